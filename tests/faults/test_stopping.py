"""An orderly end while something waits: for a lock of the target, a transaction of the source, a frozen server."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cdcsync.demo.cluster import Cluster
from tests import ROOT
from tests.support import forked
from tests.support.configs import configuration
from tests.support.outages import MakeSimple, frozen, make_target, metric
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

FOR_EVER = "stop_timeout_s = 1000"


@pytest.fixture
def make(make_database: Callable[[], Database], make_simple: MakeSimple) -> Callable[[str], Pipeline]:
    """Makes a pipeline between two databases."""

    def made(worker_lines: str) -> Pipeline:
        source, target = make_database(), make_database()
        return make_simple(source.dsn, target.dsn, slot=source.name, worker_lines=worker_lines)

    return made


def waiting(pipeline: Pipeline) -> list[tuple[object, ...]]:
    """Return the worker's sessions on the target that wait for a lock; what a transaction sees of others stays as it
    was, so another session asks."""
    return pipeline.source.execute(
        "SELECT pid, query FROM pg_stat_activity WHERE datname = %s"
        " AND application_name LIKE 'cdcsync%%' AND wait_event_type = 'Lock'",
        [pipeline.target.info.dbname],
    ).fetchall()


def slots(pipeline: Pipeline) -> list[tuple[object, ...]]:
    return pipeline.source.execute(
        "SELECT slot_name FROM pg_replication_slots WHERE slot_name = %s", [pipeline.config.source.slot]
    ).fetchall()


def acknowledged(pipeline: Pipeline) -> bool:
    """Say whether the slot is where the checkpoint is."""
    (slot,) = pipeline.source.execute("SELECT confirmed_flush_lsn::text FROM pg_replication_slots").fetchone() or ("",)
    (checkpoint,) = pipeline.target.execute("SELECT checkpoint::text FROM cdcsync.pipelines").fetchone() or ("",)
    return bool(slot == checkpoint)


def test_a_worker_whose_apply_waits_for_a_lock_ends_in_time_and_leaves_nothing_half_done(
    make: Callable[[str], Pipeline],
) -> None:
    # With ACCESS EXCLUSIVE the look-up before the transaction waits already, with SHARE the first write in it.
    pipeline = make("stop_timeout_s = 0.5")
    for mode in ("ACCESS EXCLUSIVE", "SHARE"):
        worker = pipeline.start()
        pipeline.live()
        pipeline.in_step()
        with pipeline.target.transaction():
            pipeline.target.execute(f"LOCK TABLE cdcsync.articles_chunks IN {mode} MODE")
            pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
            until(lambda: waiting(pipeline), "apply to wait for the lock")

            assert pipeline.stop(worker) == 0

            until(lambda: not waiting(pipeline), lambda: f"no session that waits: {waiting(pipeline)}")
    assert pipeline.event("stop_timeout")
    pipeline.start()
    pipeline.in_step()


@pytest.mark.proof
def test_a_worker_that_is_killed_while_it_waits_for_a_lock_leaves_no_session_in_the_queue(
    make: Callable[[str], Pipeline],
) -> None:
    pipeline = make(FOR_EVER)
    worker = pipeline.start()
    pipeline.live()
    with pipeline.target.transaction():
        pipeline.target.execute("LOCK TABLE cdcsync.articles_chunks IN ACCESS EXCLUSIVE MODE")
        pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
        until(lambda: len(waiting(pipeline)) > 1, "apply and the status page to wait for the lock")

        worker.kill()
        worker.wait()

        until(lambda: not waiting(pipeline), lambda: f"no session that waits: {waiting(pipeline)}")
    pipeline.start()
    pipeline.in_step()


def test_a_worker_whose_target_is_frozen_ends_in_time(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    cluster = make_cluster()
    pipeline = make_simple(cluster.dsn(), make_target(cluster), worker_lines="stop_timeout_s = 0.5")
    worker = pipeline.start()
    pipeline.live()
    row = pipeline.target.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply%'"
    ).fetchone()
    assert row is not None
    with frozen(row[0]):
        pipeline.source.execute("UPDATE articles SET title = 'changed'")
        until(lambda: metric(pipeline, "cdcsync_lag_seconds") > 0, "the change to wait")

        assert pipeline.stop(worker) == 0

    pipeline.start()
    pipeline.in_step()


def test_a_worker_whose_source_is_idle_ends_at_once(
    make_cluster: Callable[..., Cluster], make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    # Nothing is due for a quarter of an hour, and what is written to the target is no news to the source, which writes
    # something of its own every fifteen seconds.
    cluster = make_cluster(settings={"wal_sender_timeout": "1h"})
    pipeline = make_simple(cluster.dsn(), make_database().dsn, worker_lines="stop_timeout_s = 10")
    pipeline.path.write_text(pipeline.path.read_text().replace("feedback_every_s = 1", "feedback_every_s = 1000"))
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    until(lambda: acknowledged(pipeline), "the source to know of all that is in the target")

    assert pipeline.stop(worker) == 0
    assert "stop_timeout" not in [event["event"] for event in pipeline.events()]


def test_a_worker_that_creates_its_slot_ends_at_once_and_leaves_no_slot(make: Callable[[str], Pipeline]) -> None:
    pipeline = make(FOR_EVER)
    with pipeline.source.transaction():
        pipeline.source.execute("INSERT INTO articles VALUES (1000, 1, 'open')")
        worker = pipeline.start()
        until(lambda: slots(pipeline), lambda: f"the slot that is being made; {pipeline.tail()}")

        assert pipeline.stop(worker) == 0

        until(lambda: not slots(pipeline), "no slot, while the transaction is still open")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()


def test_a_worker_whose_set_up_waits_for_a_lock_ends_at_once(make: Callable[[str], Pipeline]) -> None:
    pipeline = make(FOR_EVER)
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    with pipeline.target.transaction():
        pipeline.target.execute("LOCK TABLE cdcsync.pipelines IN SHARE MODE")
        worker = pipeline.start()
        until(lambda: waiting(pipeline), lambda: f"the set-up to wait; {pipeline.tail()}")

        assert pipeline.stop(worker, signal.SIGINT) == 0

        until(lambda: not waiting(pipeline), lambda: f"no session that waits: {waiting(pipeline)}")


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_worker_at_once_that_waits_for_a_lock(
    number: signal.Signals, make: Callable[[str], Pipeline]
) -> None:
    pipeline = make(FOR_EVER)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with pipeline.target.transaction():
        pipeline.target.execute("LOCK TABLE cdcsync.articles_chunks IN SHARE MODE")
        pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
        until(lambda: waiting(pipeline), "apply to wait for the lock")
        worker.send_signal(signal.SIGINT)
        pipeline.event("stopping")
        until(lambda: _takes(worker.pid, number), "the worker to take a second signal")
        assert pipeline.stop(worker, number) == 128 + number
    assert "Traceback" not in pipeline.log.read_text()
    pipeline.start()
    pipeline.in_step()


STUCK = """
import os
import threading
from pathlib import Path

class Stuck:
    identity = "stuck"
    dimensions = 2

    def open(self):
        if place := os.environ.get("STUCK"):
            Path(place).touch()
            threading.Event().wait()

    def embed(self, texts, *, kind):
        return [[1, len(text)] for text in texts]
"""


def test_whatever_loads_a_model_ends_at_the_first_signal_and_leaves_nothing_behind(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles VALUES (1, 'one')")
    own = {"type": "python", "class": "stuck:Stuck"}
    pipeline = make_pipeline(configuration(database.dsn, embedders={"own": own}, worker_lines=FOR_EVER))
    there = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}

    for number in (signal.SIGTERM, signal.SIGINT):
        loads = tmp_path / number.name
        worker = pipeline.start(**there, STUCK=str(loads))
        until(loads.exists, lambda: f"the model to be loaded; {pipeline.tail()}")
        assert pipeline.stop(worker, number) == 0
        # Not the former worker's: the session that held it has ended.
        until(
            lambda: not pipeline.target.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'").fetchall(),
            "the lock of the pipeline to be free",
        )
    assert "Traceback" not in pipeline.log.read_text()

    worker = pipeline.start(**there)
    pipeline.live()
    pipeline.reach("articles")
    until(lambda: pipeline.target.execute("SELECT id FROM articles_index").fetchall() == [(1,)], pipeline.tail)
    assert pipeline.stop(worker) == 0

    for arguments in (["search", "articles", "one"], ["check", "--deep"]):
        loads = tmp_path / arguments[0]
        with (tmp_path / "said").open("wb+") as said:
            command = forked.start(
                "cdcsync",
                [*arguments, "-c", str(pipeline.path)],
                (subprocess.DEVNULL, said, said),
                more={**there, "STUCK": str(loads)},
            )
            until(loads.exists, f"{arguments[0]} to load the model")
            assert pipeline.stop(command, signal.SIGINT) == 130
            assert "stopping; Ctrl-C again ends at once" in (tmp_path / "said").read_text()


def _takes(pid: int, number: signal.Signals) -> bool:
    """Say whether a process catches a signal. Between two handlers it would end by the signal's own action."""
    with open(f"/proc/{pid}/status") as status:
        (caught,) = [line.split()[1] for line in status if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


IN_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "cdcsync", "run", "-c", sys.argv[1]])
"""


def test_a_worker_ends_with_its_terminal_wherever_its_log_goes(make: Callable[[str], Pipeline]) -> None:
    pipeline = make("stop_timeout_s = 20")
    ours, theirs = pty.openpty()
    with pipeline.log.open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, str(pipeline.path)], stdin=theirs, stdout=log, stderr=log
        )
    pipeline.processes.append(worker)
    os.close(theirs)
    pipeline.live()
    os.close(ours)
    assert worker.wait(timeout=30) == -signal.SIGHUP
