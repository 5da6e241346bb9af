"""`tokens_per_day`, from the provider to the status: loads stop first, changes go on to the end of the budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cdcsync.embedders.protocol import WORD
from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(200)]

PER_DAY = 2_000
IN_HAND = 4 * 8 * 10
"""Tokens beyond a limit: of the call that reaches it, two of the loop and one of a page, at ten a text."""

ROWS = 400
"""Of some ten tokens each, so that the load alone is more than a day's worth."""


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider) -> Pipeline:
    settings = {**hosted(provider.url), "concurrency": 1, "batch_texts": 8, "tokens_per_day": PER_DAY}
    made = make_pipeline(
        configuration(
            database.dsn,
            embedders={"hosted": settings},
            indexes={"articles": {"text": "{body}", "inline_budget_ms": 0}},
        )
    )
    made.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, body text)")
    made.source.execute(
        f"INSERT INTO articles SELECT i, 'loaded article with the number ' || i FROM generate_series(1, {ROWS}) AS i"
    )
    return made


def embedder(pipeline: Pipeline) -> Any:
    return json.loads(pipeline.get("/status")[1])["embedders"]["hosted"]


def problems(pipeline: Pipeline) -> str:
    return " ".join(json.loads(pipeline.get("/status")[1])["problems"])


def without_vector(pipeline: Pipeline, which: str) -> int:
    row = pipeline.target.execute(
        "SELECT count(*) FROM cdcsync.articles_backlog JOIN cdcsync.articles_chunks USING (chunk_id)"
        " WHERE content LIKE %s",
        [f"{which}%"],
    ).fetchone()
    assert row is not None
    return int(row[0])


def change(pipeline: Pipeline, first: int, count: int) -> None:
    pipeline.source.execute(
        "INSERT INTO articles SELECT i, 'changed article with the number ' || i"
        " FROM generate_series(%s::int, %s::int) AS i",
        [first, first + count - 1],
    )
    pipeline.reach("articles")


@pytest.mark.proof
def test_loads_stop_first_and_changes_go_on_to_the_end_of_the_days_budget(
    pipeline: Pipeline, provider: FakeProvider
) -> None:
    tomorrow = datetime.combine(datetime.now(UTC).date() + timedelta(days=1), datetime.min.time(), UTC)
    if tomorrow - datetime.now(UTC) < timedelta(minutes=5):
        pytest.skip("the day ends while this runs")
    until_when = f"{tomorrow:%Y-%m-%d %H:%M} UTC"
    worker = pipeline.start()

    until(lambda: f"texts of loads wait until {until_when}" in problems(pipeline), pipeline.tail)
    assert PER_DAY * 0.8 <= embedder(pipeline)["tokens_today"] <= PER_DAY * 0.8 + IN_HAND
    loaded = len([text for text in provider.embedded if text.startswith("loaded")])
    assert without_vector(pipeline, "loaded") == ROWS - loaded > 100

    change(pipeline, 1_001, 5)
    until(lambda: without_vector(pipeline, "changed") == 0, pipeline.tail)

    # A restart goes on from what was used.
    assert pipeline.stop(worker) == 0
    used = embedded_tokens(pipeline)
    worker = pipeline.start()
    pipeline.event("listening")
    change(pipeline, 2_001, 5)
    until(lambda: without_vector(pipeline, "changed") == 0, pipeline.tail)
    until(lambda: embedder(pipeline)["tokens_today"] > used, pipeline.tail)
    assert len([text for text in provider.embedded if text.startswith("loaded")]) == loaded

    # Changes use up the rest of the day; then they wait too, and everything says so.
    change(pipeline, 3_001, 100)
    until(lambda: f"all {PER_DAY} tokens of the day are used" in problems(pipeline), pipeline.tail)
    assert PER_DAY <= embedder(pipeline)["tokens_today"] <= PER_DAY + IN_HAND
    assert embedder(pipeline)["tried_again_at"] == f"{tomorrow:%Y-%m-%dT%H:%M:%S}Z"
    status, answer = pipeline.get("/readyz")
    assert (status, "tokens of the day are used" in answer.decode()) == (503, True)
    assert without_vector(pipeline, "changed") > 0
    pipeline.in_step(vectors=False)

    assert pipeline.stop(worker) == 0
    pipeline.path.write_text(pipeline.path.read_text().replace(f"= {PER_DAY}", f"= {100 * PER_DAY}"))
    pipeline.start()
    pipeline.live()
    until(lambda: without_vector(pipeline, "changed") == 0, pipeline.tail)
    assert {count for text, count in provider.embedded.items() if text != WORD} == {1}
    pipeline.in_step()


def embedded_tokens(pipeline: Pipeline) -> int:
    row = pipeline.target.execute("SELECT tokens FROM cdcsync.embedders WHERE name = 'hosted'").fetchone()
    assert row is not None
    return int(row[0])
