"""Backfill requests: rows that any process writes and the worker serves.

Source: PostgreSQL, "NOTIFY".
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, cast

import msgspec
from psycopg import sql

from cdcsync.postgres import Connection

Kind = Literal["initial", "replay", "resync"]
Phase = Literal["rows", "orphans"]

_COLUMNS = "id, index_name, kind, rewrite, filter, state, phase, cursor, rows_done, rows_total, started_at"


CHANNEL = "cdcsync_backfills"
"""Where requests are announced, the payload being the index. The schema is not part of it: the server takes no names
of more than 63 bytes here, and a worker of another schema is only woken for nothing."""


class Request(msgspec.Struct, frozen=True):
    """An open backfill; `cursor` is the key of the last row applied."""

    id: int
    index: str
    kind: Kind
    rewrite: bool
    filter: str | None
    state: str
    phase: Phase
    cursor: tuple[str, ...] | None
    rows_done: int
    rows_total: int | None
    started_at: datetime | None


class Requests:
    """The backfills table."""

    def __init__(self, schema: str) -> None:
        self._table = sql.Identifier(schema, "backfills")
        self.channel = CHANNEL

    async def add(self, connection: Connection, index: str, kind: Kind, *, rewrite: bool, filter_: str | None) -> int:
        """Ask for a backfill and wake the worker; takes effect when the caller commits."""
        cursor = await connection.execute(
            sql.SQL("INSERT INTO {} (index_name, kind, rewrite, filter) VALUES (%s, %s, %s, %s) RETURNING id").format(
                self._table
            ),
            [index, kind, rewrite, filter_],
        )
        row = await cursor.fetchone()
        assert row is not None
        await connection.execute("SELECT pg_notify(%s, %s)", [self.channel, index])
        return cast(int, row[0])

    async def oldest_open(self, connection: Connection, indexes: list[str]) -> Request | None:
        """Return the request to serve next for these indexes."""
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT {_COLUMNS} FROM {{}}"
                " WHERE state IN ('requested', 'running') AND index_name = ANY(%s) ORDER BY id LIMIT 1"
            ).format(self._table),
            [indexes],
        )
        row = await cursor.fetchone()
        return None if row is None else _request(row)

    async def latest(self, connection: Connection, index: str) -> Request | None:
        """Return the open request of an index, or the last one that ended."""
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT {_COLUMNS} FROM {{}}"
                " WHERE index_name = %s ORDER BY state IN ('requested', 'running', 'paused') DESC, id DESC LIMIT 1"
            ).format(self._table),
            [index],
        )
        row = await cursor.fetchone()
        return None if row is None else _request(row)

    async def start(self, connection: Connection, request: Request, rows_total: int | None) -> None:
        """Note that a request is being served."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'running', started_at = coalesce(started_at, now()),"
                " rows_total = coalesce(rows_total, %s) WHERE id = %s AND state IN ('requested', 'running')"
            ).format(self._table),
            [rows_total, request.id],
        )

    async def state(self, connection: Connection, request: Request) -> str | None:
        """Return a request's state now: someone may have paused or cancelled it."""
        cursor = await connection.execute(
            sql.SQL("SELECT state FROM {} WHERE id = %s").format(self._table), [request.id]
        )
        row = await cursor.fetchone()
        return None if row is None else cast(str, row[0])

    async def fail(self, connection: Connection, request: Request, error: str) -> None:
        """End a request that cannot be served."""
        await connection.execute(
            sql.SQL("UPDATE {} SET state = 'failed', error = %s, finished_at = now() WHERE id = %s").format(
                self._table
            ),
            [error, request.id],
        )


def _request(row: tuple[Any, ...]) -> Request:
    values = list(row)
    values[7] = None if values[7] is None else tuple(values[7])
    return Request(*values)
