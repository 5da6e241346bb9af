"""How many rows a table has, counted or as the planner expects."""

from __future__ import annotations

from typing import cast

import psycopg
from psycopg import sql

from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.source.reads import reading
from cdcsync.source.statements import RELATIONS, Statements
from cdcsync.source.unreadable import of_a_row


async def estimate(table: Statements, connection: Connection) -> int:
    """Return the planner's idea of how many rows the table has."""
    row = await fetch_one(
        connection,
        # A root repeats its leaves.
        "SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::int8 FROM pg_class c WHERE c.relkind <> 'p'"
        f" AND c.oid IN {RELATIONS}",
        {"table": str(table.shape.table)},
    )
    return cast(int, row[0])


async def count(table: Statements, connection: Connection, where: str | None = None) -> int | None:
    """Return how many rows there are to read; None if a condition fails for one of them."""
    statement = sql.SQL("SELECT count(*) FROM {}").format(table.fulfilling(where))
    try:
        async with reading(connection):
            row = await fetch_one(connection, statement)
    except psycopg.Error as error:
        if not of_a_row(error):
            raise
        return None
    return cast(int, row[0])


async def expected(table: Statements, connection: Connection, where: str | None = None) -> int:
    """Return the planner's idea of how many rows there are to read; none is looked at."""
    if where is None and table.all_rows:
        return await estimate(table, connection)
    statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(table.fulfilling(where))
    async with reading(connection):
        row = await fetch_one(connection, statement)
    return int(row[0][0]["Plan"]["Plan Rows"])
