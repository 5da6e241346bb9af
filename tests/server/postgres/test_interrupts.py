"""Interrupts: a statement that waits fails, here and on the server."""

from __future__ import annotations

import socket

import anyio
import anyio.to_thread
import psycopg
import pytest

from cdcsync.postgres.interrupts import cancelled_by, connected, hang_up, interrupted_by
from cdcsync.postgres.sessions import connect
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'"


async def active(database: Database) -> None:
    """Wait until the server runs the statement."""
    while database.execute(WAITING) == [(0,)]:  # noqa: ASYNC110 # the server tells no event
        await anyio.sleep(0.01)


async def test_an_event_ends_the_statement_on_the_server_too(database: Database) -> None:
    stop = anyio.Event()

    async def stop_soon() -> None:
        await active(database)
        stop.set()

    async with await connect(database.dsn, "target") as connection, anyio.create_task_group() as tasks:
        tasks.start_soon(stop_soon)
        async with interrupted_by(stop, connection):
            with pytest.raises(psycopg.errors.QueryCanceled):
                await connection.execute("SELECT pg_sleep(600)")
    assert database.execute(WAITING) == [(0,)]


async def test_a_block_that_ends_by_itself_is_not_interrupted(database: Database) -> None:
    async with await connect(database.dsn, "target", autocommit=True) as connection:
        async with interrupted_by(anyio.Event(), connection):
            cursor = await connection.execute("SELECT 1")
        assert await cursor.fetchone() == (1,)
        assert not connection.closed


async def test_whoever_waits_on_a_connection_that_is_hung_up_sees_that_it_broke(database: Database) -> None:
    async with await connect(database.dsn, "target") as connection, anyio.create_task_group() as tasks:

        async def hang_up_soon() -> None:
            await active(database)
            hang_up(connection.pgconn.socket)

        tasks.start_soon(hang_up_soon)
        with pytest.raises(psycopg.OperationalError):
            await connection.execute("SELECT pg_sleep(600)")


async def test_a_block_is_left_where_it_is_once_the_event_is_set() -> None:
    stop, reached = anyio.Event(), []
    async with cancelled_by(stop):
        reached.append("before")
        stop.set()
        await anyio.sleep_forever()
        reached.append("after")
    assert reached == ["before"]


@pytest.mark.parametrize("by", ["a cancellation", "its time limit"])
async def test_a_login_that_is_given_up_is_closed_at_once_although_its_error_is_kept(by: str) -> None:
    kept: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        limit_s = 600 if by == "a cancellation" else 2
        settings = f"host=127.0.0.1 port={silent.getsockname()[1]} dbname=any user=any connect_timeout={limit_s}"

        async def attempt() -> None:
            try:
                await connected(psycopg.AsyncConnection, settings)
            except psycopg.errors.ConnectionTimeout as error:
                kept.append(error)
            except anyio.get_cancelled_exc_class() as error:
                kept.append(error)
                raise

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attempt)
            far, _ = await anyio.to_thread.run_sync(silent.accept)
            if by == "a cancellation":
                tasks.cancel_scope.cancel()
        with far:
            far.settimeout(30)
            while await anyio.to_thread.run_sync(far.recv, 1024):
                pass  # what a login begins with
    assert len(kept) == 1
