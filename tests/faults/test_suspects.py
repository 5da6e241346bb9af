"""Texts that a provider fails at are asked for apart: they hold up neither the texts beside them nor another index."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider, Misdeed, cut, not_a_number, status, wrong_count, wrong_dimension
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.timeout(400)]

TIMEOUT_S = 3
"""How long the worker waits for an answer: longer than a call that may have been turned away."""


def silent(exchange: Any, texts: list[str]) -> None:
    """Give no answer for longer than anybody waits."""
    exchange.provider.released.wait(60)
    exchange.hang_up()


def one_not_a_number(exchange: Any, texts: list[str]) -> None:
    """Give a vector that cannot be used for the poisonous texts only."""
    good = iter(exchange.provider.vectors([text for text in texts if "poison" not in text]))
    exchange.embed([[0.0] * exchange.provider.dimensions if "poison" in text else next(good) for text in texts])


FAULTS: Mapping[str, Misdeed] = {
    "400": status(400, {"error": {"message": "no"}}),
    "500": status(500, {"error": {"message": "no"}}),
    "a connection that is cut": cut,
    "too few vectors": wrong_count,
    "vectors that are too long": wrong_dimension,
    "vectors of NaN": not_a_number,
    "one vector of zeros": one_not_a_number,
    "silence": silent,
}


class Poisoned:
    """A provider that fails at texts with the word `poison`.

    :ivar held: how many requests for them are under way.
    """

    def __init__(self, provider: FakeProvider, fault: Misdeed) -> None:
        self.fault = fault
        self.held = 0
        self._lock = threading.Lock()
        provider.always = self

    def __call__(self, exchange: Any, texts: list[str]) -> None:
        if not any("poison" in text for text in texts):
            exchange.embed(exchange.provider.vectors(texts))
            return
        with self._lock:
            self.held += 1
        try:
            self.fault(exchange, texts)
        finally:
            with self._lock:
                self.held -= 1


def holding(let: threading.Event) -> Misdeed:
    """Give no answer until the test lets the request fail."""

    def hold(exchange: Any, texts: list[str]) -> None:
        let.wait(300)
        exchange.hang_up()

    return hold


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider) -> Pipeline:
    """Two indexes of empty tables that one embedder serves, one of them from its backlog alone."""
    made = make_pipeline(
        configuration(
            database.dsn,
            worker_lines='log_level = "debug"',
            embedders={"hosted": {**hosted(provider.url), "timeout_s": 300}},
            indexes={"articles": {"text": "{body}", "inline_budget_ms": 0}, "notes": {"text": "{body}"}},
        )
    )
    # Whoever lets a request fail does not wait until it has taken long.
    made.hurry = {"cdcsync.flows.embed.calls.QUICK_S": 0}
    for table in ("articles", "notes"):
        made.source.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, body text)".encode())
    return made


def insert(pipeline: Pipeline, name: str, first: int, *bodies: str) -> None:
    """Insert rows in one transaction."""
    with pipeline.source.transaction():
        for key, body in enumerate(bodies, first):
            pipeline.source.execute(f"INSERT INTO {name} VALUES (%s, %s)".encode(), [key, body])


def insert_poisoned(pipeline: Pipeline) -> None:
    """Insert five transactions of five rows, each with one poisonous text."""
    for at in range(0, 50, 10):
        insert(pipeline, "articles", at, *(f"article {at + no} {'poison' * (no == 2)}" for no in range(5)))


def vectors(pipeline: Pipeline, name: str, *, beyond: int = -1) -> int:
    """Return how many texts have a vector, of those with larger keys."""
    statement = f"SELECT count(*) FROM {name}_index WHERE NOT stale AND id > %s"
    (count,) = pipeline.target.execute(statement.encode(), [beyond]).fetchone() or (0,)
    return int(count)


def noted(pipeline: Pipeline) -> list[tuple[int, str]]:
    """Return attempts and reason of each text that failed alone."""
    return pipeline.target.execute(
        "SELECT attempts, error FROM cdcsync.articles_backlog WHERE attempts > 0 ORDER BY chunk_id"
    ).fetchall()


def test_texts_that_hang_hold_up_no_other_text_of_any_index(pipeline: Pipeline, provider: FakeProvider) -> None:
    poisoned = Poisoned(provider, cut)
    pipeline.start()
    pipeline.live()
    insert_poisoned(pipeline)
    until(lambda: len(noted(pipeline)) == 5, pipeline.tail)
    # A text beside the last of them may be asked for after it failed.
    until(lambda: vectors(pipeline, "articles") == 20, pipeline.tail)

    # Every call for one of them hangs: one that is made beside others, and those that come after it failed.
    first = 1_000
    for _ in range(3):
        poisoned.fault = holding(let := threading.Event())
        until(lambda: poisoned.held > 0, pipeline.tail)
        for number in range(first, first + 20):
            insert(pipeline, "articles", number, f"article {number}")
            insert(pipeline, "notes", number, f"note {number}")
        for name in ("articles", "notes"):
            until(lambda name=name, end=first - 1: vectors(pipeline, name, beyond=end) == 20, pipeline.tail)  # type: ignore[misc]
        assert poisoned.held == 1, "what is known to hang takes one place"
        # One more that nobody knows takes another place, once.
        insert(pipeline, "articles", first + 50, f"article {first + 50} poison")
        until(lambda: poisoned.held == 2, pipeline.tail)
        insert(pipeline, "articles", first + 51, f"article {first + 51}")
        until(lambda end=first + 50: vectors(pipeline, "articles", beyond=end) == 1, pipeline.tail)  # type: ignore[misc]
        poisoned.fault = cut
        let.set()
        first += 1_000
    until(lambda: len(noted(pipeline)) == 8, pipeline.tail)
    assert pipeline.times("embedder_unavailable") == 0


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_text_that_fails_in_any_way_is_found_and_all_others_have_their_vectors(
    pipeline: Pipeline, provider: FakeProvider, fault: str
) -> None:
    text = pipeline.path.read_text()
    assert "timeout_s = 300" in text
    pipeline.configure(text.replace("timeout_s = 300", f"timeout_s = {TIMEOUT_S}"))
    pipeline.hurry = {}
    Poisoned(provider, FAULTS[fault])
    pipeline.start()
    pipeline.live()
    insert_poisoned(pipeline)
    insert(pipeline, "notes", 0, *(f"note {number}" for number in range(50)))
    until(lambda: vectors(pipeline, "notes") == 50, pipeline.tail)
    until(lambda: len(noted(pipeline)) == 5, pipeline.tail)
    until(lambda: vectors(pipeline, "articles") == 20, pipeline.tail)
    # The last of its attempts.
    pipeline.target.execute(
        "UPDATE cdcsync.articles_backlog SET attempts = greatest(attempts, 7), next_attempt_at = now()"
    )
    until(lambda: {attempts for attempts, _ in noted(pipeline)} == {8}, pipeline.tail)

    found = pipeline.answer("failures", "articles", "list")
    assert sorted(int(one["key"]["id"]) for one in found) == [2, 12, 22, 32, 42]
    assert all(one["error"] and "poison" not in one["error"] for one in found)
    assert pipeline.times("embedder_unavailable") == 0
    assert vectors(pipeline, "articles") == 20


@pytest.mark.proof
def test_a_restart_loses_no_attempt_and_finds_those_that_hang_again(pipeline: Pipeline, provider: FakeProvider) -> None:
    poisoned = Poisoned(provider, cut)
    worker = pipeline.start()
    pipeline.live()
    insert_poisoned(pipeline)
    until(lambda: len(noted(pipeline)) == 5, pipeline.tail)
    poisoned.fault = holding(let := threading.Event())
    insert(pipeline, "articles", 100, "article 100", "article 101 poison", "article 102")
    until(lambda: poisoned.held == 2, pipeline.tail)
    before = noted(pipeline)

    assert pipeline.stop(worker) == 0
    assert noted(pipeline) == before
    let.set()
    until(lambda: poisoned.held == 0, pipeline.tail)
    poisoned.fault = holding(let := threading.Event())
    pipeline.start()
    until(lambda: poisoned.held == 2, pipeline.tail)
    insert(pipeline, "articles", 200, "article 200")
    until(lambda: vectors(pipeline, "articles", beyond=199) == 1, pipeline.tail)
    poisoned.fault = cut
    let.set()
    until(lambda: vectors(pipeline, "articles", beyond=99) == 3, pipeline.tail)
    until(lambda: len(noted(pipeline)) == 6, pipeline.tail)


def test_an_outage_costs_no_suspect_an_attempt(pipeline: Pipeline, provider: FakeProvider) -> None:
    poisoned = Poisoned(provider, holding(let := threading.Event()))
    pipeline.start()
    pipeline.live()
    insert_poisoned(pipeline)
    until(lambda: poisoned.held > 0, pipeline.tail)
    provider.stop()
    let.set()
    pipeline.event("embedder_unavailable")
    insert(pipeline, "articles", 100, "article 100", "article 101")
    pipeline.in_step(vectors=False)
    assert noted(pipeline) == []

    poisoned.fault = lambda exchange, texts: exchange.embed(exchange.provider.vectors(texts))
    provider.start()
    until(lambda: vectors(pipeline, "articles") == 27, pipeline.tail)
    assert pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() == (0,)
    pipeline.in_step()
