"""What was asked of a worker that has not done it yet is withdrawn, or the command says that the worker will do it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import anyio
import psycopg
import pytest

from cdcsync.flows.migrate.withdrawal import end_of_drop, end_of_switch
from tests.support import forked
from tests.support.configs import configuration
from tests.support.migrations import WATCHFUL, loaded, migrate, ready
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

ASKED = "SELECT FROM cdcsync.indexes WHERE activation_asked_at IS NOT NULL"


@pytest.fixture
def unwatching(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """An index with other chunks beside it, followed by a worker that does not look for what commands ask."""
    pipeline = make_pipeline(configuration(database.dsn))
    loaded(pipeline, "articles", rows=20)
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"text": "about: {title}"}}))
    migrate(pipeline, "start")
    ready(pipeline, 2)
    both = "SELECT count(*) FROM cdcsync.indexes WHERE state = 'live'"
    until(lambda: pipeline.target.execute(both).fetchone() == (2,), pipeline.tail)
    pipeline.stop(pipeline.processes[-1])
    pipeline.hurry = {"cdcsync.flows.watch.WATCH_S": 600}
    looked_once(pipeline)
    return pipeline


def looked_once(pipeline: Pipeline) -> None:
    """Start a worker, and wait until its watch has looked into the target and waits."""
    pipeline.start()
    watches = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync watch' AND state = 'idle'"
        " AND datname = current_database()"
    )
    until(lambda: pipeline.target.execute(watches).fetchone() == (2,), pipeline.tail)


def watched(pipeline: Pipeline) -> None:
    """Start a worker that looks for what commands ask, in place of the one that does not."""
    pipeline.stop(pipeline.processes[-1])
    pipeline.hurry = dict(WATCHFUL)
    pipeline.start()
    pipeline.source.execute("INSERT INTO articles VALUES (2000, 'another one')")
    pipeline.reach("articles")


def states(pipeline: Pipeline) -> list[str]:
    return [one["state"] for one in migrate(pipeline, "status")]


def ended(pipeline: Pipeline, number: signal.Signals, *arguments: str, once: str = ASKED) -> tuple[int, str]:
    """Run `migrate`, send it a signal once a statement finds rows, and return its exit status and what it said."""
    path = pipeline.directory / "said"
    with path.open("wb+") as said:
        command = forked.start(
            "cdcsync",
            ["migrate", "articles", *arguments, "-c", str(pipeline.path)],
            (subprocess.DEVNULL, said, said),
            more={"COLUMNS": "200"},
        )
        until(lambda: pipeline.target.execute(once.encode()).fetchall(), lambda: Path(path).read_text())
        status = pipeline.stop(command, number)
    return status, " ".join(path.read_text().split())


@pytest.mark.proof
def test_ctrl_c_withdraws_an_activation_that_waits_for_the_worker(unwatching: Pipeline) -> None:
    pipeline = unwatching
    status, said = ended(pipeline, signal.SIGINT, "activate")
    assert status == 130
    assert "the switch to generation 2 is withdrawn; generation 1 stays live" in said
    assert states(pipeline) == ["live", "ready"]
    watched(pipeline)
    assert states(pipeline) == ["live", "ready"]
    assert migrate(pipeline, "activate")["live"] == 2
    back = migrate(pipeline, "rollback")
    assert (back["live"], back["before"], back["withdrawn"]) == (1, 2, None)


@pytest.mark.proof
def test_a_rollback_withdraws_an_activation_that_no_command_waits_for_any_more(unwatching: Pipeline) -> None:
    pipeline = unwatching
    ended(pipeline, signal.SIGKILL, "activate")
    assert states(pipeline) == ["live", "activating"]
    left = []
    for point in ("activation withdrawn", "withdrawn activation committed"):
        killed = pipeline.command("migrate", "articles", "rollback", CDCSYNC_CRASH_AT=point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        left.append(states(pipeline)[1])
    assert left == ["activating", "ready"]
    ended(pipeline, signal.SIGKILL, "activate")
    done = pipeline.command("migrate", "articles", "rollback")
    assert (done.returncode, done.stdout.strip()) == (
        0,
        "the switch to generation 2 is withdrawn; generation 1 stays live",
    )
    ended(pipeline, signal.SIGKILL, "activate")
    assert migrate(pipeline, "rollback") == {"index": "articles", "live": 1, "before": 1, "withdrawn": 2}
    watched(pipeline)
    assert states(pipeline) == ["live", "ready"]


@pytest.mark.proof
def test_ctrl_c_withdraws_a_rollback_too_and_a_second_rollback_asks_for_it_again(unwatching: Pipeline) -> None:
    pipeline = unwatching
    pipeline.stop(pipeline.processes[-1])
    assert migrate(pipeline, "activate")["live"] == 2
    looked_once(pipeline)
    _, said = ended(pipeline, signal.SIGINT, "rollback")
    assert "the switch to generation 1 is withdrawn; generation 2 stays live" in said
    ended(pipeline, signal.SIGKILL, "rollback")
    assert states(pipeline) == ["activating", "live"]
    pipeline.stop(pipeline.processes[-1])
    done = migrate(pipeline, "rollback")
    assert (done["live"], done["withdrawn"]) == (1, None)


@pytest.mark.proof
def test_ctrl_c_leaves_a_drop_to_the_worker_and_says_so(unwatching: Pipeline) -> None:
    pipeline = unwatching
    dropping = "SELECT FROM cdcsync.generations WHERE state = 'dropping'"
    status, said = ended(pipeline, signal.SIGINT, "drop", "--yes", once=dropping)
    assert status == 130
    assert "the drop of generation 2 is left to the worker; see how it ends: cdcsync migrate articles status" in said
    watched(pipeline)
    assert states(pipeline) == ["live"]


@pytest.mark.anyio
async def test_an_interrupted_command_says_how_things_stand(unwatching: Pipeline) -> None:
    pipeline = unwatching
    config = pipeline.config
    assert await end_of_switch(config, "articles", 2) == "nothing was switched; generation 1 stays live"
    assert "generation 1 is live: it was switched before" in await end_of_switch(config, "articles", 1)
    assert await end_of_drop(config, "articles", 2) == "nothing was dropped; generation 2 is ready"
    assert await end_of_drop(config, "articles", 3) == "generation 3 is dropped"


@pytest.mark.anyio
async def test_a_switch_that_is_being_made_is_left_to_the_worker(unwatching: Pipeline) -> None:
    pipeline = unwatching
    await anyio.to_thread.run_sync(ended, pipeline, signal.SIGKILL, "activate")
    with psycopg.connect(pipeline.config.target.dsn) as worker:
        worker.execute("SELECT FROM cdcsync.indexes WHERE name = 'articles' FOR UPDATE")
        said = await end_of_switch(pipeline.config, "articles", 2)
    assert said.startswith("the switch to generation 2 is left to the worker (")
    assert said.endswith("; see how it ends: cdcsync migrate articles status")
    assert pipeline.target.execute(ASKED.encode()).fetchall() == [()]
