"""`cdcsync teardown` as an operator uses it: what goes, what stays, and when it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import msgspec
import psycopg
import pytest
from anyio.to_thread import run_sync

from cdcsync import Index
from cdcsync.config import Config
from cdcsync.config.serving import Serve
from cdcsync.errors import ModelChanged, SetupError, SlotInUse
from cdcsync.flows.teardown.one_index import drop_index
from cdcsync.flows.teardown.pipeline import tear_down
from cdcsync.lsn import INVALID_LSN
from cdcsync.postgres.sessions import connect
from cdcsync.source.catalog import read_slot
from cdcsync.source.slot import SlotConnection
from cdcsync.target.belongings import relations_of
from cdcsync.target.ddl.search_function import NO_GENERATION
from cdcsync.target.pipelines import Pipelines
from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.indexes import until as eventually
from tests.support.migrations import NEW, OLD, hashed, turned
from tests.support.servers import Database
from tests.support.serving import served
from tests.support.teardowns import (
    ANOTHER_SLOT,
    OF_WORKER,
    fill,
    make,
    outcomes,
    publications,
    relations,
    run_and_stop,
    sent,
    set_up,
    slots,
    two_indexes,
)
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server


def teardown(pipeline: Pipeline, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return pipeline.command("teardown", *arguments, answer=answer)


def test_slot_and_publication_go_and_the_index_stays_searchable(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    fill(source)
    pipeline = make(make_pipeline, source, target)
    run_and_stop(pipeline)

    done = teardown(pipeline)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"✓ slot s_{source.name} dropped", "✓ publication cdcsync dropped"]
    assert slots(source) == publications(source) == []
    assert target.execute("SELECT count(*) FROM articles_index") == [(20,)]


def test_a_purge_leaves_nothing_behind_and_can_be_repeated(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)

    first = outcomes(teardown(pipeline, "--purge", "--yes", "--json"))
    again = outcomes(teardown(pipeline, "--purge", "--yes", "--json"))

    assert set(first.values()) == {"dropped"}
    assert set(again.values()) == {"absent"}
    assert relations(database) == ["articles"]
    assert slots(database) == publications(database) == []
    assert database.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'cdcsync'") == []
    assert database.execute("SELECT count(*) FROM articles") == [(20,)]


@pytest.mark.proof
def test_a_pipeline_that_was_torn_down_can_be_set_up_again(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    _, pipeline = set_up(make_database, make_pipeline)
    outcomes(teardown(pipeline, "--purge", "--yes", "--json"))

    run_and_stop(pipeline)

    pipeline.compare()


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("\n", 1), ("", 2)], ids=["no", "empty line", "nobody"])
def test_without_a_yes_nothing_is_changed(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], answer: str, status: int
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)
    before = relations(database)

    done = teardown(pipeline, "--purge", answer=answer)

    assert done.returncode == status
    assert "table cdcsync.articles_chunks" in done.stderr
    assert "view public.articles_index" in done.stderr
    assert relations(database) == before
    assert slots(database) == [f"s_{database.name}"]
    assert outcomes(teardown(pipeline, "--purge", "--json", answer="yes\n"))


def test_it_refuses_while_a_worker_runs(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    fill(database)
    pipeline = make(make_pipeline, database, database)
    worker = pipeline.start()
    pipeline.live()

    done = teardown(pipeline, "--purge", "--yes")

    assert done.returncode == 2
    assert "error: a worker runs for this pipeline" in done.stderr
    assert "fix:   stop it" in done.stderr
    database.execute("INSERT INTO articles VALUES (100, 'still followed')")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    "command", [partial(tear_down, purge=True), partial(drop_index, index="articles")], ids=["teardown", "drop"]
)
async def test_it_waits_for_the_lock_of_a_worker_that_is_just_ending(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Config], Coroutine[Any, Any, Any]],
) -> None:
    database, pipeline = await run_sync(set_up, make_database, make_pipeline)
    monkeypatch.setattr("cdcsync.flows.teardown.workers.ENDING_S", PATIENCE_S)

    async def waits() -> bool:
        return bool(
            database.execute(
                "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        )

    async with await connect(database.dsn, "target") as ending:
        assert await Pipelines("cdcsync", pipeline.config.source.slot).try_lock(ending)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(command, pipeline.config)
            await eventually(waits)
            await ending.close()
    assert not [name for name in relations(database) if "articles_" in name]


@pytest.mark.anyio
async def test_it_waits_until_the_server_has_noticed_that_nobody_reads_the_slot_any_more(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, pipeline = await run_sync(set_up, make_database, make_pipeline)
    slot = await run_sync(pipeline.released)
    async with await SlotConnection.connect(database.dsn) as reader:
        await reader.start(slot, ["cdcsync"], INVALID_LSN, streaming=False)
        monkeypatch.setattr("cdcsync.source.catalog.RELEASE_S", 0)
        with pytest.raises(SlotInUse):
            await tear_down(pipeline.config, purge=True)
        assert slots(database) == [slot]

        async def read_while_it_ends(*arguments: Any) -> Any:
            found = await read_slot(*arguments)
            await reader.aclose()
            return found

        monkeypatch.setattr("cdcsync.source.catalog.RELEASE_S", PATIENCE_S)
        monkeypatch.setattr("cdcsync.source.catalog.read_slot", read_while_it_ends)
        await tear_down(pipeline.config, purge=True)
    assert slots(database) == []


def test_what_a_user_built_on_the_index_is_not_dropped_with_it(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)
    database.execute("CREATE VIEW mine AS SELECT id FROM articles_index")

    done = teardown(pipeline, "--purge", "--yes")

    assert done.returncode == 2
    assert "depends on the index" in done.stderr
    assert "mine" in done.stderr
    assert database.execute("SELECT count(*) FROM mine") == [(20,)]
    assert slots(database) == [f"s_{database.name}"]


@pytest.mark.proof
def test_the_other_pipeline_of_the_schema_goes_on(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    fill(database)
    one = make(make_pipeline, database, database, slot=f"a_{database.name}")
    other = make(make_pipeline, database, database, slot=f"b_{database.name}", index="others")
    run_and_stop(one)
    worker = other.start()
    other.event("index_live")
    assert other.stop(worker) == 0

    done = outcomes(teardown(one, "--purge", "--yes", "--json"))

    assert done["publication cdcsync"] == "kept"
    assert slots(database) == [f"b_{database.name}"]
    assert set(database.execute("SELECT slot FROM cdcsync.embedders")) == {(f"b_{database.name}",)}
    assert not [name for name in relations(database) if "articles_" in name]
    database.execute("INSERT INTO articles VALUES (100, 'still followed')")
    worker = other.start()
    other.in_step()
    assert other.stop(worker) == 0


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["CREATE PUBLICATION cdcsync FOR ALL TABLES WITH (publish_via_partition_root)"], "not made by a worker"),
        (["CREATE PUBLICATION cdcsync FOR TABLE articles"], "not made by a worker"),
        (["CREATE PUBLICATION cdcsync FOR TABLE articles, elsewhere", OF_WORKER], "also sends public.elsewhere"),
        (["CREATE PUBLICATION cdcsync FOR TABLE articles", OF_WORKER, ANOTHER_SLOT], "may be read through another_"),
    ],
    ids=["all tables", "made by hand", "another table", "another slot"],
)
def test_a_publication_that_serves_others_too_is_kept(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], statements: list[str], reason: str
) -> None:
    database = make_database()
    fill(database)
    database.execute("CREATE TABLE elsewhere (id int PRIMARY KEY)")
    for statement in statements:
        database.execute(statement)
    pipeline = make(make_pipeline, database, database)

    done = teardown(pipeline)

    assert done.returncode == 0
    assert reason in done.stdout
    assert "DROP PUBLICATION cdcsync" in done.stdout
    assert publications(database) == ["cdcsync"]


def test_a_slot_that_may_not_be_the_pipelines_is_refused_with_the_statement_that_drops_it(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    fill(database)
    slot = f"s_{database.name}"
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    pipeline = make(make_pipeline, database, database)

    done = teardown(pipeline)

    assert done.returncode == 2
    assert "test_decoding" in done.stderr
    assert slots(database) == [slot]
    (statement,) = re.findall(r"SELECT pg_drop_replication_slot\('\w+'\)", done.stderr)
    database.execute(statement)
    assert teardown(pipeline).returncode == 0


def test_a_purge_that_is_killed_at_any_point_is_finished_by_the_next_one_and_the_other_pipeline_goes_on(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database, elsewhere = make_database(), make_database()
    fill(elsewhere)
    killed = two_indexes(database, database, make_pipeline)
    # It lets go of an index of a table that nothing but its rows in the target tells to be its own by now.
    killed.configure(configuration(database.dsn))
    let_go = killed.start()
    killed.event("index_unfollowed")
    assert killed.stop(let_go) == 0
    other = make_pipeline(
        configuration(
            elsewhere.dsn,
            target=database.dsn,
            source_lines='publication = "others"',
            indexes={"others": {"table": "articles"}},
        )
    )
    worker = other.start()
    other.event("index_live")

    killed.released()
    left = []
    for point in ("fence raised to drop", "publication dropped", "slot dropped", "drop written", "drop committed"):
        died = killed.command("teardown", "--purge", "--yes", CDCSYNC_CRASH_AT=point)
        assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
        left.append((len(slots(database)), len(publications(database)), len(indexes(database))))
    done = outcomes(teardown(killed, "--purge", "--yes", "--json"))

    assert left == [(1, 1, 3), (1, 0, 3), (0, 0, 3), (0, 0, 3), (0, 0, 1)]
    assert set(done.values()) == {"absent"}
    assert not [name for name in relations(database) if "articles_" in name or "notes_" in name]
    elsewhere.execute("INSERT INTO articles VALUES (100, 'still followed')")
    other.in_step()
    assert other.stop(worker) == 0


def indexes(database: Database) -> list[str]:
    """Return the indexes of all pipelines."""
    return [name for (name,) in database.execute("SELECT name FROM cdcsync.indexes")]


@pytest.mark.proof
@pytest.mark.parametrize("point", ["publication dropped", "slot dropped"])
def test_a_teardown_that_is_killed_is_finished_by_the_next_one_and_the_index_stays_searchable(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], point: str
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)
    pipeline.released()

    died = pipeline.command("teardown", CDCSYNC_CRASH_AT=point)
    done = outcomes(teardown(pipeline, "--json"))

    assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
    was = "absent" if point == "slot dropped" else "dropped"
    assert done == {f"slot s_{database.name}": was, "publication cdcsync": "absent"}
    assert slots(database) == publications(database) == []
    assert database.execute("SELECT count(*) FROM articles_index") == [(20,)]


# -- one index -------------------------------------------------------------------------------------------------------


def drop(pipeline: Pipeline, index: str, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return pipeline.command("drop", index, *arguments, answer=answer)


@pytest.mark.proof
def test_an_index_that_left_the_configuration_is_unfollowed_says_so_and_can_be_dropped(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    fill(source)
    source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, title text)")
    pipeline = make(make_pipeline, source, target)
    both = pipeline.path.read_text()
    more = '[embedders.other]\ntype = "hash"\n[indexes.notes]\ntable = "notes"\ntext = "{title}"\nembedder = "other"\n'
    pipeline.path.write_text(both + more)
    worker = pipeline.start()
    until(
        lambda: (1,) in target.execute("SELECT 1 FROM pg_class WHERE relname = 'notes_chunks'"), "the index to be there"
    )
    until(lambda: target.execute("SELECT count(*) FROM cdcsync.indexes WHERE state = 'live'") == [(2,)], pipeline.tail)
    refused = drop(pipeline, "notes", "--yes")
    assert (refused.returncode, "a worker follows the index" in refused.stderr) == (2, True), refused.stderr
    assert pipeline.stop(worker) == 0

    pipeline.path.write_text(both)
    pipeline.start()
    assert pipeline.event("index_unfollowed")["index"] == "notes"
    until(lambda: "cdcsync drop notes" in str(json.loads(pipeline.get("/status")[1])["problems"]), pipeline.tail)
    with pytest.raises(psycopg.errors.RaiseException, match="no longer followed"):
        target.execute("SELECT cdcsync.wait_for('notes', '0/1')")

    target.execute("CREATE TABLE cdcsync.notes_vectors_2 (LIKE cdcsync.notes_vectors_1)")
    target.execute("COMMENT ON TABLE cdcsync.notes_vectors_2 IS 'cdcsync index notes: vectors of another generation'")
    target.execute(
        "CREATE FUNCTION cdcsync.notes_vectors_1_new_note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END';"
        " COMMENT ON FUNCTION cdcsync.notes_vectors_1_new_note() IS 'cdcsync index notes: a rebuild that was killed';"
        " CREATE TRIGGER cdcsync_rebuild AFTER DELETE ON cdcsync.notes_vectors_1_fresh"
        " FOR EACH ROW EXECUTE FUNCTION cdcsync.notes_vectors_1_new_note()"
    )
    target.execute("INSERT INTO cdcsync.approvals (index_name, change, texts) VALUES ('notes', 'f', 1)")
    asked = drop(pipeline, "notes", answer="n\n")
    assert (asked.returncode, "cannot be undone" in asked.stderr) == (1, True)
    done = drop(pipeline, "notes", "--yes", "--json")
    assert outcomes(done) == {
        "index notes in the target": "dropped",
        "public.notes in the publication cdcsync": "dropped",
    }
    assert not [one for one in relations(target) if "notes" in one]
    assert target.execute("SELECT FROM cdcsync.approvals") == []
    assert target.execute("SELECT name FROM cdcsync.embedders") == [("fake",)]
    assert target.execute("SELECT FROM pg_proc WHERE proname LIKE 'notes%'") == []
    assert "there is no index notes" in drop(pipeline, "notes", "--yes").stderr
    # The other index goes on.
    source.execute("UPDATE articles SET title = 'after'")
    pipeline.in_step("articles")


def test_a_drop_that_is_killed_at_any_point_is_finished_by_the_next_one_and_the_other_index_goes_on(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = two_indexes(database, database, make_pipeline)
    died = pipeline.command("drop", "notes", "--yes", CDCSYNC_CRASH_AT="fence raised to drop")
    assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
    pipeline.configure(configuration(database.dsn))
    worker = pipeline.start()
    pipeline.event("index_unfollowed")

    left = []
    for point in ("table taken from its publication", "publication without the table committed", "drop written"):
        died = pipeline.command("drop", "notes", "--yes", CDCSYNC_CRASH_AT=point)
        assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
        left.append((sent(database), database.execute("SELECT count(*) FROM notes_index")))
    last = pipeline.command("drop", "notes", "--yes", CDCSYNC_CRASH_AT="drop committed")
    again = drop(pipeline, "notes", "--yes")

    assert left == [(["articles", "notes"], [(1,)]), (["articles"], [(1,)]), (["articles"], [(1,)])]
    assert last.returncode == -signal.SIGKILL, last.stderr + last.stdout
    assert (again.returncode, "there is no index notes" in again.stderr) == (2, True)
    assert sent(database) == ["articles"]
    assert not [name for name in relations(database) if "notes_" in name]
    database.execute("UPDATE articles SET title = 'after'")
    pipeline.in_step("articles")
    assert pipeline.stop(worker) == 0


@pytest.mark.proof
def test_an_index_that_a_killed_drop_has_left_is_followed_again_if_a_worker_begins_first(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = two_indexes(database, database, make_pipeline)

    died = pipeline.command("drop", "articles", "--yes", CDCSYNC_CRASH_AT="publication without the table committed")
    database.execute("UPDATE articles SET title = 'while it was not sent' WHERE id = 7")
    database.execute("DELETE FROM articles WHERE id = 8")
    worker = pipeline.start()

    assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
    until(lambda: pipeline.in_step_now("articles"), pipeline.tail)
    assert sent(database) == ["articles", "notes"]
    assert pipeline.stop(worker) == 0


def test_an_index_that_something_depends_on_keeps_its_table_in_the_publication(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = two_indexes(database, database, make_pipeline)
    database.execute("CREATE VIEW mine AS SELECT id FROM notes_index")

    refused = drop(pipeline, "notes", "--yes")

    assert (refused.returncode, "depends on the index" in refused.stderr) == (2, True)
    assert sent(database) == ["articles", "notes"]


def test_on_a_server_that_was_not_followed_a_slot_of_our_name_is_anothers_and_its_publication_stays_whole(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    fill(database)
    database.execute("CREATE TABLE notes (id bigint PRIMARY KEY, title text)")
    pipeline = make(make_pipeline, database, database)
    both = pipeline.path.read_text()
    pipeline.path.write_text(f'{both}\n[indexes.notes]\ntable = "notes"\ntext = "{{title}}"\nembedder = "fake"\n')
    run_and_stop(pipeline)
    pipeline.path.write_text(both)
    database.execute("UPDATE cdcsync.pipelines SET system_identifier = '1'")

    done = drop(pipeline, "notes", "--yes", "--json")

    assert outcomes(done) == {
        "index notes in the target": "dropped",
        "public.notes in the publication cdcsync": "kept",
    }
    assert "another cluster" in done.stdout
    assert f"may be read through {pipeline.config.source.slot}" in done.stdout
    assert sent(database) == ["articles", "notes"]


def test_without_its_source_what_is_in_the_target_goes_by_any_server(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    fill(source)
    source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, title text)")
    pipeline = make(make_pipeline, source, target)
    both = f'{pipeline.path.read_text()}\n[indexes.notes]\ntable = "notes"\ntext = "{{title}}"\nembedder = "fake"\n'
    pipeline.path.write_text(both)
    run_and_stop(pipeline)
    slot = pipeline.released()
    source.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    nowhere = psycopg.conninfo.make_conninfo(source.dsn, dbname="nowhere")
    pipeline.path.write_text(both.replace(source.dsn, nowhere))
    for refused in (drop(pipeline, "notes", "--yes"), teardown(pipeline, "--purge", "--yes")):
        assert refused.returncode != 0
        assert "nowhere" in refused.stderr
    assert target.execute("SELECT count(*) FROM articles_index") == [(20,)]

    # As docs/operations.md says: any server does, since there is neither slot nor publication.
    pipeline.path.write_text(both.replace(source.dsn, target.dsn))
    dropped = outcomes(drop(pipeline, "notes", "--yes", "--json"))
    assert dropped["index notes in the target"] == "dropped"
    assert dropped["public.notes in the publication cdcsync"] == "absent"
    torn_down = outcomes(teardown(pipeline, "--purge", "--yes", "--json"))
    assert torn_down["indexes articles in the target"] == "dropped"
    assert torn_down[f"slot {slot}"] == torn_down["publication cdcsync"] == "absent"
    assert relations(target) == []


@pytest.mark.proof
def test_an_index_that_comes_back_into_the_configuration_is_read_again(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    fill(source)
    pipeline = make(make_pipeline, source, target)
    text = pipeline.path.read_text()
    run_and_stop(pipeline)
    pipeline.path.write_text(
        text.replace("[indexes.articles]", "[indexes.others]").replace(
            '"articles"', '"articles"\nview = "others_index"'
        )
    )
    worker = pipeline.start()
    pipeline.event("index_unfollowed")
    source.execute("UPDATE articles SET title = title || ' meanwhile'")
    source.execute("DELETE FROM articles WHERE id = 3")
    assert pipeline.stop(worker) == 0

    pipeline.path.write_text(text)
    pipeline.start()
    until(lambda: pipeline.in_step_now(), pipeline.tail)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "drop_all", [partial(drop_index, index="articles"), partial(tear_down, purge=True)], ids=["an index", "a pipeline"]
)
async def test_a_search_that_holds_one_table_gets_the_next_while_the_index_is_to_be_dropped(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    drop_all: Callable[[Config], Coroutine[Any, Any, object]],
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)
    ours = "SELECT FROM pg_stat_activity WHERE application_name IN ('cdcsync drop', 'cdcsync teardown')"
    async with (
        await connect(database.dsn, "target") as searcher,
        anyio.create_task_group() as tasks,
        searcher.transaction(),
    ):
        await searcher.execute("SELECT FROM cdcsync.articles_vectors_1")
        tasks.start_soon(drop_all, pipeline.config)
        waits = f"{ours} AND wait_event_type = 'Lock'"
        await run_sync(until, lambda: database.execute(waits), "the drop to wait for the search")
        await searcher.execute("SELECT FROM cdcsync.articles_chunks")
    assert not [one for one in relations(database) if "articles_" in one]


@pytest.mark.anyio
async def test_an_index_that_a_worker_begins_to_follow_meanwhile_is_not_dropped(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, pipeline = set_up(make_database, make_pipeline)
    database.execute("UPDATE cdcsync.indexes SET unfollowed_at = now()")
    tables = relations(database)

    async def comes_back(*arguments: Any) -> Any:
        database.execute("UPDATE cdcsync.indexes SET unfollowed_at = NULL")
        return await relations_of(*arguments)

    monkeypatch.setattr("cdcsync.flows.teardown.one_index.relations_of", comes_back)
    async with await connect(database.dsn, "target") as worker:
        assert await Pipelines("cdcsync", pipeline.config.source.slot).try_lock(worker)
        with pytest.raises(SetupError, match="a worker follows the index"):
            await drop_index(pipeline.config, "articles")
    assert relations(database) == tables
    assert database.execute("SELECT count(*) FROM cdcsync.indexes") == [(1,)]


@pytest.mark.anyio
@pytest.mark.proof
@pytest.mark.parametrize("model", [turned(NEW), hashed(12)], ids=["the same dimensions", "other dimensions"])
async def test_vectors_of_a_dropped_index_are_never_taken_for_those_of_the_index_that_gets_its_name(
    database: Database, make_pipeline: Callable[[str], Pipeline], model: Section
) -> None:
    def asking(embedder: str) -> str:
        return configuration(
            database.dsn,
            embedders={"old": turned(OLD), "new": model},
            indexes={"articles": {"embedder": embedder}},
        )

    def load() -> None:
        worker = pipeline.start(PYTHONPATH=str(ROOT))
        pipeline.live()
        assert pipeline.stop(worker) == 0

    fill(database)
    pipeline = make_pipeline(asking("old"))
    await run_sync(load)
    async with Index.open(pipeline.config, "articles") as running:
        before = await running.search("title 7", mode="vector", k=1)
        [kept] = await running.embed(["title 7"])
        assert outcomes(await run_sync(drop, pipeline, "articles", "--yes", "--json"))
        pipeline.configure(asking("new"))
        await run_sync(load)

        after = await running.search("title 7", mode="vector", k=1)
        assert [(hit.key, abs(hit.distance or 0) < 1e-3) for hit in (*before, *after)] == [({"id": 7}, True)] * 2
        assert (before.generation, after.generation) == (1, 2)
        with pytest.raises(ModelChanged):
            await running.search("title 7", mode="vector", vector=kept, generation=before.generation)

    listening = Serve(listen="127.0.0.1:0", anonymous=True)
    async with served(msgspec.structs.replace(pipeline.config, serve=listening)) as client:
        asked = {"query": "title 7", "mode": "vector", "vector": [*map(float, kept)], "generation": before.generation}
        assert (await client.post("/v1/indexes/articles/search", json=asked)).status_code == 409
    with pytest.raises(psycopg.Error) as refused:
        database.execute(
            "SELECT FROM cdcsync.articles_search('title 7', %s::text::vector, generation => %s)",
            [str([*map(float, kept)]), before.generation],
        )
    assert refused.value.sqlstate == NO_GENERATION


def test_the_tables_of_an_index_leave_the_publication_together(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    pipeline = two_indexes(source, target, make_pipeline)
    source.execute("CREATE TABLE authors (id bigint PRIMARY KEY)")
    source.execute("ALTER PUBLICATION cdcsync ADD TABLE authors")
    added = "made_of = jsonb_set(made_of::jsonb, '{tables,public.authors}', '{\"oid\": 0}')"
    target.execute(f"UPDATE cdcsync.indexes SET {added} WHERE name = 'notes'")

    done = outcomes(drop(pipeline, "notes", "--yes", "--json"))

    assert done["public.authors in the publication cdcsync"] == "dropped"
    assert done["public.notes in the publication cdcsync"] == "dropped"
    assert sent(source) == ["articles"]
