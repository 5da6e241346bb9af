"""Locks that exclude searches, taken so that no search waits for long and none ever fails.

Every later search waits behind a session that waits for an exclusive lock. So such a lock is waited for only briefly,
then everything is given up, and tried again a little later.

Source: PostgreSQL, "Explicit Locking"; "Client Connection Defaults" (lock_timeout).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import psycopg

from cdcsync.backoff import backoff_s
from cdcsync.logs import get_logger

log = get_logger()

T = TypeVar("T")

BRIEFLY = "SET LOCAL lock_timeout = '400ms'"
"""Less than PostgreSQL's default `deadlock_timeout`, 1 s: so that the server never breaks a circle by failing
somebody's statement, we give up."""


async def until_locked(change: Callable[[], Awaitable[T]], *, table: str) -> T:
    """Do a change that begins with `BRIEFLY`, in a transaction of its own, again and again until nobody is in its way.

    :param table: the name of the locked table, for the log.
    """
    attempt = 0
    while True:
        try:
            return await change()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            log.info("lock_waits", table=table, attempt=attempt + 1)
            await anyio.sleep(backoff_s(attempt, first=0.1, most=5))
            attempt += 1
