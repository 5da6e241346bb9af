"""Snapshots from before a moment: whose they are, and which do not count."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import psycopg
import pytest

from cdcsync.postgres.horizons import read_horizon, snapshots
from cdcsync.postgres.queries import fetch_row, fetch_value
from cdcsync.postgres.sessions import Connection, connect
from tests.support.clocks import set_back
from tests.support.indexes import until
from tests.support.roles import Roles, grant
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]

WORKER = "the worker's role"


@pytest.fixture
def target(roles: Roles, make_database: Callable[[], Database]) -> Database:
    """A database that goes before the roles."""
    return make_database()


@pytest.fixture(params=["a superuser", WORKER])
async def connection(request: pytest.FixtureRequest, roles: Roles, target: Database) -> AsyncIterator[Connection]:
    """A session that asks, of a superuser or of the role that roles.sql makes; the others are of a superuser."""
    dsn = target.dsn
    if request.param == WORKER:
        role = roles.name("target")
        grant(target, target_role=role)
        dsn = roles.dsn(target, role)
    async with await connect(dsn, "target") as opened:
        yield opened


REPEATABLE = "BEGIN ISOLATION LEVEL REPEATABLE READ"


@asynccontextmanager
async def reading(dsn: str) -> AsyncIterator[int]:
    """Keep a snapshot during the block; yields the session's pid."""
    async with await connect(dsn, "target", application_name="report") as reader:
        await reader.execute(REPEATABLE)
        await reader.execute("SELECT 1")
        yield reader.info.backend_pid


async def knows_ages(connection: Connection) -> bool:
    """Whether a session may know when the transactions of other roles began."""
    return bool(await fetch_value(connection, "SELECT pg_has_role('pg_read_all_stats', 'USAGE')"))


async def test_a_snapshot_from_before_names_its_session(connection: Connection, target: Database) -> None:
    known = await knows_ages(connection)
    async with reading(target.dsn) as pid:
        await connection.execute("SELECT pg_current_xact_id()")  # commits
        (found,) = await snapshots(connection, before=await read_horizon(connection))
        assert f"pid {pid} (report, role " in str(found)
        assert ("which has been open for 00:00:" in str(found)) is known
        assert found.remedy.endswith(f"SELECT pg_terminate_backend({pid})")
        assert [one.pid for one in await snapshots(connection)] == [pid]
        assert [one.pid for one in await snapshots(connection, open_for_s=3_600)] == ([] if known else [pid])


@pytest.mark.parametrize("open_for_s", [0.0, 600.0])
async def test_a_snapshot_from_before_the_clock_went_back_is_an_old_one(
    connection: Connection, target: Database, open_for_s: float
) -> None:
    async with reading(target.dsn) as pid:
        await set_back(connection, target)
        assert [one.pid for one in await snapshots(connection, open_for_s=open_for_s)] == [pid]
    assert await snapshots(connection) == []


@pytest.mark.parametrize("kind", ["client", "prepared"])
async def test_a_newer_snapshot_is_not_from_before_even_if_an_older_transaction_is_still_open(
    connection: Connection, target: Database, kind: str
) -> None:
    writer = target.connect()
    with writer:
        writer.execute("BEGIN; SELECT pg_current_xact_id()")
        if kind == "prepared":
            writer.execute("PREPARE TRANSACTION 'an older one'")
        await connection.execute("SELECT pg_current_xact_id()")  # commits
        horizon = await read_horizon(connection)
        async with reading(target.dsn):
            assert await snapshots(connection, before=horizon) == []
            assert len(await snapshots(connection)) == 1
        writer.execute("ROLLBACK PREPARED 'an older one'" if kind == "prepared" else "ROLLBACK")


async def test_a_transaction_from_before_that_takes_new_snapshots_has_none_from_before(
    connection: Connection, connect_target: ConnectTarget, target: Database
) -> None:
    reader = await connect_target()
    async with anyio.create_task_group() as tasks:
        with target.connect() as holder:
            holder.execute("SELECT pg_advisory_lock(1)")
            await reader.execute("BEGIN; SELECT 1")
            horizon = await read_horizon(connection)
            await connection.execute("SELECT pg_current_xact_id()")  # commits
            tasks.start_soon(reader.execute, "SELECT pg_advisory_lock(1)")
            await until(lambda: snapshots(connection))
            assert await snapshots(connection, before=horizon) == []


async def test_a_session_of_another_database_reads_none_of_our_tables(connection: Connection, target: Database) -> None:
    async with reading(psycopg.conninfo.make_conninfo(target.dsn, dbname="postgres")):
        assert await snapshots(connection) == []


async def test_a_session_that_builds_an_index_reads_no_other_table_meanwhile(
    connection: Connection, connect_target: ConnectTarget, target: Database
) -> None:
    target.execute("CREATE TABLE public.notes AS SELECT 1 AS id")
    target.execute(
        "CREATE FUNCTION public.waits(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN $1; END'"
    )
    waits = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
        " AND backend_xmin IS NOT NULL"
    )
    builder, watcher = await connect_target(), await connect_target()

    async def blocked() -> bool:
        return await fetch_row(watcher, waits) is not None

    async with anyio.create_task_group() as tasks:
        with target.connect() as holder:
            holder.execute("SELECT pg_advisory_lock(1)")
            tasks.start_soon(builder.execute, "CREATE INDEX ON public.notes (public.waits(id))")
            await until(blocked)
            assert await snapshots(connection) == []
