"""What is in the way of other chunks becoming those that are searched, or of going, and who may read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import anyio
import psycopg
import pytest

from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.flows.migrate import switch
from cdcsync.flows.setup import exchange
from cdcsync.flows.setup.indexes import drop_generations, let_go
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec
from tests.support.configs import Section, configuration
from tests.support.migrations import loaded, migrate, ready, refused
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

SCHEMA = "cdcsync"
REGISTRY = Registry(SCHEMA)


def beside(make_pipeline: Callable[[str], Pipeline], database: Database, *others: str) -> Pipeline:
    """Return an index that is to have other chunks, beside other indexes; a worker runs with the file of before."""
    indexes: dict[str, Section] = {name: {} for name in ("articles", *others)}
    pipeline = make_pipeline(configuration(database.dsn, indexes=indexes))
    loaded(pipeline, *indexes, rows=20)
    pipeline.configure(configuration(database.dsn, indexes=indexes | {"articles": {"text": "about: {title}"}}))
    return pipeline


def begun(pipeline: Pipeline) -> None:
    migrate(pipeline, "start")
    ready(pipeline, 2)


@pytest.mark.proof
def test_what_is_built_on_the_tables_is_in_the_way_and_nothing_else_changes(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = beside(make_pipeline, database)
    reader = f"reader_{pipeline.target.info.dbname}"
    execute = pipeline.target.execute
    execute(f"CREATE ROLE {reader} LOGIN")
    try:
        execute(f"GRANT USAGE ON SCHEMA cdcsync TO {reader}")
        execute(
            "GRANT SELECT ON articles_index, articles_index_chunks, cdcsync.articles_chunks, cdcsync.articles_words,"
            f" cdcsync.articles_vectors_1 TO {reader}"
        )
        begun(pipeline)
        execute("CREATE VIEW mine AS SELECT content FROM articles_index_chunks")
        execute("ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY")
        execute(f"CREATE POLICY few ON cdcsync.articles_chunks TO {reader} USING (id < 10)")
        told = refused(pipeline, "activate")
        assert 'cdcsync"."articles~2_chunks" has not: whoever may read it would see every row' in told
        assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "ready"]
        pipeline.source.execute("INSERT INTO articles VALUES (21, 'one more')")
        until(lambda: execute("SELECT count(*) FROM mine").fetchone() == (21,), pipeline.tail)
        assert "has not" in migrate(pipeline, "status")[1]["refusal"]
        execute('ALTER TABLE cdcsync."articles~2_chunks" ENABLE ROW LEVEL SECURITY')
        execute(f'CREATE POLICY few ON cdcsync."articles~2_chunks" TO {reader} USING (id < 10)')
        assert migrate(pipeline, "activate")["live"] == 2
        # What is built on the views of an index sees the other chunks; a role sees what it saw.
        found = execute("SELECT count(*), bool_and(content LIKE 'about: %') FROM mine").fetchone()
        assert found == (21, True)
        with psycopg.connect(pipeline.config.target.dsn, autocommit=True) as connection:
            connection.execute(f"SET ROLE {reader}")
            rows = connection.execute(
                "SELECT id, content FROM cdcsync.articles_search('article', k => 50, mode => 'text')"
            ).fetchall()
        assert {id_ for id_, _ in rows} == set(range(1, 10))
        assert all(content.startswith("about: ") for _, content in rows)

        execute("CREATE VIEW old AS SELECT content FROM cdcsync.articles_chunks")
        told = refused(pipeline, "drop", "--yes")
        assert "generation 1 could not be dropped" in told
        assert "old depends on" in told
        pipeline.source.execute("INSERT INTO articles VALUES (1000, 'a new one')")
        until(lambda: execute("SELECT count(*) FROM mine").fetchone() == (22,), pipeline.tail)
        # A worker that resumes does not forget what it could not do.
        assert "old depends on" in migrate(pipeline, "status")[0]["refusal"]
        execute("DROP VIEW old")
        assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    finally:
        execute(f"DROP OWNED BY {reader}")
        execute(f"DROP ROLE {reader}")


@pytest.mark.proof
def test_a_reader_in_the_way_holds_up_no_other_index(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = beside(make_pipeline, database, "notes")
    text = pipeline.path.read_text()
    # Nor is another index of the file in the way, whose table is not there yet.
    pipeline.configure(f'{text}\n[indexes.lacking]\ntable = "lacking"\ntext = "{{title}}"\nembedder = "fake"\n')
    migrate(pipeline, "start")
    pipeline.configure(text)
    begun(pipeline)
    with psycopg.connect(pipeline.config.target.dsn) as dump:
        dump.execute("SELECT FROM articles_index")
        assert "other transactions have locked its view or tables" in refused(pipeline, "activate")
        pipeline.source.execute("INSERT INTO notes VALUES (21, 'one more')")
        until(lambda: pipeline.target.execute("SELECT count(*) FROM notes_index").fetchone() == (21,), pipeline.tail)
    assert migrate(pipeline, "activate")["live"] == 2


@pytest.mark.proof
def test_what_is_wrong_with_the_table_of_both_sides_is_said_once(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = beside(make_pipeline, database)
    begun(pipeline)
    pipeline.source.execute("ALTER TABLE articles RENAME title TO heading")
    paused = "SELECT count(*) FROM cdcsync.indexes WHERE state = 'paused'"
    until(lambda: pipeline.target.execute(paused).fetchone() == (2,), pipeline.tail)
    problems = json.loads(pipeline.command("status", "--json").stdout)["problems"]
    said = [one for one in problems if "is paused" in one]
    assert len(said) == 1, said
    checked = " ".join(pipeline.command("check").stdout.split())
    assert checked.count("is paused") == 1, checked
    pipeline.source.execute("ALTER TABLE articles RENAME heading TO title")
    until(lambda: pipeline.target.execute(paused).fetchone() == (0,), pipeline.tail)


@pytest.mark.proof
def test_nobody_waits_for_a_worker_whose_file_lacks_the_index(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = beside(make_pipeline, database, "notes")
    begun(pipeline)
    text = pipeline.path.read_text()
    pipeline.configure(configuration(database.dsn, indexes={"notes": {}}))
    pipeline.stop(pipeline.processes[-1])
    pipeline.start()
    unfollowed = "SELECT count(*) FROM cdcsync.indexes WHERE unfollowed_at IS NOT NULL"
    until(lambda: pipeline.target.execute(unfollowed).fetchone() == (2,), pipeline.tail)
    pipeline.configure(text)
    assert "no worker follows generation 2 any more" in refused(pipeline, "activate")
    assert "no worker follows the index" in refused(pipeline, "drop", "--yes")


@pytest.fixture
async def both_sides(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> AsyncIterator[tuple[Pipeline, Connection]]:
    """Articles with other chunks beside them, without a worker, and a session on their target."""
    pipeline = beside(make_pipeline, database)
    begun(pipeline)
    pipeline.stop(pipeline.processes[-1])
    async with await connect(pipeline.config.target.dsn, "target") as connection:
        yield pipeline, connection


async def both_asked(connection: Connection) -> None:
    """Ask for the chunks beside the articles to be activated, and then to be dropped."""
    await REGISTRY.ask_for_activation(connection, "articles")
    await Generations(SCHEMA).drop_asked(connection, beside_name("articles"), 2)


async def both_entries(connection: Connection) -> tuple[Entry, Entry]:
    entry, other = await REGISTRY.both(connection, "articles")
    assert entry is not None
    assert other is not None
    return entry, other


@pytest.mark.anyio
async def test_a_worker_that_examined_before_an_exchange_drops_nothing_of_what_stands_there_since(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    section = pipeline.config.indexes["articles"]
    examined = (await stored_spec(connection, SCHEMA, "articles", section)).beside
    assert examined is not None
    assert migrate(pipeline, "activate")["live"] == 2
    await Generations(SCHEMA).drop_asked(connection, examined.name, 1)
    await drop_generations(connection, SCHEMA, examined)
    (other,) = await Generations(SCHEMA).of(connection, examined.name)
    assert (other.generation, other.state, other.refusal) == (1, "dropping", None)
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    assert pipeline.target.execute("SELECT array_agg(name) FROM cdcsync.indexes").fetchone() == (["articles"],)


@pytest.mark.anyio
async def test_an_exchange_that_had_to_wait_gives_way_to_a_later_request_to_drop(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    await both_asked(connection)
    assert not await exchange._exchange(connection, pipeline.config, "articles")
    entry, other = await both_entries(connection)
    assert (entry.generation, other.generation) == (1, 2)
    # A command asks for the end of what others want to have live: that is the last word.
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 2
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live"]


@pytest.mark.anyio
async def test_a_drop_that_was_decided_on_before_others_dropped_drops_nothing_of_what_stands_there_since(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    assert not await exchange._drop(connection, pipeline.config, "articles")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "ready"]


@pytest.mark.anyio
async def test_a_refused_drop_leaves_no_activation_that_was_asked_before_it(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    await both_asked(connection)
    pipeline.target.execute('CREATE VIEW mine AS SELECT content FROM cdcsync."articles~2_chunks"')
    assert await exchange.do_what_was_asked(connection, pipeline.config)
    entry, other = await both_entries(connection)
    assert (entry.generation, other.activation_asked_at) == (1, None)
    (_, beside_it) = migrate(pipeline, "status")
    assert beside_it["state"] == "ready"
    assert "mine depends on" in beside_it["refusal"]


@pytest.mark.anyio
async def test_nobody_waits_for_an_activation_by_a_worker_whose_file_lacks_the_index_by_now(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    async with await connect(pipeline.config.target.dsn, "target") as worker:
        assert await Pipelines(SCHEMA, pipeline.config.source.slot).try_lock(worker)
        await REGISTRY.ask_for_activation(connection, "articles")
        await REGISTRY.note_followed(connection, pipeline.config.source.slot, [])
        with anyio.fail_after(60), pytest.raises(SetupError, match="no worker follows generation 2 any more"):
            await switch._answered(connection, pipeline.config, "articles", 2)
    other = await REGISTRY.find(connection, beside_name("articles"))
    assert other is not None
    assert other.activation_asked_at is None


@pytest.mark.anyio
async def test_what_a_migration_has_begun_since_the_examination_is_followed_with_its_index(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    assert set(pipeline.config.indexes) == {"articles"}
    await let_go(connection, pipeline.config)
    assert [one.unfollowed_at for one in await REGISTRY.both(connection, "articles") if one is not None] == [None] * 2


@pytest.mark.anyio
async def test_whoever_waited_for_a_row_while_names_were_exchanged_gets_the_one_of_that_name(
    both_sides: tuple[Pipeline, Connection],
) -> None:
    pipeline, connection = both_sides
    found: list[Entry | None] = []

    async def find(name: str) -> None:
        async with await connect(pipeline.config.target.dsn, "target") as other, other.transaction():
            found.append(await REGISTRY.find(other, name, lock=True))

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with anyio.create_task_group() as tasks, connection.transaction():
        await REGISTRY.exchange(connection, "articles")
        tasks.start_soon(find, "articles")
        with anyio.fail_after(60):
            while pipeline.target.execute(waiting).fetchone() == (0,):  # noqa: ASYNC110
                await anyio.sleep(0.01)
    (entry,) = found
    assert entry is not None
    assert (entry.name, entry.generation) == ("articles", 2)
