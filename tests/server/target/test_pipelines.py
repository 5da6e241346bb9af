"""The pipeline's row: one worker at a time, fenced, and a checkpoint that is a chain and only moves forward."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import anyio
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import LeaseLost, RunError, TargetRewound, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.chain import Lease
from cdcsync.model.pauses import Pause
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target import pipelines
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines, PipelineState
from tests.support.clocks import set_back
from tests.support.indexes import SCHEMA, until, until_blocked
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]

COMMITTED = datetime(2024, 2, 29, 12, tzinfo=UTC)


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target with our shared tables and the row of the pipeline `slot`."""
    connection = await connect_target()
    await create_shared(connection, SCHEMA)
    await PIPELINES.ensure(connection, "publication")
    return connection


PIPELINES = Pipelines(SCHEMA, "slot")
INSERTED = "SELECT pg_current_wal_insert_lsn()::text"


async def state(connection: Connection) -> PipelineState:
    found = await PIPELINES.read(connection)
    assert found is not None
    return found


async def test_a_new_pipeline_has_no_checkpoint_and_stands_under_no_fence(connection: Connection) -> None:
    found = await state(connection)
    assert (found.checkpoint, found.system_identifier, found.timeline, found.fence, found.worker) == (
        None,
        None,
        None,
        0,
        None,
    )
    assert (found.commit_time, found.caught_up_at) == (None, None)
    assert found.updated_at.tzinfo is not None


async def test_a_pipeline_that_was_never_set_up_has_no_state(connection: Connection) -> None:
    assert await Pipelines(SCHEMA, "other").read(connection) is None


async def test_setting_up_again_keeps_the_state_and_follows_the_publication(connection: Connection) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    await PIPELINES.begin_at(connection, lease, Lsn(5), "sys", 1)
    before = await state(connection)

    await PIPELINES.ensure(connection, "another")

    assert await state(connection) == before
    cursor = await connection.execute("SELECT slot, publication FROM cdcsync.pipelines")
    assert await cursor.fetchall() == [("slot", "another")]


async def test_why_indexes_without_a_row_are_paused_is_kept_since_the_first_time_until_they_have_one(
    connection: Connection,
) -> None:
    assert (await state(connection)).waiting == {}
    refused = {"wide": Pause("too many columns", "carry fewer"), "held": Pause("its table is locked")}
    await PIPELINES.note_waiting(connection, refused, ["wide", "held", "sound"])
    first = (await state(connection)).waiting
    assert {name: str(pause) for name, pause in first.items()} == {
        "wide": "too many columns; carry fewer",
        "held": "its table is locked",
    }
    # A note stays while the index is tried again; another reason takes its place.
    await PIPELINES.note_waiting(connection, {"wide": Pause("still too many")}, ["wide", "held"])
    wide, held = (await state(connection)).waiting["wide"], (await state(connection)).waiting["held"]
    assert (wide.reason, wide.remedy, wide.since) == ("still too many", None, first["wide"].since)
    assert held == first["held"]
    await PIPELINES.note_waiting(connection, {}, ["wide"])
    assert set((await state(connection)).waiting) == {"wide"}
    await PIPELINES.note_waiting(connection, {}, [])
    assert (await state(connection)).waiting == {}


# -- the lock --------------------------------------------------------------------------------------------------------


async def test_one_session_holds_the_lock_until_it_ends(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    first, second = await connect_target(), await connect_target()
    assert await PIPELINES.holder(connection) is None

    assert await PIPELINES.try_lock(first)
    assert not await PIPELINES.try_lock(second)
    assert await PIPELINES.holder(connection) == first.info.backend_pid
    # Other pipelines are not concerned.
    assert await Pipelines(SCHEMA, "other").try_lock(second)
    assert await Pipelines("elsewhere", "slot").try_lock(second)
    assert await PIPELINES.holder(connection) == first.info.backend_pid

    await first.execute("SELECT pg_advisory_unlock_all()")
    assert await PIPELINES.try_lock(second)
    assert await PIPELINES.holder(connection) == second.info.backend_pid


async def test_a_session_of_our_login_can_be_ended_also_in_a_role_to_which_it_was_switched(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn(), autocommit=True) as administrator:
        administrator.execute(
            "CREATE ROLE owner; CREATE ROLE plain LOGIN; CREATE ROLE switched LOGIN IN ROLE owner;"
            " ALTER ROLE switched SET role = 'owner'"
        )
    name = "cdcsync apply slot"
    for role in ("plain", "switched"):
        asking = await connect(cluster.dsn(user=role), "target")

        async def held(name: str, role: str = role) -> tuple[Connection, int]:
            holding = await connect(cluster.dsn(user=role), "target", application_name=name)
            assert await PIPELINES.try_lock(holding)
            assert holding.backend is not None
            return holding, holding.backend.pid

        first, pid = await held(name)
        await PIPELINES.end_session(asking, pid, name)
        assert await PIPELINES.holder(asking) is None
        second, pid = await held("cdcsync migrate")  # a command does a worker's work where none runs

        async def silent_ended(asking: Connection = asking) -> bool:
            return await PIPELINES.end_silent(asking, 0.0)

        # It may still be busy for a moment with the statement that took the lock.
        await until(silent_ended)
        assert await PIPELINES.holder(asking) is None
        for connection in (first, second, asking):
            await connection.close()


@pytest.mark.parametrize("within", [False, True], ids=["", "in a transaction"])
async def test_a_session_that_the_servers_clock_calls_silent_is_watched_before_it_is_ended(
    connection: Connection, target: Database, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """As after the clock was set, or the server's machine was suspended."""
    watched = []

    async def heard(seconds: float) -> None:
        watched.append(seconds)
        await holding.execute("SELECT")

    async with await connect(target.dsn, "target", application_name="cdcsync apply slot") as holding:
        assert await PIPELINES.try_lock(holding)
        with monkeypatch.context() as patched:
            patched.setattr(pipelines, "anyio", SimpleNamespace(sleep=heard))
            while not watched:  # it may still be busy for a moment with the statement that took the lock
                async with connection.transaction() if within else nullcontext():
                    assert not await PIPELINES.end_silent(connection, 0.0)
        assert await PIPELINES.holder(connection) == holding.info.backend_pid


async def test_a_session_that_was_last_heard_before_the_clock_went_back_is_ended_after_the_same_time(
    connection: Connection, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(seconds: float) -> None:
        pass

    async def ended() -> bool:
        return await PIPELINES.end_silent(connection, 600.0)

    async with await connect(target.dsn, "target", application_name="cdcsync apply slot") as holding:
        assert await PIPELINES.try_lock(holding)
        await set_back(connection, target)
        with monkeypatch.context() as patched:
            patched.setattr(pipelines, "anyio", SimpleNamespace(sleep=silent))
            await until(ended)
        assert await PIPELINES.holder(connection) is None


# -- the fence -------------------------------------------------------------------------------------------------------


async def test_each_worker_that_takes_over_raises_the_fence(connection: Connection) -> None:
    first = (await PIPELINES.take_over(connection, "first")).fence
    second = (await PIPELINES.take_over(connection, "second")).fence
    found = await state(connection)
    assert first < second
    assert (found.fence, found.worker) == (second, "second")


@pytest.mark.parametrize("lost", ["the row", "the last fence"])
async def test_a_fence_is_higher_than_any_before_also_where_the_row_began_anew_or_went_back(
    connection: Connection, connect_target: ConnectTarget, lost: str
) -> None:
    before = await PIPELINES.take_over(connection, "first")
    if lost == "the row":
        await connection.execute("DELETE FROM cdcsync.pipelines")
        await PIPELINES.ensure(connection, "publication")
    else:
        await connection.execute("UPDATE cdcsync.pipelines SET fence = 0")
    with pytest.raises(TargetRewound, match="went back"):
        await PIPELINES.admit(await connect_target(), before)
    assert (await PIPELINES.take_over(connection, "second")).fence > before.fence
    with pytest.raises(LeaseLost):
        await PIPELINES.admit(await connect_target(), before)


@pytest.mark.parametrize(
    "back",
    [
        "checkpoint = '0/5'",
        "checkpoint = NULL",
        "checkpoint = '0/63'",
        "commits = commits - 1",
        "commits = commits + 1",
        "fence = fence - 1",
    ],
)
async def test_the_checkpoint_moves_only_from_what_was_last_committed(connection: Connection, back: str) -> None:
    """As after a standby that lagged was promoted, a backup restored, or the row edited."""
    lease = await PIPELINES.take_over(connection, "me")
    lease = await PIPELINES.begin_at(connection, lease, Lsn(5), "sys", 1)
    lease, _ = await PIPELINES.commit(connection, lease, Lsn(9))
    await connection.execute(f"UPDATE cdcsync.pipelines SET {back}".encode())
    before = await state(connection)

    for position in (Lsn(12), None):
        with pytest.raises(TargetRewound, match="has committed 0/9") as refused:
            await PIPELINES.commit(connection, lease, position)
        assert refused.value.where == "slot slot"
        assert refused.value.hint
    with pytest.raises(TargetRewound):
        await PIPELINES.forget(connection, lease)
    with pytest.raises(TargetRewound):
        await PIPELINES.begin_at(connection, lease, Lsn(12), "sys", 1)
    assert await state(connection) == before


async def test_how_far_ahead_of_the_checkpoint_the_index_is_stays_until_the_position_is_forgotten(
    connection: Connection,
) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    lease = await PIPELINES.begin_at(connection, lease, Lsn(5), "sys", 1)
    seen = []
    for position, ahead in ((None, Lsn(40)), (Lsn(20), None), (None, Lsn(30)), (Lsn(50), None)):
        lease, _ = await PIPELINES.commit(connection, lease, position, ahead=ahead)
        found = await state(connection)
        seen.append((found.checkpoint, found.ahead, found.reach))
    assert seen == [(5, 40, 40), (20, 40, 40), (20, 40, 40), (50, 40, 50)]
    await PIPELINES.forget(connection, lease)
    found = await state(connection)
    assert (found.checkpoint, found.ahead, found.reach) == (None, None, None)


async def test_a_commit_tells_if_asked_where_the_wal_ended_before_it(connection: Connection) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    lease = await PIPELINES.begin_at(connection, lease, Lsn(5), "sys", 1)
    before = Lsn.parse(await fetch_value(connection, INSERTED))
    lease, wal_end = await PIPELINES.commit(connection, lease, Lsn(9), wal_end=True)
    assert wal_end is not None
    assert before <= wal_end < Lsn.parse(await fetch_value(connection, INSERTED))
    assert await PIPELINES.commit(connection, lease, Lsn(12)) == (Lease(lease.fence, Lsn(12), lease.commits + 1), None)


async def test_nothing_is_written_under_an_older_fence(connection: Connection) -> None:
    old = await PIPELINES.take_over(connection, "first")
    new = await PIPELINES.take_over(connection, "second")
    await PIPELINES.begin_at(connection, new, Lsn(5), "sys", 1)
    before = await state(connection)

    with pytest.raises(LeaseLost, match="taken over") as lost:
        await PIPELINES.commit(connection, old, Lsn(9))
    with pytest.raises(LeaseLost):
        await PIPELINES.commit(connection, old, None)
    with pytest.raises(LeaseLost):
        await PIPELINES.begin_at(connection, old, Lsn(9), "sys", 1)

    assert lost.value.where == "slot slot"
    assert lost.value.hint
    assert await state(connection) == before


async def test_who_takes_over_ends_the_sessions_admitted_before_and_no_others(
    connection: Connection, connect_target: ConnectTarget
) -> None:
    elsewhere = Pipelines(SCHEMA, "other")
    await elsewhere.ensure(connection, "publication")
    first = await PIPELINES.take_over(connection, "first")
    idle, busy, beside, stranger = [await connect_target() for _ in range(4)]
    await PIPELINES.admit(idle, first)
    await PIPELINES.admit(busy, first)
    await elsewhere.admit(beside, await elsewhere.take_over(connection, "first"))
    await busy.execute("BEGIN; UPDATE cdcsync.pipelines SET worker = 'late' WHERE slot = 'other'")

    second = await PIPELINES.take_over(connection, "second")
    own = await connect_target()
    await PIPELINES.admit(own, second)
    ended = await PIPELINES.end_overtaken(connection, second)

    assert sorted(ended) == sorted([idle.info.backend_pid, busy.info.backend_pid])
    for one in (idle, busy):
        with pytest.raises(psycopg.OperationalError):
            await one.execute("SELECT")
    for one in (beside, stranger, own):
        await one.execute("SELECT")
    cursor = await connection.execute("SELECT worker FROM cdcsync.pipelines WHERE slot = 'other'")
    assert await cursor.fetchone() == ("first",)
    assert await PIPELINES.end_overtaken(connection, second) == []


async def test_a_worker_spares_sessions_of_its_own_and_its_successor_does_not(
    connection: Connection, connect_target: ConnectTarget
) -> None:
    building, another = await connect_target(), await connect_target()
    first = await PIPELINES.take_over(connection, "first")
    for session in (building, another):
        await PIPELINES.admit(session, first)
    pid = building.info.backend_pid

    again = await PIPELINES.take_over(connection, "first")
    assert await PIPELINES.end_overtaken(connection, again, [pid]) == [another.info.backend_pid]
    await building.execute("SELECT")

    successor = await PIPELINES.take_over(connection, "second")
    assert await PIPELINES.end_overtaken(connection, successor) == [pid]
    with pytest.raises(psycopg.OperationalError):
        await building.execute("SELECT")


async def test_a_session_of_a_worker_that_was_overtaken_is_not_admitted(
    connection: Connection, connect_target: ConnectTarget
) -> None:
    lease = await PIPELINES.take_over(connection, "first")
    await PIPELINES.take_over(connection, "second")
    with pytest.raises(LeaseLost, match="taken over"):
        await PIPELINES.admit(await connect_target(), lease)
    with pytest.raises(RunError, match="row is gone"):
        await Pipelines(SCHEMA, "other").admit(await connect_target(), lease)


async def test_a_session_of_before_that_another_role_has_is_ended_by_who_may_and_else_named(
    make_cluster: Callable[[], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "END_SESSION_MS", 100)
    cluster = make_cluster()
    async with await connect(cluster.dsn(), "target") as administrator:
        await create_shared(administrator, SCHEMA)
        await PIPELINES.ensure(administrator, "publication")
        await administrator.execute(
            f"CREATE ROLE first LOGIN; CREATE ROLE plain LOGIN; GRANT USAGE ON SCHEMA {SCHEMA} TO first, plain;"
            f" GRANT SELECT, UPDATE ON {SCHEMA}.pipelines TO first, plain;"
            " REVOKE EXECUTE ON FUNCTION pg_terminate_backend FROM PUBLIC"
        )
        async with await connect(cluster.dsn(user="plain"), "target") as successor:
            lease = await PIPELINES.take_over(successor, "first")
            assert await PIPELINES.end_overtaken(successor, lease) == []
            left = await connect(cluster.dsn(user="first"), "target")
            await PIPELINES.admit(left, lease)
            lease = await PIPELINES.take_over(successor, "second")
            with pytest.raises(TargetUnavailable, match=r"does not end: pid \d+, of role first") as told:
                await PIPELINES.end_overtaken(successor, lease)
        pid = left.info.backend_pid
        assert told.value.hint == f"end it, as that role or a superuser: SELECT pg_terminate_backend({pid})"
        assert await PIPELINES.end_overtaken(administrator, lease) == [pid]
        await left.close()


async def test_a_pipeline_without_a_row_cannot_be_taken_over(connection: Connection) -> None:
    with pytest.raises(RunError, match="row is gone"):
        await Pipelines(SCHEMA, "other").take_over(connection, "me")


async def test_who_takes_over_waits_for_the_predecessor_that_is_committing(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """So that the checkpoint read after taking over is the last one."""
    watching, second = await connect_target(), await connect_target()
    lease = await PIPELINES.take_over(connection, "first")
    fences = []

    async def take_over() -> None:
        fences.append((await PIPELINES.take_over(second, "second")).fence)
        fences.append(int((await state(second)).checkpoint or 0))

    async with anyio.create_task_group() as tasks, connection.transaction():
        await PIPELINES.commit(connection, lease, Lsn(7))
        tasks.start_soon(take_over)
        await until_blocked(watching, second)

    assert fences == [(await state(connection)).fence, 7]
    assert fences[0] > lease.fence


async def test_who_was_taken_over_while_it_waited_commits_nothing(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    watching, second = await connect_target(), await connect_target()
    lease = await PIPELINES.take_over(connection, "first")
    lost = []

    async def commit() -> None:
        try:
            await PIPELINES.commit(connection, lease, Lsn(7))
        except LeaseLost:
            lost.append(True)

    async with anyio.create_task_group() as tasks, second.transaction():
        await PIPELINES.take_over(second, "second")
        tasks.start_soon(commit)
        await until_blocked(watching, connection)

    assert lost == [True]
    assert (await state(watching)).checkpoint is None


# -- the checkpoint --------------------------------------------------------------------------------------------------


async def test_a_pipeline_begins_where_it_is_told(connection: Connection) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    await PIPELINES.begin_at(connection, lease, Lsn.parse("16/B374D848"), "7345", 3)
    found = await state(connection)
    assert (found.checkpoint, found.system_identifier, found.timeline) == (Lsn.parse("16/B374D848"), "7345", 3)


async def test_the_checkpoint_only_moves_forward(connection: Connection) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    seen = []
    for position in (Lsn(10), Lsn(30), Lsn(20), None, Lsn(0xFFFF_FFFF_FFFF_FFFF)):
        lease, _ = await PIPELINES.commit(connection, lease, position)
        seen.append((await state(connection)).checkpoint)
    assert seen == [10, 30, 30, 30, 0xFFFF_FFFF_FFFF_FFFF]


async def test_times_are_noted_and_kept_until_there_are_newer_ones(connection: Connection) -> None:
    lease = await PIPELINES.take_over(connection, "me")
    lease, _ = await PIPELINES.commit(connection, lease, Lsn(1), commit_time=COMMITTED)
    first = await state(connection)
    lease, _ = await PIPELINES.commit(connection, lease, None, caught_up=True)
    second = await state(connection)
    await PIPELINES.commit(connection, lease, Lsn(2), commit_time=COMMITTED + timedelta(seconds=1))
    third = await state(connection)

    assert (first.commit_time, first.commit_lsn, first.caught_up_at) == (COMMITTED, 1, None)
    assert (second.commit_time, second.commit_lsn) == (COMMITTED, 1)
    assert second.caught_up_at is not None
    assert second.caught_up_at > first.updated_at
    assert (third.commit_time, third.caught_up_at) == (COMMITTED + timedelta(seconds=1), second.caught_up_at)
    assert first.updated_at < second.updated_at < third.updated_at
