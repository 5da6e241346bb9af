"""How far loads are, and how much time is left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from cdcsync.status import BackfillStatus, IndexStatus, Paces, Progress, Status, WorkerStatus
from cdcsync.status.progress import progress

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


def index(state: str, **facts: object) -> IndexStatus:
    return IndexStatus(state, None, "public.a", "public.a_index", **facts)  # type: ignore[arg-type]


def load(done: int, total: int | None, kind: Any = "initial") -> BackfillStatus:
    return BackfillStatus(1, kind, "running", "rows", done, total, None, None)


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (index("absent"), []),
        (index("live", documents=20, chunks=30, vectors=30), []),
        (index("live", documents=20, chunks=30, vectors=28, backlog=2, backlog_live=2), []),
        (index("building", backfill=load(0, None)), [("rows", 0, None), ("vectors", 0, None)]),
        (
            index("building", backfill=load(5, 20), chunks=9, backlog=5, documents=5),
            [("rows", 5, 20), ("vectors", 4, 36)],
        ),
        (
            index("building", documents=20, chunks=32, backlog=17, failed=1, discarded=2),
            [("rows", 20, 20), ("vectors", 12, 32)],
        ),
        (index("live", documents=20, chunks=30, backlog=12), [("vectors", 18, 30)]),
        (
            index("live", documents=20, chunks=30, backfill=load(5, 20, "resync")),
            [("rows", 5, 20), ("vectors", 30, 30)],
        ),
    ],
)
def test_rows_follow_the_load_and_vectors_the_chunks(
    status: IndexStatus, parts: list[tuple[str, int, int | None]]
) -> None:
    assert [(one.what, one.done, one.total) for one in progress(status)] == parts


def test_the_build_of_the_hnsw_index_is_a_part_of_the_load() -> None:
    parts = progress(index("building", documents=20, chunks=30), hnsw=(70, 100))
    assert parts[-1] == Progress("hnsw", 70, 100)


def reading(at_s: float, done: int, total: int | None = 1_000, state: Any = "running") -> Status:
    backfill = msgspec.structs.replace(load(done, total), state=state)
    one = msgspec.structs.replace(index("building", backfill=backfill), progress=[Progress("vectors", done, total)])
    worker = WorkerStatus("w", True, None)
    return Status(
        *(1, NOW + timedelta(seconds=at_s), "p", "p", None, None, None, None, None, worker, {"a": one}, []),
    )


def left(paces: Paces, status: Status) -> float | None:
    return paces.told(status).indexes["a"].progress[0].eta_s


def test_the_time_left_is_by_the_rate_of_the_last_half_minute() -> None:
    paces = Paces()
    assert left(paces, reading(0, 0)) is None
    assert left(paces, reading(1, 10)) is None  # too soon to say
    assert left(paces, reading(10, 100)) == 90.0
    found = [left(paces, reading(at_s, 100 + (at_s - 10) * 20)) for at_s in range(11, 50)]
    assert found[-1] == pytest.approx((1_000 - 880) / 20, rel=0.1)


def test_a_load_that_begins_anew_has_no_rate_yet() -> None:
    paces = Paces()
    left(paces, reading(0, 0))
    left(paces, reading(10, 500))
    assert left(paces, reading(11, 3)) is None


def test_a_clock_that_goes_back_begins_the_rate_anew() -> None:
    paces = Paces()
    left(paces, reading(3_600, 0))
    assert left(paces, reading(0, 500)) is None
    assert left(paces, reading(10, 600)) == 40.0


def test_a_load_that_somebody_paused_has_no_time_left_and_no_rate_when_it_goes_on() -> None:
    paces = Paces()
    left(paces, reading(0, 0))
    assert left(paces, reading(10, 100)) == 90.0
    for at_s in range(11, 400, 20):
        assert left(paces, reading(at_s, 100, state="paused")) is None
    assert left(paces, reading(401, 100)) is None
    assert left(paces, reading(411, 200)) == 80.0


def test_without_an_end_there_is_no_time_left() -> None:
    paces = Paces()
    left(paces, reading(0, 0, None))
    assert left(paces, reading(10, 500, None)) is None
