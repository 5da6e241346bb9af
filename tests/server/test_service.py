"""A worker under a service manager: what it tells a notification socket, and passwords from a service file."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg import conninfo

from tests.fixtures.servers import Database
from tests.fixtures.workers import PATIENCE_S, Pipeline

pytestmark = pytest.mark.server

CONFIG = """
[source]
dsn = "{dsn}"
slot = "{slot}"
feedback_every_s = 1
[worker]
listen = "127.0.0.1:0"
[embedders.fake]
type = "hash"
dimensions = 8
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "fake"
"""

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

        def wait_for(name: str) -> str:
            while True:
                for line in manager.recv(4096).decode().splitlines():
                    if line.startswith(f"{name}="):
                        return line.partition("=")[2]

        yield wait_for


def make(make_pipeline: Callable[[str], Pipeline], database: Database, dsn: str) -> Pipeline:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles VALUES (1, 'one')")
    return make_pipeline(CONFIG.format(dsn=dsn, slot=f"s_{database.name}"))


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
