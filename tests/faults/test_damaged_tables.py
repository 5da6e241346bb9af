"""A target that stops, and comes back with a damaged table: the other indexes keep up, and the operator is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.outages import MakeSimple, make_target
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

NOTES = """
[indexes.notes]
table = "notes"
text = "{body}"
embedder = "fake"
"""


def damage(path: Path) -> None:
    """Overwrite the header of a table's first page."""
    with path.open("r+b") as file:
        file.write(b"\xff" * 24)


def reasons(pipeline: Pipeline) -> list[str]:
    status, body = pipeline.get("/readyz")
    told: list[str] = json.loads(body)["reasons"]
    assert (status == 200) == (not told)
    return told


@pytest.mark.proof
def test_what_only_looks_at_a_target_ends_no_worker_and_says_what_it_cannot_see(
    make_database: Callable[[], Database], make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_cluster()
    pipeline = make_simple(source.dsn, make_target(target), slot=source.name, worker_lines="ready_max_lag_s = 1")
    pipeline.source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text NOT NULL)")
    pipeline.source.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 20) AS i")
    pipeline.configure(pipeline.path.read_text() + NOTES)
    pipeline.hurry = {"cdcsync.worker.readings.AWAY_S": 1}
    worker = pipeline.start()
    pipeline.live()
    (path,) = pipeline.target.execute("SELECT pg_relation_filepath('cdcsync.articles_chunks')").fetchone() or ("",)

    # Nothing is to be written, so only who looks at the target notices that it is gone.
    until(lambda: not reasons(pipeline), pipeline.tail)
    target.stop()
    until(lambda: any("the target does not answer" in one for one in reasons(pipeline)), pipeline.tail)
    damage(target.data / path)
    target.start()
    pipeline.connect_target()

    until(lambda: any(one.startswith("index articles cannot be read: invalid page") for one in reasons(pipeline)), "it")
    pipeline.source.execute("UPDATE notes SET body = body || ' and on'")
    pipeline.in_step("notes")
    status = json.loads(pipeline.get("/status")[1])
    assert (status["indexes"]["notes"]["chunks"], status["indexes"]["notes"]["unreadable"]) == (20, None)
    assert "Damaged tables" in next(one for one in status["problems"] if one.startswith("index articles cannot"))
    assert 'cdcsync_index_chunks{index="notes"} 20.0' in pipeline.metrics()
    assert 'cdcsync_index_chunks{index="articles"} NaN' in pipeline.metrics()
    assert worker.poll() is None

    # A worker that starts finds the damage as well, and applies to the other index.
    assert pipeline.stop(worker) == 0
    pipeline.source.execute("UPDATE articles SET title = title || ' and on'")
    pipeline.source.execute("DELETE FROM notes WHERE id < 5")
    worker = pipeline.start()
    pipeline.in_step("notes")
    until(lambda: pipeline.times("index_unreadable") == 2, pipeline.tail)
    assert worker.poll() is None

    # As docs/operations.md says: without the index, its tables can be dropped, and then it is loaded anew.
    text = pipeline.path.read_text()
    start, end = text.index("[indexes.articles]"), text.index("[indexes.notes]")
    assert pipeline.stop(worker) == 0
    pipeline.configure(text[:start] + text[end:])
    streamed = pipeline.times("streaming")
    worker = pipeline.start()
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    pipeline.in_step()
    dropped = pipeline.command("drop", "articles", "--yes")
    assert dropped.returncode == 0, dropped.stderr
    assert pipeline.stop(worker) == 0
    pipeline.configure(text)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
