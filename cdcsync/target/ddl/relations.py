"""The tables, the view and the function in the target: what they are, and how they come to be.

Everything is created idempotently and describes itself with COMMENT ON. Chunks and vectors are apart, so that a
change of metadata never touches the HNSW index, a chunk can be applied before its vector exists, and a new model is
a new vectors table.

Source: PostgreSQL, "Data Definition"; pgvector's README (operator classes, HNSW).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import LiteralString

import psycopg
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import LOCKED_OUT
from cdcsync.postgres.queries import fetch_row, fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.chunks_view import (
    chunks_marker,
    chunks_view_columns,
    chunks_view_name,
    put_chunks_view,
    release_chunks_view,
)
from cdcsync.target.ddl.grants import read_alike, settings_kept
from cdcsync.target.ddl.hits import wanted_attributes
from cdcsync.target.ddl.languages import search_expression
from cdcsync.target.ddl.names import MAX_ATTEMPTS as MAX_ATTEMPTS
from cdcsync.target.ddl.names import OPCLASSES as OPCLASSES
from cdcsync.target.ddl.names import OPERATORS as OPERATORS
from cdcsync.target.ddl.names import Names as Names
from cdcsync.target.ddl.names import b_tree_name, words_name
from cdcsync.target.ddl.names import vector_schema as vector_schema
from cdcsync.target.ddl.policies import release_policy
from cdcsync.target.ddl.searching import create_words, put_search
from cdcsync.target.ddl.standing import continue_numbers, create_index, describe_column, describe_table
from cdcsync.target.ddl.tiers import create_vectors as create_vectors
from cdcsync.target.ddl.views import Column, follow_name, put_view, release_columns, schemas_read

POSITION = "No later than the commit on the source that brought this text to its document; 0/0 where that is unknown."
"""What `commit_lsn` is. `wait_for` compares it: a text that waits for its vector may have been committed there."""

OWN: dict[str, LiteralString] = {
    "chunk_no": "int NOT NULL",
    "chunk_total": "int",
    "content": "text NOT NULL",
    "content_hash": "bytea NOT NULL",
    "document_hash": "bytea NOT NULL",
    "commit_lsn": "pg_lsn NOT NULL",
    "applied_at": "timestamptz NOT NULL DEFAULT now()",
}
"""The columns of the chunks table after key and carried columns."""

RESERVED = frozenset(("chunk_id", *OWN, "search", "embedding", "stale"))
"""Our own columns of the chunks table and the view: a key or carried column cannot have these names."""

FILLFACTOR = 85
"""Leaves room on each page for HOT updates of carried columns."""

SEARCHED_CHARACTERS = 100_000
"""Keyword search reads this much of a chunk: a tsvector holds at most a megabyte, and a longer text would be refused
with all that is in its batch. No text of this many characters gets there."""


def relation_columns(spec: IndexSpec) -> dict[str, Collection[str]]:
    """Return the columns of those relations of an index that have its key and carried columns, by what they are."""
    searched = [] if spec.config.search is None else ["search"]
    columns: dict[str, Collection[str]] = {
        "the chunks table": ["chunk_id", *spec.shape.key, *spec.shape.carried, *OWN, *searched]
    }
    if not spec.hidden:
        columns |= {"the view": _view_columns(spec), "a hit of the search function": wanted_attributes(spec)}
    return columns


def entry_columns(spec: IndexSpec) -> tuple[str, ...]:
    """Return the columns of the unique index of the chunks table."""
    return (*spec.shape.key, "chunk_no")


async def create_index_relations(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create or extend one index's tables and its view. The caller's transaction commits.

    Where all is there and as it should be, no lock is taken that a search could be in the way of. What is made again
    has the grants and options of what was there before.

    :raises SetupError: a relation of the view's name exists and is not ours, or an existing index differs in its key.
    """
    if spec.hidden:
        await _create(connection, schema, spec)
        return
    chunks, view = Names(schema, spec.relations).chunks, spec.config.view_name
    await follow_name(connection, chunks, _view_marker(spec), view)
    await _refuse_another(connection, schema, spec)
    await follow_name(connection, chunks, chunks_marker(spec), chunks_view_name(view))
    # Settings are kept by name: a view that is made again has its new one already.
    async with settings_kept(connection, schema, spec.name):
        searched = [*Names(schema, spec.relations).all_vectors(spec.generation), words_name(schema, spec.relations)]
        absent = await _absent(connection, searched)
        await _create(connection, schema, spec)
        not_made = await _absent(connection, absent)
        for table in absent:
            if table not in not_made:
                await read_alike(connection, table, chunks=chunks, index=spec.name)


async def _absent(connection: Connection, tables: Sequence[sql.Identifier]) -> list[sql.Identifier]:
    """Return those of these tables that are not there."""
    rows = await fetch_rows(
        connection,
        "SELECT to_regclass(name) IS NULL FROM unnest(%s::text[]) WITH ORDINALITY AS one (name, n) ORDER BY n",
        [[table.as_string(connection) for table in tables]],
    )
    return [table for table, (absent,) in zip(tables, rows, strict=True) if absent]


async def _create(connection: Connection, schema: str, spec: IndexSpec) -> None:
    names = Names(schema, spec.relations)
    present = await _columns_present(connection, schema, spec)
    key = _definitions(spec.shape.key, spec.key_types, " NOT NULL")
    carried = _definitions(spec.shape.carried, spec.carried_types, "")
    own = [sql.SQL(f"{name} {definition}") for name, definition in OWN.items()]
    identifiers = {
        "chunks": names.chunks,
        "backlog": names.backlog,
        "entry": sql.SQL(", ").join(map(sql.Identifier, entry_columns(spec))),
        "columns": sql.SQL(", ").join(key + carried + own),
    }
    await connection.execute(
        sql.SQL(
            """
            CREATE TABLE IF NOT EXISTS {chunks} (
                chunk_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                {columns},
                UNIQUE ({entry})
            ) WITH (fillfactor = """
            + str(FILLFACTOR)
            + ")"
        ).format(**identifiers)
    )
    if present:
        await continue_numbers(connection, names.chunks, "chunk_id")
    types = dict(zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True))
    lacks = {
        *spec.shape.carried,
        "chunk_total",
        *(["search"] if spec.config.search is not None else []),
    } - present.keys()
    if present and not spec.hidden and (lacks or any(present.get(one, type_) != type_ for one, type_ in types.items())):
        await _lock_views(connection, spec)
    if present:
        for column, definition in zip(spec.shape.carried, carried, strict=True):
            if column not in present:
                await connection.execute(sql.SQL("ALTER TABLE {} ADD COLUMN {}").format(names.chunks, definition))
        await _follow_types(connection, schema, spec, present)
        if "chunk_total" not in present:
            await connection.execute(sql.SQL("ALTER TABLE {} ADD COLUMN chunk_total int").format(names.chunks))
    if "search" not in present:
        await _create_search(connection, spec, names)
        if present and spec.config.search is not None:
            # A new index gets it once its table is read: many times cheaper than to have it grow.
            await connection.execute(
                sql.SQL("CREATE INDEX {} ON {} USING gin (search)").format(
                    sql.Identifier(names.search_name), names.chunks
                )
            )
    for column in spec.config.indexed:
        definition = sql.SQL("{} ({})").format(names.chunks, sql.Identifier(column))
        await create_index(connection, schema, b_tree_name(spec.relations, column), definition)
    await create_vectors(connection, schema, spec)
    await connection.execute(
        sql.SQL(
            """
            CREATE TABLE IF NOT EXISTS {backlog} (
                generation int NOT NULL,
                chunk_id bigint NOT NULL,
                content_hash bytea NOT NULL,
                lane smallint NOT NULL,
                attempts int NOT NULL DEFAULT 0,
                next_attempt_at timestamptz NOT NULL DEFAULT now(),
                error text,
                PRIMARY KEY (chunk_id, generation)
            )
            """
        ).format(**identifiers)
    )
    for suffix, columns in (
        ("hash", "(generation, content_hash)"),
        ("failed", f"(generation) WHERE attempts >= {MAX_ATTEMPTS}"),
    ):
        definition = sql.SQL("{} " + columns).format(names.backlog)
        await create_index(connection, schema, f"{spec.relations}_backlog_{suffix}", definition)
    await _index_waiting(connection, schema, spec, names)
    if await describe_column(connection, names.chunks, "commit_lsn", POSITION) and present:
        # Earlier versions moved the position of a text that waits with each change of its row.
        await connection.execute(
            sql.SQL(
                "UPDATE {chunks} SET commit_lsn = '0/0' WHERE commit_lsn > '0/0'"
                " AND chunk_id IN (SELECT chunk_id FROM {backlog} WHERE generation = {generation})"
            ).format(**identifiers, generation=spec.generation)
        )
    for relation, comment in (
        (names.chunks, f"cdcsync index {spec.name}: the chunks of {spec.shape.table}, by key and number"),
        (names.backlog, f"cdcsync index {spec.name}: chunks without a current vector; lane 0 live, 1 backfill"),
    ):
        await describe_table(connection, relation, comment)
    if spec.config.search is not None:
        await create_words(connection, schema, spec)
    if spec.hidden:
        return
    await _put_view(connection, schema, spec)
    await put_chunks_view(connection, schema, spec)
    await put_search(connection, schema, spec)


async def _index_waiting(connection: Connection, schema: str, spec: IndexSpec, names: Names) -> None:
    """Index the texts that wait by lane, without those that failed finally.

    The index of earlier versions has all of them. It is good enough until nobody is in the way of its successor.
    """
    definition = sql.SQL(f"{{}} (generation, lane, chunk_id) WHERE attempts < {MAX_ATTEMPTS}").format(names.backlog)
    name, earlier = f"{spec.relations}_backlog_due", sql.Identifier(schema, f"{spec.relations}_backlog_lane")
    if await fetch_value(connection, "SELECT to_regclass(%s) IS NULL", [earlier.as_string(connection)]):
        await create_index(connection, schema, name, definition)
        return
    with suppress(*LOCKED_OUT):
        async with connection.transaction():
            await create_index(connection, schema, name, definition)
        async with connection.transaction():
            await connection.execute(sql.SQL("DROP INDEX {}").format(earlier))


async def _lock_views(connection: Connection, spec: IndexSpec) -> None:
    """Lock the views before the chunks that they read, which is the order in which searches lock them.

    A search that has locked the view would wait for us to let go of the chunks, while we wait for its view; and one of
    them there always is. With a view, PostgreSQL locks what it reads.
    """
    view = spec.config.view_name
    for one in (view, chunks_view_name(view)):
        present = await fetch_value(
            connection,
            "SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'v')",
            [one.schema, one.name],
        )
        if present:
            name = sql.Identifier(one.schema, one.name)
            await connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(name))


async def _columns_present(connection: Connection, schema: str, spec: IndexSpec) -> dict[str, str]:
    """Return the columns of the chunks table and their types; none when it is not there yet.

    :raises SetupError: it is there, for another key.
    """
    cursor = await connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), EXISTS (SELECT FROM pg_constraint k"
        " WHERE k.conrelid = c.oid AND k.contype = 'u' AND a.attnum = ANY(k.conkey) AND a.attname <> 'chunk_no')"
        " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped",
        [schema, f"{spec.relations}_chunks"],
    )
    found = await cursor.fetchall()
    key = {column for column, _, is_key in found if is_key}
    if found and key != set(spec.shape.key):
        raise SetupError(
            f"the index exists with the key ({', '.join(sorted(key))}), and the table has the key"
            f" ({', '.join(spec.shape.key)})",
            where=f"index {spec.name}",
            hint="give the index another name in the configuration, which builds a new index, and drop the old one",
        )
    return {column: type_ for column, type_, _ in found}


async def _follow_types(connection: Connection, schema: str, spec: IndexSpec, present: Mapping[str, str]) -> None:
    """Give key and carried columns the types of the spec, where they have others.

    Values that cannot become ones of the new type are dropped, since the table is read again after it: of a carried
    column the column, of a key every chunk. The vectors stay for the texts that come again.
    """
    names = Names(schema, spec.relations)
    wanted = dict(zip(spec.shape.carried, spec.carried_types, strict=True))
    wanted |= dict(zip(spec.shape.key, spec.key_types, strict=True))
    changed = {column: type_ for column, type_ in wanted.items() if present.get(column, type_) != type_}
    if not changed:
        return
    from_ = _view_from(names, spec)
    if not spec.hidden:
        view = spec.config.view_name
        await release_columns(connection, view, changed, _view_columns(spec), from_, chunks=names.chunks)
        await release_chunks_view(connection, schema, spec, changed)
    # A policy that reads a column keeps its type; `put_policy` makes it again.
    await release_policy(connection, schema, spec)
    for column, type_ in changed.items():
        name = sql.Identifier(column)
        try:
            async with connection.transaction():
                await connection.execute(
                    sql.SQL("ALTER TABLE {} ALTER COLUMN {} TYPE {type} USING {}::text::{type}").format(
                        names.chunks, name, name, type=sql.SQL(type_)
                    )
                )
        except (psycopg.DataError, psycopg.IntegrityError):
            if column in spec.shape.key:
                await connection.execute(sql.SQL("TRUNCATE {}, {}").format(names.chunks, names.backlog))
                await connection.execute(
                    sql.SQL("ALTER TABLE {} ALTER COLUMN {} TYPE {} USING NULL").format(
                        names.chunks, name, sql.SQL(type_)
                    )
                )
                continue
            await connection.execute(sql.SQL("ALTER TABLE {} DROP COLUMN {}").format(names.chunks, name))
            await connection.execute(
                sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(names.chunks, name, sql.SQL(type_))
            )


async def _create_search(connection: Connection, spec: IndexSpec, names: Names) -> None:
    if spec.config.search is None:
        return
    text = sql.SQL("left(content, " + str(SEARCHED_CHARACTERS) + ")")
    await connection.execute(
        sql.SQL("ALTER TABLE {} ADD COLUMN IF NOT EXISTS search tsvector GENERATED ALWAYS AS ({}) STORED").format(
            names.chunks, search_expression(spec.config, text)
        )
    )


async def create_view(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create or replace the view that users query, on the spec's generation. The caller's transaction commits.

    :raises SetupError: a relation that is not ours has the view's name.
    """
    async with settings_kept(connection, schema, spec.name):
        await _refuse_another(connection, schema, spec)
        await _put_view(connection, schema, spec)


async def _refuse_another(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Refuse to continue if anything but this index's own view has the view's name.

    :raises SetupError: one has.
    """
    view = spec.config.view_name
    existing = await fetch_row(
        connection,
        "SELECT c.relkind = 'v' AND starts_with(coalesce(obj_description(c.oid, 'pg_class'), ''), %s) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [_view_marker(spec), view.schema, view.name],
    )
    if existing is not None and not (existing[0] and schema in await schemas_read(connection, view)):
        raise SetupError(
            "a relation of this name exists and is not the view of this index",
            where=str(view),
            hint=f"choose another name with [indexes.{spec.name}] view = …",
        )


def _view_marker(spec: IndexSpec) -> str:
    """Return how the comment of an index's own view begins."""
    return f"cdcsync index {spec.name}: "


def _view_columns(spec: IndexSpec) -> dict[str, Column]:
    return chunks_view_columns(spec) | {
        "embedding": Column(sql.SQL("v.embedding"), stored=False),
        "stale": Column(sql.SQL("v.content_hash <> c.content_hash AS stale"), stored=False),
    }


def _view_from(names: Names, spec: IndexSpec) -> sql.Composable:
    return sql.SQL("{} AS c JOIN {} AS v USING (chunk_id)").format(names.chunks, names.vectors(spec.generation))


async def _put_view(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create the view, or give it the columns of the spec."""
    names, view = Names(schema, spec.relations), spec.config.view_name
    from_, vectors = _view_from(names, spec), names.vectors(spec.generation)
    await put_view(connection, view, _view_columns(spec), from_, chunks=names.chunks, vectors=vectors)
    comment = f"{_view_marker(spec)}{spec.shape.table} with its vectors; stale says that the vector is of an older text"
    identifier = sql.Identifier(view.schema, view.name)
    await connection.execute(sql.SQL("COMMENT ON VIEW {} IS {}").format(identifier, sql.Literal(comment)))


def _definitions(names: Sequence[str], types: Sequence[str], constraint: str) -> list[sql.Composable]:
    return [
        sql.SQL("{} {}" + constraint).format(sql.Identifier(name), sql.SQL(type_))
        for name, type_ in zip(names, types, strict=True)
    ]
