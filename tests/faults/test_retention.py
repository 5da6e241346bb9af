"""WAL that the slot keeps on the source: none for an idle pipeline, and a word before there is too much."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isnan

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.outages import MakeSimple, make_target, metric
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


def test_an_idle_database_next_to_a_busy_one_keeps_no_wal(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as busy:
        busy.execute("CREATE DATABASE idle")
        pipeline = make_simple(cluster.dsn("idle"), database.dsn)
        pipeline.start()
        pipeline.live()
        busy.execute("CREATE TABLE noise (t text)")
        busy.execute("INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
        (written,) = busy.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)

        def kept() -> object:
            # Where decoding may begin anew moves with a note of the running transactions, as the server writes them
            # from time to time.
            busy.execute("SELECT pg_log_standby_snapshot()")
            return busy.execute(
                "SELECT restart_lsn > %(lsn)s::pg_lsn AND confirmed_flush_lsn > %(lsn)s::pg_lsn"
                " FROM pg_replication_slots",
                {"lsn": written},
            ).fetchone() == (True,)

        until(kept, pipeline.tail)


def passed(pipeline: Pipeline, lsn: str) -> bool:
    """Say whether the checkpoint is beyond a position."""
    row = pipeline.target.execute("SELECT checkpoint > %s::pg_lsn FROM cdcsync.pipelines", [lsn]).fetchone()
    return row == (True,)


def test_heartbeats_move_the_checkpoint_of_a_server_where_nobody_writes(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), database.dsn, source_lines="heartbeat_every_s = 0.1")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    for _ in range(2):
        # Nothing but heartbeats is written here, and each is beyond what was written before it.
        until(partial(passed, pipeline, pipeline.position()), pipeline.tail)
    found = pipeline.source.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync heartbeat'"
    ).fetchone()
    assert found == (1,)


def test_a_slot_that_was_given_up_because_nobody_read_it_says_so(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings={"idle_replication_slot_timeout": "1s"})
    pipeline = make_simple(cluster.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    slot = pipeline.released()

    def given_up() -> bool:
        pipeline.source.execute("CHECKPOINT")
        return pipeline.source.execute(
            "SELECT invalidation_reason FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone() == ("idle_timeout",)

    until(given_up, "the server to give the slot up")

    done = pipeline.command("run")
    assert done.returncode == 2
    assert "nobody read it for longer than idle_replication_slot_timeout" in done.stderr
    shown = pipeline.command("status").stdout
    assert "idle_replication_slot_timeout" in shown


@pytest.mark.proof
def test_a_slot_that_holds_much_of_what_it_may_is_told_of_before_it_is_a_gap(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings={"max_slot_wal_keep_size": "96MB"})
    pipeline = make_simple(cluster.dsn(), database.dsn)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert metric(pipeline, "cdcsync_slot_retained_ratio") < 0.5
    with pipeline.target.transaction():
        pipeline.target.execute("LOCK TABLE cdcsync.articles_chunks IN SHARE MODE")
        pipeline.source.execute("UPDATE articles SET title = 'changed'")
        write_wal(pipeline, 0.55)
        told = pipeline.event("slot_retention")
        assert told["level"] == "warning"
        assert 50 <= told["percent"] < 80
        write_wal(pipeline, 0.85)
        until(lambda: len(retentions(pipeline)) == 2, pipeline.tail)
        assert retentions(pipeline)[1]["level"] == "error"
        assert retentions(pipeline)[1]["fix"]
        assert metric(pipeline, "cdcsync_slot_retained_ratio") >= 0.8
    pipeline.in_step()

    def relieved() -> bool:
        pipeline.source.execute("SELECT pg_log_standby_snapshot()")
        return metric(pipeline, "cdcsync_slot_retained_ratio") < 0.5

    until(relieved, pipeline.tail)
    assert len(retentions(pipeline)) == 2


@pytest.mark.proof
def test_figures_of_servers_that_are_away_are_not_known_and_those_of_the_slot_need_no_target(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    """The slot fills while the target is away, which is when its alerts matter."""
    source, cluster = make_cluster(settings={"max_slot_wal_keep_size": "96MB"}), make_cluster()
    pipeline = make_simple(source.dsn(), make_target(cluster))
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    chunks = 'cdcsync_index_chunks{index="articles"}'
    until(lambda: metric(pipeline, chunks) == 20, pipeline.tail)
    cluster.stop()
    pipeline.source.execute("UPDATE articles SET title = 'changed'")
    write_wal(pipeline, 0.85)
    until(lambda: metric(pipeline, "cdcsync_slot_safe_bytes") < 48e6, pipeline.tail)
    assert metric(pipeline, "cdcsync_slot_retained_bytes") > 48e6
    for figure in (chunks, "cdcsync_lag_bytes"):
        until(lambda: isnan(metric(pipeline, figure)), figure)  # noqa: B023 - called in the loop
    cluster.start()
    until(lambda: metric(pipeline, chunks) == 20, pipeline.tail)
    source.stop()
    for figure in ("cdcsync_lag_bytes", "cdcsync_slot_retained_bytes", 'cdcsync_slot_wal_status{status="reserved"}'):
        until(lambda: isnan(metric(pipeline, figure)), figure)  # noqa: B023 - called in the loop
    assert metric(pipeline, chunks) == 20


def retentions(pipeline: Pipeline) -> list[dict[str, object]]:
    return [event for event in pipeline.events() if event["event"] == "slot_retention"]


def write_wal(pipeline: Pipeline, share: float) -> None:
    """Write WAL until the slot holds more than a share of what it may."""
    while pipeline.source.execute(
        "SELECT pg_current_wal_lsn() - restart_lsn"
        " < %s * (pg_current_wal_lsn() - restart_lsn + safe_wal_size) FROM pg_replication_slots",
        [share],
    ).fetchone() == (True,):
        pipeline.source.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 1000000), true)")
