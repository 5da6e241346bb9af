"""Models as searches use them: calls shared by those who ask for the same, and remembered for a while."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import numpy as np
import pytest

from cdcsync.config import HashEmbedder
from cdcsync.embedders import queries
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.embedders.protocol import Kind, Vectors
from cdcsync.embedders.queries import QueryEmbedder
from cdcsync.errors import EmbedderUnavailable

pytestmark = pytest.mark.anyio


class Held(Hashing):
    """Answers when it is let, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__("held", HashEmbedder(dimensions=8))
        self.asked: list[list[str]] = []
        self.reached = anyio.Event()
        self.let = anyio.Event()
        self.away = False

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        self.asked.append(list(texts))
        self.reached.set()
        await self.let.wait()
        if self.away:
            raise EmbedderUnavailable("nobody is at home")
        return self.vectors(texts)


@pytest.fixture
def model() -> Held:
    return Held()


@pytest.fixture
def embedder(model: Held) -> QueryEmbedder:
    return QueryEmbedder(model, timeout_s=30)


async def test_those_who_ask_for_one_text_at_the_same_time_share_a_call(model: Held, embedder: QueryEmbedder) -> None:
    found: list[Vectors] = []

    async def ask() -> None:
        found.append(await embedder.embed_one("one"))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
        await model.reached.wait()
        model.let.set()
    assert model.asked == [["one"]]
    assert all(np.array_equal(vector, model.vectors(["one"])[0]) for vector in found)
    assert embedder._asking == {}


async def test_the_others_are_answered_though_the_first_gave_up(model: Held, embedder: QueryEmbedder) -> None:
    found: list[Vectors] = []

    async def ask() -> None:
        found.append(await embedder.embed_one("one"))

    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as first:
            first.start_soon(embedder.embed_one, "one")
            await model.reached.wait()
            others.start_soon(ask)
            first.cancel_scope.cancel()
        model.let.set()
    assert len(found) == 1
    assert model.asked == [["one"], ["one"]]


async def test_when_a_shared_call_fails_the_others_do_not_call_again(model: Held, embedder: QueryEmbedder) -> None:
    failures: list[EmbedderUnavailable] = []
    model.away = True

    async def ask() -> None:
        try:
            await embedder.embed_one("one")
        except EmbedderUnavailable as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)
        await model.reached.wait()
        model.let.set()
    assert len(failures) == 5
    assert model.asked == [["one"]]


async def test_a_vector_is_remembered_for_a_minute(
    model: Held, embedder: QueryEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.let.set()
    now = anyio.current_time()
    monkeypatch.setattr("cdcsync.embedders.queries.anyio.current_time", lambda: now)
    for _ in range(3):
        await embedder.embed_one("one")
    assert model.asked == [["one"]]
    now += queries.REMEMBERED_S + 1
    await embedder.embed_one("one")
    assert model.asked == [["one"], ["one"]]


async def test_the_oldest_queries_are_forgotten_first(
    model: Held, embedder: QueryEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.let.set()
    monkeypatch.setattr(queries, "REMEMBERED", 2)
    for text in ("one", "two", "one", "three", "one", "two"):
        await embedder.embed_one(text)
    assert model.asked == [["one"], ["two"], ["three"], ["two"]]
