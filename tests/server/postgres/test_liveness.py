"""Sessions whose statements are looked for, and sessions that beat, which whoever uses them does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import psycopg
import pytest
import structlog
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster, free_port
from cdcsync.postgres import liveness, sessions, settings
from cdcsync.postgres.interrupts import hang_up
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import connect
from tests.support.indexes import until
from tests.support.poolers import pooled
from tests.support.proxies import Proxy
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def beats_each_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEATS", liveness.TCP_USER_TIMEOUT_MS / 2)


async def test_a_session_knows_when_its_server_was_started_as_the_server_tells_it(database: Database) -> None:
    async with await connect(database.dsn, "source") as connection:
        assert connection.backend is not None
        told = await (await connection.execute("SELECT pg_postmaster_start_time()")).fetchone()

    assert (connection.backend.started_at,) == told


LOOPBACK = "127.0.0.1"

HEARD = "SELECT state_change::text FROM pg_stat_activity WHERE application_name = %s"


async def test_a_session_that_beats_is_heard_from_while_it_has_nothing_to_do(database: Database) -> None:
    beating = await connect(database.dsn, "target", application_name="cdcsync test beats")
    silent = await connect(database.dsn, "target", application_name="cdcsync test is silent")
    asking = await connect(database.dsn, "target")
    beating.beat()

    async def heard(name: str) -> object:
        return await (await asking.execute(HEARD, [name])).fetchone()

    before, of_the_other = await heard("cdcsync test beats"), await heard("cdcsync test is silent")

    async def heard_again() -> bool:
        return await heard("cdcsync test beats") != before

    await until(heard_again)
    assert await heard("cdcsync test is silent") == of_the_other
    for connection in (beating, silent, asking):
        await connection.close()


async def test_a_session_that_beats_can_be_used_at_any_moment(database: Database) -> None:
    connection = await connect(database.dsn, "target")
    await connection.execute("CREATE TEMPORARY TABLE taken (n int)")
    connection.beat()
    for number in range(200):
        assert connection.free
        async with connection.transaction():
            assert not connection.free
            async with connection.cursor() as cursor, cursor.copy("COPY taken FROM STDIN") as copy:
                await copy.write_row((number,))
                await anyio.sleep(0.002)
                await copy.write_row((number,))
        await anyio.sleep(0.001)
    assert await (await connection.execute("SELECT count(*) FROM taken")).fetchone() == (400,)
    await connection.close()


# -- looking for a statement -----------------------------------------------------------------------------------------

ROLES = """
    CREATE ROLE plain LOGIN;
    CREATE ROLE owner;
    CREATE ROLE switched LOGIN IN ROLE owner;
    ALTER ROLE switched SET role = 'owner';
    CREATE ROLE untracked LOGIN;
    ALTER ROLE untracked SET track_activities = off;
"""

KINDS = ["plain", "switched", "untracked", "pooled"]
"""Roles of a session; the last kind is behind a pool in session mode, which has numbers of its own for processes."""


@pytest.fixture(scope="module")
def roles() -> Iterator[Cluster]:
    """A cluster with all of the roles."""
    with Cluster() as cluster:
        with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
            connection.execute(ROLES)
        yield cluster


@pytest.fixture
def dsn_of(roles: Cluster) -> Iterator[Callable[[str], str]]:
    """Tells how a session of a kind connects."""
    with ExitStack() as stack:

        def dsn(kind: str) -> str:
            if kind != "pooled":
                return roles.dsn(user=kind)
            # Where an unprivileged user may read.
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="cdcsync-pooler-", dir=os.sep + "tmp")))
            return stack.enter_context(pooled(roles.dsn(user="plain"), "session", directory))

        yield dsn


@contextlib.asynccontextmanager
async def waiting(connection: WatchedConnection, dsn: str) -> AsyncIterator[None]:
    """Have a statement of the connection wait on the server for a lock."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as blocking:
        await blocking.execute("SELECT pg_advisory_lock(1)")

        async def waits() -> bool:
            cursor = await blocking.execute("SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'")
            return cursor.rowcount > 0

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.execute, "SELECT pg_advisory_lock(1)")
            await until(waits)
            yield
            await blocking.execute("SELECT pg_advisory_unlock(1)")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_statement_that_the_server_works_on_may_take_any_time(
    roles: Cluster, dsn_of: Callable[[str], str], kind: str
) -> None:
    connection = await connect(dsn_of(kind), "target")
    async with waiting(connection, roles.dsn()):
        assert not await connection.unanswerable()
    await connection.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_statement_of_which_the_server_knows_nothing_is_lost(
    roles: Cluster, dsn_of: Callable[[str], str], kind: str
) -> None:
    connection = await connect(dsn_of(kind), "target")
    # The server waits for a statement; were one on its way for so long, it would never come.
    await until(connection.unanswerable)
    assert connection.backend is not None
    async with await psycopg.AsyncConnection.connect(roles.dsn(), autocommit=True) as administrator:
        ended = await administrator.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.backend.pid])
        assert await ended.fetchone() == (True,)
    assert await connection.unanswerable()
    await connection.close()


async def test_hosts_of_the_dsn_that_are_silent_say_nothing_of_the_server_that_answered(database: Database) -> None:
    ours = conninfo.conninfo_to_dict(database.dsn)
    silent = [free_port(), free_port()]
    hosts = {"host": ",".join([LOOPBACK] * 2 + [str(ours["host"])]), "port": f"{silent[0]},{silent[1]},{ours['port']}"}
    several = {**ours, **hosts, "target_session_attrs": "read-write", "tcp_user_timeout": 4000}
    # They refuse at first, which is quicker than to wait for them.
    connection = await connect(conninfo.make_conninfo("", **several), "target")
    with ExitStack() as stack:
        for port in silent:
            stack.enter_context(socket.create_server((LOOPBACK, port)))
        async with waiting(connection, database.dsn):
            assert not await connection.unanswerable()
    await connection.close()


async def test_a_dsn_that_leaves_the_time_limit_to_the_system_has_ours_for_statements(database: Database) -> None:
    connection = await connect(conninfo.make_conninfo(database.dsn, tcp_user_timeout=0), "target")
    assert connection.patience_s == liveness.TCP_USER_TIMEOUT_MS / 2000
    await connection.close()


REFUSALS = {
    "no connection to spare": "ALTER ROLE plain CONNECTION LIMIT 1",
    "no right to log in": "ALTER ROLE plain NOLOGIN",
    "a port that refuses": "",
    "another server": "",
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_look_that_is_refused_or_ends_elsewhere_proves_nothing(
    roles: Cluster, dsn_of: Callable[[str], str], database: Database, refusal: str
) -> None:
    dsn = dsn_of("plain")
    connection = await connect(dsn, "target")
    await until(connection.unanswerable)
    with psycopg.connect(roles.dsn(), autocommit=True) as administrator:
        # The session of the look that came before may still be ending, and counts.
        administrator.execute(REFUSALS[refusal].encode())
        if refusal == "a port that refuses":
            connection.watch(conninfo.make_conninfo(dsn, port=free_port()))
        if refusal == "another server":
            connection.watch(database.dsn)
        try:
            assert not await connection.unanswerable()
        finally:
            administrator.execute("ALTER ROLE plain LOGIN CONNECTION LIMIT -1")
    await connection.close()


async def test_a_server_that_was_started_again_has_lost_every_statement(cluster: Cluster) -> None:
    connection = await connect(cluster.dsn(), "target")
    cluster.stop()
    cluster.start()
    assert await connection.unanswerable()
    await connection.close()


# -- sessions that are left behind -----------------------------------------------------------------------------------


@pytest.mark.proof_from(2)
@pytest.mark.parametrize("how", ["given up", "cancelled"])
@pytest.mark.parametrize("kind", ["plain", "switched", "pooled"])
async def test_a_session_that_is_left_behind_in_a_transaction_is_ended_on_the_server_with_its_locks(
    roles: Cluster,
    dsn_of: Callable[[str], str],
    make_proxy: Callable[[int], Proxy],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    how: str,
) -> None:
    logged = structlog.testing.CapturingLogger()
    monkeypatch.setattr(liveness, "log", logged)
    dsn = conninfo.conninfo_to_dict(dsn_of(kind))
    proxy = make_proxy(int(str(dsn["port"])))
    dsn |= {"host": "127.0.0.1", "port": proxy.port, "tcp_user_timeout": 1_000}
    connection = await connect(conninfo.make_conninfo("", **dsn), "target", application_name="cdcsync test")
    async with (
        await psycopg.AsyncConnection.connect(roles.dsn(), autocommit=True) as administrator,
        anyio.create_task_group() as tasks,
    ):

        async def leave() -> None:
            with pytest.raises(psycopg.OperationalError):
                await connection.execute("SELECT")

        async def free() -> bool:
            cursor = await administrator.execute("SELECT pg_try_advisory_xact_lock(2)")
            return await cursor.fetchone() == (True,)

        async def told() -> bool:
            return [(one.args, one.kwargs["session"]) for one in logged.calls] == [
                (("lost_session_ended",), "cdcsync test")
            ]

        await connection.execute("BEGIN; SELECT pg_advisory_xact_lock(2)")
        assert not await free()
        proxy.freeze()
        proxy.heal()
        if how == "given up":
            await leave()
        else:
            tasks.start_soon(connection.execute, "SELECT")
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await connection.close()
            await until(free)
            await until(told)


async def _is_quiet(connection: WatchedConnection, silent: anyio.Event) -> None:
    await silent.wait()
    await connection.execute("SELECT")


async def _copies(connection: WatchedConnection, silent: anyio.Event) -> None:
    async with connection.cursor() as cursor, cursor.copy("COPY pg_temp.left_behind FROM STDIN") as copy:
        await silent.wait()
        await copy.write("1\n")


async def _is_sent_much(connection: WatchedConnection, silent: anyio.Event) -> None:
    await connection.execute("SELECT repeat('x', 1000) FROM pg_advisory_xact_lock(3), generate_series(1, 100000)")


async def _works(connection: WatchedConnection, silent: anyio.Event) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock(3)")


@pytest.mark.parametrize(
    ("leave", "begun"),
    [
        (_is_quiet, "idle in transaction SELECT pg_advisory_xact_lock(2)"),
        (_copies, "active COPY"),
        (_is_sent_much, "active SELECT repeat"),
        (_works, "active SELECT pg_advisory_xact_lock(3)"),
    ],
)
async def test_a_transaction_that_is_left_behind_is_ended_whatever_the_server_waits_for(
    database: Database,
    make_proxy: Callable[[int], Proxy],
    leave: Callable[[WatchedConnection, anyio.Event], Awaitable[None]],
    begun: str,
) -> None:
    dsn = conninfo.conninfo_to_dict(database.dsn)
    proxy = make_proxy(int(str(dsn["port"])))
    dsn |= {"host": "127.0.0.1", "port": proxy.port, "tcp_user_timeout": 1_000}
    connection = await connect(conninfo.make_conninfo("", **dsn), "target", application_name="cdcsync test")
    pid = connection.info.backend_pid
    await connection.execute("CREATE TEMP TABLE left_behind (n int)")
    await connection.execute("BEGIN")
    await connection.execute("SELECT pg_advisory_xact_lock(2)")
    silent = anyio.Event()
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as administrator:

        async def fails() -> None:
            with pytest.raises(psycopg.OperationalError):
                await leave(connection, silent)

        async def has_begun() -> bool:
            cursor = await administrator.execute(
                "SELECT starts_with(state || ' ' || query, %s) FROM pg_stat_activity WHERE pid = %s", [begun, pid]
            )
            return await cursor.fetchone() == (True,)

        async def gone() -> bool:
            cursor = await administrator.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid])
            return await cursor.fetchone() is None

        await administrator.execute("SELECT pg_advisory_lock(3)")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fails)
            await until(has_begun)
            proxy.freeze()
            proxy.heal()
            silent.set()
            await anyio.wait_all_tasks_blocked()
            with contextlib.suppress(psycopg.OperationalError):  # who waited may have found out by itself
                hang_up(connection.pgconn.socket)
        if leave is _works:
            await anyio.sleep(2 * connection.patience_s)  # it is looked at while it works, and again
        await administrator.execute("SELECT pg_advisory_unlock(3)")
        await until(gone)
    await connection.close()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_the_server_ends_what_a_process_that_has_ended_left_behind_in_a_transaction(
    database: Database, make_proxy: Callable[[int], Proxy], monkeypatch: pytest.MonkeyPatch, side: settings.Side
) -> None:
    monkeypatch.setattr(sessions, "SAFETY", settings.SAFETY.replace("120s", "100ms"))
    dsn = conninfo.conninfo_to_dict(database.dsn)
    proxy = make_proxy(int(str(dsn["port"])))
    connection = await connect(conninfo.make_conninfo("", **dsn | {"host": "127.0.0.1", "port": proxy.port}), side)
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as administrator:

        async def free() -> bool:
            cursor = await administrator.execute("SELECT pg_try_advisory_xact_lock(3)")
            return await cursor.fetchone() == (True,)

        await connection.execute("BEGIN; SELECT pg_advisory_xact_lock(3)")
        proxy.freeze()
        connection.pgconn.finish()  # as the end of the process does, of which the server hears nothing
        await until(free)


async def test_a_session_that_is_left_behind_outside_of_a_transaction_is_left_to_the_server(
    database: Database, make_proxy: Callable[[int], Proxy]
) -> None:
    proxy = make_proxy(int(str(conninfo.conninfo_to_dict(database.dsn)["port"])))
    dsn = conninfo.make_conninfo(database.dsn, host="127.0.0.1", port=proxy.port, tcp_user_timeout=1_000)
    connection = await connect(dsn, "target", application_name="cdcsync test")
    proxy.freeze()
    proxy.heal()
    with pytest.raises(psycopg.OperationalError):
        await connection.execute("SELECT")
    # An earlier test's loop may have been closed before its own were done.
    assert not liveness._ENDING & asyncio.all_tasks()
