"""What a worker remembers of the last hour."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from cdcsync.metrics import Metrics
from cdcsync.status import BackfillStatus, IndexStatus, Status, WorkerStatus
from cdcsync.worker.history import EVENTS, EVERY_S, KEPT, Memory

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
LIVE = IndexStatus("live", None, "public.a", "public.a_index")


def reading(at_s: float, index: IndexStatus = LIVE, **fields: Any) -> Status:
    worker = WorkerStatus("w", True, NOW)
    status = Status(
        *(1, NOW + timedelta(seconds=at_s), "p", "p", "0/10", 0, 0.0, True, None, worker, {"a": index}, []),
    )
    return msgspec.structs.replace(status, **fields)


def told(status: Status) -> list[tuple[str, float, float | None]]:
    """Return the events with when they began and ended, in seconds."""
    return [
        (
            one.words,
            (one.since - NOW).total_seconds(),
            None if one.until is None else (one.until - NOW).total_seconds(),
        )
        for one in status.events
    ]


def test_points_are_rates_over_ten_seconds() -> None:
    metrics = Metrics()
    memory = Memory(metrics)
    memory.noted(reading(0), [])
    metrics.changes.labels("a", "upsert").inc(30)
    metrics.changes.labels("b", "delete").inc(20)
    metrics.received_bytes.inc(1_000)
    memory.noted(reading(5), [])
    assert memory.history().points == []
    metrics.vectors.labels("a", "inline").inc(7)
    memory.noted(reading(10, msgspec.structs.replace(LIVE, backlog=4), lag_bytes=500, lag_seconds=0.3), [])
    (point,) = memory.history().points
    assert (point.received, point.changes, point.vectors) == (100, 5, 0.7)
    assert (point.wal, point.backlog, point.lag) == (50, 4, 0.3)
    assert point.at == (NOW + timedelta(seconds=10)).timestamp()


def test_points_go_on_after_the_clock_went_back() -> None:
    memory = Memory(Metrics())
    for at_s in (3_600, 0, 10):
        memory.noted(reading(at_s), [])
    assert [one.at for one in memory.history().points] == [(NOW + timedelta(seconds=10)).timestamp()]


def test_an_hour_is_kept() -> None:
    memory = Memory(Metrics())
    for number in range(KEPT + 10):
        memory.noted(reading(number * EVERY_S), [])
    points = memory.history().points
    assert len(points) == KEPT
    assert points[-1].at - points[0].at == 3600 - EVERY_S


def test_what_the_source_does_not_tell_leaves_a_hole_and_no_zero() -> None:
    memory = Memory(Metrics())
    memory.noted(reading(0), [])
    memory.noted(reading(10, lag_bytes=None), [])
    assert memory.history().points[0].wal is None


def test_a_problem_has_a_beginning_and_an_end_and_may_change_its_figures() -> None:
    memory = Memory(Metrics())
    memory.noted(reading(0, problems=["index a: 2 chunks have no vector"]), [])
    status = memory.noted(reading(4, problems=["index a: 1 chunk has no vector"]), [])
    assert told(status) == [("1 chunk has no vector", 0, None)]
    assert status.events[0].index == "a"
    assert told(memory.noted(reading(12), [])) == [("1 chunk has no vector", 0, 4)]


def test_a_problem_that_both_tell_is_one() -> None:
    memory = Memory(Metrics())
    assert len(memory.noted(reading(0, problems=["x is wrong"]), ["x is wrong"]).events) == 1


def test_a_moment_without_a_stream_is_not_remembered() -> None:
    memory = Memory(Metrics())
    memory.noted(reading(0), ["the replication stream is not connected"])
    assert memory.noted(reading(7), []).events == []


def test_a_pause_begins_when_the_index_was_paused_and_is_told_once() -> None:
    memory = Memory(Metrics())
    paused = msgspec.structs.replace(LIVE, state="paused", reason="no column x", since=NOW - timedelta(minutes=5))
    status = memory.noted(reading(0, paused, problems=["index a is paused: no column x"]), ["index a is paused: …"])
    assert told(status) == [("paused: no column x", -300, None)]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            msgspec.structs.replace(
                LIVE, state="building", backfill=BackfillStatus(1, "initial", "running", "rows", 1, 2, None, None)
            ),
            "first load",
        ),
        (
            msgspec.structs.replace(LIVE, backfill=BackfillStatus(1, "replay", "paused", "rows", 1, 2, None, None)),
            "replay, paused",
        ),
    ],
)
def test_loads_are_events(index: IndexStatus, words: str) -> None:
    memory = Memory(Metrics())
    assert told(memory.noted(reading(0, index), [])) == [(words, 0, None)]
    memory.noted(reading(10, index), [])
    assert told(memory.noted(reading(20), [])) == [(words, 0, 10)]


def test_a_load_that_a_reading_does_not_show_has_ended_and_may_go_on_after_all() -> None:
    memory = Memory(Metrics())
    loading = msgspec.structs.replace(LIVE, state="building")
    memory.noted(reading(0, loading), [])
    assert told(memory.noted(reading(2), [])) == [("first load: the last vectors", 0, 0)]
    assert told(memory.noted(reading(4, loading), [])) == [("first load: the last vectors", 0, None)]


def test_a_problem_of_a_moment_is_not_shown_once_it_is_gone() -> None:
    memory = Memory(Metrics())
    assert told(memory.noted(reading(0), ["x is wrong"])) == [("x is wrong", 0, None)]
    assert told(memory.noted(reading(1), [])) == []
    memory.noted(reading(2), ["x is wrong"])
    assert told(memory.noted(reading(3), [])) == [("x is wrong", 0, None)]


def test_what_the_audit_found_is_told_once() -> None:
    memory = Memory(Metrics())
    differed = msgspec.structs.replace(LIVE, differed_at=NOW)
    memory.noted(reading(1, differed), [])
    assert told(memory.noted(reading(2, differed), [])) == [("the audit found differences and read them again", 0, 0)]


def test_only_the_last_events_are_kept() -> None:
    memory = Memory(Metrics())
    for number in range(EVENTS + 5):
        memory.happened(f"event {number}", NOW + timedelta(seconds=number))
    events = memory.noted(reading(100), []).events
    assert len(events) == EVENTS
    assert events[0].words == f"event {EVENTS + 4}"


def test_freshness_is_told_by_index_and_kind() -> None:
    metrics = Metrics()
    metrics.note_text_freshness(["a"], 0.02)
    metrics.note_vector_freshness("a", 0.5, times=3)
    index = Memory(metrics).noted(reading(0), []).indexes["a"]
    assert index.text_freshness is not None
    assert index.vector_freshness is not None
    assert (index.text_freshness.count, index.vector_freshness.count) == (1, 3)
    assert index.vector_freshness.p99_s == pytest.approx(0.5, rel=0.05)
    assert index.vector_freshness.strip[-1] is not None
