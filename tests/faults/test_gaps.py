"""Gaps: changes that the slot cannot send any more are noticed before one is applied, and a resync heals the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import copy_of, put_back
from tests.support.outages import MakeSimple, configure, frozen, indexed, stops_at_the_gap_and_heals
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


def load(pipeline: Pipeline) -> None:
    """Run a worker until the index is live and equal, and stop it."""
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.stop(worker)


def change(pipeline: Pipeline) -> None:
    """Write what gets lost, of every kind."""
    pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
    pipeline.source.execute("DELETE FROM articles WHERE id % 7 = 0")
    pipeline.source.execute("INSERT INTO articles SELECT 1000 + i, 1, 'late ' || i FROM generate_series(1, 5) i")


def drop(pipeline: Pipeline) -> None:
    pipeline.source.execute("SELECT pg_drop_replication_slot(%s)", [pipeline.released()])


def recreate(pipeline: Pipeline) -> None:
    drop(pipeline)
    pipeline.source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [pipeline.config.source.slot])


def recreate_two_phase(pipeline: Pipeline) -> None:
    drop(pipeline)
    create = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput', false, true)"
    pipeline.source.execute(create, [pipeline.config.source.slot])


def advance(pipeline: Pipeline) -> None:
    pipeline.source.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", [pipeline.released()])


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("mishap", "reason", "status"),
    [
        pytest.param(drop, "the replication slot is gone", 1, id="dropped"),
        pytest.param(recreate, "the slot is ahead of the index", 1, id="recreated"),
        pytest.param(recreate_two_phase, "sends prepared transactions", 2, id="made to send prepared transactions"),
        pytest.param(advance, "the slot is ahead of the index", 1, id="advanced by someone else"),
    ],
)
def test_a_slot_that_cannot_send_all_is_a_gap(
    make_database: Callable[[], Database],
    make_simple: MakeSimple,
    mishap: Callable[[Pipeline], None],
    reason: str,
    status: int,
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    load(pipeline)
    change(pipeline)
    mishap(pipeline)

    stops_at_the_gap_and_heals(pipeline, reason, status)


def test_a_slot_that_was_moved_while_the_worker_was_cut_off_is_a_gap(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    # Nobody connects anew for a moment, so that the slot is free.
    with source.server.connect() as admin:
        admin.execute(f'ALTER DATABASE "{source.name}" ALLOW_CONNECTIONS false')
        admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = %s AND application_name LIKE 'cdcsync%%'",
            [source.name],
        )
        change(pipeline)
        before = indexed(pipeline)
        advance(pipeline)
        admin.execute(f'ALTER DATABASE "{source.name}" ALLOW_CONNECTIONS true')

    assert worker.wait(timeout=PATIENCE_S) == 1
    assert "the slot is ahead of the index" in pipeline.tail()
    assert indexed(pipeline) == before


LITTLE_WAL = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}


def lose_wal(pipeline: Pipeline) -> None:
    """Write more WAL than the slot may hold."""
    for _ in range(4):
        pipeline.source.execute("SELECT pg_switch_wal()")
        pipeline.source.execute("SELECT pg_logical_emit_message(false, 'x', 'y', true)")
    pipeline.source.execute("CHECKPOINT")
    assert pipeline.source.execute("SELECT wal_status FROM pg_replication_slots").fetchone() == ("lost",)


def test_a_slot_that_lost_its_wal_is_a_gap(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings=LITTLE_WAL)
    pipeline = make_simple(cluster.dsn(), database.dsn)
    load(pipeline)
    change(pipeline)
    lose_wal(pipeline)

    # The checks before the start see it already, and nothing is changed then.
    stops_at_the_gap_and_heals(pipeline, "the server has removed WAL", status=2)


def test_a_slot_that_loses_its_wal_under_a_worker_is_a_gap(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings=LITTLE_WAL)
    pipeline = make_simple(cluster.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with frozen(worker.pid):
        before = indexed(pipeline)
        change(pipeline)
        lose_wal(pipeline)

    assert worker.wait(timeout=PATIENCE_S) == 1
    assert "has removed WAL" in " ".join(pipeline.tail().split())
    assert indexed(pipeline) == before


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("recovered", [False, True], ids=["files put back", "recovered to a new timeline"])
def test_a_source_restored_from_an_older_backup_is_a_gap(
    make_cluster: Callable[..., Cluster],
    database: Database,
    make_simple: MakeSimple,
    tmp_path: Path,
    recovered: bool,
) -> None:
    cluster = make_cluster(settings={"restore_command": "false"})
    pipeline = make_simple(cluster.dsn(), database.dsn)
    load(pipeline)
    cluster.stop()
    copy_of(cluster, tmp_path / "backup")
    cluster.start()
    pipeline.connect_source()
    change(pipeline)
    worker = pipeline.start()
    pipeline.in_step()
    pipeline.stop(worker)
    cluster.stop()
    put_back(cluster, tmp_path / "backup")
    if recovered:
        signal = cluster.data / "recovery.signal"
        signal.touch()
        cluster.programs.give(signal)
    cluster.start()
    pipeline.connect_source()
    if recovered:
        until(
            lambda: pipeline.source.execute("SELECT pg_is_in_recovery()").fetchone() == (False,),
            "the end of the recovery",
        )
        # WAL goes on beyond the checkpoint, so that only its history tells.
        pipeline.source.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1000000), true)")
    pipeline.source.execute("UPDATE articles SET title = 'another life' WHERE id = 1")

    stops_at_the_gap_and_heals(pipeline, "branched off at" if recovered else "restored from a backup")


def test_another_cluster_is_a_gap_and_nothing_is_created_there(
    make_cluster: Callable[..., Cluster],
    make_database: Callable[[], Database],
    make_simple: MakeSimple,
    make_pipeline: Callable[[str], Pipeline],
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    load(pipeline)
    cluster = make_cluster()
    other = cluster.dsn()
    with psycopg.connect(other, autocommit=True) as connection:
        connection.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL)")
        connection.execute("INSERT INTO articles VALUES (1, 1, 'of another world')")
    configure(pipeline, dsn=conninfo.make_conninfo(other))
    pipeline.connect_source(other)
    before = pipeline.source.execute("SELECT count(*) FROM pg_publication").fetchone()

    worker = pipeline.start()
    assert worker.wait(timeout=PATIENCE_S) == 1
    assert pipeline.source.execute("SELECT count(*) FROM pg_publication").fetchone() == before == (0,)

    # It may be the source of another pipeline, which a slot of its own keeps apart from this one.
    assert "source.slot" in pipeline.tail()
    with psycopg.connect(other, autocommit=True) as connection:
        connection.execute("CREATE TABLE notes (LIKE articles INCLUDING ALL)")
        connection.execute("INSERT INTO notes TABLE articles")
    text = pipeline.path.read_text()
    beside = make_pipeline(text.replace(f'"{source.name}"', f'"other_{source.name}"').replace("articles", "notes"))
    worker = beside.start()
    beside.event("index_live")
    beside.compare_one("notes")
    assert beside.stop(worker) == 0
    beside.released()
    assert beside.command("teardown", "--purge", "--yes").returncode == 0

    stops_at_the_gap_and_heals(pipeline, "another cluster than before")
