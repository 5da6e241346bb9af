"""Migrations from one generation of vectors to another: the whole way, with a worker that follows changes meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cdcsync.config import parse
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

OLD = {"old": {"type": "hash", "dimensions": 8}}
BOTH = {**OLD, "new": {"type": "hash", "dimensions": 12}}


def migrate(pipeline: Pipeline, *arguments: str, index: str = "articles", status: int = 0) -> Any:
    """Run `cdcsync migrate INDEX …` and return its JSON, or what it wrote to standard error if it is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "cdcsync", "migrate", index, *arguments, "--json", "-c", str(pipeline.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def loaded(database: Database, make_pipeline: Callable[[str], Pipeline], **index: object) -> Pipeline:
    """Return a pipeline with a running worker that has loaded a table of 200 rows."""
    pipeline = make_pipeline(configuration(database.dsn, embedders=OLD, indexes={"articles": {**index}}))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    pipeline.source.execute(
        "INSERT INTO articles SELECT i, 'article ' || i || ' is about ' || i % 17 FROM generate_series(1, 200) i"
    )
    pipeline.start()
    pipeline.live()
    return pipeline


def asks_for(pipeline: Pipeline, database: Database, *, restart: bool = True, **index: object) -> None:
    """Have the configuration ask for other vectors, and the worker know both models."""
    text = configuration(database.dsn, embedders=BOTH, indexes={"articles": {**index}})
    pipeline.path.write_text(text)
    pipeline.config = parse(text, {}, where=str(pipeline.path))
    if restart:
        pipeline.stop(pipeline.processes[-1])
        pipeline.start()


def state(pipeline: Pipeline, generation: int) -> str | None:
    row = pipeline.target.execute(
        "SELECT state FROM cdcsync.generations WHERE index_name = 'articles' AND generation = %s", [generation]
    ).fetchone()
    return None if row is None else row[0]


def ready(pipeline: Pipeline, generation: int) -> None:
    until(lambda: state(pipeline, generation) == "ready", lambda: f"a filled generation; {pipeline.tail()}")


def complete(pipeline: Pipeline, generation: int, dimensions: int) -> None:
    """Wait until each chunk has a vector of its text in a generation, and no other vector is there."""

    def whole() -> bool:
        row = pipeline.target.execute(
            "SELECT (SELECT count(*) FROM cdcsync.articles_chunks AS c WHERE NOT EXISTS (SELECT FROM"
            f" cdcsync.articles_vectors_{generation} AS v WHERE v.chunk_id = c.chunk_id"
            f" AND v.content_hash = c.content_hash AND vector_dims(v.embedding) = {dimensions})),"
            f" (SELECT count(*) FROM cdcsync.articles_vectors_{generation} AS v WHERE NOT EXISTS"
            " (SELECT FROM cdcsync.articles_chunks AS c WHERE c.chunk_id = v.chunk_id))"
        ).fetchone()
        return row == (0, 0)

    until(whole, lambda: f"generation {generation} to be whole; {pipeline.tail()}")


def test_an_index_migrates_to_another_model_and_back(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = loaded(database, make_pipeline)
    asks_for(pipeline, database, embedder="new")
    assert pipeline.event("preflight")["where"] == "indexes.articles"

    begun = migrate(pipeline, "start")
    assert (begun["generation"], begun["live"], begun["begun"], begun["chunks"]) == (2, 1, True, 200)
    assert migrate(pipeline, "start")["begun"] is False
    ready(pipeline, 2)
    pipeline.source.execute("UPDATE articles SET title = title || ', changed' WHERE id % 3 = 0")
    pipeline.source.execute("DELETE FROM articles WHERE id % 10 = 1")
    pipeline.source.execute("INSERT INTO articles VALUES (1000, 'an article that is new')")
    pipeline.reach("articles")
    complete(pipeline, 1, 8)
    complete(pipeline, 2, 12)

    refused = migrate(pipeline, "activate", "--min", "overlap=1", status=1)
    assert (refused["switched"], refused["live"], refused["gates"][0]["passed"]) == (False, 1, False)
    done = migrate(pipeline, "activate", "--min", "recall=0.9")
    assert (done["switched"], done["before"], done["live"]) == (True, 1, 2)
    assert 0 < done["quality"]["overlap"] < 1
    pipeline.source.execute("UPDATE articles SET title = title || ', again' WHERE id % 4 = 0")
    pipeline.in_step("articles")
    complete(pipeline, 1, 8)

    back = migrate(pipeline, "rollback")
    assert (back["live"], back["before"]) == (1, 2)
    pipeline.reach("articles")
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    left = pipeline.target.execute("SELECT to_regclass('cdcsync.articles_vectors_1')").fetchone()
    assert left == (None,)
    (only,) = migrate(pipeline, "status")
    assert (only["generation"], only["state"], only["vectors"]) == (2, "live", only["chunks"])
    pipeline.source.execute("UPDATE articles SET title = title || ', once more' WHERE id % 5 = 0")
    pipeline.in_step("articles")
