"""An operator who edits what a worker is just setting up: the worker looks again, whoever of the two was first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psycopg
import pytest

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

WORKER_WAITS = (
    "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    " AND application_name LIKE 'cdcsync%%' AND query LIKE '%%PUBLICATION%%'"
    " AND %s = ANY(pg_blocking_pids(pid))"
)

WITHOUT_NOTES = "ALTER PUBLICATION cdcsync DROP TABLE notes"


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Two live indexes on two tables, and the worker down."""
    pipeline = make_pipeline(
        configuration(database.dsn, source_lines='on_gap = "resync"', indexes={"articles": {}, "notes": {}})
    )
    for table in ("articles", "notes"):
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)".encode())
        pipeline.source.execute(f"INSERT INTO {table} SELECT i, 'title ' || i FROM generate_series(1, 30) i".encode())
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.released()
    return pipeline


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [
        pytest.param([WITHOUT_NOTES], ["ALTER PUBLICATION cdcsync ADD TABLE notes"], id="the table is put back"),
        pytest.param(
            [WITHOUT_NOTES],
            ["LOCK TABLE notes IN SHARE UPDATE EXCLUSIVE MODE", "DROP PUBLICATION cdcsync"],
            id="the publication is dropped",
        ),
        pytest.param(
            ["DROP PUBLICATION cdcsync"],
            ["CREATE PUBLICATION cdcsync FOR TABLE articles, notes WITH (publish_via_partition_root = true)"],
            id="the publication is created",
        ),
        pytest.param(
            ["DROP PUBLICATION cdcsync"],
            ["LOCK TABLE articles IN SHARE UPDATE EXCLUSIVE MODE", "CREATE PUBLICATION cdcsync FOR ALL TABLES"],
            id="one of all tables is created",
        ),
        pytest.param([WITHOUT_NOTES], ["DROP TABLE notes"], id="the table is dropped"),
        pytest.param([WITHOUT_NOTES], ["ALTER TABLE notes RENAME TO remarks"], id="the table is renamed"),
    ],
)
def test_a_worker_whose_set_up_is_overtaken_by_an_edit_examines_everything_again(
    pipeline: Pipeline, database: Database, before: Sequence[str], meanwhile: Sequence[str]
) -> None:
    for statement in before:
        pipeline.source.execute(statement.encode())
    with psycopg.connect(database.dsn) as operator:
        for statement in meanwhile:
            operator.execute(statement.encode())
        worker = pipeline.start()
        until(
            lambda: pipeline.source.execute(WORKER_WAITS, [operator.info.backend_pid]).fetchone() == (True,),
            pipeline.tail,
        )

    pipeline.event("set_up_refused")
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    # While there is no publication nothing is sent: then the table is read again.
    until(lambda: pipeline.in_step_now("articles"), pipeline.tail)
    assert worker.poll() is None


def refuse(pipeline: Pipeline, words: str) -> None:
    """Have the source refuse every edit of a publication, in words that no examination can foresee.

    :param words: an expression of SQL.
    """
    pipeline.source.execute(WITHOUT_NOTES)
    pipeline.source.execute("CREATE SEQUENCE public.refusals")
    pipeline.source.execute(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN RAISE EXCEPTION '%', {words} USING HINT = 'ask the owner'; END $$".encode()
    )
    pipeline.source.execute(
        "CREATE EVENT TRIGGER refuses ON ddl_command_start WHEN TAG IN ('ALTER PUBLICATION') EXECUTE FUNCTION refuse()"
    )


def test_a_refusal_that_stays_the_same_ends_the_worker_with_its_reason(pipeline: Pipeline) -> None:
    refuse(pipeline, "'not today'")
    worker = pipeline.start()
    assert worker.wait(timeout=PATIENCE_S) == 2
    refusals = [event for event in pipeline.events() if event["event"] == "set_up_refused"]
    assert [(one["error"], one["fix"]) for one in refusals] == [("publication cdcsync: not today", "ask the owner")] * 2
    assert "error: not today\n" in pipeline.tail()


@pytest.mark.proof
def test_refusals_for_ever_new_reasons_end_no_worker(pipeline: Pipeline) -> None:
    refuse(pipeline, "'number ' || nextval('public.refusals')")
    worker = pipeline.start()
    until(lambda: pipeline.times("set_up_refused") > 3, pipeline.tail)
    pipeline.source.execute("DROP EVENT TRIGGER refuses")
    pipeline.event("publication_extended")
    pipeline.source.execute("UPDATE notes SET title = title || ' again'")
    until(pipeline.in_step_now, pipeline.tail)
    assert worker.poll() is None
