"""The connections to the target that the embed loops of a worker share.

A connection serves any index: what it needs for one, a stage for vectors, is made when it first serves that index.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import psycopg

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.postgres.temporary import TemporaryTables
from cdcsync.target.backlog import Backlog, storing_sessions


class _Session:
    """A connection with the backlogs that it has served."""

    def __init__(self, connection: WatchedConnection) -> None:
        self.connection = connection
        self.stages = TemporaryTables(connection)
        self._backlogs: dict[tuple[str, int], Backlog] = {}

    async def backlog(self, schema: str, spec: IndexSpec, alike: Sequence[IndexSpec]) -> Backlog:
        one = spec.name, spec.generation
        if one not in self._backlogs:
            backlog = Backlog(self.connection, schema, spec, alike)
            await backlog.open()
            self._backlogs[one] = backlog
        return self._backlogs[one]


class BacklogPool:
    """Lends connections, opened when they are needed, and closes those that broke.

    :param generations: how many generations of vectors share it, those of all indexes.
    """

    def __init__(self, dsn: str, schema: str, generations: int) -> None:
        self._dsn = dsn
        self._schema = schema
        self._free = anyio.Semaphore(storing_sessions(generations))
        self._idle: list[_Session] = []
        self.problems: dict[str, str] = {}
        """Why vectors of an index wait, as its embed loop noted it."""

    @asynccontextmanager
    async def backlog(self, spec: IndexSpec, alike: Sequence[IndexSpec] = ()) -> AsyncIterator[Backlog]:
        """Lend a connection to an index's backlog that nobody else uses meanwhile, as soon as there is one.

        :param alike: see `Backlog`; those of a generation are always the same.
        :raises TargetUnavailable, SetupError: as `connect`.
        """
        async with self._lent() as session:
            yield await session.backlog(self._schema, spec, alike)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection for something else.

        :raises TargetUnavailable, SetupError: as `connect`.
        """
        async with self._lent() as session:
            yield session.connection

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[_Session]:
        async with self._free:
            # Each in its turn, so that none is left alone with its stages.
            session = self._idle.pop(0) if self._idle else await self._open()
            try:
                with speaking_of("target"):
                    await session.stages.freeze()
                yield session
            finally:
                self._idle.append(session)
                if not session.connection.free:
                    # The cause that broke this connection has most likely broken the others.
                    await self.aclose()

    async def _open(self) -> _Session:
        opened = await connect(
            self._dsn, "target", application_name="cdcsync embed", lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
        )
        return _Session(opened)

    async def aclose(self) -> None:
        """Close the connections that nobody uses; the next use opens another."""
        idle, self._idle = self._idle, []
        with anyio.CancelScope(shield=True):
            for session in idle:
                with contextlib.suppress(psycopg.Error):
                    await session.connection.close()
