"""Apply sessions on a target that is set up for two indexes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from cdcsync.lsn import Lsn
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import Applied, ChangeSet
from cdcsync.postgres.sessions import Connection
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.session import ApplySession
from tests.support.indexes import SCHEMA, make_spec, until
from tests.support.servers import Database

SLOT = "slot"
SPECS = [make_spec(search=None), make_spec(name="notes", key={"id": "text"}, carried={}, search=None)]


class Pipeline:
    """A target that is set up for two indexes, and the sessions opened on it."""

    def __init__(self, target: Database, connection: Connection, stack: contextlib.AsyncExitStack) -> None:
        self.connection = connection
        self.dsn = target.dsn
        self._target = target
        self._stack = stack

    def session(self) -> ApplySession:
        session = ApplySession(self._target.dsn, SCHEMA, SLOT)
        self._stack.push_async_callback(session.aclose)
        return session

    async def open(self) -> ApplySession:
        session = self.session()
        await until(session.try_open)  # the server may still be ending the session before this one
        await session.prepare(SPECS)
        return session

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        cursor = await self.connection.execute(statement.encode())
        return await cursor.fetchall()

    async def checkpoint(self) -> Lsn | None:
        state = await Pipelines(SCHEMA, SLOT).read(self.connection)
        assert state is not None
        return state.checkpoint

    async def terminate(self, session: ApplySession) -> None:
        """End the session on the server, as an administrator or a crash would, and wait until it is gone."""
        await self.connection.execute("SELECT pg_terminate_backend(%s, 10000)", [session.connection.info.backend_pid])

    async def broken(self, session: ApplySession) -> None:
        """Break the session so that it knows."""
        await self.terminate(session)
        with pytest.raises(psycopg.OperationalError):
            await session.connection.execute("SELECT 1")


async def apply(
    session: ApplySession,
    checkpoint: Lsn | None = None,
    pages: Sequence[PageEnd] = (),
    **of_index: ChangeSet,
) -> dict[str, Applied]:
    """Commit changes of indexes."""
    return await session.apply(of_index, pages, checkpoint, commit_time=None, caught_up=False)
