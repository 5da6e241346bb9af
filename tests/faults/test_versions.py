"""Sources of other major versions than the target: the whole path from the first load on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import OTHER_VERSIONS
from tests.support.outages import MakeSimple, configure, stops_at_the_gap_and_heals
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.streaming]


@pytest.mark.parametrize(
    "version", [pytest.param(one, marks=[pytest.mark.proof] * (one != min(OTHER_VERSIONS))) for one in OTHER_VERSIONS]
)
def test_a_source_of_another_version_is_followed_from_its_first_load_to_a_gap(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple, version: int
) -> None:
    if not OTHER_VERSIONS[version].exists():
        pytest.skip(f"PostgreSQL {version} is not installed")
    cluster = make_cluster(bin_dir=OTHER_VERSIONS[version], settings={"logical_decoding_work_mem": "64kB"})
    pipeline = make_simple(
        cluster.dsn(), database.dsn, rows=300, worker_lines="batch_rows = 50\nbackfill_page_rows = 40"
    )
    pipeline.source.execute("ALTER TABLE articles ALTER title SET STORAGE EXTERNAL")
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()

    every_kind_of_change(pipeline)
    pipeline.in_step()
    with pipeline.source.transaction():
        pipeline.source.execute(
            "INSERT INTO articles SELECT i, 1, repeat('title ' || i, 10) FROM generate_series(5001, 6500) i"
        )
        pipeline.source.execute("SAVEPOINT a")
        pipeline.source.execute("UPDATE articles SET title = 'never'")
        pipeline.source.execute("ROLLBACK TO a")
        pipeline.source.execute("UPDATE articles SET tenant = 9 WHERE id % 3 = 0")
    pipeline.in_step()
    row = pipeline.source.execute("SELECT stream_txns > 0 FROM pg_stat_replication_slots").fetchone()
    assert row == (True,)

    pipeline.source.execute("TRUNCATE articles")
    pipeline.source.execute("INSERT INTO articles SELECT i, 1, 'anew ' || i FROM generate_series(1, 50) i")
    pipeline.in_step()

    cluster.restart()
    pipeline.connect_source()
    every_kind_of_change(pipeline)
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    every_kind_of_change(pipeline)
    configure(pipeline, streaming=False)
    worker = pipeline.start()
    pipeline.in_step()
    assert not [event for event in pipeline.events() if event.get("level") == "error"]

    pipeline.stop(worker)
    pipeline.source.execute("DELETE FROM articles WHERE id % 4 = 0")
    pipeline.source.execute("SELECT pg_drop_replication_slot(%s)", [pipeline.released()])
    stops_at_the_gap_and_heals(pipeline, "the replication slot is gone")


def every_kind_of_change(pipeline: Pipeline) -> None:
    """Write each kind of change: to text, to a carried column, to the key, and large values that stay as they are."""
    source = pipeline.source
    source.execute("INSERT INTO articles SELECT max(id) + 1, 1, 'one more' FROM articles")
    source.execute("UPDATE articles SET title = repeat(title, 600) WHERE id = (SELECT max(id) FROM articles)")
    with source.transaction():
        source.execute("UPDATE articles SET tenant = tenant + 1 WHERE id % 2 = 0 OR length(title) > 1000")
        source.execute("UPDATE articles SET title = 'again ' || id WHERE id % 5 = 0")
        source.execute("UPDATE articles SET id = id + 10000 WHERE id % 11 = 0 OR length(title) > 1000")
    source.execute("DELETE FROM articles WHERE id % 13 = 0")
