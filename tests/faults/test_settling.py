"""A worker that is killed while it moves vectors between the tiers."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from cdcsync.process.crashpoints import VARIABLE
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("point", "budget"), [("vectors moved", 25), ("move committed", 25), ("vectors moved#2", 0.1)])
def test_each_vector_is_in_one_tier_after_a_kill_and_settles_in_the_end(
    make_pipeline: Callable[[str], Pipeline], database: Database, point: str, budget: float
) -> None:
    pipeline = make_pipeline(
        configuration(
            database.dsn,
            worker_lines="settle_after_s = 0\nsettle_share = 1",
            indexes={"articles": {"text": "{body}", "fresh_scan_budget_ms": budget}},
        )
    )
    pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, body text NOT NULL)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'text ' || i FROM generate_series(1, 200) AS i")
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)

    worker = pipeline.start(**{VARIABLE: point})
    pipeline.source.execute("UPDATE articles SET body = body || ', changed' WHERE id % 2 = 0")
    assert worker.wait(timeout=PATIENCE_S) == -signal.SIGKILL

    twice = "SELECT count(*) FROM (SELECT FROM cdcsync.articles_vectors_1 GROUP BY chunk_id HAVING count(*) > 1) AS t"
    assert pipeline.target.execute(twice).fetchone() == (0,)
    assert pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_vectors_1").fetchone() == (200,)

    worker = pipeline.start()
    pipeline.in_step()
    until(
        lambda: pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_vectors_1_fresh").fetchone() == (0,),
        "empty fresh tier",
    )
    pipeline.compare()
    assert pipeline.target.execute(twice).fetchone() == (0,)
    pipeline.stop(worker)
