"""PgBouncer before a server: as good as the server in session mode; in its other modes refused, with nothing set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import psycopg
import pytest

import cdcsync.sync
from cdcsync.errors import SetupError
from cdcsync.postgres import poolers, sessions
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import Side
from tests.support.outages import MakeSimple
from tests.support.poolers import pooled
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = [pytest.mark.server, pytest.mark.anyio]

Make = Callable[[str], Pipeline]

Through = Callable[..., str]


@pytest.fixture
def through() -> Iterator[Through]:
    """Makes a pool before a server, and tells the DSN that leads through it."""
    with ExitStack() as stack:

        def made(dsn: str, mode: str, *, size: int = 20) -> str:
            # Where an unprivileged user may read.
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="cdcsync-pooler-", dir=os.sep + "tmp")))
            return stack.enter_context(pooled(dsn, mode, directory, size=size))

        yield made


@pytest.fixture
def make(make_database: Callable[[], Database], make_simple: MakeSimple, through: Through) -> Make:
    """Makes a pipeline whose target is behind PgBouncer in a mode."""

    def made(mode: str) -> Pipeline:
        source, target = make_database(), make_database()
        return make_simple(source.dsn, through(target.dsn, mode), slot=source.name)

    return made


SET = """
    SELECT name, setting FROM pg_settings WHERE source = 'session' AND name NOT LIKE 'transaction%' ORDER BY name
"""


def settings_of(dsn: str) -> list[Any]:
    """Return what has been set in the sessions that three clients of a pool get at the same time."""
    with ExitStack() as stack:
        clients = [stack.enter_context(psycopg.connect(dsn, application_name="app")) for _ in range(3)]
        return [client.execute(SET).fetchall() for client in clients]


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


@pytest.fixture
def apart(make_database: Callable[[], Database], make_simple: MakeSimple, through: Through) -> tuple[Pipeline, str]:
    """A pipeline that only its commands reach through a pool, which is in transaction mode; and its target's DSN."""
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, slot=source.name)
    pooled_dsn = through(target.dsn, "transaction")
    pipeline.configure(pipeline.path.read_text().replace(target.dsn, pooled_dsn))
    return pipeline, pooled_dsn


COMMANDS = [
    "check",
    "run",
    "plan",
    "status",
    "verify articles",
    "failures articles list",
    "audit",
    "search articles title",
    "evaluate articles",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leaves_the_sessions_that_a_pool_shares_as_they_were(
    apart: tuple[Pipeline, str], command: str
) -> None:
    pipeline, dsn = apart
    before = settings_of(dsn)
    done = pipeline.command(*command.split())
    assert "each transaction another session" in done.stdout + done.stderr
    assert settings_of(dsn) == before


async def test_an_index_leaves_the_sessions_that_a_pool_shares_as_they_were(apart: tuple[Pipeline, str]) -> None:
    pipeline, dsn = apart
    before = settings_of(dsn)
    with pytest.raises(SetupError, match="each transaction another session"):
        async with cdcsync.Index.open(pipeline.config, "articles"):
            pass
    assert settings_of(dsn) == before


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("size", [1, 2, 20])
async def test_a_pool_that_shares_sessions_is_refused_whatever_its_size(
    database: Database, through: Through, mode: str, size: int, side: Side
) -> None:
    with pytest.raises(SetupError, match="each transaction another session") as raised:
        await connect(through(database.dsn, mode, size=size), side)
    assert "session mode" in str(raised.value.hint)


async def test_a_pool_that_shares_sessions_is_known_although_an_application_was_in_between(
    database: Database, through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = through(database.dsn, "transaction")
    open_one = psycopg.AsyncConnection.connect
    async with (
        await open_one(dsn, autocommit=True) as first,
        await open_one(dsn, autocommit=True) as other,
        await open_one(dsn, autocommit=True) as application,
    ):
        execute, meetings = other.execute, iter([application.transaction()])

        async def meet(*arguments: Any) -> Any:
            # The application has the session that was used last, until the other has taken the next one.
            for meeting in meetings:
                async with meeting:
                    await application.execute("SELECT 1")
                    return await execute(*arguments)
            return await execute(*arguments)

        monkeypatch.setattr(other, "execute", meet)
        assert await poolers.shares_sessions(first, other)


async def test_a_pool_in_session_mode_with_no_session_to_spare_is_as_good_as_the_server(
    database: Database, through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poolers, "SPARE_S", 0.1)
    dsn = through(database.dsn, "session", size=1)
    for _ in range(2):
        async with await connect(dsn, "target") as connection:
            cursor = await connection.execute("SHOW search_path")
            assert await cursor.fetchone() == ('""',)


async def test_a_pool_in_session_mode_is_asked_for_a_second_session_once(
    database: Database, through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def shares(*connections: Any) -> bool:
        asked.append(connections)
        return await poolers.shares_sessions(*connections)

    monkeypatch.setattr(sessions, "shares_sessions", shares)
    dsn = through(database.dsn, "session")
    for side in get_args(Side):
        await (await connect(dsn, side)).close()
    assert len(asked) == 1


def test_a_pool_in_session_mode_is_as_good_as_the_server(make: Make) -> None:
    pipeline = make("session")
    dsn = pipeline.config.target.dsn
    before = settings_of(dsn)
    pipeline.start()
    pipeline.live()
    pipeline.source.execute("UPDATE articles SET title = title || ' again' WHERE id % 3 = 0")
    pipeline.in_step()
    for command in ("check", "status", "search articles title", "evaluate articles"):
        done = pipeline.command(*command.split())
        assert done.returncode == 0, done.stdout + done.stderr
    with cdcsync.sync.Index.open(pipeline.config, "articles") as articles:
        assert len(articles.search("title", k=3)) == 3
    assert settings_of(dsn) == before
