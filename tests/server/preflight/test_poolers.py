"""PgBouncer before the target: in session mode it is as good as the server, in its other modes `check` names it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.outages import MakeSimple
from tests.support.poolers import pooled
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

Make = Callable[[str], Pipeline]


@pytest.fixture
def make(make_database: Callable[[], Database], make_simple: MakeSimple) -> Iterator[Make]:
    """Makes a pipeline whose target is behind PgBouncer in a mode."""
    with ExitStack() as stack:

        def made(mode: str) -> Pipeline:
            source, target = make_database(), make_database()
            # Where an unprivileged user may read.
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="cdcsync-pooler-", dir=os.sep + "tmp")))
            through = stack.enter_context(pooled(target.dsn, mode, directory))
            return make_simple(source.dsn, through, slot=source.name)

        yield made


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_shares_sessions_is_named_before_anything_is_created(make: Make, mode: str) -> None:
    pipeline = make(mode)

    checked, run = pipeline.command("check"), pipeline.command("run")

    for done in (checked, run):
        assert done.returncode == 2, done.stdout + done.stderr
        assert "each transaction another session" in done.stdout + done.stderr
        assert "session mode" in done.stdout + done.stderr
    assert (
        pipeline.source.execute(
            "SELECT FROM pg_replication_slots WHERE slot_name = %s", [pipeline.config.source.slot]
        ).fetchall()
        == []
    )


def test_a_pool_in_session_mode_is_as_good_as_the_server(make: Make) -> None:
    pipeline = make("session")
    pipeline.start()
    pipeline.live()
    pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
    pipeline.in_step()
    assert pipeline.command("check").returncode == 0
