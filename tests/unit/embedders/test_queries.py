"""Models as searches use them: calls shared by those who ask for the same, and remembered for a while."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import anyio
import numpy as np
import pytest

from cdcsync.config import Config, HashEmbedder, OpenAIEmbedder, PythonEmbedder, TeiEmbedder, TeiReranker
from cdcsync.embedders import make_embedder, queries
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.embedders.protocol import Kind, Vectors
from cdcsync.embedders.queries import QueryEmbedder, QueryModels, QueryReranker
from cdcsync.embedders.reranking import make_reranker
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from tests.support.indexes import make_spec
from tests.support.provider import FakeProvider, status

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


async def test_queries_of_others_come_between_those_that_one_caller_has_many_of(
    model: Held, embedder: QueryEmbedder
) -> None:
    made: list[Vectors] = []

    async def many() -> None:
        made.append(await embedder.embed_each(["one", "two", "three", "one"]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(many)
        await model.reached.wait()
        tasks.start_soon(embedder.embed_one, "another's")
        await anyio.wait_all_tasks_blocked()
        model.let.set()
    assert model.asked == [["one"], ["another's"], ["two"], ["three"]]
    assert np.array_equal(made[0], model.vectors(["one", "two", "three", "one"]))


async def test_many_queries_fail_as_the_first_that_fails(model: Held, embedder: QueryEmbedder) -> None:
    model.away = True
    model.let.set()
    with pytest.raises(EmbedderUnavailable, match="nobody is at home"):
        await embedder.embed_each(["one", "two"])


async def test_a_call_has_time_for_each_of_its_queries() -> None:
    left_s: list[float] = []

    class Watched(Held):
        async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
            left_s.append(anyio.current_effective_deadline() - anyio.current_time())
            return self.vectors(texts)

    embedder = QueryEmbedder(Watched(), timeout_s=1000)
    for count in (1, 3):
        await embedder.embed(["one"] * count)
    assert [round(left / 1000) for left in left_s] == [1, 3]


def tei(provider: FakeProvider) -> QueryEmbedder:
    settings = TeiEmbedder(base_url=provider.tei_url, model="hashing", dimensions=provider.dimensions)
    return QueryEmbedder(make_embedder("tei", settings), timeout_s=5)


def openai(provider: FakeProvider) -> QueryEmbedder:
    settings = OpenAIEmbedder(base_url=provider.url, model="hashing", dimensions=provider.dimensions)
    return QueryEmbedder(make_embedder("openai", settings), timeout_s=5)


def reranker(provider: FakeProvider) -> QueryReranker:
    return QueryReranker(make_reranker("fine", TeiReranker(base_url=provider.tei_url)), "fine", timeout_s=5)


async def ask(model: QueryEmbedder | QueryReranker) -> None:
    await (model.score("one", ["two"]) if isinstance(model, QueryReranker) else model.embed_one("one"))


@pytest.mark.parametrize("code", [401, 403, 404, 405, 407, 307])
@pytest.mark.parametrize("make", [openai, tei, reranker])
async def test_a_provider_that_refuses_us_is_away_and_its_words_are_told(
    provider: FakeProvider,
    make: Callable[[FakeProvider], QueryEmbedder | QueryReranker],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key that has expired, or a firewall that does not like a query, is no mistake of whoever searches."""
    model = make(provider)
    provider.always = status(code)
    for _ in range(2):
        with pytest.raises(EmbedderUnavailable, match=str(code)) as refused:
            await ask(model)
        assert refused.value.hint is not None
    assert len(provider.requests) == 1  # it is left alone for a while
    monkeypatch.setattr(queries, "AWAY_S", 0.0)
    model._away_until = 0.0
    provider.always = None
    await ask(model)
    await model.aclose()


class Stuck:
    """A class of a user's whose calls end when they are let, in a thread."""

    identity = "stuck:1"
    dimensions = 2
    reached, let = threading.Event(), threading.Event()

    def embed(self, texts: Sequence[str], *, kind: str) -> list[list[int]]:
        self.reached.set()
        assert self.let.wait(60)
        return [[1, len(text)] for text in texts]


async def test_a_call_in_a_thread_that_does_not_end_is_not_waited_for_and_the_model_is_back_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queries, "AWAY_S", 0.0)
    settings = PythonEmbedder(class_=f"{Stuck.__module__}:{Stuck.__name__}")
    embedder = QueryEmbedder(make_embedder("own", settings), timeout_s=0.2)
    with anyio.fail_after(60):
        for text in ("one", "two"):  # the second one never begins
            with pytest.raises(EmbedderUnavailable, match=r"the model did not answer within 0\.2 s"):
                await embedder.embed_one(text)
        assert Stuck.reached.is_set()
        Stuck.let.set()
        answered = False
        while not answered:
            with contextlib.suppress(EmbedderUnavailable):
                answered = list(await embedder.embed_one("three")) == [1, 5]
        await embedder.aclose()


async def test_a_model_that_cannot_be_loaded_here_is_a_mistake_of_the_set_up_and_is_not_tried_by_each_call() -> None:
    tries: list[str] = []

    class Broken(Held):
        async def open(self) -> None:
            tries.append(self.name)
            raise EmbedderSetupError("torch is not installed", where="embedders.held", hint="install it")

    embedder = QueryEmbedder(Broken(), timeout_s=30)
    for _ in range(3):
        with pytest.raises(EmbedderSetupError, match="torch") as broken:
            await embedder.embed_one("one")
        assert (broken.value.where, broken.value.hint) == ("embedders.held", "install it")
    assert len(tries) == 1


async def test_a_model_that_is_being_loaded_is_away_until_it_is_there(model: Held) -> None:
    class Loading(Held):
        async def open(self) -> None:
            self.reached.set()
            await self.let.wait()

    loading = Loading()
    embedder = QueryEmbedder(loading, timeout_s=0.01)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embedder.open)
            await loading.reached.wait()
            for _ in range(2):
                with pytest.raises(EmbedderUnavailable, match=r"the model was not loaded within 0\.01 s"):
                    await embedder.embed_one("one")
            loading.let.set()
    embedder._timeout_s = 30
    assert np.array_equal(await embedder.embed_one("one"), model.vectors(["one"])[0])
    await embedder.aclose()


async def test_a_model_that_the_configuration_lacks_is_not_looked_for_with_each_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec()
    looked: list[str] = []

    def embedder_of(_: object, model: str, named: str) -> Hashing:
        looked.append(named)
        if len(looked) == 1:
            raise EmbedderSetupError("it is of another model", where="embedders.old", hint="give the new file")
        return Hashing(named, HashEmbedder(dimensions=8))

    monkeypatch.setattr(queries, "embedder_of", embedder_of)
    models = QueryModels(cast(Config, SimpleNamespace(embedders={})), timeout_s=30)
    for _ in range(3):
        with pytest.raises(EmbedderSetupError, match="another model") as refused:
            models.embedder(spec)
        assert refused.value.hint == "give the new file"
    assert len(looked) == 1
    monkeypatch.setattr(anyio, "current_time", lambda: math.inf)
    assert models.embedder(spec) is models.embedder(spec)
