"""Tables of an earlier version are brought to ours in one transaction, with what they hold; newer ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.core import TyperArgument, TyperGroup

from cdcsync import __version__
from cdcsync.cli.entry import command_line
from cdcsync.config import parse
from cdcsync.errors import SetupError
from cdcsync.postgres.sessions import connect
from cdcsync.target.version import DDL, VERSION, open_target, write_version
from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

EARLIER = (Path(__file__).parent / "schema_1.sql").read_text()


@pytest.fixture
def earlier(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """A pipeline whose worker of the version before stopped a moment ago; the source has changed since."""
    slot = f"s_{database.name}"
    with database.connect() as connection:
        connection.execute(EARLIER.replace("SLOT", slot))
    with database.connect() as connection:
        connection.execute("CREATE PUBLICATION cdcsync FOR TABLE public.articles, public.notes")
        row = connection.execute(
            "SELECT lsn, system_identifier, timeline_id FROM pg_create_logical_replication_slot(%s, 'pgoutput'),"
            " pg_control_system(), pg_control_checkpoint()",
            [slot],
        ).fetchone()
        assert row is not None
        connection.execute(
            "UPDATE cdcsync.pipelines SET checkpoint = %s, system_identifier = %s, timeline = %s", [*map(str, row)]
        )
        connection.execute("UPDATE public.articles SET title = 'new here' WHERE id = 3")
        connection.execute("DELETE FROM public.notes WHERE id = 4")
    indexes: dict[str, Section] = {
        "articles": {"columns": ["tenant"]},
        "notes": {"vector_type": "halfvec", "search": ""},
    }
    return make_pipeline(configuration(database.dsn, indexes=indexes))


def version(pipeline: Pipeline) -> tuple[int, str] | None:
    found = pipeline.target.execute("SELECT to_regclass('cdcsync.schema_version')::text").fetchone()
    if found == (None,):
        return None
    row = pipeline.target.execute("SELECT version, cdcsync FROM cdcsync.schema_version").fetchone()
    assert row is not None
    return row[0], row[1]


def in_step(pipeline: Pipeline) -> bool:
    """Say whether both indexes equal their source; halves of vectors differ from what the embedder makes."""
    try:
        pipeline.compare_one("articles")
        pipeline.compare_one("notes", vectors=False)
    except (AssertionError, psycopg.Error) as error:
        pipeline.difference = str(error)
        return False
    return True


def test_an_upgrade_keeps_position_texts_and_vectors_and_follows_what_changed_meanwhile(earlier: Pipeline) -> None:
    assert earlier.command("check").returncode == 0
    for command in (["status"], ["replay", "articles", "--dry-run"]):
        done = earlier.command(*command)
        assert (done.returncode, "start `cdcsync run` of this version, which upgrades them" in done.stderr) == (2, True)
    planned = earlier.command("plan")
    assert planned.returncode == 3
    assert f"the tables of schema cdcsync: from version 1 to {VERSION}" in planned.stdout

    earlier.start()
    assert earlier.event("schema_upgraded")["before"] == 1
    # The event is in the log before its transaction ends.
    until(lambda: version(earlier) == (VERSION, __version__), earlier.tail)
    until(lambda: in_step(earlier), lambda: earlier.difference or earlier.tail())
    assert all(event.get("kind") != "resync" for event in earlier.events())
    counted = 'cdcsync_embed_texts_total{embedder="fake"} 1.0'
    until(lambda: counted in earlier.metrics(), lambda: str([one for one in earlier.metrics() if "embed_texts" in one]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("SELECT pg_drop_replication_slot(slot) FROM cdcsync.pipelines", "the replication slot is gone"),
        ("UPDATE cdcsync.pipelines SET checkpoint = NULL", "the checkpoint was removed"),
    ],
)
def test_a_gap_is_told_before_an_upgrade(earlier: Pipeline, damage: str, said: str) -> None:
    earlier.target.execute(damage.encode())
    for command, code in (("check", 2), ("plan", 2), ("run", 1)):
        done = earlier.command(command)
        assert done.returncode == code
        assert said in " ".join((done.stdout + done.stderr).split())


def test_an_upgrade_that_is_killed_before_it_commits_has_changed_nothing(earlier: Pipeline) -> None:
    def catalog() -> list[tuple[object, ...]]:
        return earlier.target.execute(
            "SELECT c.relname, a.attname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " JOIN pg_attribute a ON a.attrelid = c.oid WHERE n.nspname = 'cdcsync' ORDER BY 1, 2"
        ).fetchall()

    before = catalog()
    assert earlier.start(CDCSYNC_CRASH_AT="shared tables written").wait(timeout=60) != 0
    assert (version(earlier), catalog()) == (None, before)
    assert earlier.start(CDCSYNC_CRASH_AT="shared tables committed").wait(timeout=60) != 0
    assert version(earlier) == (VERSION, __version__)
    earlier.start()
    until(lambda: in_step(earlier), lambda: earlier.difference or earlier.tail())


def test_an_upgrade_gives_way_to_searches_until_a_transaction_that_read_the_tables_ends(earlier: Pipeline) -> None:
    with (
        psycopg.connect(earlier.config.target.dsn) as reading,
        psycopg.connect(earlier.config.target.dsn, autocommit=True, options="-c statement_timeout=30s") as searching,
    ):
        reading.execute("SELECT FROM cdcsync.indexes")
        earlier.start()
        earlier.event("lock_waits")
        for _ in range(20):
            assert searching.execute("SELECT count(*) FROM cdcsync.indexes").fetchone() == (2,)
        assert version(earlier) is None
    until(lambda: version(earlier) == (VERSION, __version__), earlier.tail)
    until(lambda: in_step(earlier), lambda: earlier.difference or earlier.tail())


APART = ("demo", "init", "config", "token", "search", "serve", "audit")
"""The commands that have nothing to do with our tables, or only search or read what others recorded."""


def command_lines(command: Any, *path: str) -> Iterator[list[str]]:
    """Yield each command with its arguments, once for each action that it takes."""
    if isinstance(command, TyperGroup):
        for name, one in command.commands.items():
            if path or name not in APART:
                yield from command_lines(one, *path, name)
        return
    lines = [list(path)]
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            kind = parameter.type_descriptor.annotation
            values = [one.value for one in kind] if isinstance(kind, type) and issubclass(kind, Enum) else ["articles"]
            lines = [[*line, value] for line in lines for value in values]
    yield from lines


MORE = [
    ["teardown", "--purge"],
    ["plan", "--approve", "articles"],
    *(["replay", "articles", option] for option in ("--cancel", "--detach", "--dry-run")),
    ["verify", "articles", "--repair"],
]
"""Options by which a command does something else."""


def stored(pipeline: Pipeline) -> dict[str, list[str]]:
    """Return what all of our tables hold."""
    tables = pipeline.target.execute(
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'cdcsync'::regnamespace AND relkind = 'r'"
    ).fetchall()
    return {
        name: sorted(
            row for (row,) in pipeline.target.execute(f'SELECT t::text FROM cdcsync."{name}" AS t'.encode()).fetchall()
        )
        for (name,) in tables
    }


def test_every_command_refuses_tables_of_a_newer_version_and_names_both(earlier: Pipeline) -> None:
    worker = earlier.start()
    earlier.event("streaming")
    until(lambda: in_step(earlier), lambda: earlier.difference or earlier.tail())
    earlier.stop(worker)
    earlier.target.execute("UPDATE cdcsync.schema_version SET version = %s, cdcsync = '9.9'", [VERSION + 1])
    before, wrong = stored(earlier), []
    lines = [*command_lines(command_line()), *MORE]
    assert {"run", "check", "status", "drop", "migrate", "failures"} <= {line[0] for line in lines}
    for line in lines:
        done = earlier.command(*line, answer="y\n")
        said = " ".join((done.stdout + done.stderr).split())
        named = f"are of version {VERSION + 1}, made by cdcsync 9.9; this is cdcsync {__version__}, which knows version"
        if done.returncode != 2 or f"{named} {VERSION}" not in said:
            wrong.append((line, done.returncode, said))
        if stored(earlier) != before:
            wrong.append((line, done.returncode, "it has written"))
            break
    assert not wrong


@pytest.mark.anyio
async def test_a_session_that_may_write_is_refused_by_tables_of_a_newer_version(database: Database) -> None:
    database.execute("CREATE SCHEMA cdcsync")
    async with await connect(database.dsn, "target") as connection:
        for statement in DDL:
            await connection.execute(sql.SQL(statement).format(schema=sql.Identifier("cdcsync")))
        await write_version(connection, "cdcsync")
    target = parse(configuration(database.dsn), {}, where="the test's configuration").target
    await (await open_target(target, application_name="cdcsync test")).close()
    database.execute("UPDATE cdcsync.schema_version SET version = version + 1, cdcsync = '9.9'")
    with pytest.raises(SetupError, match=f"of version {VERSION + 1}, made by cdcsync 9.9"):
        await (await open_target(target, application_name="cdcsync test")).close()


def test_a_standby_of_a_newer_version_leaves_the_tables_to_the_worker_that_runs(earlier: Pipeline) -> None:
    with psycopg.connect(earlier.config.target.dsn, autocommit=True) as running:
        lock = f"cdcsync pipeline cdcsync {earlier.config.source.slot}"
        running.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [lock])
        earlier.start()
        earlier.event("standby")
        assert version(earlier) is None
    until(lambda: version(earlier) == (VERSION, __version__), earlier.tail)
    until(lambda: in_step(earlier), lambda: earlier.difference or earlier.tail())


def test_a_worker_stops_with_the_reason_once_a_newer_version_has_upgraded_its_tables(earlier: Pipeline) -> None:
    worker = earlier.start()
    earlier.event("streaming")
    earlier.target.execute("UPDATE cdcsync.schema_version SET version = 99, cdcsync = '9.9'")
    assert worker.wait(timeout=60) == 1
    assert f"are of version 99, made by cdcsync 9.9; this is cdcsync {__version__}" in earlier.tail()


@pytest.mark.parametrize("purge", [[], ["--purge"]], ids=["", "purge"])
def test_a_pipeline_of_an_earlier_version_is_torn_down_without_an_upgrade(earlier: Pipeline, purge: list[str]) -> None:
    done = earlier.command("teardown", "--yes", *purge)
    assert done.returncode == 0, done.stderr
    slots = "SELECT FROM pg_replication_slots WHERE database = current_database()"
    assert earlier.source.execute(slots).fetchall() == []
    left = earlier.target.execute("SELECT to_regclass('cdcsync.pipelines') IS NOT NULL").fetchone()
    assert left == (not purge,)


def test_tables_made_here_have_our_version(earlier: Pipeline, database: Database) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA cdcsync CASCADE")
    assert version(earlier) is None
    earlier.start()
    earlier.event("listening")
    until(lambda: version(earlier) == (VERSION, __version__), earlier.tail)
    assert earlier.times("schema_upgraded") == 0
