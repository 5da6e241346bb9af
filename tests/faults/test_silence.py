"""Servers that fall silent without closing a connection, and servers that are not there yet: nobody waits for ever."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import OTHER_VERSIONS
from tests.support.outages import MakeSimple, all_read, configure, make_target, metric
from tests.support.proxies import Proxy
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

NOTICED_WITHIN_MS = 4_000
"""The DSNs' `tcp_user_timeout`; the source's `wal_sender_timeout` is as long."""

MakeProxy = Callable[[int], Proxy]


def through(proxy: Proxy, dsn: str) -> str:
    return conninfo.make_conninfo(
        dsn, host="127.0.0.1", port=proxy.port, tcp_user_timeout=NOTICED_WITHIN_MS, connect_timeout=2
    )


def reasons(pipeline: Pipeline) -> str:
    """Return why the worker says that it is not ready, empty when it is."""
    return " ".join(json.loads(pipeline.get("/readyz")[1])["reasons"])


def status(pipeline: Pipeline) -> dict[str, Any]:
    code, body = pipeline.get("/status")
    return dict(json.loads(body)) if code == 200 else {}


def change(pipeline: Pipeline, word: str) -> None:
    """Change every text, which is more than is embedded beside the commit."""
    pipeline.source.execute("UPDATE articles SET title = title || %s", [word])


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("how", ["freeze", pytest.param("drop", marks=pytest.mark.proof)])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_connection_that_falls_silent_is_noticed_told_of_and_made_again(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple, make_proxy: MakeProxy, side: str, how: str
) -> None:
    source = make_cluster(settings={"wal_sender_timeout": f"{NOTICED_WITHIN_MS}ms"})
    target = make_cluster()
    dsn = make_target(target)
    near_source, near_target = make_proxy(source.port), make_proxy(target.port)
    pipeline = make_simple(source.dsn(), dsn, rows=200, worker_lines="ready_max_lag_s = 1")
    text = pipeline.path.read_text()
    text = text.replace(source.dsn(), through(near_source, source.dsn())).replace(dsn, through(near_target, dsn))
    pipeline.path.write_text(text)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    until(lambda: not reasons(pipeline), lambda: reasons(pipeline))
    silent = near_source if side == "source" else near_target

    getattr(silent, how)()
    change(pipeline, " meanwhile")
    if side == "source":
        until(lambda: "nothing has been heard" in reasons(pipeline), lambda: reasons(pipeline))
        assert metric(pipeline, "cdcsync_lag_seconds") != 0  # unknown is not a number
        until(lambda: "is not connected" in reasons(pipeline), lambda: reasons(pipeline))
    else:
        until(lambda: "lag of" in reasons(pipeline), lambda: reasons(pipeline))
        until(lambda: pipeline.times("apply_waits") + pipeline.times("stream_waits") > 0, pipeline.tail)
    silent.heal()

    pipeline.in_step()
    until(lambda: not reasons(pipeline), lambda: reasons(pipeline))
    until(lambda: status(pipeline).get("caught_up"), pipeline.tail)
    change(pipeline, " afterwards")
    pipeline.in_step()
    assert worker.poll() is None
    if side == "target" and how == "freeze":
        # The server had not noticed either, and held the pipeline's lock for the old session.
        assert pipeline.times("old_session_ended") > 0


@pytest.mark.proof
@pytest.mark.parametrize("how", ["the process stands still", "the host is cut off"])
def test_a_standby_takes_over_from_a_worker_whose_sessions_nobody_has_any_more(
    make_cluster: Callable[..., Cluster],
    make_simple: MakeSimple,
    make_pipeline: Callable[[str], Pipeline],
    make_proxy: MakeProxy,
    how: str,
) -> None:
    source = make_cluster(settings={"wal_sender_timeout": f"{NOTICED_WITHIN_MS}ms"})
    target = make_cluster()
    dsn = make_target(target)
    near_source, near_target = make_proxy(source.port), make_proxy(target.port)
    first = make_simple(source.dsn(), dsn, rows=200)
    text = first.path.read_text()
    direct = conninfo.make_conninfo(dsn, tcp_user_timeout=NOTICED_WITHIN_MS)
    second = make_pipeline(text.replace(dsn, direct))
    cut = text.replace(source.dsn(), through(near_source, source.dsn())).replace(dsn, through(near_target, dsn))
    first.path.write_text(cut)
    worker = first.start()
    first.live()
    first.in_step()
    heir = second.start()
    second.event("standby")

    if how == "the process stands still":
        worker.send_signal(signal.SIGSTOP)
    else:
        near_source.freeze()
        near_target.freeze()
    change(second, " meanwhile")

    second.event("silent_session_ended")
    second.in_step()
    # Should it live after all, it writes nothing and stands by.
    if how == "the process stands still":
        worker.send_signal(signal.SIGCONT)
    near_source.heal()
    near_target.heal()
    first.event("overtaken")
    streamed = first.times("streaming")
    change(second, " afterwards")
    second.in_step()
    assert (worker.poll(), heir.poll(), first.times("streaming")) == (None, None, streamed)
    assert second.stop(heir) == 0
    until(lambda: first.times("streaming") > streamed, first.tail)
    change(first, " again")
    first.in_step()


def test_a_worker_that_has_nothing_to_do_keeps_its_place(
    make_simple: MakeSimple, make_pipeline: Callable[[str], Pipeline], make_database: Callable[[], Database]
) -> None:
    source, target = make_database(), make_database()
    dsn = conninfo.make_conninfo(target.dsn, tcp_user_timeout=1_000)
    first = make_simple(source.dsn, dsn, slot=source.name)
    worker = first.start()
    first.live()
    second = make_pipeline(first.path.read_text())
    heir = second.start()
    second.event("standby")

    def heard() -> bool:
        """Say whether it was heard from for longer than a silent session may last."""
        name = f"cdcsync apply {source.name}"
        row = first.target.execute(
            "SELECT state_change FROM pg_stat_activity WHERE application_name = %s ORDER BY backend_start", [name]
        ).fetchone()
        beats.add(row)
        return len(beats) > 6

    beats: set[object] = set()
    until(heard, first.tail)
    assert (worker.poll(), heir.poll(), second.times("silent_session_ended")) == (None, None, 0)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_start_waits_for_a_server_that_is_starting_up_and_says_so(
    make_cluster: Callable[..., Cluster], make_database: Callable[[], Database], make_simple: MakeSimple, side: str
) -> None:
    other = make_database()
    cluster = make_cluster(settings={"hot_standby": "off"})
    dsn = make_target(cluster) if side == "target" else cluster.dsn()
    source, target = (cluster.dsn(), other.dsn) if side == "source" else (other.dsn, dsn)
    pipeline = make_simple(source, target, slot=other.name)
    cluster.stop()
    signal = cluster.data / "standby.signal"
    signal.touch()
    cluster.programs.give(signal)
    cluster.start(wait=False)
    until(lambda: refusal(dsn), "the server to be starting up")

    worker = pipeline.start()
    pipeline.event("start_waits")
    assert "the start waits" in reasons(pipeline)
    cluster.promote()
    cluster.wait_until_ready()

    pipeline.connect_source()
    pipeline.connect_target()
    pipeline.live()
    pipeline.in_step()
    assert worker.poll() is None


def refusal(dsn: str) -> str | None:
    """Return why a server that runs takes no connections, None while it does not run."""
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError as error:
        return str(error) if "database system" in str(error) else None
    return None


def test_a_start_waits_no_longer_than_it_may(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), database.dsn, worker_lines="start_timeout_s = 0.5")
    cluster.stop()
    worker = pipeline.start()
    assert worker.wait(timeout=PATIENCE_S) == 2
    assert pipeline.times("start_waits") > 0
    assert "fix: " in pipeline.tail()


@pytest.mark.proof
def test_a_publication_that_was_made_again_on_15_is_a_gap_that_heals(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    # Before 18 the server looks the publication up in the catalog of the time, and fails at every change in between.
    if not OTHER_VERSIONS[15].exists():
        pytest.skip("PostgreSQL 15 is not installed")
    cluster = make_cluster(bin_dir=OTHER_VERSIONS[15])
    pipeline = make_simple(cluster.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.stop(worker)
    pipeline.released()
    pipeline.source.execute("DROP PUBLICATION cdcsync")
    change(pipeline, " in between")
    pipeline.source.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")

    assert pipeline.start().wait(timeout=PATIENCE_S) == 1
    said = " ".join(pipeline.tail().split())
    assert "the source fails each time that it decodes what follows the checkpoint" in said
    assert "the publication was dropped and created again" in said
    configure(pipeline, on_gap="resync")
    worker = pipeline.start()
    pipeline.event("resync_requested")
    until(lambda: all_read(pipeline) and pipeline.in_step_now(), pipeline.tail)
    change(pipeline, " and on")
    pipeline.in_step()
    assert worker.poll() is None
