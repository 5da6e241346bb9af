"""The relations of an index in the target: created, and read back."""

from __future__ import annotations

from typing import Any

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from tests.support.indexes import SCHEMA, make_spec, register


async def rows(connection: Connection, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    """Return the rows of a query."""
    cursor = await connection.execute(statement.encode(), arguments or None)
    return await cursor.fetchall()


async def create(connection: Connection, *specs: IndexSpec, schema: str = SCHEMA) -> None:
    """Create the shared tables and the relations of these indexes, in one transaction."""
    async with connection.transaction():
        await create_shared(connection, schema)
        for spec in specs:
            await create_index_relations(connection, schema, spec)


async def registered(connection: Connection, *names: str) -> Connection:
    """Create the first of these indexes, and register all of them under the slot `s`."""
    specs = [make_spec(name=name, search=None) for name in names or ("articles",)]
    await create(connection, specs[0])
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    for spec in specs:
        await register(connection, spec, slot="s")
    return connection


async def catalog(connection: Connection) -> list[tuple[Any, ...]]:
    """Return what there is in our schema and of our views, down to columns, indexes and comments."""
    return await rows(
        connection,
        """
        SELECT c.oid::regclass::text, c.relkind, obj_description(c.oid, 'pg_class'), c.reloptions,
               array(SELECT format('%s %s %s %s', attname, format_type(atttypid, atttypmod), attnotnull,
                                   col_description(attrelid, attnum))
                     FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               CASE c.relkind WHEN 'v' THEN pg_get_viewdef(c.oid) WHEN 'i' THEN pg_get_indexdef(c.oid) END
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'cdcsync' OR c.relkind = 'v' AND n.nspname = 'public'
        ORDER BY 1
        """,
    )
