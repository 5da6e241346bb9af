"""A target that goes back to an earlier state under a living worker: noticed before one more change is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import copy_of, cut_off, put_back
from tests.support.outages import MakeSimple, all_read, make_target, stops_at_the_gap_and_heals
from tests.support.proxies import Proxy
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def acknowledged(pipeline: Pipeline) -> None:
    """Wait until the source has heard that everything committed so far is in the target."""
    lsn = pipeline.position()
    pipeline.source.execute("SELECT pg_logical_emit_message(true, 'x', '')")
    until(
        lambda: (
            pipeline.source.execute(
                "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
                [lsn, pipeline.config.source.slot],
            ).fetchone()
            == (True,)
        ),
        pipeline.tail,
    )


def change(pipeline: Pipeline, word: str) -> None:
    pipeline.source.execute("UPDATE articles SET title = title || %s WHERE id %% 2 = 0", [word])
    pipeline.source.execute("DELETE FROM articles WHERE id = (SELECT min(id) FROM articles)")


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("on_gap", ["stop", "resync"])
@pytest.mark.parametrize("how", ["a standby that lagged is promoted", "a backup is restored"])
def test_a_target_that_lost_confirmed_changes_under_a_worker_is_a_gap(
    make_database: Callable[[], Database],
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
    tmp_path: Path,
    stack: contextlib.ExitStack,
    how: str,
    on_gap: str,
) -> None:
    source, first = make_database(), make_cluster()
    dsn, standby = make_target(first), None
    if "standby" in how:
        standby = stack.enter_context(first.standby(slot="near"))
        dsn = conninfo.make_conninfo(
            dsn, host="127.0.0.1,127.0.0.1", port=f"{first.port},{standby.port}", target_session_attrs="read-write"
        )
    pipeline = make_simple(source.dsn, dsn, slot=source.name, source_lines=f'on_gap = "{on_gap}"')
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    if standby is not None:
        (lsn,) = pipeline.target.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or ("",)
        cut_off(standby, after=lsn)
    else:
        pipeline.target.execute("CHECKPOINT")
        first.stop("immediate")
        copy_of(first, tmp_path / "backup")
        first.start()
        pipeline.connect_target()
    change(pipeline, " then lost")
    pipeline.in_step()
    acknowledged(pipeline)
    first.kill()
    if standby is not None:
        standby.promote()
    else:
        put_back(first, tmp_path / "backup")
        first.start()
    pipeline.connect_target()
    change(pipeline, " after")

    pipeline.event("target_rewound")
    if on_gap == "stop":
        assert worker.wait(timeout=PATIENCE_S) == 1, pipeline.tail()
        stops_at_the_gap_and_heals(pipeline, "the target fell back to an older state (a standby of it was promoted")
    else:
        pipeline.event("resync_requested")
        until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
        assert worker.poll() is None


@pytest.mark.proof
def test_a_former_primary_of_the_target_that_is_back_and_named_first_is_passed_over(
    make_database: Callable[[], Database],
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
    stack: contextlib.ExitStack,
) -> None:
    source, first = make_database(), make_cluster()
    dsn = make_target(first)
    standby = stack.enter_context(first.standby(slot="near"))
    dsn = conninfo.make_conninfo(
        dsn, host="127.0.0.1,127.0.0.1", port=f"{first.port},{standby.port}", target_session_attrs="read-write"
    )
    pipeline = make_simple(source.dsn, dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    (lsn,) = pipeline.target.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or ("",)
    cut_off(standby, after=lsn)
    first.kill()
    standby.promote()
    pipeline.connect_target()
    change(pipeline, " on the promoted one")
    pipeline.in_step()

    first.start()
    row = "SELECT fence, commits, checkpoint FROM cdcsync.pipelines"
    with psycopg.connect(first.dsn("target"), autocommit=True) as former:
        before = former.execute(row).fetchall()
        change(pipeline, " and beside the former one")
        pipeline.in_step()
        # Also if all sessions are opened again, by this worker or by the next one.
        pipeline.target.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"
        )
        change(pipeline, " again")
        pipeline.in_step()
        assert worker.poll() is None
        assert pipeline.command("status").returncode == 0
        assert pipeline.command("check").returncode == 0
        assert pipeline.stop(worker) == 0
        worker = pipeline.start()
        change(pipeline, " by the next worker")
        pipeline.in_step()
        assert pipeline.stop(worker) == 0
        assert former.execute(row).fetchall() == before
    assert pipeline.times("resync_requested") == 0


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("edit", ["commits = commits - 1", "checkpoint = NULL"])
def test_an_edited_row_of_the_pipeline_is_noticed_and_what_may_be_missing_is_read(
    make_database: Callable[[], Database], make_simple: MakeSimple, edit: str
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, source_lines='on_gap = "resync"')
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.target.execute(f"UPDATE cdcsync.pipelines SET {edit}".encode())
    change(pipeline, " after")
    pipeline.event("target_rewound")
    until(lambda: pipeline.times("streaming") == 2 and all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
    # With the checkpoint still there, nothing is lost, and nothing is read again.
    assert pipeline.times("resync_requested") == (1 if "NULL" in edit else 0)
    assert worker.poll() is None


def test_an_empty_checkpoint_beside_a_loaded_index_is_a_gap(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    change(pipeline, " while nobody knew")
    pipeline.target.execute("UPDATE cdcsync.pipelines SET checkpoint = NULL")

    stops_at_the_gap_and_heals(pipeline, "the pipeline has no checkpoint")


def test_the_worker_follows_its_targets_address_to_another_server_although_the_one_before_runs(
    make_database: Callable[[], Database],
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
    make_proxy: Callable[[int], Proxy],
    stack: contextlib.ExitStack,
) -> None:
    source, first = make_database(), make_cluster()
    standby = stack.enter_context(first.standby(slot="near"))
    address = make_proxy(first.port)
    dsn = conninfo.make_conninfo(make_target(first), host="127.0.0.1", port=address.port)
    pipeline = make_simple(source.dsn, dsn, slot=source.name, source_lines='on_gap = "resync"')
    pipeline.hurry["cdcsync.flows.address.LOOK_S"] = 1.0
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    address.move(standby.port)
    assert "standby" in pipeline.event("target_sessions_wait")["error"]
    change(pipeline, " over the session that is open")
    pipeline.in_step()

    standby.promote()
    pipeline.connect_target()
    change(pipeline, " to the new target")

    until(pipeline.in_step_now, pipeline.tail)
    with psycopg.connect(first.dsn(), autocommit=True) as left:
        ours = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"
        until(lambda: not left.execute(ours).fetchall(), lambda: f"{left.execute(ours).fetchall()} to end")
    assert worker.poll() is None
    assert pipeline.times("index_paused") == 0
    assert pipeline.stop(worker) == 0


def test_a_restart_of_the_target_costs_the_stream_no_connection(
    make_database: Callable[[], Database],
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
) -> None:
    source, target = make_database(), make_cluster()
    pipeline = make_simple(source.dsn, make_target(target), slot=source.name)
    pipeline.hurry["cdcsync.flows.address.LOOK_S"] = 0.5
    pipeline.hurry["cdcsync.postgres.followed.STAYS_S"] = 0.0
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    target.restart()
    pipeline.connect_target()

    # Nothing changes, and the sessions that are opened meanwhile have the one that applies changes opened again.
    held = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply%'"
    until(lambda: bool(pipeline.target.execute(held).fetchall()), pipeline.tail)
    change(pipeline, " after")
    pipeline.in_step()
    assert pipeline.times("streaming") == 1
    assert pipeline.stop(worker) == 0
