"""Sessions on either server.

Every session pins how values are rendered, so that the stream, a backfill page and a comparison show the same text
for the same value under any settings of the role or database.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Self

import anyio
import psycopg
from psycopg.pq import TransactionStatus

from cdcsync.errors import CdcsyncError, SetupError, Unavailable
from cdcsync.postgres.errors import speaking_of, unavailable
from cdcsync.postgres.liveness import WatchedConnection, at_its_host, backend_of
from cdcsync.postgres.logins import Host, log_in, refuse_left_behind
from cdcsync.postgres.poolers import shares_sessions
from cdcsync.postgres.settings import (
    DURABILITY,
    LEAVING,
    RENDERING,
    SAFETY,
    TABLES_ONLY,
    WORKING,
    Side,
    conninfo_for,
    describe,
)

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

Admit = Callable[[Connection, Side], Awaitable[None]]
Refused = Callable[[CdcsyncError], Awaitable[None]]
Right = Callable[[WatchedConnection], Awaitable[None]]

_ADMITTING: ContextVar[tuple[Admit, Refused] | None] = ContextVar("admitting", default=None)


@contextlib.contextmanager
def admitting(admit: Admit, refused: Refused) -> Iterator[None]:
    """Answer for each session that is opened in this block or in a task begun there.

    A worker has a dozen of them. One that was forgotten would write behind a successor's back, or read another server
    than the one that is followed. A server that refuses a session is no fault of the index or the request that the
    session was for.

    :param admit: called with each session before its use; raises what is to be raised where it is not admitted. If the
        server is not the right one, the next host of the DSN is tried.
    :param refused: called with the error of a session that no host admits, before `connect` raises it.
    """
    token = _ADMITTING.set((admit, refused))
    try:
        yield
    finally:
        _ADMITTING.reset(token)


IDLE_S = 20.0
"""How long a session that is used now and then keeps its connection: a server has few, and a new one costs 10 ms."""


SETTINGS_S = 30.0
"""How long a server that has accepted a login may take for the first statements, which wait for nothing."""

_SESSION_MODE: set[tuple[str, ...]] = set()
"""The pools that were found to be in session mode: host, hostaddr, port, database and user of each.

A process finds that out once for each pool, because it takes another login and another session of the pool. It does not
notice if the mode of a pool changes later."""


def answers(connection: Connection, error: CdcsyncError) -> bool:
    """Say whether a server answers although a statement failed, so that others may succeed on this connection."""
    if not isinstance(error, Unavailable):
        return not connection.closed
    code = error.sqlstate
    return code is not None and not connection.closed and code[:2] != "08" and not code.startswith("57P")


async def connect(
    dsn: str,
    side: Side,
    *,
    application_name: str = "cdcsync",
    autocommit: bool = True,
    lock_wait_ms: int | None = None,
    works: bool = False,
    right: Right | None = None,
) -> WatchedConnection:
    """Open an SQL session with pinned rendering. The caller closes it.

    The server is the one that `admitting` or `right` takes for the right one. If neither is there to say, it is none
    that another host of the DSN shows to be a former primary.

    :param lock_wait_ms: how long a statement waits for a lock, if that is not for the side to say.
    :param works: whether it keeps an index in step, as every session on the source does; see `WORKING`.
    :param right: raises the error of a server that is not the right one; `admitting` is not asked then.
    :raises SetupError: wrong password, database, host name or DSN, or a pooler that shares sessions: waiting does not
        help.
    :raises SourceUnavailable, TargetUnavailable: the server does not answer now.
    """
    admit, refused = _ADMITTING.get() or (None, None)
    if right is not None:
        admit = None
    try:
        settings = conninfo_for(dsn, application_name=application_name)
        return await _open(
            *(settings, side, f"{side} ({describe(dsn)})"),
            admit=admit,
            autocommit=autocommit,
            lock_wait_ms=lock_wait_ms,
            works=works,
            right=right,
        )
    except CdcsyncError as error:
        if refused is not None:
            await refused(error)
        raise


async def _open(
    settings: str,
    side: Side,
    where: str,
    *,
    admit: Admit | None,
    autocommit: bool,
    lock_wait_ms: int | None,
    works: bool,
    right: Right | None,
) -> WatchedConnection:
    async def fits(connection: WatchedConnection, others: Sequence[Host]) -> None:
        here = at_its_host(connection, settings)
        connection.watch(here)
        # Planned anew each time: a plan made while a table was empty would scan it for ever, and one that is kept over
        # an ALTER TABLE is an error.
        connection.prepare_threshold = None
        try:
            with speaking_of(side, where=where), anyio.fail_after(SETTINGS_S):
                connection.backend = await backend_of(connection)
                if connection.backend.pid != connection.info.backend_pid:
                    await _refuse_shared(connection, here, side, where)
                if right is not None:
                    await right(connection)
                if admit is None:
                    await refuse_left_behind(connection.backend, others, side, where, anew=right is not None)
                await _set_up(connection, side, lock_wait_ms, works=works)
                if admit is not None:
                    await admit(connection, side)
                await connection.set_autocommit(autocommit)
        except TimeoutError:
            raise unavailable(side, f"it let us in, and said nothing for {SETTINGS_S:g} s", where=where) from None

    return await log_in(WatchedConnection, settings, side, where, fits)


async def _refuse_shared(connection: WatchedConnection, here: str, side: Side, where: str) -> None:
    """Raise an error if the pooler that this connection is with shares sessions; nothing has been set until now.

    :param here: a DSN that leads to the same pooler.
    :raises SetupError: it does.
    """
    info = connection.info
    pool = (info.host, info.hostaddr, str(info.port), info.dbname, info.user)
    if pool in _SESSION_MODE:
        return
    other = await log_in(WatchedConnection, here, side, where)
    try:
        shared = await shares_sessions(connection, other)
    finally:
        other.pgconn.finish()
    if shared:
        raise SetupError(
            "leads to a pooler that gives each transaction another session: locks, settings and temporary tables of"
            " cdcsync's sessions would be lost, and its settings left to other clients",
            where=where,
            hint="connect to the server itself, or to a pool in session mode (PgBouncer: pool_mode = session)",
        )
    _SESSION_MODE.add(pool)


async def _set_up(connection: WatchedConnection, side: Side, lock_wait_ms: int | None, *, works: bool) -> None:
    """Pin the settings of a session."""
    # Together, because each statement of its own would take the time of the way there and back.
    ours = [RENDERING, SAFETY, DURABILITY[side], *([TABLES_ONLY] if side == "source" else [])]
    if works or side == "source":
        ours.append(WORKING)
    if lock_wait_ms is not None:
        ours.append(f"SET lock_timeout = {lock_wait_ms:d}")
    await connection.execute("; ".join(ours))
    with contextlib.suppress(psycopg.errors.InvalidParameterValue):
        await connection.execute(LEAVING)


class Session:
    """A connection that is opened when it is needed and again after it broke. For one task at a time."""

    def __init__(
        self,
        dsn: str,
        side: Side,
        *,
        application_name: str,
        idle_s: float | None = None,
        lock_wait_ms: int | None = None,
        works: bool = False,
        right: Right | None = None,
    ) -> None:
        """Make a session that has no connection yet.

        :param idle_s: close the connection once it has not been used for so long; nothing may live in it between uses.
        :param lock_wait_ms: see `connect`, as for `works` and `right`.
        """
        self._dsn = dsn
        self._side: Side = side
        self._application_name = application_name
        self._idle_s = idle_s
        self._lock_wait_ms = lock_wait_ms
        self._works = works
        self._right = right
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connection: WatchedConnection | None = None

    @property
    def used_at(self) -> float:
        """When its connection was last waited for, by the event loop's clock; minus infinity if it has none."""
        return -math.inf if self._connection is None else self._connection.used_at

    async def connection(self) -> WatchedConnection:
        """Return the open connection.

        :raises SourceUnavailable, TargetUnavailable, SetupError: as `connect`.
        """
        if self._connection is None or not self._connection.free:
            await self.aclose()
            self._connection = await connect(
                self._dsn,
                self._side,
                application_name=self._application_name,
                lock_wait_ms=self._lock_wait_ms,
                works=self._works,
                right=self._right,
            )
            if self._idle_s is not None:
                self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._close_if_idle)
        return self._connection

    def _close_if_idle(self) -> None:
        connection, loop = self._connection, asyncio.get_running_loop()
        assert connection is not None
        assert self._idle_s is not None
        unused_s = loop.time() - connection.used_at
        if unused_s < self._idle_s or connection.info.transaction_status != TransactionStatus.IDLE:
            self._idle_timer = loop.call_later(self._idle_s, self._close_if_idle)
            return
        self._connection = None
        connection.pgconn.finish()

    async def aclose(self) -> None:
        """Close the connection, if one is open; the next use opens another."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(psycopg.Error):
                await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
