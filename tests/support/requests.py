"""Backfill requests of the indexes that the fixture `articles_and_notes` registers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cdcsync.model.requests import Request
from cdcsync.postgres.sessions import Connection
from cdcsync.target.requests.history import History
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests
from tests.support.indexes import SCHEMA

REQUESTS, QUEUE, HISTORY = Requests(SCHEMA), Queue(SCHEMA), History(SCHEMA)


async def add(connection: Connection, index: str = "articles") -> int:
    """Ask for a replay."""
    return await REQUESTS.add(connection, index, "replay", rewrite=False, filter_=None)


async def next_one(connection: Connection, *indexes: str) -> Request | None:
    """Return the request that a worker would serve now."""
    return await QUEUE.next_open(connection, list(indexes or ("articles", "notes")))


async def end(connection: Connection, request: int, state: str) -> None:
    """Put a request into this state."""
    await connection.execute("UPDATE cdcsync.backfills SET state = %s WHERE id = %s", [state, request])


async def fill(connection: Connection, count: int = 20_000) -> None:
    """Load both indexes, then add so many ended requests of `articles` alone."""
    for index in ("articles", "notes"):
        load = await REQUESTS.add(connection, index, "initial", rewrite=False, filter_=None)
        await end(connection, load, "done")
    await connection.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state, keyed, finished_at)"
        " SELECT 'articles', 'related', 'done', true, now() - interval '1 day' FROM generate_series(1, %s)",
        [count],
    )
    await connection.execute("ANALYZE cdcsync.backfills")


@asynccontextmanager
async def reading_few(connection: Connection, most: int = 50) -> AsyncIterator[None]:
    """Check that what is done here reads few requests, and none by reading the whole table."""
    async with connection.transaction():
        yield
        cursor = await connection.execute(
            "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relid = 'cdcsync.backfills'::regclass"
        )
        row = await cursor.fetchone()
        assert row is not None
        assert row[0] == 0
        assert row[1] <= most
