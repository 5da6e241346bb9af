"""The command line against real servers: check, run, status and search, as an operator uses them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from psycopg import sql

import cdcsync
from tests.support.configs import configuration

if TYPE_CHECKING:
    from tests.support.provider import FakeProvider
    from tests.support.servers import Database

pytestmark = pytest.mark.server

PACKAGES = str(Path(cdcsync.__file__).parents[1])

PATIENCE_S = 60

CONFIG = """
[source]
dsn = "{dsn}"
slot = "{slot}"
publication = "{slot}"
[worker]
listen = "127.0.0.1:0"
[embedders.words]
type = "hash"
[indexes.articles]
table = "articles"
text = "{{title}}"
columns = ["tenant"]
embedder = "words"
"""

TABLE = "CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text)"
ROWS = "INSERT INTO articles VALUES (1, 1, 'the red balloon'), (2, 2, 'the blue whale'), (3, 2, 'a red herring')"


@pytest.fixture
def config_file(database: Database, tmp_path: Path) -> Path:
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG.format(dsn=database.dsn, slot=database.name))
    return path


@pytest.fixture
def environment(config_file: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PACKAGES, "CDCSYNC_CONFIG": str(config_file)}


def cdcsync_command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cdcsync", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def printed(environment: dict[str, str], *arguments: str) -> Any:
    """Run a command that succeeds, and return the JSON that it prints."""
    done = cdcsync_command(environment, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def running(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run the worker, and kill it in the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "run"], env=environment, stderr=subprocess.PIPE, text=True
    ) as worker:
        try:
            yield worker
        finally:
            if worker.poll() is None:
                worker.kill()


def wait_until_live(environment: dict[str, str]) -> dict[str, Any]:
    """Return the status once everything is in the index."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        status: dict[str, Any] = printed(environment, "status")
        index = status["indexes"]["articles"]
        if index["state"] == "live" and index["backlog"] == 0 and status["caught_up"]:
            return status
        assert time.monotonic() < deadline, status


def test_check_run_status_and_search_work_together(database: Database, environment: dict[str, str]) -> None:
    database.execute(TABLE)
    database.execute(ROWS)
    checked = printed(environment, "check")
    assert checked["ok"] is True
    assert {finding["level"] for finding in checked["findings"]} <= {"ok", "warning"}

    with running(environment) as worker:
        status = wait_until_live(environment)
        assert status["indexes"]["articles"]["chunks"] == status["indexes"]["articles"]["vectors"] == 3
        shown = cdcsync_command(environment, "status")
        assert shown.returncode == 0
        assert "articles" in shown.stdout
        assert cdcsync_command(environment, "status", "--check").returncode == 0

        hits = printed(environment, "search", "articles", "red balloon")
        assert hits[0]["key"] == {"id": 1}
        assert hits[0]["carried"] == {"tenant": 1}
        assert [hit["key"]["id"] for hit in printed(environment, "search", "articles", "red", "--mode", "text")] == [
            1,
            3,
        ]
        (only,) = printed(environment, "search", "articles", "red", "--where", "tenant = 2", "--mode", "text")
        assert only["content"] == "a red herring"
        assert len(printed(environment, "search", "articles", "x", "-k", "2", "--mode", "vector")) == 2

        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0, log
    without_a_worker = cdcsync_command(environment, "status", "--check")
    assert (without_a_worker.returncode, "no worker runs" in without_a_worker.stdout) == (1, True)
    assert cdcsync_command(environment, "status").returncode == 0
    assert cdcsync_command(environment, "status", "--check", "--watch").returncode == 2
    events = [json.loads(line) for line in log.splitlines()]
    assert events[-1]["event"] == "stopped"
    assert "balloon" not in log


def test_a_check_that_fails_prints_the_fixes_and_exits_with_2(environment: dict[str, str]) -> None:
    done = cdcsync_command(environment, "check")
    assert done.returncode == 2
    assert "✗ indexes.articles.table" in done.stdout
    assert "fix: " in done.stdout
    assert "Correct the errors" in done.stdout
    as_json = cdcsync_command(environment, "check", "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["ok"] is False


def test_run_refuses_what_check_would_refuse_and_creates_nothing(
    database: Database, environment: dict[str, str]
) -> None:
    done = cdcsync_command(environment, "run")
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert database.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'cdcsync'") == []
    assert database.execute("SELECT 1 FROM pg_publication") == []


def test_a_search_before_the_first_run_says_what_to_do(database: Database, environment: dict[str, str]) -> None:
    database.execute(TABLE)
    done = cdcsync_command(environment, "search", "articles", "x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: the target holds no such index"
    assert "cdcsync run" in done.stderr


def test_a_wrong_condition_is_a_usage_error(database: Database, environment: dict[str, str]) -> None:
    database.execute(TABLE)
    with running(environment) as worker:
        wait_until_live(environment)
        done = cdcsync_command(environment, "search", "articles", "x", "--where", "tennant = 1")
        worker.send_signal(signal.SIGINT)
        worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0
    assert done.returncode == 2
    what, where, fix = done.stderr.splitlines()
    assert "tennant" in what
    assert where == "where: --where tennant = 1"
    assert "c.tenant" in fix


@pytest.mark.proof
def test_a_query_by_another_model_than_the_index_is_refused(
    database: Database, config_file: Path, environment: dict[str, str]
) -> None:
    database.execute(TABLE)
    with running(environment) as worker:
        wait_until_live(environment)
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=PATIENCE_S)
    config_file.write_text(config_file.read_text().replace('type = "hash"', 'type = "hash"\ndimensions = 64'))
    done = cdcsync_command(environment, "search", "articles", "x")
    assert done.returncode == 2
    assert "were made by" in done.stderr
    assert cdcsync_command(environment, "search", "articles", "x", "--mode", "text").returncode == 0


def test_a_watched_status_is_a_line_of_json_each_time(database: Database, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "status", "--watch", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        statuses = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        _, complaints = watching.communicate(timeout=PATIENCE_S)
    assert [status["pipeline"] for status in statuses] == [database.name] * 2
    assert (watching.returncode, complaints) == (130, "\nstopping; Ctrl-C again ends at once\n")


def test_a_watched_status_goes_into_a_pipe_as_a_table_each_time(
    database: Database, environment: dict[str, str]
) -> None:
    database.execute(TABLE)
    with subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "status", "--watch"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        tables = 0
        while tables < 2:
            line = watching.stdout.readline()
            assert line
            assert "\x1b" not in line
            tables += line.startswith("pipeline")
        watching.stdout.close()  # as `head` does, once it has seen enough
        _, complaints = watching.communicate(timeout=PATIENCE_S)
    assert (watching.returncode, complaints) == (141, "")


class Screen:
    """A terminal in which a command runs, with all that it was sent."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cdcsync", *arguments],
            env={**environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.sent = ""

    def read(self) -> bool:
        """Read what there is; returns False when the command has closed the terminal."""
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # what Linux says of a terminal that nobody has open any more
            data = b""
        self.sent += data.decode()
        return bool(data)

    def wait_for(self, text: str) -> None:
        """Wait until something was sent since the last call, which is forgotten."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.sent:
            assert time.monotonic() < deadline, self.sent[-2000:]
            ready, _, _ = select.select([self._ours], [], [], 1)
            assert not ready or self.read(), self.sent[-2000:]
        self.sent = self.sent.partition(text)[2]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.proof
def test_a_watched_status_stays_on_the_screen_through_an_outage_and_gives_the_terminal_back(
    database: Database, environment: dict[str, str]
) -> None:
    database.execute(TABLE)
    database.execute(ROWS)
    with running(environment) as worker:
        wait_until_live(environment)
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=PATIENCE_S)
    screen = Screen(environment, "status", "--watch")
    try:
        screen.wait_for("\x1b[?25l")  # hides the cursor
        screen.wait_for("does not run")
        screen.wait_for("live")
        name = sql.Identifier(database.name)
        with database.server.connect() as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND application_name = 'cdcsync status'",
                [database.name],
            )
            screen.wait_for("error:")
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
        screen.wait_for("does not run")

        screen.process.send_signal(signal.SIGINT)

        screen.wait_for("\x1b[?25h")  # shows it again
        assert screen.process.wait(timeout=PATIENCE_S) == 130
        while screen.read():
            pass
        assert "Traceback" not in screen.sent
    finally:
        screen.close()


def test_colours_in_a_terminal_go_with_no_color(environment: dict[str, str]) -> None:
    for no_color, coloured in (("", True), ("1", False)):
        screen = Screen({**environment, "NO_COLOR": no_color}, "check", "-c", "nosuch.toml")
        try:
            while screen.read():
                pass
            assert screen.process.wait(timeout=PATIENCE_S) == 2
            assert "there is no such file" in screen.sent
            # Bold is no colour, and stays.
            assert bool(re.search(r"\x1b\[[\d;]*3\dm", screen.sent)) == coloured
        finally:
            screen.close()


@pytest.mark.proof
def test_a_worker_on_a_terminal_shows_its_first_load_and_then_where_to_look(
    database: Database, environment: dict[str, str]
) -> None:
    database.execute(TABLE)
    database.execute("INSERT INTO articles SELECT i, i % 3, 'title ' || i FROM generate_series(1, 20000) AS i")
    screen = Screen(environment, "run")
    try:
        screen.wait_for("listening")
        screen.wait_for("rows")
        screen.wait_for("vectors")
        screen.wait_for("searchable now: articles (20,000 rows); status page: http://127.0.0.1:")
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for("stopped")
        assert screen.process.wait(PATIENCE_S) == 0
    finally:
        screen.close()


def test_results_are_all_of_standard_output_whatever_fails_meanwhile(
    database: Database, provider: FakeProvider, tmp_path: Path
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, body text)")
    provider.fails = lambda texts: True
    far = {"type": "openai", "model": "m", "dimensions": 8, "base_url": provider.url}
    path = tmp_path / "cdcsync.toml"
    path.write_text(configuration(database.dsn, embedders={"far": far}, indexes={"articles": {"text": "{body}"}}))
    command = [sys.executable, "-m", "cdcsync", "check", "--deep", "--json", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert any("far" in one["where"] for one in json.loads(done.stdout)["findings"])
