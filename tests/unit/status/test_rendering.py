"""What a status says, on paper and on a terminal."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cdcsync.flows.follow.open_batch import IDLE_CHECKPOINT_S
from cdcsync.status import (
    BackfillStatus,
    Event,
    IndexStatus,
    SlotStatus,
    Status,
    WorkerStatus,
    as_waiting,
    render_table,
)
from cdcsync.status.generations import GenerationStatus
from cdcsync.status.stream import FRESH
from cdcsync.target.evaluations import Recall

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)

LIVE = IndexStatus(
    *("live", None, "public.articles", "public.articles_index", "model", 384, 1),
    documents=1_000,
    chunks=1_234,
    vectors=1_230,
)
STATUS = Status(
    version=1,
    read_at=NOW,
    pipeline="cdcsync",
    publication="cdcsync",
    checkpoint="0/1A2B",
    lag_bytes=3_500,
    lag_seconds=0.0,
    caught_up=True,
    slot=SlotStatus("cdcsync", True, "reserved", 41 * 1024**2, 3 * 1024**3, "0/1A2B"),
    worker=WorkerStatus("host:42", True, NOW - timedelta(minutes=3, seconds=5)),
    indexes={"articles": LIVE},
    problems=[],
)


def changed(**fields: Any) -> Status:
    return msgspec.structs.replace(STATUS, **fields)


def with_index(**fields: Any) -> Status:
    return changed(indexes={"articles": msgspec.structs.replace(LIVE, **fields)})


def printed(status: Status, *, colours: bool = False, width: int = 100) -> str:
    output = io.StringIO()
    system: Any = "standard" if colours else None
    console = Console(file=output, width=width, color_system=system, force_terminal=colours, no_color=not colours)
    console.print(render_table(status))
    return output.getvalue()


def test_all_tables_that_documents_are_made_of_are_named() -> None:
    assert "made of" not in printed(STATUS)
    told = printed(with_index(related_tables=["public.authors", "crm.tags"]))
    assert "articles: made of the tables public.articles, public.authors, crm.tags" in told


def test_a_workers_word_holds_until_an_idle_one_gives_the_next() -> None:
    assert FRESH.total_seconds() > IDLE_CHECKPOINT_S


def test_a_healthy_pipeline_is_told_in_a_few_lines() -> None:
    text = printed(STATUS)
    assert "host:42 runs for 3 min 5 s" in text
    assert "caught up to within 3.4 kB of WAL" in text
    assert "reserved, retains 41 MB, 3.0 GB until it is lost, being read" in text
    assert re.search(r"articles +live +1,000 +1,234 +1,230 +0 +0", text)
    assert "!" not in text


def test_what_is_wrong_is_said() -> None:
    slot = SlotStatus("cdcsync", False, "lost", None, None, None)
    worker = WorkerStatus("host:42", False, None)
    text = printed(changed(slot=slot, worker=worker, caught_up=False, lag_seconds=75.0, problems=["do [this] first"]))
    assert "does not run" in text
    assert "1 min 15 s, 3.4 kB of WAL" in text
    assert "lost, retains –, not being read" in text
    assert "! do [this] first" in text


def test_what_is_unknown_is_no_number() -> None:
    text = printed(changed(checkpoint=None, lag_bytes=None, lag_seconds=None, caught_up=None, slot=None))
    assert [line.split() for line in text.splitlines() if line.startswith(("lag", "slot", "checkpoint"))] == [
        ["checkpoint", "–"],
        ["lag", "–"],
        ["slot", "–"],
    ]


def test_an_absent_index_has_no_figures() -> None:
    assert re.search(r"articles +absent( +–){5}", printed(with_index(state="absent", reason="not set up yet")))


def test_estimates_are_marked() -> None:
    text = printed(with_index(estimated=True, documents=None, chunks=2_900_000, vectors=1_200_000, backlog=1_700_000))
    assert re.search(r"– +~2,900,000 +~1,200,000 +~1,700,000 +0", text)


@pytest.mark.parametrize(
    ("backfill", "text"),
    [
        (
            BackfillStatus(1, "initial", "running", "rows", 250, 1_000, 50.0, 15.0),
            "articles: initial running: 25% of 1,000 rows, 50 rows/s, 15 s left",
        ),
        (
            BackfillStatus(1, "replay", "running", "rows", 1_200, 1_000, 50.0, 0.0),
            "articles: replay running: 100% of 1,000 rows, 50 rows/s, 0 s left",
        ),
        (BackfillStatus(1, "replay", "requested", "rows", 0, None, None, None), "articles: replay requested: 0 rows"),
        (
            BackfillStatus(1, "resync", "running", "orphans", 1_000, 1_000, None, None),
            "articles: resync running: looking for rows that are gone from the source",
        ),
    ],
)
def test_a_backfill_has_a_line_of_its_own(backfill: BackfillStatus, text: str) -> None:
    assert f"› {text}" in printed(with_index(backfill=backfill))


@pytest.mark.parametrize(
    ("by_hnsw", "text"),
    [
        (True, "articles: recall@10 0.987 (ef_search 40), measured 1 h 30 min ago"),
        (False, "articles: recall@10 0.987 (the whole table is read), measured 1 h 30 min ago"),
    ],
)
def test_a_recall_that_was_measured_has_a_line_of_its_own(by_hnsw: bool, text: str) -> None:
    recall = Recall(0.98734, 10, 40, 100, by_hnsw, NOW - timedelta(minutes=90))
    assert f"› {text}" in printed(with_index(recall=recall))


@pytest.mark.parametrize(
    ("began_s", "ended_s", "told"),
    [
        (0, None, "just now"),
        (0.4, None, "just now"),
        (65, None, "for 1 min 5 s"),
        (0, 0, "just now"),
        (65, 65, "1 min 5 s ago"),
        (65, 5, "1 min 5 s ago, for 1 min 0 s"),
        (-2, None, "just now"),  # by a clock that is ahead
    ],
)
def test_an_event_says_when_it_was_or_for_how_long_it_lasts(began_s: float, ended_s: float | None, told: str) -> None:
    until = None if ended_s is None else NOW - timedelta(seconds=ended_s)
    event = Event("it was paused", "bad", NOW - timedelta(seconds=began_s), until)
    (line,) = [line for line in printed(changed(events=[event])).splitlines() if "it was paused" in line]
    assert line.split("it was paused")[0].strip() == told


def test_a_worker_that_waits_says_why_and_not_that_none_runs() -> None:
    stopped = changed(worker=WorkerStatus("host:41", False, None), problems=["no worker runs for slot s: start it"])
    text = printed(as_waiting(stopped, "host:42", "the set-up waits: the source does not answer"))
    assert "host:42 waits, see below" in text
    assert "! the set-up waits: the source does not answer" in text
    assert "no worker runs" not in text
    assert "does not run" not in text


def test_eighty_columns_are_enough_for_millions() -> None:
    text = printed(
        with_index(state="building", estimated=True, documents=None, chunks=2_900_000, backlog=1_700_000), width=80
    )
    assert "…" not in text


@pytest.mark.parametrize("width", [30, 60, 79])
def test_a_narrow_terminal_gets_each_index_by_itself_and_every_heading_whole(width: int) -> None:
    narrow = with_index(state="building", estimated=True, chunks=2_900_000, vectors=2_800_000, backlog=1_700_000)
    shown = printed(narrow, width=width)
    for word in ("articles", "building", "documents", "chunks", "vectors", "backlog", "failed", "~1,700,000"):
        assert re.search(rf"(?<!\w){word}(?!\w)", shown), word
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(("state", "code"), [("live", "32"), ("building", "33"), ("paused", "31"), ("absent", "31")])
def test_colour_says_how_an_index_is(state: str, code: str) -> None:
    assert f"\x1b[{code}m{state}" in printed(with_index(state=state), colours=True)


def test_only_colour_is_lost_without_colours() -> None:
    assert re.sub(r"\x1b\[[0-9;]*m", "", printed(STATUS, colours=True)) == printed(STATUS)


def test_generations_are_shown_side_by_side_with_what_is_left() -> None:
    facts: dict[str, Any] = {
        "vector_type": "vector",
        "distance": "cosine",
        "m": 16,
        "ef_construction": 64,
        "waiting": 0,
    }
    old = GenerationStatus(
        1, "live", "minilm", "m1", 384, chunks=100, vectors=100, failed=0, bytes=2048, recall=0.99, **facts
    )
    new = GenerationStatus(
        *(2, "filling", "e5", "m2", 768),
        **facts,
        chunks=100,
        vectors=25,
        failed=1,
        discarded=2,
        bytes=1024,
        recall=None,
        rate=5.0,
        eta_s=14.8,
    )
    shown = printed(with_index(generations=[old, new]), width=140)
    assert "articles: generation 1 live: minilm, vector(384), cosine, recall 0.990, 2.0 kB" in shown
    assert (
        "generation 2 filling: e5, vector(768), cosine, 25% of 100 chunks, 15 s left, 1 failed, 2 discarded, 1.0 kB"
        in shown
    )


@pytest.mark.parametrize(("chunks", "have"), [(1, "1 chunk has"), (2_000, "2,000 chunks have")])
def test_chunks_whose_texts_were_discarded_are_shown_and_are_no_problem(chunks: int, have: str) -> None:
    said = printed(with_index(discarded=chunks), width=200)
    assert (
        f"› articles: {have} no vector, as the text was discarded: cdcsync failures articles list --discarded" in said
    )
    assert "discarded" not in printed(with_index(discarded=0), width=200)


def test_the_tables_and_the_condition_of_an_index_are_shown() -> None:
    tables = [f"tenant_{at}.articles" for at in range(7)]
    said = printed(with_index(table="tenant_*.articles", tables=tables, where="kind <> 'x'\n AND true"), width=200)
    assert "7 tables match tenant_*.articles: tenant_0.articles" in said
    assert "tenant_4.articles and 2 more; rows where kind <> 'x' AND true" in said
