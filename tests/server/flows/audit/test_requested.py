"""A comparison that was asked for: what differs is read again, and the whole table where most of it does."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from cdcsync.flows.audit.verification import MANY
from tests.support.configs import NO_AUDIT
from tests.support.outages import MakeSimple
from tests.support.scenes import Followed, MakeScene
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server

ROWS = MANY + 500


@pytest.mark.proof
@pytest.mark.parametrize(
    ("using", "whole"), [("upper(title)", True), ("CASE WHEN id < 30 THEN upper(title) ELSE title END", False)]
)
def test_a_table_of_which_most_differs_is_read_as_one_and_not_key_by_key(
    make_database: Callable[[], Database], make_simple: MakeSimple, using: str, whole: bool
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, rows=ROWS, worker_lines=NO_AUDIT)
    pipeline.start()
    pipeline.live()

    pipeline.source.execute(f"ALTER TABLE articles ALTER title TYPE text USING {using}".encode())

    until(pipeline.in_step_now, pipeline.tail, progress=lambda: pipeline.times("batch_applied"))
    assert bool(pipeline.times("index_read_again")) is whole
    read = pipeline.target.execute(
        "SELECT kind, keyed FROM cdcsync.backfills WHERE kind NOT IN ('compare', 'initial') ORDER BY id"
    ).fetchall()
    assert read == ([("resync", False)] if whole else [("verify", True), ("replay", True)])


@pytest.mark.proof
def test_what_equals_before_the_stream_has_brought_everything_is_compared_only_afterwards(
    make_scene: MakeScene,
) -> None:
    """All texts are alike, so that the index looks right until the stream deletes what moved out of its key."""
    scene = make_scene(
        [
            *(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)" for name in ("same", "before")),
            "ALTER TABLE same REPLICA IDENTITY FULL",
            "INSERT INTO same SELECT i, 'the same' FROM generate_series(1, 2000) i",
        ],
        {"same": Followed("same"), "before": Followed("before")},
        worker_lines=NO_AUDIT,
    )
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute(
        "INSERT INTO before SELECT i, md5(i::text) FROM generate_series(1, 30000) i",
        "ALTER TABLE same DROP CONSTRAINT same_pkey",
        "UPDATE same SET id = id + 1",
        "ALTER TABLE same ADD PRIMARY KEY (id)",
    )

    scene.pipeline.start()

    scene.settle()
    scene.heals("same", "before")


def loaded(make_database: Callable[[], Database], make_simple: MakeSimple) -> Pipeline:
    """Return a pipeline that was live, and whose worker has stopped."""
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, rows=ROWS)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    return pipeline


@pytest.mark.proof
def test_a_worker_that_dies_as_it_reads_a_table_in_place_of_comparing_it_leaves_that_to_the_next_one(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline = loaded(make_database, make_simple)
    pipeline.source.execute("ALTER TABLE articles ALTER title TYPE text USING upper(title)")

    for point in ("reading in place of a comparison asked for", "reading in place of a comparison begun"):
        worker = pipeline.start(CDCSYNC_CRASH_AT=point)
        assert worker.wait(PATIENCE_S) == -signal.SIGKILL, pipeline.tail()
    pipeline.start()

    until(pipeline.in_step_now, pipeline.tail, progress=lambda: pipeline.times("batch_applied"))
    assert pipeline.target.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'resync'").fetchone() == (1,)


@pytest.mark.proof
def test_a_repair_of_most_of_an_index_reads_it_as_one(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline = loaded(make_database, make_simple)
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET tenant = tenant + 1")

    found = pipeline.answer("verify", "articles", "--repair")

    assert found["differences"] == {"carried": ROWS}
    assert (found["repaired"], found["after_repair"]["equal"]) == (ROWS, True)
    assert pipeline.target.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'resync'").fetchone() == (1,)
    pipeline.compare()
