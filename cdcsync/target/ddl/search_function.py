"""The text of an index's search function: `search.sql`, with what differs between indexes filled in.

Source: PostgreSQL, "PL/pgSQL" (Executing Dynamic Commands).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, LiteralString

import msgspec
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.bm25 import best_by_words, usable
from cdcsync.target.ddl.filters import FILTER_OPERATORS, OF_THE_SERVER, read_columns
from cdcsync.target.ddl.hits import attribute_of, wanted_attributes
from cdcsync.target.ddl.hits import attributes as present_attributes
from cdcsync.target.ddl.languages import headline, searched
from cdcsync.target.ddl.names import PATH, Names, function_name, hit_name, pgvector_version, vector_schema, words_name
from cdcsync.target.ddl.nearness import (
    DEPTH,
    EF_SEARCH,
    FUSION,
    ITERATIVE,
    MAX_HITS,
    distance,
    effort,
    exactly_nearest,
    measured,
    nearest,
    rescored,
    settings,
)
from cdcsync.target.ddl.views import converted

DEEPEST = 16_000
"""Looking for documents ends here, even if all that was found are chunks of fewer documents than were asked for."""

BUDGET = 2_000
"""Candidates of the keyword leg. Ranking one takes some microseconds for each word of the query."""

VISITS = 20_000
"""Once the words that the keyword leg has tried are in this many chunks, and a filter, a phrase or an exclusion left
too few of those, it tries all other words in one statement. It ranks at most this many of the chunks that such a
statement finds. So a search reads the chunks of the index a few times at most, however many words its query has: up to
this many and those of one word, whose chunks may be read twice, and then those of all other words together."""

SAMPLED = 2_000
"""Rows of a sample of blocks by which the keyword leg estimates how many rows a filter leaves: well below a
millisecond. The sample is the same each time, so that all pages of a query go the same way."""

MAX_WORDS = 64
"""The keyword leg goes by so many different words of a query, the rarest ones: text that somebody pasted has its rare
words among them."""

UNCOUNTED_WORDS = 8
"""So many words that are not among the counts go before others: a word that is new to the index or in a single chunk,
or a name that is in none. A text that somebody pasted can have hundreds of the latter; the rest of them take the places
that other words leave free."""

RANKED_WORDS = 16
"""The candidates are ordered by the rarest words alone before the best are scored by all: the others weigh little."""

SYNTAX_WORDS = 32
"""In a query of more words than this, quotes and dashes are punctuation: it is text that somebody pasted, and a phrase
in it need not be in what is sought. The index's configuration says what a word is, so conditions stay few and short:
PostgreSQL's limit of stack depth ends a phrase of many thousands of words."""

QUERY_CHARACTERS = 100_000
"""The keyword leg reads this much of a query: about 15,000 words."""

UNBROKEN = 2_000
"""In a longer query, what has more characters without a blank is read in parts, as no index holds it as a word."""

LOOKED_THROUGH = 255
"""The same of what has more of them and a `_`, `~` or `@`. At each of these PostgreSQL's parser looks ahead for a path,
a host or an address, and may come to the end: in 10,000 characters that takes seconds."""

K1, B, K3 = 1.2, 0.75, 8
"""BM25's usual constants. K3 is for words that the query repeats, which says what a long one is about."""

ASSUMED_CHUNKS, ASSUMED_LENGTH = 1_000, 100
"""The keyword leg's assumptions before the worker has counted words for the first time."""

HEADLINE_CHARACTERS = 20_000
"""Headlines are made of this much of a chunk."""

HEADLINE = "MaxFragments=2, MaxWords=25, MinWords=10"
"""Options of ts_headline, unless the caller gives others."""

NO_GENERATION = "VG001"
"""The SQLSTATE of a search for a generation that the index does not have: its query was embedded for vectors that are
gone. PostgreSQL leaves classes that begin with I to Z to others."""

NOT_WHOLE = "VG002"
"""The SQLSTATE of the INFO that a search of an index gives which is paused, in no configuration any more, or being
built."""

BY_WORDS_ALONE = "VG003"
"""The SQLSTATE of the INFO that a hybrid search gives whose vector has no direction."""

UNDIRECTED = "the query's vector is all zeros, or so short that by cosine no vector is near to it"

HEAD, BLOCK = resources.files(__package__).joinpath("search.sql").read_text(encoding="utf-8").split("-- the block\n")
"""The function's declaration, and its body: a block of PL/pgSQL that searches one index's chunks."""

EITHER: LiteralString = """BEGIN
-- Chunks of two generations: a search that names one of these is of the chunks that stand beside.
IF generation = ANY ({generations}) THEN
{beside};
RETURN;
END IF;
{own};
END
"""


class Variant(msgspec.Struct, frozen=True):
    """A function for one session, in `pg_temp`: the installed one with something more.

    :ivar where: the caller's own SQL condition on key and carried columns.
    :ivar path: the search_path that names in `where` are looked up in.
    :ivar explain: whether the plans of both legs are raised as INFO messages.
    """

    where: str | None = None
    path: str = PATH
    explain: bool = False


async def compose(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    variant: Variant | None = None,
) -> sql.Composed:
    """Return the statement that creates an index's search function, whose hits are of the type that is there.

    :param variant: for a function in `pg_temp`, what it has more than the installed one.
    """
    attributes = await present_attributes(connection, schema, spec)
    parts = await _parts(connection, schema, spec, attributes, variant)
    body = sql.SQL(BLOCK).format(**parts)
    if spec.beside is not None and variant is None:
        of_beside = await _parts(connection, schema, spec.beside, attributes, None)
        body = sql.SQL(EITHER).format(
            generations=sql.Literal([one.generation for one in spec.beside.generations]),
            beside=sql.SQL(BLOCK).format(**of_beside),
            own=body,
        )
    tag = _tag(body.as_string(connection))
    return sql.SQL(HEAD).format(tag=tag, **parts) + body + tag + sql.SQL("\n")


def _tag(body: str) -> sql.SQL:
    """Return a dollar quote that does not end within a body: a name or a condition may hold what looks like one."""
    tag: LiteralString = "$cdcsync_search$"
    while tag in body:
        tag = "$_" + tag[1:]
    return sql.SQL(tag)


async def _parts(
    connection: Connection, schema: str, spec: IndexSpec, attributes: Mapping[str, str], variant: Variant | None
) -> dict[str, sql.Composable]:
    """Return what replaces the names in braces in `search.sql`."""
    extension = await vector_schema(connection)
    # A role that is not a superuser may set parameters of pgvector only after its library is loaded.
    await connection.execute(sql.SQL("SELECT '[0]'::{}.vector").format(sql.Identifier(extension)))
    names = Names(schema, spec.relations)
    columns = await read_columns(connection, spec)
    own = variant or Variant()
    iterative = await pgvector_version(connection) >= ITERATIVE
    words = words_name(schema, spec.relations)
    by_language = searched(spec.config, names.chunks, words, SAMPLED)
    parts: dict[str, sql.Composable] = {
        "create": sql.SQL("CREATE OR REPLACE"),
        "function": function_name(schema, spec.searched_as) if variant is None else sql.Identifier("pg_temp", "search"),
        "hit": hit_name(schema, spec.searched_as),
        "extension": sql.Identifier(extension),
        "volatility": sql.SQL("VOLATILE" if own.explain else "STABLE"),
        "settings": sql.SQL(" ").join(
            sql.SQL("SET {} = {}").format(sql.SQL(name), value) for name, value in _settings(iterative).items()
        ),
        "index_comment": sql.SQL(spec.searched_as),
        "chunks": names.chunks,
        "words": words,
        "key": sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.key),
        "columns": _literal(msgspec.json.encode(columns).decode()),
        "searchable": sql.SQL("true" if spec.config.search is not None else "false"),
        "live_generation": sql.Literal(spec.generation),
        "generations": sql.SQL("\n").join(
            _generation(connection, schema, extension, one, by_language.of_chunk, attributes)
            for one in spec.generations
        ),
        "no_generation": sql.SQL(NO_GENERATION),
        "not_whole": sql.SQL(NOT_WHOLE),
        "of_the_server": sql.SQL("{" + ",".join(OF_THE_SERVER) + "}"),
        "by_words_alone": sql.SQL(BY_WORDS_ALONE),
        "undirected": sql.Literal(UNDIRECTED),
        "standing": sql.Identifier(schema, "standing"),
        "standing_signature": sql.Literal(f"{sql.Identifier(schema, 'standing').as_string(connection)}(text, int)"),
        "index_name": sql.Literal(spec.name),
        "first_depth": sql.SQL(DEPTH),
        "usual_ef": sql.SQL(effort(iterative=iterative)),
        "of_chunks": _text(sql.SQL(" JOIN {} AS c USING (chunk_id) WHERE ").format(names.chunks), connection),
        "embed_hint": sql.Literal(f"Embed the query with {spec.model}: generation {spec.generation} is of it."),
        "headline_options": sql.Literal(HEADLINE),
        "operators": sql.SQL("{" + ",".join(FILTER_OPERATORS) + "}"),
        # On a line of its own, so that nothing of ours can become part of it.
        "condition": sql.Literal("true" if own.where is None else f"(\n{own.where}\n)"),
        "filtered": sql.SQL("false" if own.where is None else "true"),
        "choose_configurations": by_language.choose,
        "configurations": by_language.configurations,
        "lexemes": by_language.lexemes,
        "phrases": by_language.phrases,
        "sample": _text(
            sql.SQL("SELECT pg_catalog.count(*) FROM {} AS c TABLESAMPLE SYSTEM (%s) REPEATABLE (1) WHERE %s").format(
                names.chunks
            ),
            connection,
        ),
        "words_leg": _text(
            sql.SQL(
                "SELECT coalesce(pg_catalog.array_agg(m.chunk_id), '{{}}'),"
                " coalesce(pg_catalog.array_agg(m.rank), '{{}}')"
                " FROM (SELECT c.chunk_id, %s AS rank FROM {} AS c"
                " WHERE c.search OPERATOR(pg_catalog.@@) $1 AND %s LIMIT $2) AS m"
            ).format(names.chunks),
            connection,
        ),
        "bm25_usable": usable(schema, spec),
        "bm25_leg": _text(best_by_words(schema, spec), connection),
        "explain_bm25": _explaining(own, "keyword leg", "bare, depth"),
        "enter_condition": _path_change(own, own.path),
        "leave_condition": _path_change(own, PATH),
        "explain_vector": _explaining(own, "vector leg", "embedding, depth"),
        "explain_words": _explaining(own, "keyword leg", "one, room"),
    }
    numbers = {
        "fusion": FUSION,
        "max_hits": MAX_HITS,
        "deepest": DEEPEST,
        "budget": BUDGET,
        "visits": VISITS,
        "sampled": SAMPLED,
        "max_words": MAX_WORDS,
        "uncounted_words": UNCOUNTED_WORDS,
        "ranked_words": RANKED_WORDS,
        "syntax_words": SYNTAX_WORDS,
        "query_characters": QUERY_CHARACTERS,
        "unbroken": UNBROKEN,
        "looked_through": LOOKED_THROUGH,
        "k1": K1,
        "b": B,
        "k3": K3,
        "assumed_chunks": ASSUMED_CHUNKS,
        "assumed_length": ASSUMED_LENGTH,
    }
    return parts | {name: sql.SQL(str(number)) for name, number in numbers.items()}


def _generation(
    connection: Connection,
    schema: str,
    extension: str,
    spec: IndexSpec,
    configuration: sql.Composable,
    attributes: Mapping[str, str],
) -> sql.Composed:
    """Return the branch of the function's body that chooses the vectors of one generation."""
    names = Names(schema, spec.relations)
    vectors, schema_of_vectors = names.vectors(spec.generation), sql.Identifier(extension)
    asked: dict[str, Any] = {"vector": sql.SQL("$1"), "limit": sql.SQL("$2"), "rows": sql.SQL("<rows>")}
    legs = {
        "nearest_leg": nearest(schema, schema_of_vectors, spec, **asked),
        "exact_leg": exactly_nearest(schema, schema_of_vectors, spec, **asked),
    }
    text_of_chunk = sql.SQL("pg_catalog.left(c.content, " + str(HEADLINE_CHARACTERS) + ")")
    result = sql.SQL(
        "SELECT {} FROM unnest($1, $2, $3, $4, $5) WITH ORDINALITY"
        " AS h(chunk_id, score, vector_rank, text_rank, text_score, place)"
        " JOIN {} AS c ON c.chunk_id = h.chunk_id LEFT JOIN LATERAL (SELECT * FROM {} AS v"
        " WHERE v.chunk_id = c.chunk_id ORDER BY v.content_hash <> c.content_hash LIMIT 1) AS v ON true"
        " ORDER BY h.place"
    ).format(
        _results(
            connection, spec, configuration, distance(schema_of_vectors, spec, sql.SQL("$6")), text_of_chunk, attributes
        ),
        names.chunks,
        vectors,
    )
    chosen: dict[LiteralString, sql.Composable] = {
        "dimensions": sql.Literal(spec.dimensions),
        "model": sql.Literal(spec.model),
        **{
            name: _text(
                sql.SQL(
                    # An iterative scan comes upon some near vectors late. The sum has them sorted all the same: the
                    # planner takes the distance itself for sorted, as it is the order of the index.
                    "SELECT pg_catalog.array_agg(n.chunk_id ORDER BY"
                    " n.distance OPERATOR(pg_catalog.+) 0::pg_catalog.float8, n.chunk_id) FROM ({}) AS n"
                    # By cosine a vector of zeros has no distance from anything. It is in no HNSW index either.
                    " WHERE n.distance OPERATOR(pg_catalog.<>) 'NaN'::pg_catalog.float8"
                ).format(leg),
                connection,
            )
            for name, leg in legs.items()
        },
        "rescored": sql.SQL(str(rescored(spec))),
        "directed": sql.SQL("{0} <> 'NaN'::float8").format(
            measured(schema_of_vectors, spec, sql.SQL("embedding"), sql.SQL("embedding"))
        )
        if spec.distance == "cosine"
        else sql.SQL("true"),
        "result": _text(result, connection),
    }
    assignments = sql.SQL(" ").join(sql.SQL(name + " := {};").format(value) for name, value in chosen.items())
    return sql.SQL("WHEN {} THEN {}").format(sql.Literal(spec.generation), assignments)


def _results(
    connection: Connection,
    spec: IndexSpec,
    configuration: sql.Composable,
    distance: sql.Composable,
    text: sql.Composable,
    attributes: Mapping[str, str],
) -> sql.Composable:
    """Return the expressions of a hit's attributes.

    One that the index no longer has is NULL, as is a value that an attribute's type of an earlier time cannot have.
    A column of the attribute's type is taken as it is: whoever names a type needs USAGE on its schema.
    """
    columns: dict[str, sql.Composable] = {
        attribute_of(column): sql.Identifier("c", column) for column in spec.shape.key + spec.shape.carried
    }
    results = columns | {
        "chunk_no": sql.SQL("c.chunk_no"),
        "content": sql.SQL("c.content"),
        "score": sql.SQL("h.score"),
        "distance": sql.SQL("nullif({}, 'NaN'::float8)").format(distance),
        "vector_rank": sql.SQL("h.vector_rank"),
        "text_rank": sql.SQL("h.text_rank"),
        "text_score": sql.SQL("h.text_score"),
        "headline": sql.SQL("CASE WHEN $8 IS NOT NULL THEN {} END").format(
            headline(spec.config, configuration, text, sql.SQL("coalesce($7, ''::pg_catalog.tsquery)"), sql.SQL("$8"))
        ),
        "stale": sql.SQL("v.content_hash IS DISTINCT FROM c.content_hash"),
    }
    wanted = wanted_attributes(spec)
    return sql.SQL(", ").join(
        converted(connection, results[name], type_)
        if name in wanted and wanted[name] != type_
        else columns.get(name) or sql.SQL("({})::{}").format(results.get(name, sql.SQL("NULL")), sql.SQL(type_))
        for name, type_ in attributes.items()
    )


def _settings(iterative: bool) -> dict[str, sql.Composable]:
    """Return what holds while the function runs, as SQL."""
    ours = {
        "standard_conforming_strings": "on",
        # The server's NOTICE that a query consists of stop words helps nobody.
        "client_min_messages": "warning",
        # The body sets it again; named here, it is the caller's own again afterwards.
        "hnsw.ef_search": str(EF_SEARCH),
    } | settings(iterative=iterative)
    return {"search_path": sql.SQL(PATH)} | {name: sql.Literal(value) for name, value in ours.items()}


def _path_change(variant: Variant, path: str) -> sql.Composable:
    """Return the statement that sets the path for a condition of the caller's own; nothing where there is none."""
    if variant.where is None:
        return sql.SQL("")
    return sql.SQL("PERFORM pg_catalog.set_config('search_path', {}, true);").format(sql.Literal(path))


def _explaining(variant: Variant, leg: str, arguments: LiteralString) -> sql.Composable:
    if not variant.explain:
        return sql.SQL("")
    return sql.SQL(
        "FOR line IN EXECUTE 'EXPLAIN (ANALYZE, COSTS OFF) ' || statement USING "
        + arguments
        + " LOOP RAISE INFO USING MESSAGE = line, HINT = {}; END LOOP;"
    ).format(sql.Literal(leg))


def _text(statement: sql.Composed, connection: Connection) -> sql.Composable:
    """Return a statement as a literal: the function executes it."""
    return _literal(statement.as_string(connection))


def _literal(text: str) -> sql.Literal:
    return sql.Literal(text)
