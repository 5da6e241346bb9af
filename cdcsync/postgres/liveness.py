"""Liveness: finding out that the far end of a connection no longer answers, although the socket is open.

A proxy or a firewall may keep a connection open and forward nothing. TCP does not notice, because the machine next to
us acknowledges every packet. So a statement that has not been answered for a while is looked for: over another
connection, the server is asked whether the session is working on it. A statement that the server works on, or that
waits there for a lock, may take any time. One that the server knows nothing of never ends: its connection is hung up,
and the task that waits for it gets the error of a broken connection.

The other way round, a server that is cut off from us keeps our session, and with it our locks. A session whose locks
others wait for *beats*: it sends a statement now and then even if it has nothing to do. So a session that waits can
tell a session that has nothing to do from one that nobody has any more (`Pipelines.end_silent`).

Source: PostgreSQL, "The Cumulative Statistics System" (pg_stat_activity); "libpq - C Library", `tcp_user_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, TypeVar

import anyio
import psycopg
from psycopg import conninfo, generators
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from cdcsync.postgres.interrupts import hang_up

RV = TypeVar("RV")

TCP_USER_TIMEOUT_MS = 60_000
"""How long a far end may be gone before that is noticed, where the DSN has no `tcp_user_timeout` of its own."""

BEATS = 6
"""So many beats in the time after which a session is taken for dead."""

LOOKS = 2
"""So many looks in a row must find nothing: an answer may be under way during one."""

_WORKS = """
    SELECT state = 'active' AND wait_event IS DISTINCT FROM 'ClientRead'
    FROM pg_catalog.pg_stat_activity WHERE pid = %s
"""
"""A session that waits for its client, while its client waits for it, has lost what was sent."""


class WatchedConnection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection whose unanswered statements are looked for on the server."""

    _watched: str = ""
    _patience_s: float = TCP_USER_TIMEOUT_MS / 2000
    used_at: float = 0.0
    """When it was last waited for, by the event loop's clock."""
    _look: asyncio.Task[None] | None = None
    _beat: asyncio.Task[None] | None = None
    _beats: bool = False
    _next_beat: asyncio.TimerHandle | None = None

    def watch(self, dsn: str) -> None:
        """Look for statements from now on.

        :param dsn: leads to the same server; its `tcp_user_timeout` is the time within which a dead end is noticed.
        """
        settings = conninfo.conninfo_to_dict(dsn)
        limit_ms = int(settings.get("tcp_user_timeout") or TCP_USER_TIMEOUT_MS)
        self._patience_s = limit_ms / 2000
        settings |= {
            "application_name": "cdcsync liveness",
            "connect_timeout": max(2, round(self._patience_s / LOOKS)),  # libpq takes 1 for 2
        }
        self._watched = conninfo.make_conninfo("", **settings)

    @property
    def patience_s(self) -> float:
        """How long a far end may say nothing before somebody looks whether it is there."""
        return self._patience_s

    @property
    def free(self) -> bool:
        """Whether it is in no transaction, and does nothing but beat: what is asked of it now comes next."""
        return self._beats or self.pgconn.transaction_status == TransactionStatus.IDLE

    def beat(self) -> None:
        """Show the server that we are there, from now on until the connection closes."""
        self._next_beat = asyncio.get_running_loop().call_later(self._patience_s / BEATS, self._begin_to_beat)

    def _begin_to_beat(self) -> None:
        if not self.closed:
            self._beat = asyncio.get_running_loop().create_task(self._be_heard())
            self.beat()

    async def _be_heard(self) -> None:
        if self.lock.locked():
            return
        with contextlib.suppress(psycopg.Error, OSError):
            async with self.lock:
                # A session that waited longer for the lock may have begun a transaction.
                if self.pgconn.transaction_status == TransactionStatus.IDLE:
                    self._beats = True
                    try:
                        self.pgconn.send_query(b"SELECT")
                        await self.wait(generators.execute(self.pgconn))
                    finally:
                        self._beats = False

    async def close(self) -> None:
        """Close the connection."""
        if self._next_beat is not None:
            self._next_beat.cancel()
        await super().close()

    async def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        """Wait for the server, and look for the statement if that takes long."""
        loop = asyncio.get_running_loop()
        self.used_at = loop.time()
        if not self._watched:
            return await super().wait(gen, *arguments, **options)
        timer = loop.call_later(self._patience_s, self._begin_to_look)
        try:
            return await super().wait(gen, *arguments, **options)
        finally:
            self.used_at = loop.time()
            timer.cancel()
            if self._look is not None:
                self._look.cancel()
                self._look = None

    def _begin_to_look(self) -> None:
        self._look = asyncio.get_running_loop().create_task(self._look_until_answered())

    async def _look_until_answered(self) -> None:
        missed = 0
        while missed < LOOKS:
            missed = 0 if await self._works() else missed + 1
            await asyncio.sleep(self._patience_s / (LOOKS if missed else 1))
        with contextlib.suppress(psycopg.Error, OSError):
            hang_up(self.pgconn.socket)

    async def _works(self) -> bool:
        """Say whether the server works on this connection's statement; a server that answers nobody does not."""
        pid = self.pgconn.backend_pid
        try:
            with anyio.move_on_after(self._patience_s):
                async with await psycopg.AsyncConnection.connect(self._watched, autocommit=True) as asking:
                    cursor = await asking.execute(_WORKS, [pid])
                    return await cursor.fetchone() == (True,)
        except psycopg.OperationalError as error:
            # With no connection to spare (53300), the server lives, and nothing is known about the statement.
            return "connection slots" in str(error) or "too many" in str(error)
        return False
