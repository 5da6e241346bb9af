"""Migrations to other chunks, which are filled beside those that are searched."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import anyio.to_thread
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.migrations import (
    BOTH,
    belongings,
    hashed,
    leave_rebuilds,
    loaded,
    migrate,
    ready,
    refused,
    state,
)
from tests.support.searches import SEARCHES_PER_S, Searches
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

FRAMED = "about: {title}\n\n{title}"
"""A template whose chunks nobody can take for those of `{title}`."""

PIECES = {"strategy": "characters", "max_tokens": 15, "overlap_tokens": 0}


def made(pipeline: Pipeline, stem: str, generation: int, contents: Callable[[int, str], set[str]]) -> None:
    """Wait until the chunks of a stem are what its rows come to, each with one vector of its text."""

    def whole() -> bool:
        rows = dict(pipeline.source.execute("SELECT id, title FROM articles").fetchall())
        found: dict[int, set[str]] = {}
        for id_, content in pipeline.target.execute(f'SELECT id, content FROM cdcsync."{stem}_chunks"').fetchall():
            found.setdefault(id_, set()).add(content)
        lacking = pipeline.target.execute(
            f'SELECT count(*) FROM cdcsync."{stem}_chunks" AS c WHERE 1 <> (SELECT count(*) FROM'
            f' cdcsync."{stem}_vectors_{generation}" AS v WHERE v.chunk_id = c.chunk_id'
            " AND v.content_hash = c.content_hash)"
        ).fetchone()
        return found == {id_: contents(id_, title) for id_, title in rows.items()} and lacking == (0,)

    until(whole, lambda: f"the chunks of {stem} to be whole; {pipeline.tail()}")


def plain(_: int, title: str) -> set[str]:
    return {title}


def framed(_: int, title: str) -> set[str]:
    return {f"about: {title}\n\n{title}"}


class ByChunks(Searches):
    """Searches of an index of which model and template change: no answer has texts of both templates."""

    def check(self, who: str, generation: int, found: Sequence[tuple[str, float, bool]]) -> None:
        for text, _, _ in found:
            assert text.startswith("about: ") == (generation == 2), f"{who}, generation {generation}: {text!r}"
        super().check(who, generation, found)

    def check_hits(self, hits: Sequence[dict[str, Any]]) -> None:
        generation = 2 if hits[0]["content"].startswith("about: ") else 1
        self.check("command", generation, [(hit["content"], hit["distance"], hit["stale"]) for hit in hits])

    async def by_sql(self) -> None:
        """As an application that embeds by itself, and by words, and through the view."""
        dsn = self.pipeline.config.target.dsn
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not self.over:
                cursor = await connection.execute("SELECT generation FROM cdcsync.indexes WHERE name = 'articles'")
                (generation,) = await cursor.fetchone() or (0,)
                vector = json.dumps(self.models[generation].vectors([self.QUERY])[0].tolist())
                for mode in ("vector", "hybrid"):
                    cursor = await connection.execute(
                        "SELECT content, distance, stale FROM cdcsync.articles_search(%s, %s::text::vector, k => 5,"
                        " mode => %s, generation => %s)",
                        [self.QUERY, vector, mode, generation],
                    )
                    rows = await cursor.fetchall()
                    found = [(text, near or 0.0, stale or near is None) for text, near, stale in rows]
                    self.check("sql", generation, found)
                for statement in (
                    "SELECT content FROM cdcsync.articles_search('article', k => 50, mode => 'text')",
                    "SELECT content FROM articles_index LIMIT 500",
                    "SELECT content FROM articles_index_chunks LIMIT 500",
                ):
                    cursor = await connection.execute(statement)
                    kinds = {content.startswith("about: ") for (content,) in await cursor.fetchall()}
                    assert len(kinds) == 1, (statement, kinds)
                await anyio.sleep(1 / SEARCHES_PER_S)


def whole_way(pipeline: Pipeline, more_searches: Callable[[int], None]) -> None:
    """Migrate, and back, and forth again, while rows change; then drop the chunks of before."""
    execute = pipeline.source.execute
    begun = migrate(pipeline, "start")
    assert (begun["generation"], begun["live"], begun["begun"], begun["chunks"]) == (2, 1, True, 100)
    assert [one.split(":")[0] for one in begun["own_chunks"]] == ["text"]
    assert migrate(pipeline, "start")["begun"] is False
    more_searches(1)
    ready(pipeline, 2)
    execute("UPDATE articles SET title = title || ', changed' WHERE id % 3 = 0")
    execute("DELETE FROM articles WHERE id % 10 = 1")
    execute("INSERT INTO articles VALUES (1000, 'an article that is new')")
    made(pipeline, "articles", 1, plain)
    made(pipeline, "articles~2", 2, framed)
    more_searches(1)

    gated = migrate(pipeline, "activate", "--min", "overlap=1", status=1)
    assert (gated["switched"], gated["live"]) == (False, 1)
    done = migrate(pipeline, "activate", "--min", "recall=0.9")
    assert (done["switched"], done["before"], done["live"]) == (True, 1, 2)
    assert 0 < done["quality"]["overlap"] < 1
    more_searches(2)
    execute("UPDATE articles SET title = title || ', again' WHERE id % 4 = 0")
    made(pipeline, "articles", 1, plain)
    made(pipeline, "articles~2", 2, framed)

    back = migrate(pipeline, "rollback")
    assert (back["live"], back["before"]) == (1, 2)
    more_searches(1)
    assert migrate(pipeline, "activate")["live"] == 2
    assert [one["state"] for one in migrate(pipeline, "status")] == ["ready", "live"]
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    more_searches(2)
    execute("UPDATE articles SET title = title || ', once more' WHERE id % 5 = 0")
    made(pipeline, "articles~2", 2, framed)
    assert pipeline.target.execute("SELECT to_regclass('cdcsync.articles_chunks')").fetchone() == (None,)
    (only,) = migrate(pipeline, "status")
    assert (only["generation"], only["state"], only["vectors"]) == (2, "live", only["chunks"])


@pytest.mark.proof
@pytest.mark.anyio
@pytest.mark.timeout(240)
async def test_searches_go_on_and_never_mix_chunks_while_an_index_migrates_and_rolls_back(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    def begin() -> Pipeline:
        pipeline = make_pipeline(configuration(database.dsn, embedders=BOTH, indexes={"articles": {}, "notes": {}}))
        loaded(pipeline, "articles", "notes", rows=100)
        wanted: Mapping[str, Section] = {"articles": {"text": FRAMED, "embedder": "new"}, "notes": {}}
        pipeline.configure(configuration(database.dsn, embedders=BOTH, indexes=wanted))
        return pipeline

    pipeline = await anyio.to_thread.run_sync(begin)
    searches = ByChunks(pipeline)
    async with searches.going_on():
        await anyio.to_thread.run_sync(
            lambda: whole_way(pipeline, lambda generation: anyio.from_thread.run(searches.some_more, generation))
        )
    assert {who for who, _ in searches.answers} == {"sql", "python", "command"}
    await anyio.to_thread.run_sync(lambda: _the_other_index_is_as_it_was(pipeline))


def _the_other_index_is_as_it_was(pipeline: Pipeline) -> None:
    pipeline.source.execute("UPDATE notes SET title = title || ', too' WHERE id = 7")
    pipeline.in_step("notes")
    status = pipeline.answer("status", PYTHONPATH=str(ROOT))["indexes"]
    assert set(status) == {"articles", "notes"}
    # The file that asks for what is live changes nothing.
    pipeline.stop(pipeline.processes[-1])
    pipeline.start(PYTHONPATH=str(ROOT))
    pipeline.source.execute("INSERT INTO articles VALUES (2000, 'the last one')")
    made(pipeline, "articles~2", 2, framed)
    plan: Any = pipeline.answer("plan", PYTHONPATH=str(ROOT))
    assert [one["action"] for one in plan["indexes"]] == ["unchanged", "unchanged"]


@pytest.mark.proof
def test_a_migration_to_other_chunks_goes_on_after_a_kill_at_every_step(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"fake": hashed(8)}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders))
    loaded(pipeline, "articles", rows=300)
    pipeline.configure(configuration(database.dsn, embedders=embedders, indexes={"articles": {"text": FRAMED}}))

    def killed(point: str) -> None:
        process = pipeline.start(CDCSYNC_CRASH_AT=point)
        until(lambda: process.poll() is not None, lambda: f"a kill at {point!r}; {pipeline.tail()}")
        assert process.returncode == -signal.SIGKILL, pipeline.tail()

    def command_killed(action: str, point: str, *options: str) -> None:
        done = pipeline.command("migrate", "articles", action, "--json", *options, CDCSYNC_CRASH_AT=point)
        assert done.returncode == -signal.SIGKILL, done.stderr

    # No worker runs beside a command that is killed: it would do the steps that follow.
    pipeline.stop(pipeline.processes[-1])
    command_killed("start", "migration to other chunks asked for")
    assert migrate(pipeline, "status")[-1]["generation"] == 1
    command_killed("start", "migration to other chunks begun")
    command_killed("start", "limit of a load set", "--max-rows-per-s", "5000")
    for point in ("index relations written#2", "index relations committed", "index to be live", "index declared live"):
        killed(point)
    pipeline.start()
    ready(pipeline, 2)
    made(pipeline, "articles~2", 2, framed)
    made(pipeline, "articles", 1, plain)

    pipeline.stop(pipeline.processes[-1])
    command_killed("activate", "switch written")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "ready"]
    leave_rebuilds(pipeline)
    execute = pipeline.target.execute
    execute("ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY")
    execute("CREATE POLICY few ON cdcsync.articles_chunks USING (id < 10)")
    for point in ("fence raised by a command", "request withdrawn", "withdrawn request committed"):
        command_killed("activate", point)
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "ready"]
    execute("DROP POLICY few ON cdcsync.articles_chunks")
    execute("ALTER TABLE cdcsync.articles_chunks DISABLE ROW LEVEL SECURITY")
    command_killed("activate", "chunks exchanged")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "activating"]
    killed("exchange of chunks committed")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["ready", "live"]
    assert {
        (index, name.split("_")[0])
        for name, index in execute(
            "SELECT proname::text, substring(obj_description(oid, 'pg_proc') FROM 'index (.+?):') FROM pg_proc"
            " WHERE proname LIKE 'articles%\\_note'"
        )
    } == {("articles~other", "articles"), ("articles", "articles~2")}
    pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = title || ', changed' WHERE id % 50 = 0")
    made(pipeline, "articles~2", 2, framed)
    made(pipeline, "articles", 1, plain)

    pipeline.stop(pipeline.processes[-1])
    command_killed("drop", "end of a generation committed", "--yes")
    leave_rebuilds(pipeline)
    command_killed("drop", "chunks dropped", "--yes")
    killed("dropped chunks committed")
    assert {name for _, name in belongings(pipeline, "articles")} == {
        "articles_search",
        "articles_hit",
        "_articles_hit",
    }
    pipeline.start()
    until(lambda: state(pipeline, 1) is None, pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ', again' WHERE id % 50 = 1")
    made(pipeline, "articles~2", 2, framed)


@pytest.mark.proof
def test_chunks_that_are_given_up_are_not_made_in_place(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"fake": hashed(8)}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders))
    loaded(pipeline, "articles", rows=30)
    pipeline.configure(configuration(database.dsn, embedders=embedders, indexes={"articles": {"text": FRAMED}}))
    migrate(pipeline, "start")
    ready(pipeline, 2)
    # The worker knows neither of the two by the file now: searches keep what they have.
    pipeline.stop(pipeline.processes[-1])
    pipeline.start()
    pipeline.source.execute("INSERT INTO articles VALUES (1000, 'an article that is new')")
    made(pipeline, "articles", 1, plain)
    made(pipeline, "articles~2", 2, framed)
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 2
    pipeline.stop(pipeline.processes[-1])
    pipeline.start()
    pipeline.source.execute("INSERT INTO articles VALUES (2000, 'another one')")
    made(pipeline, "articles", 1, plain)
    plan = pipeline.answer("plan", status=3)
    assert "were dropped (text)" in plan["indexes"][0]["remaining"][0]
    assert migrate(pipeline, "start")["generation"] == 3
    ready(pipeline, 3)
    made(pipeline, "articles~3", 3, framed)
    pipeline.configure(configuration(database.dsn, embedders=embedders, indexes={"articles": {"text": "{id} {title}"}}))
    assert "not those that the configuration asks for" in refused(pipeline, "start")
    # Nor are those of a file that asks for neither, which is told to drop one.
    pipeline.stop(pipeline.processes[-1])
    pipeline.start()
    migrate(pipeline, "drop", "--yes")
    pipeline.source.execute("INSERT INTO articles VALUES (3000, 'a third one')")
    made(pipeline, "articles", 1, plain)
    assert "were dropped (text)" in pipeline.answer("plan", status=3)["indexes"][0]["remaining"][0]
    migrate(pipeline, "start")
    ready(pipeline, 4)
    pipeline.stop(pipeline.processes[-1])
    leave_rebuilds(pipeline)
    dropped = pipeline.command("drop", "articles", "--yes")
    assert dropped.returncode == 0, dropped.stderr
    assert belongings(pipeline, "articles") | belongings(pipeline, "articles~4") == set()


@pytest.mark.proof
def test_rows_that_no_document_of_the_other_chunks_is_made_of_are_listed_counted_and_read_again(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make_pipeline(configuration(database.dsn))
    loaded(pipeline, "articles", rows=20)
    pipeline.source.execute("INSERT INTO articles VALUES (1000, repeat('a long one of many words ', 10))")
    pipeline.reach("articles")
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"chunking": {**PIECES, "max_chunks": 3}}}))
    migrate(pipeline, "start", "--max-rows-per-s", "1")
    migrate(pipeline, "start", "--max-rows-per-s", "5000")
    ready(pipeline, 2)
    pace = pipeline.target.execute(
        "SELECT max_rows_per_s FROM cdcsync.backfills WHERE index_name = 'articles~other'"
    ).fetchone()
    assert pace == (5000,)
    (failure,) = pipeline.answer("failures", "articles", "list")
    assert (failure["key"], failure["kind"], failure["generation"]) == ({"id": "1000"}, "document", 2)
    assert [one["failed_documents"] for one in migrate(pipeline, "status")] == [0, 1]
    said = pipeline.answer("status", status=0)["problems"]
    assert any("1 row is left out: no document of generation 2 could be made" in one for one in said), said
    assert "of 1 rows no document of generation 2 could be made" in refused(pipeline, "activate")
    again = pipeline.answer("failures", "articles", "retry")
    assert (again["retry"], again["documents"]["state"], again["documents"]["failed"]) == (1, "done", 1)
    pipeline.source.execute("UPDATE articles SET title = 'a short one' WHERE id = 1000")
    until(lambda: pipeline.answer("failures", "articles", "list") == [], pipeline.tail)
    assert migrate(pipeline, "activate")["live"] == 2


def test_texts_that_both_have_are_not_embedded_again(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make_pipeline(configuration(database.dsn))
    loaded(pipeline, "articles", rows=30)
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"chunking": PIECES}}))
    pipeline.source.execute("INSERT INTO articles VALUES (1000, repeat('a long one of many words ', 10))")
    pipeline.reach("articles")
    begun = migrate(pipeline, "start")
    assert 0 < begun["chunks"] <= 5, begun
    ready(pipeline, 2)
    shared = pipeline.target.execute(
        'SELECT count(*) FROM cdcsync.articles_vectors_1 AS a JOIN cdcsync."articles~2_vectors_2" AS b'
        " USING (content_hash) WHERE a.embedding = b.embedding"
    ).fetchone()
    assert shared == (30,)

    # A vector that is to be made anew would be taken from there.
    done = pipeline.command("replay", "articles", "--force-embed")
    assert (done.returncode, "cdcsync migrate articles drop" in done.stderr) == (2, True), done.stderr


@pytest.mark.proof
def test_other_chunks_are_not_begun_while_vectors_are_made_anew(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make_pipeline(configuration(database.dsn))
    loaded(pipeline, "articles", rows=20)
    ((request,),) = pipeline.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, force_embed, state)"
        " VALUES ('articles', 'replay', true, 'paused') RETURNING id"
    ).fetchall()
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"chunking": PIECES}}))
    told = refused(pipeline, "start")
    assert f"request {request} makes vectors anew" in told
    assert "cdcsync replay articles --cancel" in told
    assert pipeline.command("replay", "articles", "--cancel").returncode == 0
    migrate(pipeline, "start")
    ready(pipeline, 2)


@pytest.mark.proof
def test_other_chunks_are_activated_rolled_back_and_dropped_while_the_source_is_away(
    make_cluster: Callable[..., Cluster], database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    source = make_cluster()

    def wanting(indexes: Mapping[str, Section]) -> str:
        return configuration(source.dsn(), target=database.dsn, embedders=BOTH, indexes=indexes)

    pipeline = make_pipeline(wanting({"articles": {}, "notes": {}}))
    loaded(pipeline, "articles", "notes", rows=20)
    # Before a worker sees the other text, which it would make in place.
    pipeline.stop(pipeline.processes[-1])
    pipeline.configure(wanting({"articles": {"text": FRAMED, "embedder": "new"}, "notes": {}}))
    assert migrate(pipeline, "start")["generation"] == 2
    pipeline.start(PYTHONPATH=str(ROOT))
    ready(pipeline, 2)
    source.stop("immediate")
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "rollback")["live"] == 1
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    source.start()
    pipeline.source.close()
    pipeline.source = psycopg.connect(source.dsn(), autocommit=True)
    pipeline.source.execute("UPDATE articles SET title = 'back again' WHERE id = 7")
    made(pipeline, "articles~2", 2, framed)
    pipeline.source.execute("UPDATE notes SET title = 'too' WHERE id = 7")
    pipeline.in_step("notes")


@pytest.mark.proof
def test_other_chunks_that_cannot_be_set_up_hold_up_nothing_and_are_made_once_they_can_be(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"e": hashed(16)}
    indexes: dict[str, Section] = {"articles": {"text": "{title}"}, "notes": {}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders, indexes=indexes))
    loaded(pipeline, "articles", "notes", rows=50)
    pipeline.target.execute(
        "CREATE FUNCTION public.named() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity LIKE '%~%')"
        " THEN RAISE EXCEPTION 'no such names here'; END IF; END $$"
    )
    pipeline.target.execute(
        "CREATE EVENT TRIGGER named ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION public.named()"
    )
    pipeline.configure(
        configuration(database.dsn, embedders=embedders, indexes=indexes | {"articles": {"text": FRAMED}})
    )
    migrate(pipeline, "start", "--yes")
    paused = "SELECT reason FROM cdcsync.indexes WHERE name = 'articles~other' AND state = 'paused'"
    until(
        lambda: any("no such names here" in reason for (reason,) in pipeline.target.execute(paused).fetchall()),
        pipeline.tail,
    )

    for number in range(1000, 1003):
        pipeline.source.execute("INSERT INTO articles VALUES (%s, 'quite new')", [number])
        pipeline.source.execute("INSERT INTO notes VALUES (%s, 'quite new')", [number])
        pipeline.reach("articles")
        pipeline.in_step("notes")
    made(pipeline, "articles", 1, plain)
    told = [one["index"] for one in pipeline.events() if one["event"] == "index_paused"]
    assert set(told) == {"articles~other"}
    # Every attempt ends the pipeline of all: they are put off, further each time.
    assert len(told) <= 5

    pipeline.target.execute("DROP EVENT TRIGGER named")
    ready(pipeline, 2)
    made(pipeline, "articles~2", 2, framed)
