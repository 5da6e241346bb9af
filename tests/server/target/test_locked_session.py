"""The session under the pipeline's lock: one worker at a time, through broken connections and successors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest
from psycopg import conninfo

import cdcsync.target.locked_session as session_module
from cdcsync.demo.cluster import Cluster
from cdcsync.errors import LeaseLost, RunError, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.postgres import liveness
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.locked_session import worker_name
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.session import ApplySession
from tests.support.expiries import EXPIRIES, expire
from tests.support.indexes import SCHEMA, changes, document, until
from tests.support.outages import make_target
from tests.support.sessions import SLOT, SPECS, Pipeline, apply

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_session_is_open_to_one_worker_at_a_time(locked: Pipeline) -> None:
    first, second = locked.session(), locked.session()
    assert await first.try_open()
    assert not await second.try_open()
    fence = (await first.state()).fence
    assert (await first.state()).worker == worker_name()

    await first.aclose()

    await until(second.try_open)  # the server may still be ending the first one
    assert (await second.state()).fence > fence


async def test_who_does_not_get_the_lock_leaves_no_session_behind(locked: Pipeline) -> None:
    first = await locked.open()
    for _ in range(3):
        assert not await locked.session().try_open()
    # A session that was closed may still be ending; one that was not would stay for ever.

    async def alone() -> bool:
        found = await locked.rows("SELECT pid FROM pg_stat_activity WHERE application_name = 'cdcsync apply slot'")
        return found == [(first.connection.info.backend_pid,)]

    await until(alone)


async def test_a_pipeline_that_was_not_set_up_cannot_be_opened_and_stays_unlocked(locked: Pipeline) -> None:
    await locked.connection.execute("DELETE FROM cdcsync.indexes; DELETE FROM cdcsync.pipelines")
    session = locked.session()
    with pytest.raises(RunError, match="row is gone"):
        await session.try_open()
    await locked.connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('slot', 'p')")
    other = locked.session()
    # The refused session's end takes the server a moment.
    await until(other.try_open)
    assert (await other.state()).fence


async def test_a_session_that_broke_is_opened_again_under_the_same_fence(locked: Pipeline) -> None:
    session = await locked.open()
    await apply(session, Lsn(10), articles=changes(document("1", "a")))
    fence = await locked.rows("SELECT fence FROM cdcsync.pipelines")
    await locked.terminate(session)

    with pytest.raises(TargetUnavailable):
        await apply(session, Lsn(20), articles=changes(document("2", "b")))
    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(20), articles=changes(document("2", "b")))
    await session.reopen(SPECS)

    assert await locked.rows("SELECT fence FROM cdcsync.pipelines") == fence
    assert await session.writer("articles").stored_hashes([("2",)]) == {}
    await apply(session, Lsn(20), articles=changes(document("2", "b")))
    assert await locked.rows("SELECT id FROM cdcsync.articles_chunks ORDER BY id") == [(1,), (2,)]
    assert await locked.checkpoint() == 20
    assert not await locked.session().try_open()


@pytest.mark.parametrize("code", EXPIRIES)
async def test_a_session_that_a_time_limit_ended_is_opened_again_under_the_same_fence(
    locked: Pipeline, code: str
) -> None:
    session = await locked.open()
    fence = (await session.state()).fence
    await expire(session.connection, code)
    with pytest.raises(TargetUnavailable):
        await session.apply({}, (), Lsn(7), commit_time=None, caught_up=True)
    await session.ensure(SPECS)
    await session.apply({}, (), Lsn(7), commit_time=None, caught_up=True)
    assert ((await session.state()).fence, (await session.state()).checkpoint) == (fence, Lsn(7))


async def test_a_session_is_not_opened_again_behind_a_successor(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    first = await locked.open()
    await locked.broken(first)
    second = await locked.open()
    with pytest.raises(LeaseLost, match="taken over"):
        await first.reopen(SPECS)

    # Nor when the successor has come and gone.
    await second.aclose()
    with pytest.raises(LeaseLost, match="taken over"):
        await first.reopen(SPECS)
    # What was refused holds no lock.
    third = locked.session()
    await until(third.try_open)
    assert (await third.state()).fence > second._held.fence > first._held.fence


async def test_a_lock_that_the_server_has_not_freed_yet_is_waited_for(
    locked: Pipeline,
    connect_target: Callable[[], Awaitable[Connection]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    session = await locked.open()
    await locked.broken(session)
    lingering = await connect_target()
    assert await Pipelines(SCHEMA, SLOT).try_lock(lingering)

    with pytest.raises(TargetUnavailable, match="still held"):
        await session.reopen(SPECS)
    await lingering.execute("SELECT pg_advisory_unlock_all()")
    await session.reopen(SPECS)
    await apply(session, Lsn(10))
    assert await locked.checkpoint() == 10


async def test_a_last_session_that_the_server_is_still_ending_is_waited_for(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 60.0)
    last = await locked.open()
    # As far as the server goes, this is a session whose end takes it long.
    session = ApplySession(locked.dsn, SCHEMA, SLOT, before=last)
    stranger = locked.session()
    async with session, anyio.create_task_group() as tasks:
        tasks.start_soon(session.try_open)
        await until(partial(waits_for_the_lock, locked))
        assert not await stranger.try_open()
        assert stranger.holder == last.connection.info.backend_pid
        await last.aclose()
    assert session._held.fence > last._held.fence


async def waits_for_the_lock(locked: Pipeline) -> bool:
    return bool(await locked.rows("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


async def test_a_last_session_that_the_server_does_not_end_is_ended(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    last = await locked.open()
    async with ApplySession(locked.dsn, SCHEMA, SLOT, before=last) as session:
        assert await session.try_open()
        with pytest.raises(psycopg.OperationalError):
            await last.connection.execute("SELECT 1")


async def test_the_session_of_a_worker_that_took_over_is_not_taken_for_our_last_one(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server may give it the pid that ours had.
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    last = await locked.open()
    await last.aclose()
    other = await locked.open()
    last._pid = other._pid
    session = ApplySession(locked.dsn, SCHEMA, SLOT, before=last)
    assert not await session.try_open()
    assert session.holder == other._pid
    assert (await other.state()).fence == other._held.fence


async def test_a_pipeline_whose_row_is_gone_says_so(locked: Pipeline) -> None:
    session = await locked.open()
    await locked.connection.execute("DELETE FROM cdcsync.indexes; DELETE FROM cdcsync.pipelines")
    with pytest.raises(RunError, match="row is gone"):
        await session.state()
    with pytest.raises(RunError, match="row is gone"):
        await apply(session, Lsn(10))


async def test_a_closed_session_may_be_closed_again_and_frees_the_lock(locked: Pipeline) -> None:
    async with locked.session() as session:
        assert await session.try_open()
    await session.aclose()
    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(10))
    again = locked.session()
    await until(again.try_open)
    assert (await again.state()).fence > session._held.fence


async def test_a_target_that_is_away_is_waited_for() -> None:
    session = ApplySession("postgresql://postgres@127.0.0.1:1/nowhere", SCHEMA, SLOT)
    with pytest.raises(TargetUnavailable):
        await session.try_open()


async def test_a_session_that_was_refused_a_write_is_opened_again(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await locked.open()
    await session.prepare([])  # all indexes are paused: it makes no tables of its own that would be refused
    await session.connection.execute("SET default_transaction_read_only = on")
    with pytest.raises(TargetUnavailable, match="read-only"):
        await apply(session, Lsn(0x100))
    monkeypatch.setattr(liveness, "REFUSED_S", 0.0)
    await session.ensure([])
    await apply(session, Lsn(0x100))
    assert await locked.checkpoint() == Lsn(0x100)


async def test_a_session_goes_past_a_standby_to_the_primary(make_cluster: Callable[..., Cluster]) -> None:
    primary = make_cluster()
    dsn = make_target(primary)
    async with await connect(dsn, "target") as connection:
        await create_shared(connection, SCHEMA)
        await Pipelines(SCHEMA, SLOT).ensure(connection, "publication")
    with primary.standby() as standby:
        several = conninfo.make_conninfo(dsn, host="127.0.0.1,127.0.0.1", port=f"{standby.port},{primary.port}")
        async with ApplySession(several, SCHEMA, SLOT) as session:
            assert await session.try_open()
            assert session.connection.info.port == primary.port
            await session.aclose()
            await session.reopen([])
            assert session.connection.info.port == primary.port
            primary.stop()
            with pytest.raises(TargetUnavailable, match="is a standby at the moment"):
                await session.reopen([])
