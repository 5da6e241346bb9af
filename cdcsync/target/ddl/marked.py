"""The tables, views and functions that belong to an index in the target: found by their comments, and dropped.

Every table, view and function that belongs to an index says so in its comment. So nothing has to know the generations
of an index, or what a worker left half done, to drop all of it. The caller's transaction commits.

Source: PostgreSQL, "COMMENT", "Dependency Tracking".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString

from psycopg import sql

from cdcsync.postgres.queries import fetch_rows
from cdcsync.postgres.sessions import Connection

_TABLES: LiteralString = """
    SELECT c.oid, format('%%I.%%I', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, unnest(%s::text[]) AS marker
    WHERE n.nspname = %s AND c.relkind IN ('r', 'p') AND NOT c.relispartition
        AND starts_with(obj_description(c.oid, 'pg_class'), marker)
    ORDER BY 2
"""
_VIEWS: LiteralString = """
    SELECT DISTINCT format('%%I.%%I', n.nspname, c.relname)
    FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = ANY(%s::oid[]) AND c.relkind = 'v'
        AND obj_description(c.oid, 'pg_class') ~ '^cdcsync (index|chunks of index) '
    ORDER BY 1
"""
_FUNCTIONS: LiteralString = """
    SELECT p.oid::regprocedure::text
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, unnest(%s::text[]) AS marker
    WHERE n.nspname = %s AND starts_with(obj_description(p.oid, 'pg_proc'), marker)
"""


def marker(index: str) -> str:
    """Return how the comments begin of what is an index's."""
    return f"cdcsync index {index}: "


async def tables_of(connection: Connection, schema: str, indexes: Sequence[str]) -> dict[int, str]:
    """Return the tables of indexes, of all generations: their names as SQL writes them, by oid."""
    return dict(await fetch_rows(connection, _TABLES, [[marker(name) for name in indexes], schema]))


async def views_on(connection: Connection, tables: Sequence[int]) -> list[str]:
    """Return our views on tables, also under names that the configuration gave them before, but no views of users."""
    return [name for (name,) in await fetch_rows(connection, _VIEWS, [list(tables)])]


async def drop_functions(connection: Connection, schema: str, *markers: str) -> None:
    """Drop the functions whose comments begin so; those of triggers need their tables dropped first."""
    functions = await fetch_rows(connection, _FUNCTIONS, [list(markers), schema])
    await drop_all(connection, "FUNCTION", [name for (name,) in functions])


async def drop_all(connection: Connection, kind: LiteralString, names: Sequence[str]) -> None:
    """Drop all at once, so that references among them do not matter. The names come quoted from the server."""
    if names:
        listed = sql.SQL(", ").join(sql.SQL(name) for name in names)
        await connection.execute(sql.SQL("DROP " + kind + " {}").format(listed))


async def describe_again(connection: Connection, schema: str, stem: str, before: str, after: str) -> None:
    """Have the tables of a stem, and the functions of their triggers, say that they are of an index of another name."""
    for kind, statement in (("TABLE", _COMMENTED_TABLES), ("FUNCTION", _COMMENTED_FUNCTIONS)):
        for name, comment in await fetch_rows(connection, statement, [schema, f"{stem}_", marker(before)]):
            said = marker(after) + comment.removeprefix(marker(before))
            await connection.execute(
                sql.SQL("COMMENT ON " + kind + " {} IS {}").format(sql.SQL(name), sql.Literal(said))
            )


_COMMENTED_TABLES: LiteralString = """
    SELECT format('%%I.%%I', n.nspname, c.relname), d.description
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_description d ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid AND d.objsubid = 0
    WHERE n.nspname = %s AND c.relkind IN ('r', 'p')
        AND starts_with(c.relname::text, %s) AND starts_with(d.description, %s)
"""
_COMMENTED_FUNCTIONS: LiteralString = """
    SELECT p.oid::regprocedure::text, d.description
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    JOIN pg_description d ON d.classoid = 'pg_proc'::regclass AND d.objoid = p.oid
    WHERE n.nspname = %s AND p.prorettype = 'trigger'::regtype
        AND starts_with(p.proname::text, %s) AND starts_with(d.description, %s)
"""
