"""The embed loop over a provider that counts texts: what a killed worker has paid for and not kept."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from cdcsync.embedders.protocol import WORD
from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(200)]

ROWS = 1_200
CALL_TEXTS = 16
CONCURRENCY = 4
LOST_AT_MOST = (CONCURRENCY + 1) * CALL_TEXTS
"""What one killed worker can lose: the calls in flight, and one that has been answered and is being stored."""

POINTS = ("vectors written", "vectors committed#7", "vectors written#12", "vectors committed", "vectors written#20")


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider) -> Pipeline:
    """A live index of an empty table, whose worker was stopped before many rows were inserted."""
    settings = {**hosted(provider.url), "concurrency": CONCURRENCY, "batch_texts": CALL_TEXTS}
    made = make_pipeline(
        configuration(
            database.dsn,
            embedders={"hosted": settings},
            indexes={"articles": {"text": "{body}", "inline_budget_ms": 0}},
        )
    )
    made.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, body text)")
    worker = made.start()
    made.live()
    assert made.stop(worker) == 0
    made.source.execute(f"INSERT INTO articles SELECT i, 'article number ' || i FROM generate_series(1, {ROWS}) AS i")
    return made


def embedded(provider: FakeProvider) -> int:
    """Return how many texts the provider has answered for, once it has answered all requests."""
    until(lambda: provider.at_once == 0, "the provider to have answered")
    return provider.embedded.total() - provider.embedded[WORD]


def stored(pipeline: Pipeline) -> int:
    row = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_vectors_1").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.proof
def test_a_killed_worker_loses_no_more_than_the_calls_in_flight_and_one_that_is_being_stored(
    pipeline: Pipeline, provider: FakeProvider
) -> None:
    lost: list[int] = []
    for point in POINTS:
        worker = pipeline.start(CDCSYNC_CRASH_AT=point)
        assert worker.wait(timeout=60) == -signal.SIGKILL, pipeline.tail()
        pipeline.released()
        lost.append(embedded(provider) - stored(pipeline) - sum(lost))
    pipeline.start()
    until(lambda: stored(pipeline) == ROWS, pipeline.tail)

    assert max(lost) <= LOST_AT_MOST, lost
    # Nothing else is embedded again: what was stored, and what waits for its turn, costs what it costs without a kill.
    assert embedded(provider) == ROWS + sum(lost)
    pipeline.in_step()  # which asks the provider, too, to know what is right
    assert max(provider.embedded[f"article number {at}"] for at in range(1, ROWS + 1)) <= 2 + len(POINTS)


def test_vectors_are_kept_that_came_before_the_provider_failed(pipeline: Pipeline, provider: FakeProvider) -> None:
    """A call is too large, and one of its halves works before nothing does: what it made is stored, and not only
    remembered until somebody asks again."""
    halved = 0

    def fails(texts: list[str]) -> bool:
        nonlocal halved
        if texts == [WORD]:
            return halved > 0
        halved += len(texts) < CALL_TEXTS
        return len(texts) == CALL_TEXTS or halved > 1

    provider.fails = fails
    pipeline.start()
    pipeline.event("embedder_unavailable")
    made = embedded(provider)

    assert 0 < made < ROWS
    until(lambda: stored(pipeline) == made, pipeline.tail)

    provider.fails = lambda texts: False
    until(lambda: stored(pipeline) == ROWS, pipeline.tail)
    assert embedded(provider) == ROWS
