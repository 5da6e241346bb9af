"""About how many rows a table has: from its statistics, or from a sample if it has none.

A table has no statistics until it is first analysed, and loses them when its server is upgraded with pg_upgrade (before
PostgreSQL 18): `reltuples` is then -1, which must not be taken for an empty table.

Source: PostgreSQL, "pg_class" (reltuples); "Using EXPLAIN"; "Row Estimation Examples".
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.postgres.queries import fetch_one, fetch_value
from cdcsync.postgres.sessions import Connection

SAMPLED = 1_000
"""Rows that tell how many are on a page of a table without statistics."""


async def estimate_rows(connection: Connection, table: sql.Identifier) -> tuple[int, bool]:
    """Return about how many rows a table has, and whether its statistics say so.

    Without statistics the planner guesses a row's width, and can be wrong by an order of magnitude. Then some rows tell
    how many are on a page.
    """
    name = sql.Literal(table.as_string(connection))
    analysed = await fetch_value(
        connection,
        sql.SQL("SELECT reltuples >= 0 AND relpages > 0 FROM pg_class WHERE oid = {}::regclass").format(name),
    )
    if analysed:
        return await planned_rows(connection, table), True
    sampled = await fetch_value(
        connection,
        sql.SQL(
            "SELECT coalesce(pg_relation_size({}::regclass) / current_setting('block_size')::int8 * count(*)"
            " / nullif(count(DISTINCT (ctid::text::point)[0]), 0), 0) FROM (SELECT ctid FROM {} LIMIT {}) AS t"
        ).format(name, table, sql.Literal(SAMPLED)),
    )
    return int(sampled), False


async def planned_rows(connection: Connection, table: sql.Identifier) -> int:
    """Return how many rows the planner expects: its statistics, scaled by the table's present size."""
    # Planned each time: a plan made while a table was empty would be kept for ever.
    row = await fetch_one(connection, sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(table), prepare=False)
    return int(row[0][0]["Plan"]["Plan Rows"])
