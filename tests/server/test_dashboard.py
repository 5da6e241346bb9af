"""The Grafana dashboard over a real Prometheus that scrapes a real worker: every panel has something to show."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdcsync.demo.cluster import free_port
from tests import ROOT
from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider, status
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.slow]

DASHBOARD = ROOT / "config" / "dashboard.json"

SCRAPING = """
global: {{scrape_interval: 500ms}}
scrape_configs:
  - job_name: cdcsync
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""

VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "10s", "$__range": "1m"}

SELDOM = (
    "cdcsync_verify_differences",
    "cdcsync_audit_differences_total",
    "cdcsync_proven_equal",
    "cdcsync_slot_safe_bytes",
)
"""Metrics that do not exist before the first audit, or without a limit for WAL: their queries need only be valid."""


def expressions() -> list[str]:
    """Return the panels' queries, with values for the dashboard's variables."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    for name, value in VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    return found


class Prometheus:
    """A server that scrapes one worker."""

    def __init__(self, port: int) -> None:
        self.port = port

    def shows(self, expression: str) -> bool:
        """Whether a query has a result now.

        :raises AssertionError: the server does not take the query.
        """
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/query?{query}", timeout=10) as answer:
                said = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return False  # it is still starting
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        except OSError:
            return False
        assert said["status"] == "success", said
        return bool(said["data"]["result"])


@pytest.fixture
def scrape(tmp_path: Path) -> Iterator[Callable[[int], Prometheus]]:
    """Starts a Prometheus that scrapes a port."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no prometheus: it is Debian's package prometheus")
    started: list[subprocess.Popen[bytes]] = []

    def start(target: int) -> Prometheus:
        config, port = tmp_path / "prometheus.yml", free_port()
        config.write_text(SCRAPING.format(port=target))
        arguments = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        started.append(
            subprocess.Popen(
                [program, *arguments, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        )
        return Prometheus(port)

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.proof
def test_every_panel_shows_something_of_a_worker_at_work(
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    provider: FakeProvider,
    scrape: Callable[[int], Prometheus],
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, body text)")
    database.execute("ALTER TABLE articles ALTER body SET STORAGE EXTERNAL")  # so large that changes leave it out
    database.execute(
        "INSERT INTO articles SELECT i, 'title ' || i, repeat('word ' || i || ' ', 500)"
        " FROM generate_series(1, 100) AS i"
    )
    pipeline = make_pipeline(
        configuration(
            database.dsn,
            worker_lines="backfill_page_rows = 20\nbackfill_max_rows_per_s = 2\nevaluate_every_s = 0.5",
            embedders={"hosted": hosted(provider.url)},
            indexes={"articles": {"text": "{title} {body}"}},
        )
    )
    worker = pipeline.start()
    prometheus = scrape(pipeline.event("listening")["port"])
    seldom = {one for one in expressions() if any(name in one for name in SELDOM)}
    waiting, number, slow = set(expressions()) - seldom, 100, True

    def shown() -> bool:
        nonlocal number, slow
        number += 1
        database.execute(f"INSERT INTO articles VALUES ({number}, 'new', 'short')")
        database.execute(f"UPDATE articles SET title = 'changed {number}' WHERE id <= 3")
        waiting.difference_update([one for one in waiting if prometheus.shows(one)])
        if slow and not any("backfill" in one for one in waiting):
            slow = False
            provider.misdeeds.append(status(500))
            database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
            pipeline.path.write_text(pipeline.path.read_text().replace("backfill_max_rows_per_s = 2", ""))
            worker.send_signal(signal.SIGHUP)  # the rest of the load need not take its time
        return not waiting

    # Recall is measured in a fifth of the time, and gauges are read in a twentieth: both take long on a busy machine.
    until(
        shown,
        lambda: "data for " + "\n".join(sorted(waiting)),
        patience_s=2 * PATIENCE_S,
        progress=lambda: len(waiting),
    )
    for one in seldom:
        prometheus.shows(one)
