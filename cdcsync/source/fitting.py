"""How many rows fit into a page: their sizes, as the server knows them without reading a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import psycopg
from psycopg import sql

from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_one, fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.source.keys import read_keys
from cdcsync.source.reads import reading
from cdcsync.source.statements import PLACE, RELATIONS, Statements
from cdcsync.source.unreadable import of_a_row


async def fitting(
    table: Statements, connection: Connection, after: Key | None, limit: int, most_bytes: int, where: str | None = None
) -> int:
    """Return how many rows of a page are at most so large together, at least 1; no value is read for that."""
    if not await _has_large_values(table, connection):
        return limit
    rows = table.named if where else table.rows
    try:
        return await _fitting(table, connection, rows, after, limit, most_bytes, where)
    except psycopg.Error as error:
        if not of_a_row(error):
            raise
        # Rows that do not fulfil the condition may be read, too, where it fails.
        return await _fitting(table, connection, table.bare, after, limit, most_bytes, None)


async def _fitting(
    table: Statements,
    connection: Connection,
    rows: sql.Composed,
    after: Key | None,
    limit: int,
    most_bytes: int,
    where: str | None,
) -> int:
    keys = sql.SQL(", ").join(table.ordered)
    # Our own aliases are names that no column is likely to have.
    selected = sql.SQL('{}, {} AS "row size"').format(keys, await _size(table, connection))
    statement = sql.SQL(
        'SELECT count(*), count(*) FILTER (WHERE "so far" <= {most}) FROM (SELECT'
        ' sum("row size") OVER (ORDER BY {keys} ROWS UNBOUNDED PRECEDING) AS "so far" FROM'
        " ({rows}) AS t) AS sizes"
    ).format(
        most=sql.Literal(most_bytes),
        keys=keys,
        rows=await table.page(connection, selected, rows, after, limit, where, needed=table.needed),
    )
    async with reading(connection):
        ((looked_at, fits),) = await fetch_texts(connection, statement, table.place(after), prepare=False)
    return limit if looked_at == fits else max(1, int(cast(str, fits)))


async def fitting_keys(table: Statements, connection: Connection, keys: Sequence[Key], most_bytes: int) -> int:
    """Return how many of these keys, from the first on, have rows of at most so many bytes together; at least 1."""
    if len(keys) < 2 or not await _has_large_values(table, connection):
        return len(keys)
    selected = sql.SQL("wanted.{}, {}").format(PLACE, await _size(table, connection))

    async def read(possible: Sequence[Key], apart: bool) -> dict[Key, int]:
        cursor = psycopg.AsyncRawCursor(connection)
        statement = await table.keyed(connection, selected, apart=apart)
        async with reading(connection):
            await cursor.execute(statement, table.arrays(possible), prepare=False)
            return {possible[place - 1]: size for place, size in await cursor.fetchall()}

    parts, _, _ = await read_keys(table, connection, keys, read)
    sizes = {key: size for part in parts for key, size in part.items()}
    total = 0
    for place, key in enumerate(keys, start=1):
        total += sizes.get(key, 0)
        if total > most_bytes:
            return max(1, place - 1)
    return len(keys)


async def _has_large_values(table: Statements, connection: Connection) -> bool:
    """Say whether any value is stored out of line: if none is, no row is larger than a page of the server's."""
    # The function locks what it is asked about: nobody else's table, whatever the planner thinks is cheaper.
    row = await fetch_one(
        connection,
        "WITH ours AS MATERIALIZED"
        f" (SELECT reltoastrelid AS oid FROM pg_class WHERE reltoastrelid <> 0 AND oid IN {RELATIONS})"
        " SELECT EXISTS (SELECT FROM ours WHERE pg_relation_size(oid) > 0)",
        {"table": str(table.shape.table)},
    )
    return bool(row[0])


async def _size(table: Statements, connection: Connection) -> sql.Composable:
    """Return SQL of a row's size that reads no value: of compressed ones other than text, the compressed size."""
    cursor = await connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
        " AND atttypid IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)",
        [str(table.shape.table)],
    )
    plain = {name for (name,) in await cursor.fetchall()}
    return sql.SQL(" + ").join(
        sql.SQL("coalesce({}({}), 0)").format(
            sql.SQL("octet_length" if name in plain else "pg_column_size"), sql.Identifier("t", name)
        )
        for name in table.shape.own
    )
