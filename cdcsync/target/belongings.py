"""A pipeline's belongings in the target: which relations and functions are whose, by their comments, and how they go.

The caller's transaction commits: all of it is dropped, or nothing.

Source: PostgreSQL, "Dependency Tracking", "Comment Information Functions".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import LiteralString

import msgspec
import psycopg
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.postgres.queries import fetch_row, fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.marked import drop_all, drop_functions, marker, tables_of, views_on
from cdcsync.target.embedders import forget_embedders
from cdcsync.target.registry import Registry
from cdcsync.target.search import drop_search

OURS = "cdcsync: "
"""How the comments of what all pipelines of a schema share begin."""


class Relations(msgspec.Struct, frozen=True):
    """Relations as SQL writes their names."""

    views: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


class Belongings(msgspec.Struct, frozen=True):
    """A pipeline's possessions in the target: its indexes by name, and their relations."""

    indexes: tuple[str, ...] = ()
    relations: Relations = Relations()
    source_tables: tuple[str, ...] = ()
    set_up: bool = False
    """Whether the pipeline's row is there."""


async def belongings_of(target: Connection, schema: str, slot: str) -> Belongings:
    """Return what a pipeline has in the target."""
    if not await _has_pipelines(target, schema):
        return Belongings()
    entries = [entry for entry in (await Registry(schema).all(target)).values() if entry.slot == slot]
    indexes = tuple(entry.name for entry in entries)
    row = await fetch_row(target, sql.SQL("SELECT FROM {} WHERE slot = %s").format(_pipelines(schema)), [slot])
    return Belongings(
        indexes=indexes,
        relations=await relations_of(target, schema, indexes),
        source_tables=tuple(table for entry in entries for table in entry.tables),
        set_up=row is not None,
    )


async def pipelines_sharing(target: Connection, schema: str, slot: str, publication: str) -> list[str]:
    """Return the other pipelines of the schema that use the same publication."""
    if not await _has_pipelines(target, schema):
        return []
    statement = sql.SQL("SELECT slot FROM {} WHERE publication = %s AND slot <> %s ORDER BY slot").format(
        _pipelines(schema)
    )
    return [slot for (slot,) in await fetch_rows(target, statement, [publication, slot])]


async def relations_of(target: Connection, schema: str, indexes: Sequence[str]) -> Relations:
    """Return the tables of indexes, of all generations, and our views on them."""
    tables = await tables_of(target, schema, indexes)
    return Relations(tuple(await views_on(target, list(tables))), tuple(tables.values()))


@contextlib.contextmanager
def own_dependents() -> Iterator[None]:
    """Say what else has to go first, when something that is not ours depends on what is dropped.

    :raises SetupError: something does.
    """
    try:
        yield
    except SetupError as error:
        if not isinstance(error.__cause__, psycopg.errors.DependentObjectsStillExist):
            raise
        detail = " ".join((error.__cause__.diag.message_detail or error.message).split())
        raise SetupError(
            "something that is not cdcsync's depends on the index", where="target", hint=f"drop that first: {detail}"
        ) from error


async def drop_relations(target: Connection, schema: str, indexes: Sequence[str], relations: Relations) -> None:
    """Drop indexes' search functions, views, tables and triggers' functions."""
    for index in indexes:
        await drop_search(target, schema, index)
    await drop_all(target, "VIEW", relations.views)
    await drop_all(target, "TABLE", relations.tables)
    await drop_functions(target, schema, *map(marker, indexes))


async def drop_pipeline(target: Connection, schema: str, slot: str, belongings: Belongings) -> None:
    """Drop all that is the pipeline's, and with the last pipeline of the schema what they shared."""
    await drop_relations(target, schema, belongings.indexes, belongings.relations)
    await Registry(schema).forget(target, slot)
    await forget_embedders(target, schema, slot)
    await target.execute(sql.SQL("DELETE FROM {} WHERE slot = %s").format(_pipelines(schema)), [slot])
    if await fetch_row(target, sql.SQL("SELECT FROM {} LIMIT 1").format(_pipelines(schema))) is None:
        await _drop_shared(target, schema)


async def _drop_shared(target: Connection, schema: str) -> None:
    """Drop the tables and functions that say they are ours, and the schema where it is empty and could be made anew."""
    tables = await fetch_rows(target, _SHARED_TABLES, [schema, OURS])
    await drop_all(target, "TABLE", [name for (name,) in tables])
    await drop_functions(target, schema, OURS)
    # One that an administrator made for a role that may not make schemas stays.
    if await fetch_value(target, _SCHEMA_IS_SPARE, [schema, schema]):
        await target.execute(sql.SQL("DROP SCHEMA {}").format(sql.Identifier(schema)))


_SHARED_TABLES: LiteralString = """
    SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relkind = 'r' AND starts_with(obj_description(c.oid, 'pg_class'), %s)
"""
_SCHEMA_IS_SPARE: LiteralString = """
    SELECT has_database_privilege(current_database(), 'CREATE')
        AND EXISTS (SELECT FROM pg_namespace WHERE nspname = %s AND pg_has_role(nspowner, 'USAGE'))
        AND NOT EXISTS (
            SELECT FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND deptype = 'n'
                AND refobjid = (SELECT oid FROM pg_namespace WHERE nspname = %s))
"""


def _pipelines(schema: str) -> sql.Identifier:
    return sql.Identifier(schema, "pipelines")


async def _has_pipelines(target: Connection, schema: str) -> bool:
    """Say whether a worker has ever set up this schema."""
    found = "SELECT to_regclass(%s) IS NOT NULL"
    return bool(await fetch_value(target, found, [_pipelines(schema).as_string(target)]))
