"""What the head of the page says, by what goes on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config.names import beside_name
from cdcsync.status import (
    BackfillStatus,
    Freshness,
    IndexStatus,
    Status,
    WorkerStatus,
    as_starting,
    with_headlines,
    with_problems,
    without_problems,
)
from cdcsync.status.model import EmbedderStatus, Progress

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
LIVE = IndexStatus("live", None, "public.a", "public.a_index", embedder="minilm", documents=9, chunks=9, vectors=9)
LATE_S = 30.0


def index(**fields: Any) -> IndexStatus:
    return msgspec.structs.replace(LIVE, **fields)


def status(*indexes: IndexStatus, **fields: Any) -> Status:
    named = dict(zip("abc", indexes, strict=False))
    whole = Status(
        *(1, NOW, "p", "p", "0/1", 0, 0.0, True, None, WorkerStatus("w", True, NOW), named, []),
        embedders={"minilm": EmbedderStatus()},
    )
    return msgspec.structs.replace(whole, **fields)


def head(*indexes: IndexStatus, reasons: tuple[str, ...] = (), **fields: Any) -> tuple[str, str, str | None]:
    found = with_headlines(status(*indexes, **fields), LATE_S, reasons).headline
    assert found is not None
    return found.words, found.tone, found.index


def fresh(p50_s: float) -> Freshness:
    return Freshness(1, p50_s, p50_s, 15, [None] * 60)


ROWS = Progress("rows", 50, 100, 30.0)
HELD = Progress("rows", 50, 100, None)


def paused(load: BackfillStatus) -> BackfillStatus:
    return msgspec.structs.replace(load, state="paused")


LOAD = BackfillStatus(1, "initial", "running", "rows", 50, 100, 1.0, 30.0)
REPLAY = BackfillStatus(1, "replay", "running", "rows", 5, None, None, None)


@pytest.mark.parametrize(
    ("one", "words", "tone"),
    [
        (index(), "up to date", "good"),
        (index(text_freshness=fresh(0.2)), "up to date, 0.2 s", "good"),
        (index(state="building"), "loading", "busy"),
        (index(state="building", backfill=LOAD, progress=[ROWS]), "loading 50%, 30 s left", "busy"),
        (
            index(state="building", backfill=LOAD, progress=[ROWS, Progress("vectors", 61, 201, 120.0)]),
            "loading 30%, 2 min 0 s left",
            "busy",
        ),
        (
            index(state="building", progress=[Progress("vectors", 9, 9, 0.0), Progress("hnsw", 3, 4, None)]),
            "building the HNSW index 75%",
            "busy",
        ),
        (index(backlog=5, progress=[Progress("vectors", 4, 9, 5.0)]), "embedding 44%, 5.0 s left", "busy"),
        (index(backfill=REPLAY), "up to date; replay", "busy"),
        (index(backfill=REPLAY, problem="reading its table waits"), "reading its table waits", "bad"),
        (index(backfill=paused(REPLAY)), "up to date; replay, paused", "warn"),
        (index(backfill=paused(REPLAY), progress=[HELD]), "replay, paused at 50%", "warn"),
        (index(state="building", backfill=paused(LOAD), progress=[HELD]), "loading, paused at 50%", "warn"),
        (index(state="paused", reason="no column x"), "paused: no column x", "bad"),
        (index(state="absent", reason="not set up yet"), "not set up yet", "bad"),
    ],
)
def test_an_index_is_told_in_a_few_words(one: IndexStatus, words: str, tone: str) -> None:
    assert head(one)[:2] == (words, tone)


@pytest.mark.parametrize(
    ("lag", "words", "tone"),
    [(0.2, "up to date, 0.2 s", "good"), (30.0, "up to date, 30 s", "good"), (31.0, "behind, 31 s", "warn")],
)
def test_an_index_is_late_only_above_the_limit(lag: float, words: str, tone: str) -> None:
    assert head(index(), lag_seconds=lag, caught_up=False)[:2] == (words, tone)


def test_the_headline_is_that_of_the_index_that_is_worst_off() -> None:
    loading, paused = index(state="building", progress=[ROWS]), index(state="paused", reason="r")
    assert head(index(), loading) == ("loading 50%, 30 s left", "busy", "b")
    assert head(index(), loading, paused) == ("paused: r", "bad", "c")


def test_of_indexes_that_are_all_up_to_date_the_slowest_gives_the_figure() -> None:
    assert head(index(text_freshness=fresh(0.01)), index(text_freshness=fresh(0.4)), index()) == (
        *("up to date, 0.4 s", "good", None),
    )


def test_texts_that_wait_for_an_embedder_that_fails_are_said_with_its_reason() -> None:
    told = head(index(backlog=1_200), embedders={"minilm": EmbedderStatus(problem="401 Unauthorized")})
    assert told == ("1,200 texts wait for vectors: 401 Unauthorized", "bad", "a")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"worker": WorkerStatus(None, False, None)}, "no worker runs"),
        ({"caught_up": None, "lag_seconds": None}, "the source cannot be read, so the lag is unknown"),
    ],
)
def test_what_concerns_the_worker_goes_before_its_indexes(fields: dict[str, Any], words: str) -> None:
    assert head(index(), **fields) == (words, "bad", None)


def test_a_worker_that_is_not_ready_is_never_said_to_be_well() -> None:
    assert head(index(), reasons=("nothing heard",)) == ("not ready: nothing heard", "bad", None)


def test_a_worker_that_has_just_begun_has_no_problems_but_those_of_paused_indexes() -> None:
    absent = msgspec.structs.replace(LIVE, state="absent")
    problems = ["the schema holds no pipeline: run `cdcsync run` first", "worker w is not reading slot p"]
    found = as_starting(with_headlines(without_problems(status(absent, problems=problems)), LATE_S))
    assert found.problems == []
    assert found.headline is not None
    assert (found.headline.words, found.headline.tone) == ("starting", "busy")
    assert found.indexes["a"].headline is not None
    assert found.indexes["a"].headline.tone == "busy"

    paused = msgspec.structs.replace(LIVE, state="paused", reason="no column x")
    problems.append("index b is paused: no column x")
    found = as_starting(with_headlines(without_problems(status(absent, paused, problems=problems)), LATE_S))
    assert found.problems == ["index b is paused: no column x"]
    assert found.headline is not None
    assert (found.headline.words, found.headline.tone) == ("paused: no column x", "bad")


def test_what_the_worker_knows_of_chunks_beside_an_index_is_told_of_the_index() -> None:
    found = with_problems(status(index()), {beside_name("a"): "reading its table waits"})
    assert found.indexes["a"].problem == "reading its table waits"
    assert len(found.problems) == 1
