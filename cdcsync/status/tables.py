"""Our tables in the target: which there are, and which the role may read."""

from __future__ import annotations

from typing import cast

from psycopg import sql

from cdcsync.postgres.sessions import Connection


async def relations(target: Connection, schema: str) -> set[str]:
    """Return the names of all relations in our schema."""
    cursor = await target.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)", [schema]
    )
    return {cast(str, row[0]) for row in await cursor.fetchall()}


async def may_read(target: Connection, schema: str, tables: set[str], problems: list[str]) -> set[str]:
    """Return which of these tables the role may read: one that was granted others by name need not have newer ones."""
    readable = set()
    for name in sorted(tables):
        table = sql.Identifier(schema, name).as_string(target)
        cursor = await target.execute("SELECT has_table_privilege(%s::regclass, 'SELECT')", [table])
        if await cursor.fetchone() == (True,):
            readable.add(name)
        else:
            problems.append(f"this role may not read {table}, and what it tells is left out: GRANT SELECT ON {table}")
    return readable
