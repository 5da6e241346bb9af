"""Backfill requests of the indexes that the fixture `articles_and_notes` registers."""

from __future__ import annotations

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
