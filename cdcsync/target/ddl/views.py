"""The views of an index: how they are made, what becomes of them when a column changes, and when they are renamed.

A view that other objects are built on cannot be dropped under them, nor can a column of it get another type. It keeps
what it has, so that its index is followed all the same:

    a column that is new            is appended
    a column that is gone           is NULL
    a column that has another type  keeps its own, and a value that this type cannot have is NULL

Once nothing is built on it, it becomes as a new one would be.

Source: PostgreSQL, "CREATE VIEW", "ALTER VIEW"; "System Catalogs" (pg_depend, pg_rewrite); "Data Validity Checking
Functions" (pg_input_is_valid).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.logs import get_logger
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection

log = get_logger()

CHECKED_INPUT = 160000
"""The first version that can say whether a text is a value of a type."""


class Column(msgspec.Struct, frozen=True):
    """A column that a view is to have.

    :ivar type: as SQL writes it; None if the view cannot be kept when it changes.
    :ivar stored: whether it is a column of the chunks table.
    """

    expression: sql.Composable
    type: str | None = None
    stored: bool = True


class View(msgspec.Struct, frozen=True):
    """An index's view as it is.

    :ivar columns: its columns in their order, with their types as SQL writes them.
    :ivar stored: those of the chunks table's columns that it reads.
    :ivar reads_its_own: whether it reads the chunks and vectors that it should.
    :ivar built_on: the objects that depend on it, or on the type of its rows, as a function that returns them does.
    """

    columns: dict[str, str]
    stored: frozenset[str]
    reads_its_own: bool
    built_on: tuple[str, ...]

    def shows(self, wanted: Mapping[str, Column]) -> bool:
        """Say whether it shows these columns, as far as what is built on it allows."""
        if not self.reads_its_own:
            return False
        stored = {name for name, column in wanted.items() if column.stored}
        if not self.built_on:
            return list(self.columns) == list(wanted) and not self.unlike(wanted)
        left_out = self.columns.keys() - wanted.keys()
        return self.columns.keys() >= wanted.keys() and self.stored >= stored and not left_out & self.stored

    def unlike(self, wanted: Mapping[str, Column]) -> list[str]:
        """Return those of its columns that have another type than they should."""
        return [
            name for name, type_ in self.columns.items() if name in wanted and wanted[name].type not in (None, type_)
        ]


async def read_view(
    connection: Connection, view: QualifiedName, chunks: sql.Identifier, vectors: sql.Identifier | None = None
) -> View | None:
    """Return a view; None if there is none.

    :param vectors: the table of vectors that it should read.
    """
    row = await fetch_row(
        connection,
        """
        SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               array(SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                     WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               array(SELECT DISTINCT a.attname::text FROM pg_depend d
                     JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
                     JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                     WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%(chunks)s)),
               EXISTS (
                   SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
                   WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%(chunks)s)
               ) AND (%(vectors)s::text IS NULL OR EXISTS (
                   SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
                   WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%(vectors)s))),
               array(SELECT DISTINCT coalesce(r.ev_class::regclass::text,
                                              pg_describe_object(d.classid, d.objid, d.objsubid))
                     FROM pg_depend d LEFT JOIN pg_rewrite r
                         ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
                     WHERE (d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
                            OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.oid, t.typarray))
                         AND d.deptype = 'n' AND r.ev_class IS DISTINCT FROM c.oid ORDER BY 1)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_type t ON t.oid = c.reltype
        WHERE n.nspname = %(schema)s AND c.relname = %(view)s
        """,
        {
            "chunks": chunks.as_string(connection),
            "vectors": None if vectors is None else vectors.as_string(connection),
            "schema": view.schema,
            "view": view.name,
        },
    )
    if row is None:
        return None
    names, types, stored, reads_its_own, built_on = row
    return View(dict(zip(names, types, strict=True)), frozenset(stored), reads_its_own, tuple(built_on))


async def schemas_read(connection: Connection, view: QualifiedName) -> list[str]:
    """Return the schemas of the tables that a view reads: whose index it is the view of, whatever its comment says."""
    cursor = await connection.execute(
        """
        SELECT DISTINCT n.nspname::text
        FROM pg_class v JOIN pg_namespace s ON s.oid = v.relnamespace JOIN pg_rewrite r ON r.ev_class = v.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
        JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE s.nspname = %s AND v.relname = %s ORDER BY 1
        """,
        [view.schema, view.name],
    )
    return [schema for (schema,) in await cursor.fetchall()]


async def put_view(
    connection: Connection,
    view: QualifiedName,
    wanted: Mapping[str, Column],
    from_: sql.Composable,
    *,
    chunks: sql.Identifier,
    vectors: sql.Identifier | None = None,
) -> None:
    """Create a view, or give it the columns that its index has now. The caller's transaction commits.

    :param from_: the FROM clause.
    """
    present = await read_view(connection, view, chunks, vectors)
    if present is not None and present.shows(wanted):
        return
    listed = {name: column.expression for name, column in wanted.items()}
    if present is not None and present.built_on:
        kept = {
            name: sql.SQL("{} AS {}").format(
                converted(connection, wanted[name].expression, present.columns[name]), sql.Identifier(name)
            )
            for name in present.unlike(wanted)
        }
        left_out = {name: _null(type_, name) for name, type_ in present.columns.items() if name not in wanted}
        listed = {name: (listed | kept | left_out)[name] for name in [*present.columns, *listed]}
        if kept:
            fix = f"drop what is built on it, start the worker, and create that again: {', '.join(present.built_on)}"
            log.warning("view_keeps_types", view=str(view), columns=sorted(kept), fix=fix)
    await _replace(connection, view, list(listed.values()), from_)


async def release_columns(
    connection: Connection,
    view: QualifiedName,
    columns: Collection[str],
    wanted: Mapping[str, Column],
    from_: sql.Composable,
    *,
    chunks: sql.Identifier,
) -> None:
    """Stop a view from reading these columns of the chunks table, so that their types can change.

    `put_view` has it read them again. The caller's transaction commits.
    """
    present = await read_view(connection, view, chunks)
    if present is None:
        return
    if not present.built_on:
        await connection.execute(sql.SQL("DROP VIEW {}").format(sql.Identifier(view.schema, view.name)))
        return
    listed = [
        wanted[name].expression
        if name in wanted and name not in columns and (name in present.stored or not wanted[name].stored)
        else _null(type_, name)
        for name, type_ in present.columns.items()
    ]
    await _replace(connection, view, listed, from_)


async def _replace(
    connection: Connection, view: QualifiedName, columns: Sequence[sql.Composable], from_: sql.Composable
) -> None:
    identifier = sql.Identifier(view.schema, view.name)
    statement = sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT {} FROM {}").format(
        identifier, sql.SQL(", ").join(columns), from_
    )
    try:
        async with connection.transaction():
            await connection.execute(statement)
    except psycopg.errors.InvalidTableDefinition:
        # To replace a view cannot take a column from it, or give one another type.
        await connection.execute(sql.SQL("DROP VIEW {}").format(identifier))
        await connection.execute(statement)


def _null(type_: str, name: str) -> sql.Composable:
    return sql.SQL("NULL::{} AS {}").format(sql.SQL(type_), sql.Identifier(name))


def converted(connection: Connection, value: sql.Composable, type_: str) -> sql.Composable:
    """Return SQL of a value in another type, NULL where the type cannot have it: a query must not fail at one row."""
    if type_ == "text":
        return sql.SQL("{}::pg_catalog.text").format(value)
    if connection.info.server_version < CHECKED_INPUT:
        return sql.SQL("NULL::" + type_)
    return sql.SQL(
        "CASE WHEN pg_catalog.pg_input_is_valid({0}::pg_catalog.text, {1}) THEN {0}::pg_catalog.text::{2} END"
    ).format(value, sql.Literal(type_), sql.SQL(type_))


async def follow_name(connection: Connection, chunks: sql.Identifier, marker: str, view: QualifiedName) -> None:
    """Give an index's view its new name; who may use it still may, and what is built on it stays.

    Where the new view exists already, the old one is dropped.

    :param chunks: the index's chunks table, which its views read.
    :param marker: how the comment of its views begins.
    """
    cursor = await connection.execute(
        """
        SELECT c.oid::int8, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'v' AND starts_with(obj_description(c.oid, 'pg_class'), %s) AND EXISTS (
            SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
            WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%s))
        ORDER BY c.oid
        """,
        [marker, chunks.as_string(connection)],
    )
    found = [(oid, QualifiedName(schema, name)) for oid, schema, name in await cursor.fetchall()]
    there = any(name == view for _, name in found)
    for oid, name in found:
        if name == view:
            continue
        old = sql.Identifier(name.schema, name.name)
        if there:
            await connection.execute(sql.SQL("DROP VIEW {}").format(old))
            continue
        # By a name that nobody has: the old one may be taken in the new schema, and the new one in the old.
        passing = f"cdcsync_view_{oid}"
        for statement, where, new in (
            ("ALTER VIEW {} RENAME TO {}", old, passing),
            ("ALTER VIEW {} SET SCHEMA {}", sql.Identifier(name.schema, passing), view.schema),
            ("ALTER VIEW {} RENAME TO {}", sql.Identifier(view.schema, passing), view.name),
        ):
            await connection.execute(sql.SQL(statement).format(where, sql.Identifier(new)))
        there = True
