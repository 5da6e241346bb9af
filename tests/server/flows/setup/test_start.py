"""Setting up: what another session does in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import anyio
import psycopg
import pytest
from structlog.testing import capture_logs

from cdcsync.config import QualifiedName, parse
from cdcsync.demo.cluster import Cluster
from cdcsync.errors import IndexFault, SetupError
from cdcsync.flows.setup.start import set_up_publication
from cdcsync.postgres.sessions import connect
from tests.support.configs import configuration
from tests.support.indexes import until as eventually
from tests.support.indexes import until_blocked
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

STAYS, GOES = QualifiedName("public", "articles"), QualifiedName("passing", "articles")


@pytest.mark.parametrize("extended", [False, True], ids=["created", "extended"])
async def test_a_table_that_somebody_has_locked_is_published_once_it_is_free_and_that_is_told_meanwhile(
    make_database: Callable[[], Database], extended: bool
) -> None:
    database = make_database()
    for table in ("articles", "vacuumed"):
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
    config = parse(configuration(database.dsn), {}, where="the test's configuration")
    source, other = await connect(database.dsn, "source"), await connect(database.dsn, "source")
    tables = [STAYS, QualifiedName("public", "vacuumed")]
    if extended:
        await set_up_publication(source, config, [STAYS])

    async def told() -> bool:
        return "lock_waits" in [event["event"] for event in logged]

    with capture_logs() as logged:
        async with anyio.create_task_group() as tasks, other.transaction():
            await other.execute("LOCK TABLE public.vacuumed IN SHARE UPDATE EXCLUSIVE MODE")
            tasks.start_soon(set_up_publication, source, config, tables)
            await eventually(told)
    assert next(event["table"] for event in logged if event["event"] == "lock_waits").endswith("public.vacuumed")
    published = await (await other.execute("SELECT tablename FROM pg_publication_tables ORDER BY 1")).fetchall()
    assert published == [("articles",), ("vacuumed",)]
    for connection in (source, other):
        await connection.close()


@pytest.mark.proof
@pytest.mark.parametrize(
    ("name", "locked"),
    [("plain", "public.plain"), ("values", 'public."values"'), ("a$b", "public.a$b"), ("parent", "public.child")],
)
async def test_the_index_of_a_table_that_stays_locked_waits_whatever_the_table_is_called(
    make_database: Callable[[], Database], name: str, locked: str
) -> None:
    database = make_database()
    free, held = QualifiedName("public", "free"), QualifiedName("public", name)
    for table in (free, held):
        database.execute(f'CREATE TABLE "{table.name}" (id int PRIMARY KEY)')
    if name == "parent":
        database.execute("CREATE TABLE child () INHERITS (parent)")
    config = parse(configuration(database.dsn), {}, where="the test's configuration")
    source, other = await connect(database.dsn, "source"), await connect(database.dsn, "source")
    async with other.transaction():
        await other.execute(f"LOCK TABLE ONLY {locked} IN SHARE UPDATE EXCLUSIVE MODE".encode())
        with pytest.raises(IndexFault) as refused:
            await set_up_publication(source, config, [free, held], index_of={free: "other", held: "waits"})
    assert refused.value.index == "waits"
    assert f" is locked by pid {other.info.backend_pid} (" in refused.value.message
    for connection in (source, other):
        await connection.close()


async def test_who_holds_the_publication_itself_is_named_and_a_table_that_nobody_holds_waits(
    make_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make_database()
    for table in ("articles", "more"):
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
    config = parse(configuration(database.dsn), {}, where="the test's configuration")
    source, other = await connect(database.dsn, "source"), await connect(database.dsn, "source")
    more = QualifiedName("public", "more")
    await set_up_publication(source, config, [STAYS])
    monkeypatch.setattr("cdcsync.flows.setup.start.PUBLISH_ATTEMPTS", 1)
    async with other.transaction(force_rollback=True):
        await other.execute("COMMENT ON PUBLICATION cdcsync IS 'edited'")
        with pytest.raises(IndexFault) as refused:
            await set_up_publication(source, config, [STAYS, more], index_of={STAYS: "other", more: "waits"})
    assert refused.value.index == "waits"
    assert f"publication cdcsync is locked by pid {other.info.backend_pid} (" in refused.value.message
    assert f"pg_terminate_backend({other.info.backend_pid})" in (refused.value.hint or "")
    await set_up_publication(source, config, [STAYS, more])
    for connection in (source, other):
        await connection.close()


@pytest.mark.parametrize("extended", [False, True], ids=["created", "extended"])
@pytest.mark.parametrize("gone", ["DROP TABLE passing.articles", "DROP SCHEMA passing CASCADE"])
async def test_a_table_that_is_dropped_while_it_is_published_is_refused_by_the_source_and_nothing_half_published(
    make_database: Callable[[], Database], gone: str, extended: bool
) -> None:
    database = make_database()
    database.execute("CREATE SCHEMA passing")
    for table in ("public.articles", "passing.articles"):
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
    config = parse(configuration(database.dsn), {}, where="the test's configuration")
    source, other = await connect(database.dsn, "source"), await connect(database.dsn, "source")
    watching = await connect(database.dsn, "source")
    if extended:
        await set_up_publication(source, config, [STAYS])
    refused: list[SetupError] = []

    async def publish() -> None:
        try:
            await set_up_publication(source, config, [STAYS, GOES])
        except SetupError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks, other.transaction():
        await other.execute(gone.encode())
        tasks.start_soon(publish)
        await until_blocked(watching, source)

    assert [("passing" in error.message, error.sqlstate in ("42P01", "3F000")) for error in refused] == [(True, True)]
    await set_up_publication(source, config, [STAYS])
    published = await (await watching.execute("SELECT schemaname, tablename FROM pg_publication_tables")).fetchall()
    assert published == [("public", "articles")]
    for connection in (source, other, watching):
        await connection.close()


@contextmanager
def open_transaction(database: Database, statement: str = "SELECT") -> Iterator[tuple[psycopg.Connection, str]]:
    """Yield a session whose transaction has written, and the id of that."""
    with psycopg.connect(database.dsn) as connection:
        connection.execute(statement.encode())
        (xid,) = connection.execute("SELECT pg_current_xact_id()::xid::text").fetchone() or ("",)
        yield connection, xid


def waited_for(pipeline: Pipeline, xid: str) -> None:
    """Wait until the creation of the slot waits for a transaction."""
    waits = (
        "SELECT count(*) > 0 FROM pg_replication_slots AS s JOIN pg_locks AS l ON l.pid = s.active_pid"
        " WHERE l.locktype = 'transactionid' AND NOT l.granted AND l.transactionid::text = %s"
    )
    until(lambda: pipeline.source.execute(waits, [xid]).fetchone() == (True,), pipeline.tail)


@contextmanager
def changed_while_a_slot_is_created(
    pipeline: Pipeline, database: Database, change: Sequence[str], write: str
) -> Iterator[None]:
    """Alter tables while a slot is being created, and yield once a transaction writes that no slot decodes rightly.

    PostgreSQL takes no note of transactions that change tables until all have ended that were open when the creation
    began. One that begins then, and ends after the slot was created, is decoded all the same.
    """
    with open_transaction(database) as (first, one):
        waited_for(pipeline, one)
        with open_transaction(database) as (second, two):
            for statement in change:
                pipeline.source.execute(statement)
            first.commit()
            waited_for(pipeline, two)
            with open_transaction(database, write):
                second.commit()
                yield


CREATED = ["CREATE TABLE made_meanwhile (id int PRIMARY KEY)"], "INSERT INTO made_meanwhile VALUES (1)"
SWAPPED = (
    [f"ALTER TABLE articles RENAME {old} TO {new}" for old, new in (("title", "x"), ("note", "title"), ("x", "note"))],
    "INSERT INTO articles VALUES (2, 'a note', 'a title')",
)
"""After this the same names stand in another order: columns that are taken for those of before have wrong values."""


def of_articles(dsn: str, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    pipeline = make_pipeline(configuration(dsn))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, note text)")
    pipeline.source.execute("INSERT INTO articles VALUES (1, 'the first', 'its note')")
    return pipeline


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("killed_at", ["slot created", "slot that is made again dropped"])
@pytest.mark.parametrize(("change", "write"), [CREATED, SWAPPED], ids=["a table created", "columns renamed"])
def test_a_slot_is_made_again_if_tables_changed_meanwhile_also_after_a_kill(
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    change: Sequence[str],
    write: str,
    killed_at: str,
) -> None:
    pipeline = of_articles(database.dsn, make_pipeline)
    process = pipeline.start(CDCSYNC_CRASH_AT=killed_at)
    with changed_while_a_slot_is_created(pipeline, database, change, write):
        assert process.wait(timeout=PATIENCE_S) == -signal.SIGKILL, pipeline.tail()
        pipeline.start()
        until(lambda: pipeline.times("slot_creating") == 2, pipeline.tail)
    pipeline.live()
    pipeline.source.execute("INSERT INTO articles VALUES (3, 'the third', 'the third')")
    pipeline.in_step()
    assert [pipeline.times(one) for one in ("slot_made_again", "slot_doubtful", "stream_waits")] == [1, 0, 0]


def test_a_slot_that_is_left_by_a_killed_worker_is_used_if_nothing_changed(
    cluster: Cluster, make_pipeline: Callable[[str], Pipeline]
) -> None:
    """On a server of its own: a slot may need all that the oldest one needs, and counts what changed since then."""
    pipeline = of_articles(cluster.dsn(), make_pipeline)
    process = pipeline.start(CDCSYNC_CRASH_AT="slot created")
    assert process.wait(timeout=PATIENCE_S) == -signal.SIGKILL, pipeline.tail()
    pipeline.start()
    pipeline.live()
    assert [pipeline.times(one) for one in ("slot_adopted", "slot_made_again")] == [1, 0]


def test_a_slot_that_cannot_decode_a_table_is_doubted_then_a_gap_and_another_slot_takes_its_place(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = of_articles(database.dsn, make_pipeline)
    pipeline.hurry = {"cdcsync.flows.setup.start.CREATIONS": 1}
    process = pipeline.start()
    with changed_while_a_slot_is_created(pipeline, database, *CREATED):
        assert "cdcsync verify" in pipeline.event("slot_doubtful")["fix"]
        pipeline.event("slot_created")
    assert process.wait(timeout=PATIENCE_S) == 1
    said = " ".join(pipeline.tail().split())
    assert "the source fails each time that it decodes what follows the checkpoint" in said
    assert "a table was created or altered while the slot was being made" in said
    pipeline.configure(configuration(database.dsn, source_lines='on_gap = "resync"'))
    pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = 'changed'")
    until(lambda: pipeline.in_step_now(), lambda: f"{pipeline.difference}; {pipeline.tail()}")


def test_a_start_waits_for_no_reader_of_our_tables(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = of_articles(database.dsn, make_pipeline)
    pipeline.start()
    pipeline.live()
    pipeline.stop(pipeline.processes[-1])
    with psycopg.connect(database.dsn) as reader:
        # As a transaction does that has read them, and as one does that waits in `wait_for`.
        ours = reader.execute(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p', 'v') AND (n.nspname = 'cdcsync'"
            " OR starts_with(c.relname, 'articles_index'))"
        ).fetchall()
        assert len(ours) > 20
        for (name,) in ours:
            reader.execute(f"LOCK TABLE {name} IN ACCESS SHARE MODE".encode())
        pipeline.start()
        pipeline.source.execute("UPDATE articles SET title = 'changed'")
        pipeline.in_step()
    assert pipeline.times("lock_waits") == 0
