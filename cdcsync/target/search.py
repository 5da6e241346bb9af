"""Search: the chunks nearest to a query, by vector, by keyword, or by both in one statement.

    vector leg    vectors, nearest first through HNSW, joined to their chunks  ─┐
                                                                                ├─► fused by rank ─► the best k
    keyword leg   chunks alone, so that a text is found before its vector is   ─┘

Ranks are fused and not scores: a cosine distance and a text rank have no common scale. It is one statement in a
transaction that can only read, so a hit is never half of an old state and half of a new one.

Source: pgvector's README (iterative index scans, filtering); PostgreSQL, "Controlling Text Search"; Cormack, Clarke and
Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods" (2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, LiteralString, cast

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.datetime import DateLoader, TimestampLoader, TimestamptzLoader

from cdcsync.config import Index
from cdcsync.documents.templates import make_documents
from cdcsync.errors import CdcsyncError, SetupError, UsageError
from cdcsync.model.rows import Shape
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.conditions import check_filter
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection, first_line, passing, speaking_of, translate
from cdcsync.target.ddl.relations import OPERATORS, Names, vector_schema
from cdcsync.target.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Mode = Literal["hybrid", "vector", "text"]

FUSION = 60
"""Added to each rank before its reciprocal is taken. The paper's value: results were near their best there, and changed
little around it. Smaller lets the first hit of one leg outweigh agreement of both, larger makes all ranks alike."""

MAX_HITS = 1_000
"""The most hits of one search: pgvector's upper bound of hnsw.ef_search."""

MIN_EF_SEARCH = 100
"""How many candidates HNSW looks at, where pgvector's default is 40: who searches the view can tune that, this one
should not miss a near neighbour to save a fraction of a millisecond."""


class Hit(msgspec.Struct, frozen=True):
    """A chunk that was found; the first hit is the best."""

    key: dict[str, Any]
    """The source row's key, by column."""
    carried: dict[str, Any]
    """The carried columns."""
    chunk_no: int
    """The chunk's place in its document, from 0."""
    content: str
    score: float
    """The sum of 1 / (`FUSION` + rank) over the legs that found it: higher is better, within one search."""
    distance: float | None
    """From the query's vector by the index's distance, lower is nearer; None without a query vector or a stored one."""
    text_rank: float | None
    """How well the keywords match, higher is better; None where they do not, or were not asked for."""
    stale: bool
    """Whether the stored vector is of an older text, or there is none yet."""


async def search(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    *,
    text: str,
    vector: Sequence[float] | npt.NDArray[np.float32] | None,
    k: int = 10,
    mode: Mode = "hybrid",
    where: str | None = None,
) -> list[Hit]:
    """Return the `k` best chunks for a query, the best first.

    A hybrid search uses the legs it can: without a vector the keywords alone, on an index without keyword search the
    vector alone.

    :param connection: a session on the target, in autocommit.
    :param schema: the schema of cdcsync's own tables.
    :param text: the query in words; websearch syntax ("quotes", or, -not) holds for the keyword leg.
    :param vector: `float32[dimensions]`, the query as the index's model embeds it.
    :param where: an SQL condition on key and carried columns: the caller's own SQL, with the session's privileges.
    :raises UsageError: `k`, `mode` or `where` cannot be used.
    :raises SetupError: the index is not in this database, or the vector is not of its dimension.
    :raises TargetUnavailable: the target does not answer now.
    """
    legs = _legs(spec, vector is not None, mode)
    if not 1 <= k <= MAX_HITS:
        raise UsageError(f"cannot return {k} hits", where="-k", hint=f"ask for 1 to {MAX_HITS}")
    if vector is not None and len(vector) != spec.dimensions:
        raise SetupError(
            f"the query's vector has {len(vector)} dimensions, the index has {spec.dimensions}",
            where=f"index {spec.name}",
            hint=f"embed the query with {spec.model}",
        )
    check_where(where)
    depth = k if len(legs) == 1 else min(MAX_HITS, FUSION + 2 * k)
    with speaking_of("target", where=f"index {spec.name}"):
        extension = await vector_schema(connection)
        statement = _statement(schema, extension, spec, legs, with_vector=vector is not None, where=where)
        # Placeholders of the server's kind: the percent signs in `where` and in names are then what they are.
        cursor = psycopg.AsyncRawCursor(connection)
        _keep_infinity(cursor)
        arguments: list[object] = [k, depth, text if "text" in legs else None]
        if vector is not None:
            arguments.append("[" + ",".join([repr(float(value)) for value in vector]) + "]")
        async with connection.transaction():
            await connection.execute("SET TRANSACTION READ ONLY")
            await tune(connection, max(MIN_EF_SEARCH, depth), filtered=where is not None)
            try:
                await cursor.execute(statement, arguments, prepare=False)
                rows = await cursor.fetchall()
            except psycopg.Error as error:
                raise refusal(error, spec, where) from error
    return [_hit(spec, row) for row in rows]


async def stored_spec(connection: Connection, schema: str, name: str, config: Index) -> IndexSpec:
    """Return an index as it is in the target now, whatever the configuration would make of it; needs no source.

    The types of keys are the target's; the source's are taken to be the same, as nothing here asks it.

    :raises SetupError: the target holds no such index yet.
    """
    with speaking_of("target", where=f"index {name}"):
        entry = await Registry(schema).find(connection, name)
        if entry is None:
            raise SetupError(
                "the target holds no such index",
                where=f"index {name}, schema {schema}",
                hint="`cdcsync run` creates and fills it; check target.dsn and target.schema",
            )
        cursor = await connection.execute(
            "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s) AND attnum > 0 AND NOT attisdropped",
            [schema, f"{name}_chunks"],
        )
        types = cast(dict[str, str], dict(await cursor.fetchall()))
    documents = make_documents(config, where=f"indexes.{name}")
    searchable = config.search if "search" in types else None
    return IndexSpec(
        name=name,
        config=msgspec.structs.replace(config, vector_type=entry.vector_type, columns=entry.columns, search=searchable),
        shape=Shape(name, config.table_name, entry.key, entry.columns, documents.columns),
        documents=documents,
        source_key_types=_types_of(types, entry.key),
        key_types=_types_of(types, entry.key),
        carried_types=_types_of(types, entry.columns),
        model=entry.model,
        dimensions=entry.dimensions,
        distance=cast(Distance, entry.distance),
        fingerprint=entry.fingerprint,
        generation=entry.generation,
    )


def _types_of(types: dict[str, str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(types[name] for name in names)


def _legs(spec: IndexSpec, has_vector: bool, mode: Mode) -> tuple[Mode, ...]:
    """Return which legs a search has.

    :raises UsageError: none is left.
    """
    searchable = spec.config.search is not None
    if mode == "text" and not searchable:
        raise UsageError(
            "this index has no keyword search",
            where=f"index {spec.name}",
            hint=f'search by vector, or give [indexes.{spec.name}] a search = "english" and run the worker',
        )
    if mode == "vector" and not has_vector:
        raise UsageError(
            "a search by vector needs the query's vector", where=f"index {spec.name}", hint="embed the query first"
        )
    legs: list[Mode] = []
    if mode != "text" and has_vector:
        legs.append("vector")
    if mode != "vector" and searchable:
        legs.append("text")
    if not legs:
        raise UsageError(
            "there is neither a vector nor keyword search to search by",
            where=f"index {spec.name}",
            hint="embed the query first",
        )
    return tuple(legs)


def check_where(where: str | None) -> None:
    """Refuse what is no single SQL condition.

    :raises UsageError: it is none.
    """
    if where is None:
        return
    if not where.strip():
        raise UsageError("the condition is empty", where="--where", hint="give one SQL condition, or leave it out")
    try:
        check_filter(where)
    except SetupError as error:
        raise UsageError(error.message, where=f"--where {where}", hint=error.hint) from None


# In a hybrid search each leg returns FUSION + 2k candidates. What both legs rank below that scores less than
# 2 / (2 * FUSION + 2k), which k chunks of either leg alone reach already: looking deeper cannot change the first k by
# what agreement finds.

_NEAREST: LiteralString = """
        SELECT v.chunk_id, v.embedding {operator} {vector} AS distance
        FROM {vectors} AS v JOIN {chunks} AS c USING (chunk_id)
        WHERE {condition} ORDER BY v.embedding {operator} {vector} LIMIT $2"""
"""The limit stays next to the ordering, which is what the HNSW index can serve."""

_VECTOR_LEG: LiteralString = (
    """
    nearest AS MATERIALIZED ("""
    + _NEAREST
    + """
    ),
    by_vector AS (SELECT chunk_id, row_number() OVER (ORDER BY distance, chunk_id) AS place FROM nearest)"""
)
"""Ranks come after the limit, as iterative scans may return neighbours slightly out of order."""

_TEXT_LEG: LiteralString = """
    matching AS MATERIALIZED (
        SELECT c.chunk_id, pg_catalog.ts_rank_cd(c.search, {query}) AS text_rank
        FROM {chunks} AS c
        WHERE c.search OPERATOR(pg_catalog.@@) {query} AND {condition} ORDER BY text_rank DESC, c.chunk_id LIMIT $2
    ),
    by_text AS (SELECT chunk_id, row_number() OVER (ORDER BY text_rank DESC, chunk_id) AS place FROM matching)"""

_FUSION: LiteralString = """
    fused AS (
        SELECT chunk_id, sum(1.0::float8 / ({fusion} + place)) AS score, min(place) AS best
        FROM ({places}) AS legs GROUP BY chunk_id ORDER BY score DESC, best, chunk_id LIMIT $1
    )
    SELECT {columns}, c.chunk_no, c.content, f.score, {distance}, {text_rank},
        v.content_hash IS DISTINCT FROM c.content_hash
    FROM fused AS f JOIN {chunks} AS c USING (chunk_id) LEFT JOIN {vectors} AS v USING (chunk_id) {matching}
    ORDER BY f.score DESC, f.best, c.chunk_id"""


def _statement(
    schema: str, extension: str, spec: IndexSpec, legs: Sequence[Mode], *, with_vector: bool, where: str | None
) -> sql.Composed:
    """Return the search: $1 hits, $2 candidates of each leg, $3 the words, $4 the vector when there is one."""
    by_text = "text" in legs
    parts = _vector_parts(schema, extension, spec, "$4", where)
    parts |= {
        "query": sql.SQL("pg_catalog.websearch_to_tsquery({}::pg_catalog.regconfig, $3)").format(
            sql.Literal(spec.config.search or "simple")
        ),
        "fusion": sql.Literal(FUSION),
        "places": sql.SQL(" UNION ALL ").join(
            sql.SQL("SELECT chunk_id, place FROM {}").format(sql.Identifier(f"by_{leg}")) for leg in legs
        ),
        "columns": sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.key + spec.shape.carried),
        "distance": sql.SQL("v.embedding {operator} {vector}" if with_vector else "NULL::float8").format(**parts),
        "text_rank": sql.SQL("m.text_rank" if by_text else "NULL::float4"),
        "matching": sql.SQL("LEFT JOIN matching AS m USING (chunk_id)" if by_text else ""),
    }
    bodies = [_VECTOR_LEG if leg == "vector" else _TEXT_LEG for leg in legs]
    # $3 is always there, so the server must be able to tell its type where no leg reads it.
    unread = "" if by_text else " unread AS (SELECT $3::text),"
    return sql.SQL("WITH" + unread + ",".join([*bodies, _FUSION])).format(**parts)


def nearest_statement(schema: str, extension: str, spec: IndexSpec, where: str | None) -> sql.Composed:
    """Return the search by vector alone, as ids and distances: $1 the vector, $2 how many."""
    return sql.SQL(_NEAREST).format(**_vector_parts(schema, extension, spec, "$1", where))


def _vector_parts(
    schema: str, extension: str, spec: IndexSpec, vector: LiteralString, where: str | None
) -> dict[str, sql.Composable]:
    names = Names(schema, spec.name)
    return {
        "chunks": names.chunks,
        "vectors": names.vectors(spec.generation),
        "operator": sql.SQL("OPERATOR({}." + OPERATORS[spec.distance] + ")").format(sql.Identifier(extension)),
        "vector": sql.SQL(vector + "::{}." + spec.vector_type).format(sql.Identifier(extension)),
        # On a line of its own, so that nothing of ours can become part of it.
        "condition": sql.SQL("(\n" + where + "\n)") if where else sql.SQL("true"),
    }


async def tune(connection: Connection, ef_search: int, *, filtered: bool) -> None:
    """Set for this transaction how far HNSW looks, and how the condition's names are found."""
    await connection.execute(sql.SQL("SET LOCAL hnsw.ef_search = {}").format(sql.Literal(ef_search)))
    if not filtered:
        return
    # The condition means what it means to its author: with our empty path the operators of an extension's types would
    # not be found or, worse, others would. All our own names are qualified.
    await connection.execute("SET LOCAL search_path TO DEFAULT")
    row = await fetch_row(connection, "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'vector'")
    version = tuple(int(part) for part in cast(str, row[0] if row else "0").split(".")[:2] if part.isdigit())
    if version >= (0, 8):
        # Go on scanning until enough rows pass the condition; before 0.8 a selective one simply has fewer hits.
        await connection.execute("SET LOCAL hnsw.iterative_scan = 'relaxed_order'")


def refusal(error: psycopg.Error, spec: IndexSpec, where: str | None) -> CdcsyncError:
    """Return what a failed search means: with a condition, most often that the condition is wrong."""
    reads_only = error.sqlstate == "25006"
    if where is None or error.sqlstate is None or (passing(error) and not reads_only):
        return translate(error, "target", where=f"index {spec.name}")
    columns = ", ".join([*spec.shape.key, *spec.shape.carried])
    hint = f"a condition may only read; the index has the columns {columns}"
    return UsageError(first_line(error), where=f"--where {where}", hint=error.diag.message_hint or hint)


class _Date(DateLoader):
    def load(self, data: Any) -> Any:
        return _or_text(super().load, data)


class _Timestamp(TimestampLoader):
    def load(self, data: Any) -> Any:
        return _or_text(super().load, data)


class _Timestamptz(TimestamptzLoader):
    def load(self, data: Any) -> Any:
        return _or_text(super().load, data)


def _or_text(load: Any, data: Any) -> Any:
    try:
        return load(data)
    except psycopg.DataError:
        return bytes(data).decode()


def _keep_infinity(cursor: psycopg.AsyncRawCursor[Any]) -> None:
    """Have dates that Python cannot hold (`infinity`, the year 20000) come as the server's text, instead of failing."""
    for type_, loader in (("date", _Date), ("timestamp", _Timestamp), ("timestamptz", _Timestamptz)):
        cursor.adapters.register_loader(type_, loader)


def _hit(spec: IndexSpec, row: Sequence[Any]) -> Hit:
    key, carried = spec.shape.key, spec.shape.carried
    own = row[len(key) + len(carried) :]
    return Hit(
        dict(zip(key, row[: len(key)], strict=True)),
        dict(zip(carried, row[len(key) : len(key) + len(carried)], strict=True)),
        *own,
    )
