"""Outages: servers that restart, crash, freeze or stay away, and killed workers. Nothing is lost, and nobody helps."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import datetime, timedelta

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from tests.support.disks import tight_disk_or_skip
from tests.support.outages import MakeSimple, frozen, make_target, metric
from tests.support.proxies import Proxy
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

SENDER_TIMEOUT_S = 3

OUTAGE_S = float(os.environ.get("CDCSYNC_TEST_OUTAGE_S", "7"))
"""Longer than the server waits for a word from the worker, twice."""


def change(pipeline: Pipeline, word: str) -> None:
    """Write every kind of change."""
    with pipeline.source.transaction():
        pipeline.source.execute("UPDATE articles SET title = title || %s WHERE id %% 3 = 0", [word])
        pipeline.source.execute("UPDATE articles SET tenant = tenant + 1 WHERE id % 3 = 1")
    pipeline.source.execute("DELETE FROM articles WHERE id = (SELECT min(id) FROM articles)")
    pipeline.source.execute("INSERT INTO articles SELECT max(id) + 1, 1, %s FROM articles", [word])


def test_servers_that_restart_or_crash_are_found_again(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    source, target = make_cluster(), make_cluster()
    pipeline = make_simple(source.dsn(), make_target(target))
    worker = pipeline.start()
    pipeline.live()
    for cluster, connect in ((source, pipeline.connect_source), (target, pipeline.connect_target)):
        for stop in (cluster.stop, cluster.kill):
            change(pipeline, "before")
            stop()
            if cluster is target:
                change(pipeline, "meanwhile")
            cluster.start()
            connect()
            change(pipeline, "after")
            pipeline.in_step()
    assert worker.poll() is None
    assert not [event for event in pipeline.events() if event.get("level") == "error"]


def waits_for_a_lock(pipeline: Pipeline) -> bool:
    row = pipeline.source.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%' AND wait_event_type = 'Lock'"
    ).fetchone()
    return row != (0,)


@pytest.mark.proof
@pytest.mark.parametrize("waits_for", ["source", "target", "silent target"])
def test_a_source_can_be_shut_down_while_changes_that_it_has_sent_wait_for_it_or_for_the_target(
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
    make_proxy: Callable[[int], Proxy],
    waits_for: str,
) -> None:
    """A server that is shut down waits for what it has sent to be flushed, and takes no more connections."""
    source, target = make_cluster(), make_cluster()
    near, dsn = make_proxy(target.port), make_target(target)
    pipeline = make_simple(source.dsn(), dsn)
    # Noticed long after the source has given up.
    through = conninfo.make_conninfo(dsn, host="127.0.0.1", port=near.port, tcp_user_timeout=600_000)
    pipeline.path.write_text(pipeline.path.read_text().replace(dsn, through))
    pipeline.source.execute("ALTER TABLE articles ALTER title SET STORAGE EXTERNAL")
    pipeline.source.execute("UPDATE articles SET title = repeat(title || ' ', 1000) WHERE id = 7")
    worker = pipeline.start()
    pipeline.live()
    if waits_for == "target":
        target.stop()
        change(pipeline, "meanwhile")
        until(lambda: metric(pipeline, "cdcsync_lag_seconds") > 0, "the changes to wait")
        source.stop()
    elif waits_for == "silent target":
        near.freeze()
        change(pipeline, "meanwhile")
        until(lambda: metric(pipeline, "cdcsync_lag_seconds") > 0, "the changes to wait")
        source.stop()
        near.cut()
    else:
        with closing(psycopg.connect(source.dsn())) as locking, closing(psycopg.connect(source.dsn())) as writing:
            # The title does not change, so it is not sent: it has to be read again, behind the lock.
            writing.execute("UPDATE articles SET tenant = 99 WHERE id = 7")
            with ThreadPoolExecutor(1) as pool:
                locked = pool.submit(locking.execute, "LOCK TABLE articles IN ACCESS EXCLUSIVE MODE")
                until(lambda: blocked(pipeline), "the lock to be waited for")
                writing.commit()
                locked.result()
            until(lambda: waits_for_a_lock(pipeline), "the worker to read the row")
            source.stop()
    source.start()
    pipeline.connect_source()
    if waits_for == "target":
        target.start()
        pipeline.connect_target()
    change(pipeline, "after")
    pipeline.in_step()
    assert worker.poll() is None


def blocked(pipeline: Pipeline) -> bool:
    row = pipeline.source.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    return row != (0,)


LIMITS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "transaction_timeout",
)


def test_time_limits_that_a_database_has_for_its_sessions_do_not_hold_for_the_workers(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_database()
    if server_version(source) < 170000:
        pytest.skip("PostgreSQL 17 has all of these limits")
    pipeline = make_simple(source.dsn, target.dsn, slot=source.name)
    for database in (source, target):
        for limit in LIMITS:
            database.execute(f"ALTER DATABASE {database.name} SET {limit} = '200ms'")
    worker = pipeline.start()
    pipeline.live()
    for number in range(3):
        change(pipeline, f"change {number}")
        pipeline.in_step()

    assert worker.poll() is None
    ends = ("stream_waits", "apply_waits", "backfill_waits", "target_unavailable", "comparison_waits")
    assert [event for event in pipeline.events() if event["event"] in ends] == []


def test_any_session_may_be_terminated(make_database: Callable[[], Database], make_simple: MakeSimple) -> None:
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    for connection, name in (
        (pipeline.source, "cdcsync"),
        (pipeline.target, "cdcsync apply%"),
        (pipeline.source, "cdcsync%"),
        (pipeline.target, "cdcsync%"),
    ):
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE %s",
            [name],
        ).fetchall()
        assert ended
        change(pipeline, "after")
        pipeline.in_step()
    assert worker.poll() is None


def sender(pipeline: Pipeline) -> tuple[int, datetime]:
    """Return the walsender's process id, and when it last heard of the worker."""
    row = pipeline.source.execute("SELECT pid, reply_time FROM pg_stat_replication").fetchone()
    assert row is not None
    return row[0], row[1]


@pytest.mark.proof
@pytest.mark.timeout(120 + 2 * OUTAGE_S)
@pytest.mark.parametrize("mode", ["frozen", "down"])
def test_the_source_hears_of_the_worker_all_the_time_that_the_target_is_away(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple, mode: str
) -> None:
    source = make_cluster(settings={"wal_sender_timeout": f"{SENDER_TIMEOUT_S}s"})
    target = make_cluster()
    pipeline = make_simple(source.dsn(), make_target(target), worker_lines="batch_rows = 50")
    pipeline.start()
    pipeline.live()
    row = pipeline.target.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply%'"
    ).fetchone()
    assert row is not None
    with ExitStack() as outage:
        if mode == "frozen":
            outage.enter_context(frozen(row[0]))
        else:
            target.stop()
            outage.callback(target.start)
        # More than the worker takes in while it cannot apply, so that it stops reading.
        for number in range(5):
            pipeline.source.execute(
                "INSERT INTO articles SELECT 1000 * %s + i, 1, 'title' FROM generate_series(1, 100) i", [number + 1]
            )
        until(lambda: metric(pipeline, "cdcsync_lag_seconds") > 0, "the changes to wait")
        pid, began = sender(pipeline)
        until(
            lambda: sender(pipeline)[1] > began + timedelta(seconds=OUTAGE_S),
            "the time to pass",
            patience_s=40 + OUTAGE_S,
        )
        assert sender(pipeline)[0] == pid
    if mode == "down":
        pipeline.connect_target()
    pipeline.in_step()
    assert sender(pipeline)[0] == pid


def test_a_worker_answers_while_its_target_is_locked(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    pipeline.start()
    pipeline.live()
    with pipeline.target.transaction():
        pipeline.target.execute("LOCK TABLE cdcsync.articles_chunks IN ACCESS EXCLUSIVE MODE")
        change(pipeline, "meanwhile")
        status, body = pipeline.get("/status")
        index = json.loads(body)["indexes"]["articles"]
        assert (status, "another session holds a lock" in index["unreadable"]) == (200, True), index["unreadable"]
        assert [pipeline.get(path)[0] for path in ("/livez", "/readyz", "/metrics")] == [200, 200, 200]
        assert metric(pipeline, "cdcsync_lag_seconds") > 0
    until(lambda: pipeline.get("/status")[0] == 200, pipeline.tail)
    pipeline.in_step()


def test_an_index_is_not_caught_up_before_the_source_has_sent_what_it_had(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    source = make_cluster()
    pipeline = make_simple(source.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    change(pipeline, "while nobody followed")
    if pipeline.source.info.server_version < 170000:
        pytest.skip("a walsender waits for a standby from PostgreSQL 17 on")
    # Nothing is sent on before this standby has it, which there is not.
    pipeline.source.execute("ALTER SYSTEM SET synchronized_standby_slots = 'nobody'")
    pipeline.source.execute("SELECT pg_reload_conf()")
    streams = pipeline.times("streaming")
    pipeline.start()
    until(lambda: pipeline.times("streaming") > streams, pipeline.tail)

    status = json.loads(pipeline.get("/status")[1])
    assert (status["caught_up"], status["lag_seconds"]) == (False, 0.0)

    pipeline.source.execute("ALTER SYSTEM RESET synchronized_standby_slots")
    pipeline.source.execute("SELECT pg_reload_conf()")
    pipeline.in_step()
    until(lambda: json.loads(pipeline.get("/status")[1])["caught_up"], pipeline.tail)


def test_a_second_worker_takes_over_from_one_that_was_killed(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    first = pipeline.start()
    pipeline.live()
    second = pipeline.start()
    pipeline.event("standby")
    pipeline.stop(first, signal.SIGKILL)
    change(pipeline, "after")

    pipeline.in_step()
    assert second.poll() is None


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("alone", [True, False], ids=["left alone", "beside the worker"])
def test_a_standby_that_cannot_ask_the_target_is_none_until_the_target_says_so_again(
    make_cluster: Callable[..., Cluster], make_database: Callable[[], Database], make_simple: MakeSimple, alone: bool
) -> None:
    """Nobody else may be there to follow the slot, so what watches it must not take it for one that merely waits."""
    source, target = make_database(), make_cluster()
    pipeline = make_simple(source.dsn, make_target(target), slot=source.name)
    workers = [pipeline.start()]
    pipeline.live()
    workers.append(pipeline.start())
    pipeline.event("standby")
    ports = [event["port"] for event in pipeline.events() if event.get("event") == "listening"]
    ports = ports[1:] if alone else ports

    def shown() -> list[tuple[int, tuple[float, ...]]]:
        """Return of each worker the answer to those who count a standby as ready, and its gauges."""
        names = ("cdcsync_ready", "cdcsync_standby", 'cdcsync_connected{side="target"}')
        return sorted(
            (pipeline.get("/readyz?standby=ok", port)[0], tuple(metric(pipeline, name, port) for name in names))
            for port in ports
        )

    follows, stands_by, waits = (200, (1.0, 0.0, 1.0)), (200, (0.0, 1.0, 1.0)), (503, (0.0, 0.0, 0.0))
    both = [stands_by] if alone else [stands_by, follows]
    until(lambda: shown() == both, pipeline.tail)
    target.stop()
    if alone:
        pipeline.stop(workers[0], signal.SIGKILL)
    until(lambda: shown() == [waits] * len(ports), lambda: f"{shown()}\n{pipeline.tail()}")
    assert "target" in json.loads(pipeline.get("/readyz?standby=ok", ports[-1])[1])["reasons"][0]

    target.start()
    until(lambda: shown() == ([follows] if alone else both), lambda: f"{shown()}\n{pipeline.tail()}")
    pipeline.connect_target()
    change(pipeline, "after")
    pipeline.in_step()


def server_version(database: Database) -> int:
    with database.connect() as connection:
        return connection.info.server_version


@pytest.mark.proof
def test_a_target_that_takes_only_reads_for_a_while_is_waited_for_and_the_reason_is_told(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    with target.server.connect() as administrator:
        administrator.execute(f"ALTER DATABASE {target.name} SET default_transaction_read_only = on".encode())
        # Or the setting counts from the next sessions on.
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        administrator.execute(ended.encode(), [target.name])
        pipeline.connect_target()
        change(pipeline, "meanwhile")
        until(lambda: b"changes cannot be applied" in pipeline.get("/readyz")[1], pipeline.tail)
        for told in ("read-only transaction", "`cdcsync check` says how"):
            assert told in pipeline.get("/readyz")[1].decode()
        assert json.loads(pipeline.get("/status")[1])["worker"]["waits"].startswith("changes cannot be applied")
        # Who cannot ask the worker sees that one reads the slot.
        until(lambda: "without this pipeline's lock" in pipeline.command("status").stdout, pipeline.tail)
        # Nor does a stream that broke meanwhile hide the reason.
        pipeline.source.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
        until(lambda: b"stream is not connected: " in pipeline.get("/readyz")[1], pipeline.tail)
        assert "read-only transaction" in json.loads(pipeline.get("/status")[1])["worker"]["waits"]
        administrator.execute(f"ALTER DATABASE {target.name} RESET default_transaction_read_only".encode())
    change(pipeline, "after")
    pipeline.in_step()
    until(lambda: pipeline.get("/readyz")[0] == 200, pipeline.tail)
    assert worker.poll() is None


@pytest.mark.proof
def test_a_target_whose_disk_is_full_is_waited_for_and_the_reason_is_told(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    source, target = make_cluster(), make_cluster()
    pipeline = make_simple(source.dsn(), make_target(target))
    worker = pipeline.start()
    pipeline.live()
    database = conninfo.conninfo_to_dict(pipeline.config.target.dsn)["dbname"]
    with tight_disk_or_skip(target, str(database), ["cdcsync.articles_chunks"]) as disk:
        disk.fill()
        pipeline.source.execute(
            "INSERT INTO articles SELECT i, 1, repeat('much of it ', 50) FROM generate_series(10001, 12000) AS i"
        )
        waits = pipeline.event("apply_waits")
        assert "No space left on device" in waits["error"]
        assert waits["side"] == "target"
        until(lambda: metric(pipeline, "cdcsync_lag_seconds") > 0, "the changes to wait")
        until(lambda: b"No space left on device" in pipeline.get("/readyz")[1], pipeline.tail)
        disk.free()
        pipeline.in_step()
    change(pipeline, "after")
    pipeline.in_step()
    assert worker.poll() is None
    assert not [event for event in pipeline.events() if event.get("level") == "error"]
