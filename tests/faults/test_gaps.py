"""Gaps: changes that the slot cannot send any more are noticed before one is applied, and a resync heals the index."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import copy_of, put_back, upgrade
from tests.support.outages import (
    MakeSimple,
    all_read,
    configure,
    follows_another_server_once_it_is_approved,
    frozen,
    indexed,
    make_target,
    stops_at_the_gap_and_heals,
)
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


@contextlib.contextmanager
def kept_out(source: Database) -> Iterator[psycopg.Connection[Any]]:
    """End a worker's sessions on the source, and let nobody connect anew meanwhile, so that the slot is free."""
    with source.server.connect() as admin:
        admin.execute(f'ALTER DATABASE "{source.name}" ALLOW_CONNECTIONS false')
        admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = %s AND application_name LIKE 'cdcsync%%'",
            [source.name],
        )
        yield admin
        admin.execute(f'ALTER DATABASE "{source.name}" ALLOW_CONNECTIONS true')


def restore_beside(pipeline: Pipeline, admin: psycopg.Connection[Any], source: Database, other: Database) -> None:
    """Put a copy of the database in its place; the database that had its name, and has the slot, is `other` then."""
    pipeline.source.close()
    admin.execute(f'DROP DATABASE "{other.name}"')
    admin.execute(f'CREATE DATABASE "{other.name}" TEMPLATE "{source.name}"')
    between = f"{source.name}_between"
    for old, new in [(source.name, between), (other.name, source.name), (between, other.name)]:
        admin.execute(f'ALTER DATABASE "{old}" RENAME TO "{new}"')
    admin.execute(f'ALTER DATABASE "{other.name}" ALLOW_CONNECTIONS true')


def recreate_for_another_plugin(pipeline: Pipeline, *_: object) -> None:
    drop(pipeline)
    create = "SELECT pg_create_logical_replication_slot(%s, 'test_decoding')"
    pipeline.source.execute(create, [pipeline.config.source.slot])


def recreate_physical(pipeline: Pipeline, *_: object) -> None:
    drop(pipeline)
    pipeline.source.execute("SELECT pg_create_physical_replication_slot(%s, true)", [pipeline.config.source.slot])


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("on_gap", ["resync", "stop"])
@pytest.mark.parametrize("running", [True, False], ids=["under a worker", "before a start"])
@pytest.mark.parametrize(
    ("mishap", "reason"),
    [
        pytest.param(restore_beside, "belongs to the database", id="a copy took the database's name"),
        pytest.param(recreate_for_another_plugin, "decodes with test_decoding", id="made anew for another plugin"),
        pytest.param(recreate_physical, "is a physical slot", id="made anew for a standby"),
    ],
)
def test_a_slot_that_may_be_somebody_elses_is_kept_and_the_fix_that_is_told_heals(
    make_database: Callable[[], Database],
    make_simple: MakeSimple,
    mishap: Callable[..., None],
    reason: str,
    running: bool,
    on_gap: str,
) -> None:
    source, other = make_database(), make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, source_lines=f'on_gap = "{on_gap}"')
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    if not running:
        pipeline.stop(worker)
    with kept_out(source) as admin:
        change(pipeline)
        before = indexed(pipeline)
        mishap(pipeline, admin, source, other)
    pipeline.connect_source()
    slots = "SELECT slot_name, plugin, database FROM pg_replication_slots WHERE slot_name = %s"
    made = pipeline.source.execute(slots, [source.name]).fetchall()

    if not running:
        worker = pipeline.start()
    assert worker.wait(timeout=PATIENCE_S) == (1 if running else 2), pipeline.tail()
    said = " ".join(pipeline.tail().split())
    (error,) = [one for one in pipeline.answer("check", status=2)["findings"] if one["level"] == "error"]
    (problem,) = [one for one in pipeline.answer("status")["problems"] if f"slot {source.name} " in one]
    for told in (said, f"{error['message']}; {error['hint']}", problem):
        assert reason in told
        assert 'source.on_gap = "resync"' in told
        assert "source.slot" not in told
    assert indexed(pipeline) == before
    assert pipeline.source.execute(slots, [source.name]).fetchall() == made

    (statement,) = set(re.findall(r"SELECT pg_drop_replication_slot\('\w+'\)", said + problem + error["hint"]))
    pipeline.source.execute(statement)
    configure(pipeline, on_gap="resync")
    worker = pipeline.start()
    pipeline.event("resync_requested")
    until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ' and on' WHERE id % 2 = 0")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0


@pytest.mark.proof
def test_a_database_is_followed_on_under_the_name_that_is_told_once_a_copy_took_its_name(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, other = make_database(), make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    load(pipeline)
    with kept_out(source) as admin:
        restore_beside(pipeline, admin, source, other)
    (error,) = [one for one in pipeline.answer("check", status=2)["findings"] if one["level"] == "error"]
    (name,) = re.findall(r"point source\.dsn at (\w+)", error["hint"])
    renamed = conninfo.make_conninfo(source.dsn, dbname=name)
    configure(pipeline, dsn=renamed)
    pipeline.connect_source(renamed)
    readings = indexed(pipeline)[-1]
    change(pipeline)
    worker = pipeline.start()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    assert indexed(pipeline)[-1] == readings


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
    with kept_out(source):
        change(pipeline)
        before = indexed(pipeline)
        advance(pipeline)

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
    put_back(cluster, tmp_path / "backup", recover=recovered)
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


@pytest.mark.proof
@pytest.mark.parametrize("recovered", [False, True], ids=["files put back", "recovered twice to one timeline"])
def test_a_restored_source_that_has_written_beyond_the_checkpoint_is_compared(
    make_cluster: Callable[..., Cluster],
    database: Database,
    make_simple: MakeSimple,
    tmp_path: Path,
    recovered: bool,
) -> None:
    # Neither a position nor a timeline tells: only what the slot sends again does.
    cluster = make_cluster(settings={"restore_command": "false"})
    pipeline = make_simple(cluster.dsn(), database.dsn, source_lines='on_gap = "resync"')

    def put_back_and_write(megabytes: int) -> None:
        cluster.stop()
        put_back(cluster, tmp_path / "backup", recover=recovered)
        cluster.start()
        pipeline.connect_source()
        recovering = "SELECT pg_is_in_recovery()"
        until(lambda: pipeline.source.execute(recovering).fetchone() == (False,), "the end of the recovery")
        pipeline.source.execute("UPDATE articles SET title = 'another life' WHERE id = 1")
        for _ in range(megabytes):
            pipeline.source.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1000000), true)")

    load(pipeline)
    cluster.stop()
    copy_of(cluster, tmp_path / "backup")
    cluster.start()
    pipeline.connect_source()
    if recovered:
        worker = pipeline.start()
        change(pipeline)
        pipeline.in_step()
        pipeline.stop(worker)
        put_back_and_write(4)
        worker = pipeline.start()
        pipeline.event("resync_requested")
        until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
        pipeline.stop(worker)
    worker = pipeline.start()
    pipeline.source.execute("DELETE FROM articles WHERE id = 3")
    change(pipeline)
    pipeline.in_step()
    pipeline.stop(worker)
    loads = pipeline.times("resync_requested")
    put_back_and_write(16)

    pipeline.start()
    pipeline.event("source_doubted")
    until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
    assert pipeline.times("resync_requested") == loads


def test_a_crash_that_sets_the_slot_back_costs_no_comparison(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings={"max_wal_senders": "1"})
    pipeline = make_simple(cluster.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    behind = "SELECT confirmed_flush_lsn < %s::pg_lsn FROM pg_replication_slots"
    for _ in range(2):
        pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
        pipeline.in_step()
        with frozen(worker.pid):
            cluster.kill()
            cluster.start()
            pipeline.connect_source()
            stored = pipeline.target.execute("SELECT checkpoint::text FROM cdcsync.pipelines").fetchone()
            assert pipeline.source.execute(behind, stored).fetchone() == (True,)
        pipeline.source.execute("UPDATE articles SET title = title || ' and on' WHERE id % 2 = 0")
        pipeline.in_step()
    assert pipeline.target.execute("SELECT FROM cdcsync.backfills WHERE kind = 'compare'").fetchall() == []
    assert worker.poll() is None


@pytest.mark.proof
def test_a_start_whose_slot_waits_for_a_standby_says_what_it_waits_for(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), database.dsn)
    if pipeline.source.info.server_version < 170000:
        pytest.skip("a walsender waits for a standby from PostgreSQL 17 on")
    load(pipeline)
    worker = pipeline.start()
    change(pipeline)
    pipeline.in_step()
    # Nothing is sent before this standby has it, which there is not. The crash sets the slot back.
    pipeline.source.execute("ALTER SYSTEM SET synchronized_standby_slots = 'nobody'")
    pipeline.stop(worker)
    cluster.kill()
    cluster.start()
    pipeline.connect_source()
    streams = pipeline.times("streaming")
    pipeline.start()
    pipeline.event("slot_read_again")

    def waits() -> str:
        return json.loads(pipeline.get("/status")[1])["worker"]["waits"] or ""

    until(lambda: "sends again what precedes the checkpoint" in waits(), pipeline.tail)
    assert "synchronized_standby_slots" in waits()
    code, ready = pipeline.get("/readyz")
    assert (code, b"the start waits: slot " in ready) == (503, True)
    assert pipeline.times("streaming") == streams

    pipeline.source.execute("ALTER SYSTEM RESET synchronized_standby_slots")
    pipeline.source.execute("SELECT pg_reload_conf()")
    pipeline.in_step()
    until(lambda: not waits(), pipeline.tail)
    assert pipeline.times("source_doubted") == 0


def test_a_restart_while_no_indexed_row_changes_costs_no_comparison(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    # With the index in the source, the slot is never told of the last checkpoint: its own WAL comes after that.
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), make_target(cluster))
    worker = pipeline.start()
    pipeline.live()
    pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
    pipeline.in_step()
    changed = pipeline.position()
    pipeline.source.execute("CREATE TABLE others (id int)")
    behind = "SELECT confirmed_flush_lsn BETWEEN %s::pg_lsn AND %s::pg_lsn - 1 FROM pg_replication_slots"

    def falls_back() -> bool:
        pipeline.source.execute("INSERT INTO others SELECT generate_series(1, 1000)")
        (checkpoint,) = pipeline.target.execute("SELECT checkpoint::text FROM cdcsync.pipelines").fetchone() or ("",)
        return pipeline.source.execute(behind, [changed, checkpoint]).fetchone() == (True,)

    until(falls_back, "the slot to be behind the checkpoint, and not behind the last change")
    pipeline.stop(worker)
    cluster.restart()
    pipeline.connect_source()
    pipeline.connect_target()
    (checkpoint,) = pipeline.target.execute("SELECT checkpoint::text FROM cdcsync.pipelines").fetchone() or ("",)
    assert pipeline.source.execute(behind, [changed, checkpoint]).fetchone() == (True,)
    pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = title || ' and on' WHERE id % 2 = 0")
    pipeline.in_step()
    assert pipeline.times("source_doubted") == 0
    assert pipeline.target.execute("SELECT FROM cdcsync.backfills WHERE kind = 'compare'").fetchall() == []


BLOCKED = (
    "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply%'"
    " AND datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0)"
)


@pytest.mark.proof
def test_a_restored_source_that_lacks_what_was_applied_in_part_is_compared_if_it_has_written_beyond_it(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple, tmp_path: Path
) -> None:
    # The backup's slot is where the checkpoint is, so that it sends nothing again.
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), database.dsn, rows=60, worker_lines="batch_rows = 10")
    load(pipeline)
    cluster.stop()
    copy_of(cluster, tmp_path / "backup")
    cluster.start()
    pipeline.connect_source()
    with psycopg.connect(database.dsn) as locker, psycopg.connect(database.dsn, autocommit=True) as admin:
        locker.execute("SELECT FROM cdcsync.articles_chunks WHERE id = 55 FOR UPDATE")
        pipeline.source.execute("UPDATE articles SET title = 'never happened'")
        worker = pipeline.start()
        until(lambda: admin.execute(BLOCKED).fetchone() == (True,), "the part with the locked row")
        pipeline.stop(worker, signal.SIGKILL)
    cluster.stop()
    put_back(cluster, tmp_path / "backup")
    cluster.start()
    pipeline.connect_source()
    for _ in range(4):
        pipeline.source.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1000000), true)")
    parts = "SELECT count(*) FROM cdcsync.articles_chunks WHERE content = 'never happened'"
    assert 0 < (pipeline.target.execute(parts).fetchone() or (0,))[0] < 60
    pipeline.start()
    until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail, patience_s=40)
    assert pipeline.times("source_doubted") == 1


@pytest.mark.proof
def test_a_backup_that_ends_inside_of_what_was_applied_in_part_is_a_gap(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple, tmp_path: Path
) -> None:
    # The checkpoint is still before the transaction, and so before the backup's end: it alone would not tell.
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), database.dsn, rows=60, worker_lines="batch_rows = 10")
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with frozen(worker.pid):
        pipeline.source.execute("SELECT pg_logical_emit_message(true, 'x', 'y')")
        end = pipeline.position()
        cluster.kill()
        copy_of(cluster, tmp_path / "backup")
        cluster.start()
        pipeline.connect_source()
        locker = psycopg.connect(database.dsn)
        locker.execute("SELECT FROM cdcsync.articles_chunks WHERE id = 55 FOR UPDATE")
        with pipeline.source.transaction():
            pipeline.source.execute("UPDATE articles SET title = 'never happened'")
            pipeline.source.execute("SELECT pg_logical_emit_message(true, 'x', repeat('y', 1000000))")
    with psycopg.connect(database.dsn, autocommit=True) as admin:
        until(lambda: admin.execute(BLOCKED).fetchone() == (True,), "the part with the locked row")
    pipeline.stop(worker, signal.SIGKILL)
    locker.close()
    cluster.stop()
    put_back(cluster, tmp_path / "backup")
    cluster.start()
    pipeline.connect_source()
    parts = "SELECT count(*) FROM cdcsync.articles_chunks WHERE content = 'never happened'"
    assert 0 < (pipeline.target.execute(parts).fetchone() or (0,))[0] < 60
    before = "SELECT checkpoint <= %s::pg_lsn FROM cdcsync.pipelines"
    assert pipeline.target.execute(before, [end]).fetchone() == (True,)

    stops_at_the_gap_and_heals(pipeline, "of which parts are indexed: it was restored from a backup")


@pytest.mark.proof
def test_a_source_that_was_upgraded_is_read_again_although_it_has_the_slot(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    old = make_cluster()
    if old.version < 17:
        pytest.skip("pg_upgrade keeps logical slots from PostgreSQL 17 on")
    pipeline = make_simple(old.dsn(), database.dsn)
    load(pipeline)
    pipeline.released()
    old.stop()
    new = Cluster(port=old.port)
    try:
        new.create()
        upgrade(old, new)
        new.start()
        pipeline.connect_source()
        assert pipeline.source.execute("SELECT slot_name FROM pg_replication_slots").fetchall() == [("s",)]
        fixes = [one["hint"] for one in pipeline.answer("check", status=2)["findings"] if one["level"] == "error"]
        assert any(fix.startswith("after pg_upgrade, ") for fix in fixes), fixes

        follows_another_server_once_it_is_approved(pipeline, "pg_upgrade made a new cluster of the old one")
    finally:
        new.remove()


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

    follows_another_server_once_it_is_approved(pipeline, "another cluster than before")
    # That was for this server, and once.
    pipeline.stop(pipeline.processes[-1])
    configure(pipeline, dsn=source.dsn, on_gap="resync")
    assert pipeline.start().wait(timeout=PATIENCE_S) == 1
    assert "another cluster than before" in " ".join(pipeline.tail().split())
    # An approval that nothing came of does not outlast a start that follows the server of before.
    killed = pipeline.command("plan", "--approve-source", CDCSYNC_CRASH_AT="source approved")
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    configure(pipeline, dsn=conninfo.make_conninfo(other))
    asked = "SELECT approved_source IS NULL, (SELECT count(*) FROM cdcsync.backfills) FROM cdcsync.pipelines"
    (approved, loads) = pipeline.target.execute(asked).fetchone() or (None, None)
    assert approved is False
    pipeline.start()
    until(lambda: pipeline.target.execute(asked).fetchone() == (True, loads), pipeline.tail)


def test_a_resync_that_was_interrupted_goes_on_only_at_the_server_where_it_began(
    make_cluster: Callable[..., Cluster], make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, source_lines='on_gap = "resync"')
    load(pipeline)
    change(pipeline)
    drop(pipeline)
    killed = pipeline.start(CDCSYNC_CRASH_AT="forgotten position committed")
    assert killed.wait(timeout=PATIENCE_S) == -signal.SIGKILL
    other = make_cluster().dsn()
    with psycopg.connect(other, autocommit=True) as connection:
        connection.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL)")
        before = indexed(pipeline)
        configure(pipeline, dsn=conninfo.make_conninfo(other))
        assert pipeline.start().wait(timeout=PATIENCE_S) == 1
        assert "another cluster than before" in " ".join(pipeline.tail().split())
        assert indexed(pipeline) == before
        made = "SELECT FROM pg_publication UNION ALL SELECT FROM pg_replication_slots"
        assert connection.execute(made).fetchall() == []
    configure(pipeline, dsn=source.dsn)
    pipeline.start()
    until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
