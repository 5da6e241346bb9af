"""The whole worker as a process, on real servers, against the oracle."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from functools import partial

import pytest

from tests.support.articles import articles, fill
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server

TABLE = """
CREATE TABLE articles (
    id bigint PRIMARY KEY, tenant int, title text NOT NULL, body text,
    padding text DEFAULT repeat('x', 20)
)
"""


def make(
    make_pipeline: Callable[[str], Pipeline],
    source: Database,
    target: Database | None = None,
    *,
    batch_rows: int = 50,
    page_rows: int = 40,
) -> Pipeline:
    lines = f"batch_rows = {batch_rows}"
    return make_pipeline(articles(source, target, page_rows=page_rows, worker_lines=lines))


def write(pipeline: Pipeline, seed: int, transactions: int) -> None:
    """Change rows at random: every kind of change, in transactions of several."""
    chance = random.Random(seed)
    for number in range(transactions):
        with pipeline.source.transaction():
            for _ in range(chance.randint(1, 6)):
                key = chance.randint(1, 400)
                match chance.randint(0, 9):
                    case 0 | 1 | 2:
                        pipeline.source.execute(
                            "INSERT INTO articles VALUES (%s, %s, %s, %s) ON CONFLICT (id) DO UPDATE"
                            " SET title = excluded.title, tenant = excluded.tenant",
                            [key, chance.randint(1, 5), f"new {seed} {number}", "b " * chance.randint(0, 80)],
                        )
                    case 3 | 4:
                        pipeline.source.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = %s", [key])
                    case 5 | 6:
                        pipeline.source.execute(
                            "UPDATE articles SET body = %s WHERE id = %s", [f"body {seed} {number} " * 9, key]
                        )
                    case 7:
                        pipeline.source.execute("DELETE FROM articles WHERE id = %s", [key])
                    case 8:
                        pipeline.source.execute(
                            "UPDATE articles SET id = id + 1000 WHERE id = %s"
                            " AND NOT EXISTS (SELECT FROM articles WHERE id = %s)",
                            [key, key + 1000],
                        )
                    case 9 if chance.random() < 0.05:
                        pipeline.source.execute("TRUNCATE articles")


def test_the_initial_load_and_every_kind_of_change_reach_the_index(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 300, TABLE)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()

    write(pipeline, seed=1, transactions=120)
    pipeline.in_step()
    pipeline.source.execute("TRUNCATE articles")
    pipeline.source.execute("INSERT INTO articles VALUES (1, 1, 'after the truncate', NULL)")
    pipeline.in_step()

    assert pipeline.stop(worker) == 0


def test_changes_that_come_during_the_initial_load_win(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, make_database(), make_database(), page_rows=7)
    fill(pipeline, 400, TABLE)
    pipeline.start()
    pipeline.event("backfill_started")

    write(pipeline, seed=2, transactions=150)

    pipeline.live()
    pipeline.in_step()


def batches(pipeline: Pipeline) -> int:
    return pipeline.times("batch_applied")


def far_enough(pipeline: Pipeline, wanted: int, lsn: str) -> bool:
    """Say whether so many batches were applied, or all before `lsn`: a busy worker makes few and large ones."""
    return batches(pipeline) >= wanted or pipeline.processes[-1].poll() is not None or pipeline.reached("articles", lsn)


@pytest.mark.proof_from(1)
@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_in_the_middle_of_a_stream_of_changes_loses_nothing(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], seed: int
) -> None:
    pipeline = make(make_pipeline, make_database(), make_database(), batch_rows=11, page_rows=13)
    fill(pipeline, 300, TABLE)
    chance = random.Random(seed)

    for round_ in range(5):
        worker = pipeline.start()
        applied = batches(pipeline)
        write(pipeline, seed=100 * seed + round_, transactions=30)
        wanted = applied + chance.randint(1, 6)
        until(partial(far_enough, pipeline, wanted, pipeline.position()), f"{wanted} batches")
        assert pipeline.stop(worker, signal.SIGKILL) == -signal.SIGKILL

    pipeline.start()
    pipeline.live()
    pipeline.in_step()


@pytest.mark.faults
def test_a_second_worker_stands_by_and_takes_over_from_one_that_was_killed(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 50, TABLE)
    first = pipeline.start()
    pipeline.live()
    second = pipeline.start()
    pipeline.event("standby")
    status, body = pipeline.get("/readyz")
    assert status == 503
    assert "standby" in json.loads(body)["reasons"][0]

    pipeline.stop(first, signal.SIGKILL)
    pipeline.source.execute("UPDATE articles SET title = 'after the take-over'")

    pipeline.in_step()
    assert second.poll() is None


@pytest.mark.faults
def test_broken_connections_mend_themselves(database: Database, make_pipeline: Callable[[str], Pipeline]) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 100, TABLE)
    worker = pipeline.start()
    pipeline.live()

    for seed in range(4):
        write(pipeline, seed=50 + seed, transactions=10)
        pipeline.source.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'cdcsync%'"
        )
        write(pipeline, seed=60 + seed, transactions=10)

    pipeline.in_step()
    assert worker.poll() is None


def test_a_stopped_worker_ends_in_order_and_goes_on_where_it_was(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 100, TABLE)
    worker = pipeline.start()
    pipeline.live()
    write(pipeline, seed=7, transactions=20)
    assert pipeline.stop(worker, signal.SIGINT) == 0

    write(pipeline, seed=8, transactions=60)
    again = pipeline.start()
    pipeline.in_step()

    assert pipeline.stop(again) == 0
    assert not [event for event in pipeline.events() if event.get("level") == "error"]


@pytest.mark.faults
def test_a_slot_that_was_advanced_by_someone_else_is_a_gap(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 20, TABLE)
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.source.execute("UPDATE articles SET title = 'lost'")
    pipeline.source.execute("SELECT pg_logical_emit_message(true, 'x', 'y')")
    pipeline.source.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [pipeline.released()])

    again = pipeline.start()

    assert again.wait(timeout=PATIENCE_S) == 1
    assert "ahead of the index" in pipeline.tail()
    assert "fix:" in pipeline.tail()


def test_a_transaction_much_larger_than_a_batch_is_applied_whole(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 10, TABLE)
    pipeline.start()
    pipeline.live()

    pipeline.source.execute("SET logical_decoding_work_mem = '64kB'")
    with pipeline.source.transaction():
        pipeline.source.execute(
            "INSERT INTO articles SELECT i, 1, 'title ' || i, repeat('word ', 30) FROM generate_series(1000, 3000) i"
        )
        pipeline.source.execute("SAVEPOINT a")
        pipeline.source.execute("DELETE FROM articles")
        pipeline.source.execute("ROLLBACK TO a")
        pipeline.source.execute("UPDATE articles SET tenant = 9 WHERE id % 3 = 0")

    pipeline.in_step()


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_unchanged_large_values_survive_updates_of_other_columns(
    database: Database, make_pipeline: Callable[[str], Pipeline], identity: str
) -> None:
    pipeline = make(make_pipeline, database)
    fill(pipeline, 5, TABLE)
    pipeline.source.execute(f"ALTER TABLE articles REPLICA IDENTITY {identity}")
    pipeline.source.execute("ALTER TABLE articles ALTER body SET STORAGE EXTERNAL")
    pipeline.start()
    pipeline.live()
    pipeline.source.execute(
        "UPDATE articles SET body = (SELECT string_agg(md5(i::text), ' ') FROM generate_series(1, 300) i)"
    )

    with pipeline.source.transaction():
        pipeline.source.execute("UPDATE articles SET title = 'another title'")
        pipeline.source.execute("UPDATE articles SET id = id + 100 WHERE id < 3")
        pipeline.source.execute("UPDATE articles SET tenant = 77 WHERE id = 4")
    pipeline.source.execute("UPDATE articles SET title = 'a third one' WHERE id = 4")
    pipeline.source.execute("DELETE FROM articles WHERE id = 5")

    pipeline.in_step()
