"""Poolers between us and a server. In session mode one is as good as the server; in the other modes it is of no use.

Our sessions hold a lock for as long as they live, have settings of their own, listen to notifications, and stage rows
in temporary tables. A pooler that gives a client another session with each transaction takes all of that away, mostly
when several clients are at work, and leaves our settings to whichever client gets the session next: an application's
tables are not found with an empty search_path. So it has to be found out before anything is set.

Source: PgBouncer's documentation, "Configuration" (pool_mode) and "Features" (SQL feature map for pooling modes).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import psycopg

from cdcsync.postgres.interrupts import hang_up

PID = "SELECT pg_catalog.pg_backend_pid()"

SPARE_S = 2.0
"""How long a pool may take to find a session for a second client. Applications keep theirs for milliseconds, unless the
pool is in session mode and has no more of them."""

LOOKS = 5
"""So many looks must find nothing: during one, an application may have had the session that was used last."""

Connection = psycopg.AsyncConnection[tuple[Any, ...]]


async def shares_sessions(connection: Connection, other: Connection) -> bool:
    """Say whether a pooler gives a connection another session of the server from one transaction to the next.

    Two clients take turns. Behind such a pooler, one gets the session that the other has just used, or another session
    each time. If there is no session for the second client, and the first one is served all the same, the first has a
    session of its own.

    :param other: another connection to the same pool, which the caller closes.
    :raises psycopg.Error: the pooler or the server fails.
    """
    ours, others = {await _pid(connection)}, set()
    for _ in range(LOOKS):
        asking = asyncio.ensure_future(_pid(other))
        try:
            await asyncio.wait([asking], timeout=SPARE_S)
            waits = not asking.done()
            ours.add(await _pid(connection))
            if waits and not asking.done():
                return len(ours) > 1
            others.add(await asking)
        finally:
            if not asking.done():
                hang_up(other.pgconn.socket)
            with contextlib.suppress(psycopg.Error):
                await asking
        if len(ours) > 1 or ours & others:
            return True
    return False


async def _pid(connection: Connection) -> object:
    return await (await connection.execute(PID)).fetchone()
