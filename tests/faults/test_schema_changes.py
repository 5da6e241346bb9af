"""Schema changes in mid-stream: what an index can follow it follows, what it cannot pauses it and no other."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psycopg
import pytest

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


def of_two_tables(database: Database, *, source_lines: str = "", worker_lines: str = "") -> str:
    return configuration(
        database.dsn,
        source_lines=source_lines,
        worker_lines=f'log_level = "debug"\n{worker_lines}',
        indexes={"articles": {"columns": ["rating"]}, "notes": {"text": "{body}"}},
    )


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Two live indexes on two tables."""
    pipeline = make_pipeline(of_two_tables(database))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, rating int, extra text)")
    pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i, i FROM generate_series(1, 30) i")
    pipeline.source.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 30) i")
    pipeline.start()
    pipeline.live()
    return pipeline


def change(pipeline: Pipeline) -> None:
    """Write to both tables, with and without a transaction around it."""
    with pipeline.source.transaction():
        pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
        pipeline.source.execute("UPDATE notes SET body = body || ' again' WHERE id % 3 = 0")
    pipeline.source.execute("DELETE FROM notes WHERE id = (SELECT max(id) FROM notes)")


def state(pipeline: Pipeline, index: str) -> tuple[str, str | None]:
    row = pipeline.target.execute("SELECT state, reason FROM cdcsync.indexes WHERE name = %s", [index]).fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("gap", ["slot dropped", "slot advanced"])
def test_after_a_gap_resync_heals_updates_inserts_and_deletes_alike(
    pipeline: Pipeline, make_pipeline: Callable[[str], Pipeline], gap: str
) -> None:
    pipeline.stop(pipeline.processes[-1])
    slot = pipeline.released()
    if gap == "slot dropped":
        pipeline.source.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    change(pipeline)
    pipeline.source.execute("DELETE FROM articles WHERE id % 4 = 0")
    pipeline.source.execute("UPDATE articles SET id = id + 500 WHERE id % 4 = 1")
    if gap == "slot advanced":
        pipeline.source.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [slot])
    text = pipeline.path.read_text().replace("feedback_every_s", 'on_gap = "resync"\nfeedback_every_s')
    pipeline.path.write_text(text)

    pipeline.start()

    until(pipeline.in_step_now, pipeline.tail)
    assert [event for event in pipeline.events() if event.get("event") == "gap"]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(
            ["ALTER TABLE articles ALTER COLUMN rating TYPE text USING CASE rating % 2 WHEN 0 THEN 'even' END"],
            id="a carried column retyped, with other values",
        ),
        pytest.param(
            [
                "ALTER PUBLICATION cdcsync DROP TABLE articles",
                "DELETE FROM articles WHERE id < 10",
                "ALTER PUBLICATION cdcsync ADD TABLE articles",
            ],
            id="the table out of the publication for a while",
        ),
        pytest.param(
            [
                "DROP TABLE articles",
                "CREATE TABLE articles (id int PRIMARY KEY, title text, rating int)",
                "INSERT INTO articles VALUES (7, 'anew', 7)",
            ],
            id="the table made anew",
        ),
    ],
)
def test_what_happened_to_a_table_while_nobody_looked_is_made_up_for(pipeline: Pipeline, statements: list[str]) -> None:
    pipeline.stop(pipeline.processes[-1])
    for statement in statements:
        pipeline.source.execute(statement)

    pipeline.start()

    until(lambda: pipeline.in_step_now() and state(pipeline, "articles")[0] == "live", pipeline.tail)


@pytest.mark.proof
def test_a_row_filter_that_changes_is_followed(pipeline: Pipeline) -> None:
    if pipeline.source.info.server_version < 150000:
        pytest.skip("PostgreSQL 14 has no row filters")
    pipeline.source.execute("ALTER PUBLICATION cdcsync SET TABLE articles WHERE (id <= 10), notes")

    def filtered() -> bool:
        row = pipeline.target.execute("SELECT count(*), max(id) FROM articles_index").fetchone()
        return row == (10, 10) and state(pipeline, "articles")[0] == "live"

    until(filtered, pipeline.tail)


def test_a_standby_that_takes_over_knows_the_table_as_it_is_by_then(pipeline: Pipeline) -> None:
    first = pipeline.processes[-1]
    pipeline.start()
    pipeline.event("standby")
    pipeline.source.execute("ALTER TABLE articles ALTER COLUMN rating TYPE numeric(12,4)")
    pipeline.source.execute("UPDATE articles SET rating = rating + 0.5")
    until(pipeline.in_step_now, pipeline.tail)

    pipeline.stop(first, signal.SIGKILL)
    pipeline.source.execute("UPDATE articles SET rating = rating * 2")

    until(lambda: pipeline.in_step_now() and state(pipeline, "articles")[0] == "live", pipeline.tail)


def test_an_initial_load_that_was_cancelled_leaves_no_live_index_of_half_the_rows(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    slow = "backfill_page_rows = 5\nbackfill_max_rows_per_s = 20"
    pipeline = make_pipeline(of_two_tables(database, worker_lines=slow))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, rating int)")
    pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i, i FROM generate_series(1, 200) i")
    pipeline.start()
    pipeline.event("backfill_started")
    pipeline.target.execute(
        "UPDATE cdcsync.backfills SET state = 'cancelled', finished_at = now() WHERE index_name = 'articles'"
    )

    until(lambda: state(pipeline, "articles")[0] == "paused", pipeline.tail)
    assert "cancelled" in str(state(pipeline, "articles")[1])
    pipeline.stop(pipeline.processes[-1])
    pipeline.path.write_text(of_two_tables(database))
    pipeline.start()

    until(lambda: pipeline.in_step_now() and state(pipeline, "articles")[0] == "live", pipeline.tail)


@pytest.mark.proof
def test_a_slot_that_is_dropped_in_the_middle_of_the_initial_load_is_healed_by_a_resync(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    slow = "backfill_page_rows = 5\nbackfill_max_rows_per_s = 50"
    pipeline = make_pipeline(of_two_tables(database, source_lines='on_gap = "resync"', worker_lines=slow))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, rating int)")
    pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i, i FROM generate_series(1, 200) i")
    pipeline.start()
    pipeline.event("batch_applied")
    slot = pipeline.config.source.slot

    def dropped() -> bool:
        pipeline.source.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [slot]
        )
        try:
            pipeline.source.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        except psycopg.Error:
            return False
        return True

    until(dropped, "the slot to be dropped")

    until(lambda: pipeline.in_step_now() and state(pipeline, "articles")[0] == "live", pipeline.tail)


@pytest.mark.proof
def test_a_large_transaction_from_before_a_type_change_pauses_its_index_once(pipeline: Pipeline) -> None:
    pipeline.stop(pipeline.processes[-1])
    pipeline.source.execute("INSERT INTO articles SELECT i, repeat('title ', 100), 1 FROM generate_series(31, 6000) i")
    pipeline.source.execute("ALTER TABLE articles ALTER COLUMN rating TYPE text USING 'rated ' || rating")
    pipeline.source.execute("INSERT INTO notes VALUES (1000, 'goes on')")
    seen = len(pipeline.events())

    pipeline.start()

    until(pipeline.in_step_now, pipeline.tail)
    paused = [event for event in pipeline.events()[seen:] if event.get("event") == "index_paused"]
    assert len(paused) <= 1


def test_a_pause_amid_a_transaction_that_ends_with_a_full_batch_is_not_left_hanging(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make_pipeline(of_two_tables(database, worker_lines="batch_rows = 5"))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, rating int)")
    pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    pipeline.start()
    pipeline.live()
    pipeline.target.execute("ALTER TABLE cdcsync.articles_chunks ADD CONSTRAINT small CHECK (rating < 100)")

    # The first batch pauses the index, the second one is full with the last row, and the commit comes alone.
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title', 1000 FROM generate_series(1, 10) i")

    pipeline.event("index_paused")
    pipeline.source.execute("INSERT INTO notes VALUES (1, 'goes on')")
    pipeline.in_step("notes")
