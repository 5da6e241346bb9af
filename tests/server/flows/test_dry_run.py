"""Dry runs: what a replay would do, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import ROOT
from tests.support.articles import articles, fill, live_articles
from tests.support.configs import Section, configuration, hosted
from tests.support.migrations import (
    NEW,
    OLD,
    asks_for,
    loaded,
    migrate,
    ready,
    turned,
)
from tests.support.provider import FakeProvider
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


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


@pytest.fixture
def live(make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """A pipeline of 100 rows in two databases, with its worker."""
    return live_articles(make_pipeline(articles(make_database(), make_database())))


def test_a_dry_run_counts_and_changes_nothing(live: Pipeline) -> None:
    rows = live.target.execute("SELECT count(*), count(DISTINCT content_hash) FROM cdcsync.articles_chunks").fetchone()
    assert rows is not None
    found = live.answer("replay", "articles", "--dry-run")
    assert (found["rows"], found["changed"], found["embeddings"], found["chunks"]) == (100, 0, 0, rows[0])
    found = live.answer("replay", "articles", "--dry-run", "--force-embed")
    assert found["embeddings"] == rows[0]
    assert found["seconds"] is not None
    found = live.answer("replay", "articles", "--dry-run", "--key", "7", "--key", "4711")
    assert (found["rows"], found["gone"]) == (1, 0)
    assert live.target.execute("SELECT count(*) FROM cdcsync.backfills").fetchone() == (1,)
    assert "nothing was changed" in live.command("replay", "articles", "--dry-run").stdout


def test_a_dry_run_says_the_price_where_the_configuration_does(
    live: Pipeline, database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider
) -> None:
    assert live.answer("replay", "articles", "--dry-run")["price"] is None
    priced = {**hosted(provider.url), "price_per_million_tokens": 2.5}
    pipeline = make_pipeline(configuration(database.dsn, embedders={"hosted": priced}))
    fill(pipeline, 20)
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)

    found = pipeline.answer("replay", "articles", "--dry-run", "--force-embed")

    assert found["price"] == pytest.approx(found["embedding_tokens"] * 2.5 / 1_000_000)
    assert found["price"] > 0
    assert found["seconds"] is not None
    assert "price" in pipeline.command("replay", "articles", "--dry-run").stdout
