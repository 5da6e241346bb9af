"""How much one worker takes on, and what that costs: memory, and connections to the servers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from psycopg import sql

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

INDEXES = 50
TABLES = 1_000

MEMORY_BYTES = 150 * 1000**2
"""The most that an idle worker without a local model may hold."""

CONNECTIONS = 20
"""The most that a worker may open, on both sides together: a server's default is 100 for everybody."""

PATIENCE_S = 200.0
"""For fifty indexes to be live, on a machine that may be busy: seconds of work when it is not."""


def make(
    make_pipeline: Callable[[str], Pipeline], database: Database, *, tables: int, indexes: int, rows: int
) -> Pipeline:
    """Make tables, of which the first few are indexed."""
    database.execute(
        f"DO $$ BEGIN FOR i IN 1..{tables} LOOP"
        " EXECUTE format('CREATE TABLE table%s (id int PRIMARY KEY, tenant int, title text)', i);"
        f" EXECUTE format('INSERT INTO table%s SELECT n, n %% 3, ''title '' || n FROM generate_series(1, {rows}) AS n',"
        " i);"
        " IF i % 100 = 0 THEN COMMIT; END IF;"
        " END LOOP; END $$"
    )
    followed = {f"index{at}": {"table": f"table{at}", "columns": ["tenant"]} for at in range(1, indexes + 1)}
    return make_pipeline(configuration(database.dsn, indexes=followed))


def memory_bytes(pipeline: Pipeline) -> float:
    """Return the worker's resident memory, as it says itself."""
    _, metrics = pipeline.get("/metrics")
    found = re.search(rb"^process_resident_memory_bytes (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


def backlog(pipeline: Pipeline) -> int:
    """Return how many chunks of all indexes wait for a vector."""
    rows = pipeline.target.execute("SELECT name FROM cdcsync.indexes").fetchall()
    counts = sql.SQL(" + ").join(
        sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier("cdcsync", f"{name}_backlog")) for (name,) in rows
    )
    (waiting,) = pipeline.target.execute(sql.SQL("SELECT {}").format(counts)).fetchone() or (0,)
    return int(waiting)


def live(pipeline: Pipeline) -> int:
    """Return how many indexes the worker has declared live."""
    return sum(event["event"] == "index_live" for event in pipeline.events())


def connections(database: Database) -> dict[str, int]:
    """Return how many sessions a worker has, by what they are for."""
    rows = database.execute(
        "SELECT application_name, count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'cdcsync%%' GROUP BY 1"
    )
    return dict(rows)


@pytest.mark.proof
def test_fifty_indexes_share_one_workers_connections(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database, tables=INDEXES, indexes=INDEXES, rows=3)
    worker = pipeline.start()
    until(lambda: live(pipeline) == INDEXES, pipeline.tail, patience_s=PATIENCE_S)
    database.execute(
        f"DO $$ BEGIN FOR i IN 1..{INDEXES} LOOP"
        " EXECUTE format('UPDATE table%s SET title = title || '' changed'' WHERE id = 2', i);"
        " EXECUTE format('DELETE FROM table%s WHERE id = 3', i);"
        " END LOOP; END $$"
    )

    pipeline.reach("index1")  # the others have the same checkpoint
    until(lambda: not backlog(pipeline), "the backlogs to drain")
    pipeline.compare()
    opened = connections(database)
    assert sum(opened.values()) <= CONNECTIONS, opened
    assert memory_bytes(pipeline) < MEMORY_BYTES
    assert pipeline.stop(worker) == 0
    until(lambda: not connections(database), "the connections to be closed")


def test_a_thousand_published_tables_cost_little_where_one_is_indexed(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, database, tables=TABLES, indexes=1, rows=2)
    database.execute("CREATE PUBLICATION cdcsync FOR ALL TABLES")
    worker = pipeline.start()
    pipeline.live()
    database.execute(
        f"DO $$ BEGIN FOR i IN REVERSE {TABLES}..1 LOOP"
        " EXECUTE format('UPDATE table%s SET title = ''changed'' WHERE id = 2', i);"
        " IF i % 100 = 0 THEN COMMIT; END IF;"
        " END LOOP; END $$"
    )

    pipeline.in_step()

    assert memory_bytes(pipeline) < MEMORY_BYTES
    assert pipeline.stop(worker) == 0
