"""A few sessions shared by the tasks of an application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from cdcsync.errors import UsageError
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.postgres.settings import Side


class Pool:
    """Up to `size` sessions, opened when they are needed and kept. For any number of tasks of one event loop.

    A session that broke is opened again by the next task that takes it. The session that was used last is taken
    first, so that no more stay busy than are needed.
    """

    def __init__(self, dsn: str, side: Side, *, size: int, application_name: str) -> None:
        self._room = anyio.CapacityLimiter(size)
        self._idle = [Session(dsn, side, application_name=application_name) for _ in range(size)]
        self._closed = False
        self._process: int | None = None
        """The process that has used it: a copy of that, by a fork, has its sockets, and must not write to them."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop that has used it: a task of another one that waits here for its turn would never wake."""

    def refuse_strangers(self) -> None:
        """See that the caller is of the process and the event loop that first used what an index keeps open.

        :raises UsageError: it is not.
        """
        if self._inherited():
            raise used_before_fork("cdcsync.Index")
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise UsageError(
                "it belongs to another event loop",
                where="cdcsync.Index",
                hint="open one in each event loop, or use cdcsync.sync.Index, which any thread may call",
            )
        self._process, self._loop = os.getpid(), loop

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection in autocommit; waits while all are lent.

        :raises SourceUnavailable, TargetUnavailable, SetupError: a new one cannot be opened.
        :raises UsageError: the pool is closed, or was used before a fork or in another event loop.
        """
        self.refuse_strangers()
        async with self._room:
            if self._closed:
                raise UsageError("it is closed", where="cdcsync.Index", hint="use it inside of its `with` block")
            session = self._idle.pop()
            try:
                yield await session.connection()
            finally:
                if self._closed:
                    with anyio.CancelScope(shield=True):
                        await session.aclose()
                self._idle.append(session)

    async def aclose(self) -> None:
        """Close the idle connections now, and the others when they come back; after a fork, let go of them."""
        self._closed = True
        if self._inherited():
            return
        for session in self._idle:
            await session.aclose()

    def _inherited(self) -> bool:
        return self._process not in (None, os.getpid())


def used_before_fork(where: str) -> UsageError:
    """Return the error of a process that uses what its parent has opened."""
    return UsageError(
        "it was opened before this process was forked",
        where=where,
        hint="open it in each process, after the fork: in gunicorn's post_fork, or in the function that a worker runs",
    )
