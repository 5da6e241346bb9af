"""A session that holds the pipeline's lock, through broken connections, for as long as nobody else took over.

The pipeline's row moves only in `_chain`: from the row that this worker last saw committed, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Self

import anyio
import psycopg

from cdcsync.errors import TargetUnavailable
from cdcsync.logs import get_logger
from cdcsync.model.chain import Chain, Lease, refuse_successor
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import fence, speaking_of
from cdcsync.postgres.interrupts import INTERRUPT_EVERY_S, interrupt
from cdcsync.postgres.liveness import Backend, WatchedConnection, left_behind
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.pipelines import Pipelines, PipelineState

log = get_logger()

LOCK_WAIT_MS = 10_000
"""How long a set-up or a batch waits for a lock on the tables of an index: longer than anything of ours holds one, and
short enough that the others can go on without that index."""

OLD_SESSION_S = 2.0
"""A server needs a moment to end a session whose client is gone: it drops the session's temporary tables, several for
each index, before it frees the lock."""


def worker_name() -> str:
    """Return what an operator finds this process by."""
    return f"{socket.gethostname()}:{os.getpid()}"


class LockedSession:
    """One connection under lock and fence; opened by `try_open`, and by `reopen` after it broke."""

    def __init__(self, dsn: str, schema: str, slot: str, *, before: LockedSession | None = None) -> None:
        """Make a session that is not open yet.

        :param before: the last one of this process, which is closed: the server may not have ended it yet.
        """
        self._dsn = dsn
        self._schema = schema
        self._slot = slot
        self._pipelines = Pipelines(schema, slot)
        self._end_of_chain: Chain | None = None if before is None else before._end_of_chain
        self._ending = False
        self._connection: WatchedConnection | None = None
        self._pid: int | None = None if before is None else before._pid
        """The server process of the last connection."""
        self._server: Backend | None = None if before is None else before._server
        """The server that the last connection was with."""
        self.opened: Callable[[Backend], None] = lambda server: None
        """Called with the server of each connection that got the lock."""
        self.holder: int | None = None
        """The server process that had the lock when `try_open` found it taken."""

    @property
    def connection(self) -> Connection:
        """The session's connection, for reading what only the lock's holder may rely on, and for the set-up.

        What it writes is written under the lock: whoever takes the lock next finds it committed, or undone.
        """
        if self._connection is None:
            raise TargetUnavailable("the apply connection is closed", where="target", hint="it is opened again")
        return self._connection

    async def try_open(
        self,
        once_locked: Callable[[Connection], Awaitable[None]] | None = None,
        *,
        spared: Callable[[], Collection[int]] = tuple,
    ) -> bool:
        """Connect and take the pipeline's lock and a new fence; False when another worker holds the lock: `holder`.

        :param once_locked: called between the two: what only the lock's holder may do, and the fence needs.
        :param spared: says which sessions of an earlier fence are this worker's own, and go on.
        :raises TargetUnavailable: the target does not answer now, or still holds our own last session's lock.
        """
        connection = await self._connect()
        with speaking_of("target"):
            try:
                if await self._lock(connection):
                    if once_locked is not None:
                        await once_locked(connection)
                    self._end_of_chain = Chain(self._slot, await self._pipelines.take_over(connection, worker_name()))
                    crash_point("fence raised")
                    if left := await self._pipelines.end_overtaken(connection, self._held, spared()):
                        log.warning("overtaken_sessions_ended", slot=self._slot, pids=left)
                    self._hold(connection)
                elif self.holder is not None and self.holder == self._pid:
                    raise self._still_held()
            finally:
                if self._connection is None:
                    await _close(connection)
        return self._connection is not None

    async def _lock(self, connection: WatchedConnection) -> bool:
        """Take the pipeline's lock, once our own last session is gone; False if it is held by `holder`."""
        if await self._pipelines.try_lock(connection):
            return True
        self.holder = await self._pipelines.holder(connection)
        if self.holder is not None and self.holder != self._pid:
            return False
        if await self._pipelines.lock_within(connection, OLD_SESSION_S):
            return True
        self.holder = await self._pipelines.holder(connection)
        if self.holder is None or self.holder != self._pid:
            return False
        state = await self._pipelines.read(connection)
        if state is not None and state.fence > self._held.fence:
            self._pid = None  # the server has given it to the session of another worker, which took over since
            return False
        # A server that was cut off from us keeps our own old session until TCP gives it up.
        log.warning("old_session_ended", slot=self._slot, pid=self.holder)
        await self._pipelines.end_session(connection, self.holder, self._application_name)
        return await self._pipelines.try_lock(connection)

    def _still_held(self) -> TargetUnavailable:
        return TargetUnavailable(
            f"the pipeline's lock is still held by the session with pid {self.holder}",
            where=f"slot {self._slot}",
            hint="it ends by itself within a minute if its client is gone, and is ended if it is silent",
        )

    async def reopen(self, specs: Sequence[IndexSpec]) -> None:
        """Connect again under the same fence, after the connection broke.

        :raises TargetUnavailable: the target does not answer now, or still holds the old session's lock.
        :raises LeaseLost: another worker took over meanwhile.
        :raises TargetRewound: the target is not as this worker last committed it.
        """
        await self.aclose()
        if self._ending:
            raise TargetUnavailable("the worker is ending", where=f"slot {self._slot}")
        connection = await self._connect()
        with speaking_of("target"):
            try:
                locked = await self._lock(connection)
                state = await self._pipelines.present(connection)
                if not locked:
                    refuse_successor(self._slot, self._held, state.fence)
                    raise self._still_held()
                self._chained.continue_with(state.lease)
                self._hold(connection)
            finally:
                if self._connection is None:
                    await _close(connection)
        await self.prepare(specs)

    def _hold(self, connection: WatchedConnection) -> None:
        assert connection.backend is not None
        self._connection, self._server = connection, connection.backend
        self._pid = connection.backend.pid
        self.opened(connection.backend)

    def cut(self) -> None:
        """End the connection, also amid a statement: the next use opens another, where the address leads by then."""
        if self._connection is not None:
            self._connection.cut()

    async def admit(self, connection: Connection) -> None:
        """Let another session of this worker write beside this one.

        :raises LeaseLost, TargetRewound, TargetUnavailable, RunError: as `Pipelines.admit`.
        """
        await self._pipelines.admit(connection, self._held)

    async def awaited(self) -> bool:
        """Say whether somebody waits until the index holds a position.

        :raises TargetUnavailable: the target does not answer.
        """
        with speaking_of("target"):
            return await self._pipelines.awaited(self.connection)

    async def ensure(self, specs: Sequence[IndexSpec]) -> None:
        """Open the connection again if it is not usable; otherwise do nothing.

        :raises TargetUnavailable, LeaseLost: as `reopen`.
        """
        if not self._usable:
            await self.reopen(specs)

    async def prepare(self, specs: Sequence[IndexSpec]) -> None:
        """Prepare a new connection for these indexes."""

    @property
    def _usable(self) -> bool:
        return self._connection is not None and self._connection.free

    async def state(self) -> PipelineState:
        """Return the stored state of the pipeline."""
        with speaking_of("target"):
            state = await self._pipelines.present(self.connection)
        self._chained.continue_with(state.lease)
        return state

    @property
    def _chained(self) -> Chain:
        assert self._end_of_chain is not None
        return self._end_of_chain

    @property
    def _held(self) -> Lease:
        return self._chained.held

    @contextlib.asynccontextmanager
    async def _chain(self) -> AsyncIterator[None]:
        """Run a transaction that moves the pipeline's row, and proposes where to."""
        connection = self.connection
        try:
            async with connection.transaction():
                yield
        except BaseException:
            self._chained.failed(answered=not connection.closed)
            raise
        self._chained.committed()

    async def interrupt(self) -> None:
        """Make the statements of this session fail and roll back, until cancelled: for a worker whose time is up.

        From now on the session is not opened again.
        """
        self._ending = True
        while True:
            if self._connection is not None:
                await interrupt(self._connection)
            await anyio.sleep(INTERRUPT_EVERY_S)

    @property
    def _application_name(self) -> str:
        return f"cdcsync apply {self._slot}"

    async def _connect(self) -> WatchedConnection:
        """Connect to a host that is not a standby, nor a former primary of the server of the last connection."""

        async def right(connection: WatchedConnection) -> None:
            self._pipelines.refuse_standby(connection)
            backend, last = connection.backend, self._server
            if backend is not None and last is not None and left_behind(backend, last):
                raise TargetUnavailable(
                    f"the server is a former primary: it is on timeline {backend.timeline}, and changes were applied on"
                    f" timeline {last.timeline}",
                    where=f"target ({connection.info.host}:{connection.info.port})",
                    hint=f"{fence('target')}; if it is to be the target again, start the worker again",
                )

        return await connect(
            self._dsn,
            "target",
            application_name=self._application_name,
            lock_wait_ms=LOCK_WAIT_MS,
            works=True,
            right=right,
        )

    async def aclose(self) -> None:
        """End the session, which frees the lock."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await _close(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _close(connection: Connection) -> None:
    with anyio.CancelScope(shield=True), contextlib.suppress(psycopg.Error):
        await connection.close()
