"""Reading rows by key: at once or, if one of them makes that fail, in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from cdcsync.model.rows import Key, Unread
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.sessions import Connection
from cdcsync.source.statements import PLACE, Statements
from cdcsync.source.transactions import current_snapshot
from cdcsync.source.unreadable import of_a_row, read_apart

T = TypeVar("T")

SOFT_ERRORS_VERSION = 160000
"""PostgreSQL 16: pg_input_is_valid."""

_NO_VALUE = (psycopg.DataError, psycopg.IntegrityError)
"""The errors by which a server refuses a text as a value of a type or domain."""


async def read_keys(
    table: Statements, connection: Connection, keys: Sequence[Key], read: Callable[[Sequence[Key], bool], Awaitable[T]]
) -> tuple[list[T], dict[Key, Unread], Snapshot | None]:
    """Read by keys at once or, if a row or a key makes that fail, in parts.

    Keys that are no values of the key's types, and so no row's, are left out then.

    :param read: its second argument says whether conditions are to be asked of rows with these keys alone.
    :returns: what was read, the keys whose rows cannot be read, and a snapshot of before it was read in parts.
    """
    try:
        return [await read(keys, False)], {}, None
    except psycopg.Error as error:
        if not of_a_row(error):
            raise
    snapshot = await current_snapshot(connection)
    possible = await _possible(table, connection, keys)
    return *await read_apart(possible, lambda part: read(part, True)), snapshot


async def _possible(table: Statements, connection: Connection, keys: Sequence[Key]) -> list[Key]:
    """Return those keys that are values of the key's types."""
    if connection.info.server_version >= SOFT_ERRORS_VERSION:
        valid = sql.SQL(" AND ").join(
            sql.SQL("pg_catalog.pg_input_is_valid({}, {})").format(sql.Identifier("wanted", f"cdcsync key {at}"), type_)
            for at, type_ in enumerate(map(sql.Literal, table.key_types))
        )
        # Not every type's input function can say so without an error.
        with contextlib.suppress(*_NO_VALUE):
            said = await _of_wanted(table, connection, valid, keys)
            keys = [keys[place - 1] for place, valid in said if valid]
    cast_all = sql.SQL(", ").join(table.wanted)
    _, impossible = await read_apart(keys, lambda part: _of_wanted(table, connection, cast_all, part))
    return [key for key in keys if key not in impossible]


async def _of_wanted(
    table: Statements, connection: Connection, selected: sql.Composable, keys: Sequence[Key]
) -> list[tuple[Any, ...]]:
    """Return the place of each key with what is selected of it; no table is read."""
    cursor = psycopg.AsyncRawCursor(connection)
    statement = sql.SQL("SELECT {}, {} FROM {}").format(PLACE, selected, table.wanted_from)
    await cursor.execute(statement, table.arrays(keys), prepare=False)
    return await cursor.fetchall()
