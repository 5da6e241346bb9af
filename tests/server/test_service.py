"""A worker under a service manager: what it tells a notification socket, passwords from a service file, and a log that
nobody takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg import conninfo

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline

pytestmark = pytest.mark.server

Hear = Callable[[str], str]


@pytest.fixture
def hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hear]:
    """Waits for an assignment to a name, and returns its value; what comes before is dropped."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "600000")

        lines: list[str] = []

        def wait_for(name: str) -> str:
            while True:
                while lines:
                    said, _, value = lines.pop(0).partition("=")
                    if said == name:
                        return value
                lines.extend(manager.recv(4096).decode().splitlines())

        yield wait_for


@pytest.fixture(params=["its reader ended", "its disk is full"])
def log(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes no line of a log."""
    if request.param == "its disk is full":
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def make(make_pipeline: Callable[[str], Pipeline], database: Database, dsn: str) -> Pipeline:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles VALUES (1, 'one')")
    return make_pipeline(configuration(dsn, slot=f"s_{database.name}"))


def test_a_worker_tells_that_it_is_ready_alive_and_stopping(
    database: Database, make_pipeline: Callable[[str], Pipeline], hear: Hear
) -> None:
    pipeline = make(make_pipeline, database, database.dsn)
    worker = pipeline.start()

    assert hear("READY") == "1"
    assert "streaming" in [event["event"] for event in pipeline.events()]
    assert hear("WATCHDOG") == "1"
    worker.send_signal(signal.SIGTERM)
    assert hear("STOPPING") == "1"
    assert "stopping" in hear("STATUS")
    assert worker.wait(timeout=PATIENCE_S) == 0


def test_a_standby_is_ready_too(database: Database, make_pipeline: Callable[[str], Pipeline], hear: Hear) -> None:
    pipeline = make(make_pipeline, database, database.dsn)
    pipeline.start(NOTIFY_SOCKET="")
    pipeline.live()

    pipeline.start()

    assert hear("READY") == "1"
    assert "standby" in hear("STATUS")


def test_the_connection_may_come_from_a_service_file(
    database: Database, make_pipeline: Callable[[str], Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = tmp_path / "pg_service.conf"
    settings = conninfo.conninfo_to_dict(database.dsn)
    services.write_text("[source]\n" + "".join(f"{key}={value}\n" for key, value in settings.items()))
    monkeypatch.setenv("PGSERVICEFILE", str(services))

    pipeline = make(make_pipeline, database, "service=source")
    worker = pipeline.start()
    pipeline.live()

    pipeline.in_step()
    assert pipeline.stop(worker) == 0


def test_a_reload_changes_the_pace_of_a_load_under_way_and_the_manager_hears_of_it(
    database: Database, make_pipeline: Callable[[str], Pipeline], hear: Hear
) -> None:
    pipeline = make(make_pipeline, database, database.dsn)
    database.execute("INSERT INTO articles SELECT i, 'number ' || i FROM generate_series(2, 120) AS i")
    text = pipeline.path.read_text()
    slow = text.replace("[worker]", "[worker]\nbackfill_max_rows_per_s = 1")
    pipeline.path.write_text(slow)
    worker = pipeline.start()
    assert hear("READY") == "1"
    pipeline.event("backfill_started")

    pipeline.path.write_text(slow.replace("[worker]", "[worker]\nbatchrows = 1"))
    worker.send_signal(signal.SIGHUP)
    assert hear("RELOADING") == "1"
    assert int(hear("MONOTONIC_USEC")) > 0
    assert hear("READY") == "1"
    assert "batchrows" in pipeline.event("reload_failed")["error"]

    fast = text.replace("[worker]", '[worker]\nlog_level = "debug"').replace(
        "feedback_every_s = 1", "spool_bytes = 9999999"
    )
    pipeline.path.write_text(fast)
    worker.send_signal(signal.SIGHUP)
    assert hear("RELOADING") == "1"
    assert hear("READY") == "1"
    assert set(pipeline.event("reloaded")["keys"]) == {"worker.log_level", "worker.backfill_max_rows_per_s"}
    assert set(pipeline.event("restart_needed")["keys"]) == {"source.spool_bytes", "source.feedback_every_s"}
    pipeline.live()
    assert pipeline.event("batch_applied")["level"] == "debug"
    assert pipeline.stop(worker) == 0


@pytest.mark.proof_from(1)
def test_a_worker_whose_log_is_not_taken_goes_on_and_ends_in_order(
    database: Database, make_pipeline: Callable[[str], Pipeline], log: int
) -> None:
    pipeline = make(make_pipeline, database, database.dsn)
    worker = subprocess.Popen([sys.executable, "-m", "cdcsync", "run", "-c", str(pipeline.path)], stderr=log)
    pipeline.processes.append(worker)
    pipeline.log.touch()

    pipeline.live()
    database.execute("UPDATE articles SET title = 'changed'")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
