"""Locks that others want, taken so that no statement of theirs waits for long and none ever fails.

On the target every later search waits behind a session that waits for an exclusive lock. On the source the catalog's
functions lock a partition before its parent, and ALTER TABLE locks the parent first. So a lock is waited for only
briefly, then everything is given up, and tried again a little later.

Source: PostgreSQL, "Explicit Locking"; "Client Connection Defaults" (lock_timeout).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import LiteralString, TypeVar

import anyio
import psycopg

from cdcsync.backoff import backoff_s
from cdcsync.logs import get_logger

log = get_logger()

T = TypeVar("T")

BRIEFLY = "SET LOCAL lock_timeout = '400ms'"
ALWAYS_BRIEFLY: LiteralString = "SET lock_timeout = '400ms'"
"""In one transaction, and in all of a session.

Less than PostgreSQL's default `deadlock_timeout`, 1 s: so that the server never breaks a circle by failing somebody's
statement, we give up."""


async def until_locked(change: Callable[[], Awaitable[T]], *, table: str, attempts: int | None = None) -> T:
    """Do a change that begins with `BRIEFLY`, in a transaction of its own, again and again until nobody is in its way.

    :param table: what is locked, for the log.
    :param attempts: how many times it is tried at most, where others wait for the caller meanwhile.
    :raises LockNotAvailable, DeadlockDetected: somebody was in its way each time.
    """
    attempt = 0
    while True:
        try:
            return await change()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            log.info("lock_waits", table=table, attempt=attempt + 1)
            if attempt + 1 == attempts:
                raise
            await anyio.sleep(backoff_s(attempt, first=0.1, most=5))
            attempt += 1
