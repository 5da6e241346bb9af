"""The shapes in which statements are read: one row, one value, rows, or rows in the text that the server sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from cdcsync.model.rows import Row
from cdcsync.postgres.sessions import Connection

BY_INDEX: LiteralString = (
    "SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_seqscan = off; SET enable_bitmapscan = off;"
    " SET enable_material = off"
)
"""Has a session look up the rows of a batch one by one, by an index.

What the server knows of a table that fills and empties like a queue is wrong most of the time. It then takes it for
almost empty, and reads all of it rather than look up a hundred rows: a batch would cost the more the more others wait.
For the same reason look-ups in such a table end in OFFSET 0, which keeps each of them apart from the rest of its query.
"""

BY_INDEX_HERE: LiteralString = BY_INDEX.replace("SET ", "SET LOCAL ")
"""The same for the transaction under way."""

Statement = LiteralString | sql.SQL | sql.Composed | bytes
Arguments = Sequence[object] | Mapping[str, object] | None


async def fetch_row(
    connection: Connection, statement: Statement, arguments: Arguments = None, *, prepare: bool | None = None
) -> tuple[Any, ...] | None:
    """Run a statement and return its first row, or None if it has none."""
    cursor = await connection.execute(statement, arguments, prepare=prepare)
    return await cursor.fetchone()


async def fetch_one(
    connection: Connection, statement: Statement, arguments: Arguments = None, *, prepare: bool | None = None
) -> tuple[Any, ...]:
    """Run a statement that always has a row, such as an aggregate or an INSERT … RETURNING, and return that row.

    :raises LookupError: it had none, so the statement is not what it was taken for.
    """
    row = await fetch_row(connection, statement, arguments, prepare=prepare)
    if row is None:
        raise LookupError("a statement that always has a row had none")
    return row


async def fetch_value(connection: Connection, statement: Statement, arguments: Arguments = None) -> Any:
    """Run a statement that always has a row, and return the first column of that row."""
    return (await fetch_one(connection, statement, arguments))[0]


async def fetch_rows(
    connection: Connection, statement: Statement, arguments: Arguments = None
) -> list[tuple[Any, ...]]:
    """Run a statement and return its rows."""
    cursor = await connection.execute(statement, arguments)
    return await cursor.fetchall()


async def fetch_texts(
    connection: Connection, statement: Statement, arguments: Sequence[object] = (), *, prepare: bool | None = None
) -> list[Row]:
    """Run a statement and return its rows as text, for values of any type.

    Parameters are written `$1`, because the name of a column, or a condition of the user's, may hold a % that is not a
    placeholder.
    """
    cursor = psycopg.AsyncRawCursor(connection)
    await cursor.execute(statement, arguments, prepare=prepare)
    if cursor.pgresult is None:
        raise LookupError("the statement returns no rows")
    value, columns = cursor.pgresult.get_value, range(cursor.pgresult.nfields)
    rows: list[Row] = []
    for at in range(cursor.pgresult.ntuples):
        raw = [value(at, column) for column in columns]
        rows.append(tuple([None if one is None else one.decode() for one in raw]))
    return rows
