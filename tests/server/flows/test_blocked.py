"""What waits for transactions of others says so where people look, and until they have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from psycopg import sql

from tests import ROOT
from tests.support.configs import NO_AUDIT, configuration
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server

AT_ONCE = 0.1
"""How soon a wait is told of here, in seconds."""


@pytest.fixture
def pipeline(make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Two tables and their indexes; no worker runs."""
    source, target = make_database(), make_database()
    text = configuration(source.dsn, target=target.dsn, worker_lines=NO_AUDIT, indexes={"articles": {}, "notes": {}})
    made = make_pipeline(text)
    if made.source.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
        pytest.skip("this server allows no prepared transactions (max_prepared_transactions = 0)")
    for table in ("articles", "notes"):
        made.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)".encode())
        made.source.execute(f"INSERT INTO {table} SELECT i, 'title ' || i FROM generate_series(1, 9) AS i".encode())
    made.hurry["cdcsync.flows.blocked.REPORT_S"] = AT_ONCE
    return made


def begin(pipeline: Pipeline) -> None:
    """Start a worker that commands find."""
    pipeline.start()
    port = until(lambda: listening(pipeline), pipeline.tail)[-1]["port"]
    pipeline.configure(pipeline.path.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))


def listening(pipeline: Pipeline) -> list[dict[str, int]]:
    """Return the events of workers that answer over HTTP, once all that were started do."""
    found = [event for event in pipeline.events() if event.get("event") == "listening"]
    return found if len(found) == len(pipeline.processes) else []


def loaded(pipeline: Pipeline) -> None:
    """Load the indexes, and stop the worker."""
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0


@contextmanager
def prepared(pipeline: Pipeline) -> Iterator[None]:
    """Leave a transaction that has written prepared."""
    name = f"{pipeline.config.source.slot}'s"
    pipeline.source.execute("BEGIN")
    pipeline.source.execute("INSERT INTO notes VALUES (100, 'of a prepared transaction')")
    pipeline.source.execute(sql.SQL("PREPARE TRANSACTION {}").format(name))
    try:
        yield
    finally:
        pipeline.source.execute(sql.SQL("ROLLBACK PREPARED {}").format(name))


def ending(pipeline: Pipeline) -> str:
    """Return the end of what should be said of that transaction."""
    source = pipeline.config.source
    return f"ROLLBACK PREPARED '{source.slot}''s' in database {pipeline.source.info.dbname}"


def at_the_slot(pipeline: Pipeline) -> str:
    """Start for the first time."""
    begin(pipeline)
    return f"the start waits: the creation of slot {pipeline.config.source.slot} waits for "


def at_a_page(pipeline: Pipeline) -> str:
    """Ask for a replay where a transaction was open when the worker began."""
    begin(pipeline)
    assert pipeline.command("replay", "articles", "--detach").returncode == 0
    return "index articles: reading its table waits for "


def at_a_comparison(pipeline: Pipeline) -> str:
    """Keep the publication from sending what is then changed."""
    begin(pipeline)
    pipeline.reach("articles")
    publication = pipeline.config.source.publication
    pipeline.source.execute(f"ALTER PUBLICATION {publication} SET (publish = 'insert')".encode())
    pipeline.source.execute("UPDATE articles SET title = 'never sent' WHERE id = 1")
    everything = "insert, update, delete, truncate"
    pipeline.source.execute(f"ALTER PUBLICATION {publication} SET (publish = '{everything}')".encode())
    return "index articles: rows of its table may have changed without being sent, and comparing them waits for "


@pytest.mark.parametrize("wait", [at_the_slot, at_a_page, at_a_comparison], ids=lambda wait: wait.__name__)
def test_a_wait_for_a_prepared_transaction_is_told_until_that_ends(
    pipeline: Pipeline, wait: Callable[[Pipeline], str]
) -> None:
    if wait is not at_the_slot:
        loaded(pipeline)
    with prepared(pipeline):
        begins = wait(pipeline)

        def told() -> str | None:
            """Return the reason why the worker is not ready that names the transaction."""
            reasons = json.loads(pipeline.get("/readyz")[1])["reasons"]
            return next((one for one in reasons if one.startswith(begins) and ending(pipeline) in one), None)

        until(told, lambda: f"{begins} {pipeline.get('/readyz')} {pipeline.tail()}")
        for status in (json.loads(pipeline.get("/status")[1]), pipeline.answer("status", "--check", status=1)):
            [problem] = [one for one in status["problems"] if one.startswith(begins)]
            assert f"{begins}prepared transaction" in problem
            assert ending(pipeline) in problem
            assert status["headline"]["tone"] == "bad"
            assert (status["worker"]["waits"] is None) == (wait is not at_the_slot)
            assert (status["indexes"]["articles"]["problem"] is None) == (wait is at_the_slot)
            assert status["indexes"]["notes"]["problem"] is None

    until(lambda: pipeline.get("/readyz")[0] == 200, lambda: f"{pipeline.get('/readyz')} {pipeline.tail()}")
    until(pipeline.in_step_now, lambda: f"{pipeline.difference} {pipeline.tail()}")
    until(lambda: pipeline.command("status", "--check").returncode == 0, pipeline.tail)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("runs", [True, False], ids=["beside a worker", "in place of one"])
def test_a_verification_that_waits_names_the_transaction_to_whoever_runs_it(pipeline: Pipeline, runs: bool) -> None:
    loaded(pipeline)
    pipeline.target.execute("DELETE FROM cdcsync.articles_chunks WHERE id = 1")
    said = pipeline.directory / "verify.log"
    with prepared(pipeline), said.open("wb") as errors:
        if runs:
            begin(pipeline)
        verification = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.hurried", f"cdcsync.flows.blocked.REPORT_S={AT_ONCE}", "--"),
                *("verify", "articles", "-c", str(pipeline.path)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        )
        try:
            told = "the worker may have to wait for prepared transaction"
            until(lambda: told in said.read_text() or verification.poll(), "a word of the verification")
        except BaseException:
            verification.kill()
            raise
    assert verification.wait(PATIENCE_S) == 1  # they differ
    assert told in said.read_text()
    assert ending(pipeline) not in said.read_text()  # it may be in nobody's way
