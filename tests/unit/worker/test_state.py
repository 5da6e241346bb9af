"""A running worker as others see it: whether it is ready, and why not."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import anyio
import msgspec
import pytest

from cdcsync import config
from cdcsync.backoff import Backoff
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.errors import EmbedderUnavailable, SourceUnavailable, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.embedding import Problem
from cdcsync.model.lag import Lag
from cdcsync.status import Headline, Status, WorkerStatus
from cdcsync.target.locked_session import worker_name
from cdcsync.worker.gauges import GAUGES_S, set_gauges_for_ever
from cdcsync.worker.readings import AWAY_S
from cdcsync.worker.state import ALIVE_WITHIN_S, QUERY_S, WorkerState
from tests.support.gates import Gated
from tests.support.statuses import LIVE, STATUS
from tests.support.virtual import in_virtual_time
from tests.support.worker_states import CONFIG, follow, gauge, read_as

pytestmark = pytest.mark.anyio


@pytest.fixture
async def lag() -> Lag:
    return Lag(lambda: 1_000.0, lambda: 0.0)


@pytest.fixture
async def streaming(lag: Lag) -> WorkerState:
    """A worker that follows the stream and has nothing to do."""
    state = WorkerState(CONFIG)
    lag.begin(Lsn(0x100), 60.0)
    lag.note(None, caught_up=True)
    state.attach(lag, lambda: Lsn(0x100), lambda _: None, {}, lambda _: None)
    state.connected(True)
    return state


async def test_a_worker_that_follows_its_stream_is_ready(streaming: WorkerState) -> None:
    assert streaming.not_ready() == []
    assert streaming.lag_seconds == 0.0
    assert streaming.metrics.registry.get_sample_value("cdcsync_ready") == 1


async def test_before_it_follows_anything_a_worker_tells_what_it_waits_for() -> None:
    state = WorkerState(CONFIG)
    assert state.not_ready() == ["the replication stream is not connected"]
    assert math.isnan(state.lag_seconds)
    state.standby = True
    assert state.not_ready() == ["standby: another worker holds the pipeline"]
    state.note_waiting("the source starts up")
    assert state.not_ready() == ["the start waits: the source starts up"]
    assert not state.standby
    state.connected(True)
    assert state.not_ready() == ["the set-up waits: the source starts up"]


def test_what_waits_beside_the_stream_is_told_unless_its_cause_stops_the_stream_too() -> None:
    full = SourceUnavailable("all connections are in use", where="source", hint="close some")

    async def main() -> list[list[str]]:
        state, lag, told = WorkerState(CONFIG), Lag(lambda: 1_000.0, lambda: 0.0), []
        lag.begin(Lsn(0x100), 60.0)
        lag.note(None, caught_up=True)
        state.connected(True)
        with state.outages.noted():
            watch, backfills = Backoff(waits="the tables are not watched"), Backoff(waits="backfills wait")
            for _ in range(2):
                for one in (watch, backfills):
                    await one.wait(full, asked_s=AWAY_S)
            for failing_for in (lambda _: None, lambda _: full):
                state.attach(lag, lambda: Lsn(0x100), failing_for, {}, lambda _: None)
                told.append(state.not_ready())
        return told

    assert in_virtual_time(main) == [
        ["the tables are not watched, backfills wait: all connections are in use; close some"],
        ["changes cannot be applied: all connections are in use; close some"],
    ]


@pytest.mark.parametrize(
    ("running", "name", "told"),
    [(False, "host:42", True), (True, worker_name(), True), (True, "other:1", False)],
    ids=["no worker", "this worker", "another worker"],
)
async def test_the_status_says_why_a_worker_waits_unless_another_one_works(
    streaming: WorkerState, monkeypatch: pytest.MonkeyPatch, running: bool, name: str, told: bool
) -> None:
    read = msgspec.structs.replace(STATUS, worker=WorkerStatus(name, running, None))
    connected = AsyncMock()

    async def read_status(*_: object) -> Status:
        return read

    monkeypatch.setattr("cdcsync.worker.state.read_status", read_status)
    monkeypatch.setattr(streaming, "_target", connected)
    monkeypatch.setattr(streaming, "_source", connected)
    streaming.note_waiting("the source does not answer")

    status = await streaming.status()

    why = "the set-up waits: the source does not answer"
    assert (status.worker.waits == why, why in status.problems) == (told, told)
    assert not told or (status.headline is not None and status.headline.words == why)


async def test_changes_that_cannot_be_applied_for_some_seconds_are_told_with_the_reason_and_the_fix(
    streaming: WorkerState, lag: Lag, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasts = AWAY_S - 1
    full = TargetUnavailable("the disk is full", where="index articles", hint="free some")
    streaming.attach(lag, lambda: Lsn(0), lambda seconds: full if lasts >= seconds else None, {}, lambda _: None)
    assert streaming.not_ready() == []
    lasts = AWAY_S
    why = f"changes cannot be applied: {full.with_fix}"
    assert "free some" in why
    assert streaming.not_ready() == [why]

    async def read_status(*_: object) -> Status:
        return msgspec.structs.replace(STATUS, worker=WorkerStatus("host:42", False, None, "it holds no lock"))

    monkeypatch.setattr("cdcsync.worker.state.read_status", read_status)
    monkeypatch.setattr(streaming, "_target", AsyncMock())
    monkeypatch.setattr(streaming, "_source", AsyncMock())
    status = await streaming.status()
    assert (status.worker.name, status.worker.waits, status.problems[0]) == (worker_name(), why, why)
    assert status.headline is not None
    assert status.headline.words == why


async def test_a_source_that_is_not_heard_leaves_the_lag_unknown(streaming: WorkerState, lag: Lag) -> None:
    lag.end()
    assert streaming.not_ready() == ["nothing has been heard from the source lately, so the lag is unknown"]


async def test_a_late_stream_is_told_by_its_setting(streaming: WorkerState, lag: Lag) -> None:
    lag.note(1_000.0 - CONFIG.worker.ready_max_lag_s - 1, caught_up=False)
    assert streaming.not_ready() == ["lag of 61 s is above worker.ready_max_lag_s"]


@pytest.mark.parametrize(("behind", "told"), [(2**30, False), (2**30 + 1, True)])
async def test_wal_that_was_never_sent_is_told_though_the_stream_is_not_late(
    streaming: WorkerState, behind: int, told: bool
) -> None:
    streaming.last = msgspec.structs.replace(STATUS, lag_bytes=behind)
    assert ["worker.ready_max_lag_bytes" in reason for reason in streaming.not_ready()] == [True] * told


async def test_trouble_of_embedders_and_of_indexes_is_named(streaming: WorkerState, lag: Lag) -> None:
    problem = Problem("nobody is at home", "start it", datetime.now(UTC), None)
    dispatchers: Any = {"e": SimpleNamespace(problem=problem)}
    streaming.attach(lag, lambda: Lsn(0), lambda _: None, dispatchers, lambda _: None)
    streaming.problems = {"articles": "its updates fail"}
    paused = msgspec.structs.replace(LIVE, state="paused", reason="its key is gone")
    streaming.last = msgspec.structs.replace(STATUS, indexes={"notes": paused})
    assert streaming.not_ready() == [
        "embedder e: nobody is at home (start it)",
        "index articles: its updates fail",
        "index notes is paused: its key is gone",
    ]
    assert streaming.metrics.registry.get_sample_value("cdcsync_embedder_problem", {"embedder": "e"}) == 1


async def test_what_only_the_worker_knows_of_an_index_is_in_the_status_as_it_is_in_its_readiness(
    streaming: WorkerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_status(*_: object) -> Status:
        return msgspec.structs.replace(STATUS, indexes={"articles": LIVE, "notes": LIVE})

    monkeypatch.setattr("cdcsync.worker.state.read_status", read_status)
    monkeypatch.setattr(streaming, "_target", AsyncMock())
    monkeypatch.setattr(streaming, "_source", AsyncMock())
    problems = streaming.problems = {"articles": "reading its table waits"}

    status = await streaming.status()
    assert status.problems == streaming.not_ready() == ["index articles: reading its table waits"]
    assert status.headline == Headline("reading its table waits", "bad", "articles")
    assert (status.indexes["articles"].problem, status.indexes["notes"].problem) == (problems["articles"], None)

    problems.clear()
    status = await streaming.status()
    assert (status.problems, status.indexes["articles"].problem) == ([], None)


@pytest.mark.parametrize(
    ("facts", "reasons"),
    [
        ({}, []),
        ({"state": "building"}, ["index articles is building, not live"]),
        ({"backlog": 1_500, "backlog_live": 500}, ["index articles: 1,000 loaded texts have no vector yet"]),
        ({"backlog": 500, "backlog_live": 500}, []),
    ],
)
async def test_an_index_is_loaded_once_its_loads_have_their_vectors(facts: dict[str, Any], reasons: list[str]) -> None:
    state = WorkerState(CONFIG)
    assert state.not_loaded() == ["the indexes have not been looked at yet"]
    state.last = msgspec.structs.replace(STATUS, indexes={"articles": msgspec.structs.replace(LIVE, **facts)})
    assert state.not_loaded() == reasons


def test_a_loop_that_does_not_turn_is_not_alive() -> None:
    async def main() -> list[bool]:
        state, seen = WorkerState(CONFIG), []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(state.turn)
            await anyio.sleep(2 * ALIVE_WITHIN_S)
            seen.append(state.alive())
            tasks.cancel_scope.cancel()
        await anyio.sleep(ALIVE_WITHIN_S)
        return [*seen, state.alive()]

    assert in_virtual_time(main) == [True, False]


def test_a_query_that_waits_behind_the_workers_own_texts_for_too_long_is_refused() -> None:
    busy, hashing = Gated(), HashEmbedder("h", config.HashEmbedder(dimensions=8))

    async def main() -> float:
        state = WorkerState(CONFIG)
        dispatchers: Any = {
            "busy": SimpleNamespace(problem=None, embedder=busy),
            "idle": SimpleNamespace(problem=None, embedder=hashing),
        }
        state.attach(Lag(lambda: 0.0, lambda: 0.0), lambda: Lsn(0), lambda _: None, dispatchers, lambda _: None)
        identity, vector = await state.embed_query("idle", "a query")
        assert (identity, len(vector)) == (hashing.identity, 8)
        for name in ("busy", "unknown"):
            with pytest.raises(EmbedderUnavailable, match="cannot embed this query now"):
                await state.embed_query(name, "a query")
        return anyio.current_time()

    assert in_virtual_time(main) == QUERY_S


@pytest.mark.parametrize("silent", [False, True])
def test_a_target_that_does_not_answer_is_a_reason_though_nothing_is_to_be_written(silent: bool) -> None:
    async def main() -> None:
        state, away = WorkerState(CONFIG), False

        async def read() -> Status:
            if away and silent:
                await anyio.sleep_forever()
            if away:
                raise TargetUnavailable("connection refused", where="target")
            return STATUS

        await follow(state)
        state._read = read  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(set_gauges_for_ever, state)
            await anyio.sleep(AWAY_S)
            assert (state.not_ready(), gauge(state, "cdcsync_connected", side="target")) == ([], 1)
            away = True
            await anyio.sleep(AWAY_S - GAUGES_S)
            assert state.not_ready() == []  # a server restarts in less
            await anyio.sleep(2 * GAUGES_S)
            assert state.not_ready() == ["the target does not answer" + (": connection refused" if not silent else "")]
            assert gauge(state, "cdcsync_connected", side="target") == 0
            away = False
            if silent:
                tasks.cancel_scope.cancel()
                return
            await anyio.sleep(GAUGES_S)
            assert (state.not_ready(), gauge(state, "cdcsync_connected", side="target")) == ([], 1)
            tasks.cancel_scope.cancel()

    in_virtual_time(main)


def test_a_standby_hears_from_the_target_though_it_reads_nothing() -> None:
    """The alert of a target that is away would fire for as long as it stands by."""

    async def main() -> None:
        state, away = WorkerState(CONFIG), TargetUnavailable("connection refused", where="target")
        await follow(state)

        def reading() -> Status:
            raise away

        read_as(state, reading)
        with anyio.move_on_after(AWAY_S + 1):
            await set_gauges_for_ever(state)
        state.connected(False)
        for failing in (False, True):  # before it stands by, and when somebody asks it
            if failing:
                with pytest.raises(TargetUnavailable):
                    await state.status()
                await anyio.sleep(AWAY_S)
            assert gauge(state, "cdcsync_connected", side="target") == 0
            state.stand_by()
            assert gauge(state, "cdcsync_connected", side="target") == 1
            assert state.not_ready() == ["standby: another worker holds the pipeline"]

    in_virtual_time(main)


@pytest.mark.parametrize("reached", [True, False])
def test_between_pipelines_the_examination_says_whether_the_target_answers(reached: bool) -> None:
    """Nothing is read meanwhile: what the last reading said would be told for as long as a set-up waits."""

    async def main() -> None:
        state, away = WorkerState(CONFIG), TargetUnavailable("connection refused", where="target")
        await follow(state)

        def reading() -> Status:
            if reached:
                raise away
            return STATUS

        read_as(state, reading)
        with anyio.move_on_after(AWAY_S + 1):
            await set_gauges_for_ever(state)
        assert gauge(state, "cdcsync_connected", side="target") == (not reached)
        state.examined(target_reached=reached)
        assert gauge(state, "cdcsync_connected", side="target") == reached
        state.note_waiting("the other server starts up")
        assert state.not_ready() == ["the set-up waits: the other server starts up"]

    in_virtual_time(main)


def test_a_reading_that_was_given_up_says_nothing_about_the_target() -> None:
    async def main() -> None:
        state = WorkerState(CONFIG)
        await follow(state)
        state._read = anyio.sleep_forever  # type: ignore[assignment]
        with anyio.move_on_after(1):
            await state.status()
        await anyio.sleep(AWAY_S)
        assert state.not_ready() == []

    in_virtual_time(main)
