"""The desk: as many calls at a time as the embedder serves, and none for a text that needs none."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embed import Desk
from cdcsync.embed.desk import MIN_BATCH_TEXTS, WINDOW_TEXTS
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.protocol import Kind, Vectors
from cdcsync.errors import EmbedderUnavailable
from cdcsync.metrics import Metrics


class Gated(HashEmbedder):
    """An embedder whose calls wait for the test."""

    def __init__(self, concurrency: int = 1) -> None:
        super().__init__("gated", config.HashEmbedder(dimensions=8))
        self.concurrency = concurrency
        self.calls: list[list[str]] = []
        self.gates: list[anyio.Event] = []
        self.failing = False
        self.called = anyio.Event()

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        self.calls.append(list(texts))
        gate = anyio.Event()
        self.gates.append(gate)
        self.called.set()
        await gate.wait()
        if self.failing:
            raise EmbedderUnavailable("told to fail")
        return self.vectors(texts)

    async def next_call(self, number: int) -> None:
        """Wait until so many calls have begun."""
        while len(self.calls) < number:
            self.called = anyio.Event()
            await self.called.wait()

    @property
    def texts(self) -> Counter[str]:
        return Counter(text for call in self.calls for text in call)


@asynccontextmanager
async def opened(embedder: HashEmbedder) -> AsyncIterator[Desk]:
    desk = Desk(embedder, Metrics(), anyio.current_time)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.run)
        await desk.ready.wait()
        yield desk
        tasks.cancel_scope.cancel()


def named(*texts: str) -> dict[bytes, str]:
    return {text.encode(): text for text in texts}


def avoided(desk: Desk, reason: str) -> float:
    return float(desk._metrics.embed_avoided.labels(desk.embedder.name, reason)._value.get())


async def test_a_text_that_was_made_recently_is_not_made_again() -> None:
    async with opened(HashEmbedder("h", config.HashEmbedder(dimensions=8))) as desk:
        first = await desk.embed(named("a", "b"))
        again = await desk.embed(named("b", "c"))

        np.testing.assert_array_equal(first[b"b"], again[b"b"])
        assert avoided(desk, "remembered") == 1
        desk.forget()
        assert not desk.remembered([b"a", b"b", b"c"])


async def test_a_text_under_way_is_not_asked_for_again_by_others() -> None:
    embedder = Gated(concurrency=4)
    async with opened(embedder) as desk, anyio.create_task_group() as tasks:
        found = []

        async def ask(*texts: str) -> None:
            found.append(await desk.embed(named(*texts)))

        tasks.start_soon(ask, "a", "b")
        await embedder.next_call(1)
        tasks.start_soon(ask, "b", "c")
        tasks.start_soon(ask, "c", "a")
        await embedder.next_call(2)
        await anyio.wait_all_tasks_blocked()
        for gate in reversed(embedder.gates):
            gate.set()
        await anyio.wait_all_tasks_blocked()

        assert sorted(map(sorted, found)) == [[b"a", b"b"], [b"a", b"c"], [b"b", b"c"]]
        assert embedder.texts == Counter("abc")
        assert avoided(desk, "under_way") == 3


@pytest.mark.parametrize("places", [1, 3])
async def test_no_more_calls_run_at_a_time_than_the_embedder_serves(places: int) -> None:
    embedder = Gated(concurrency=places)
    async with opened(embedder) as desk, anyio.create_task_group() as tasks:
        assert desk.idle
        for text in "abcde":
            tasks.start_soon(desk.embed, named(text))
        await anyio.wait_all_tasks_blocked()
        assert len(embedder.calls) == places
        assert not desk.idle
        for number in range(5):
            await embedder.next_call(number + 1)
            embedder.gates[number].set()


async def test_who_waited_for_a_call_that_failed_calls_for_itself() -> None:
    embedder = Gated(concurrency=2)
    async with opened(embedder) as desk, anyio.create_task_group() as tasks:
        problems = []

        async def ask() -> None:
            try:
                await desk.embed(named("a"))
            except EmbedderUnavailable as error:
                problems.append(error)

        tasks.start_soon(ask)
        await embedder.next_call(1)
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        embedder.failing = True
        embedder.gates[0].set()
        await embedder.next_call(2)
        embedder.failing = False
        embedder.gates[1].set()
        await anyio.wait_all_tasks_blocked()

        assert len(problems) == 1
        assert desk.remembered([b"a"])


async def test_a_call_that_overran_its_budget_is_remembered_when_it_ends() -> None:
    embedder = Gated()
    async with opened(embedder) as desk:
        assert await desk.embed_within(named("a"), 0.001) == {}
        embedder.gates[0].set()
        await anyio.wait_all_tasks_blocked()

        assert list(await desk.embed_within(named("a"), 0.001)) == [b"a"]
        assert len(embedder.calls) == 1


async def test_nothing_is_embedded_in_passing_while_the_stream_is_far_behind() -> None:
    async with opened(HashEmbedder("h", config.HashEmbedder(dimensions=8))) as desk:
        desk.far_behind = lambda: True
        assert await desk.embed_within(named("a"), 1.0) == {}
        desk.far_behind = lambda: False
        assert list(await desk.embed_within(named("a"), 1.0)) == [b"a"]


async def test_calls_grow_until_they_take_their_time_and_fit_the_embedder() -> None:
    now = 0.0

    class Slow(HashEmbedder):
        async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
            nonlocal now
            now += 0.001 * len(texts)
            return self.vectors(texts)

        def fitting(self, texts: Sequence[str]) -> int:
            return min(len(texts), 200)

    desk = Desk(Slow("s", config.HashEmbedder(dimensions=8)), Metrics(), lambda: now)
    texts = [str(number) for number in range(1000)]
    assert desk.batch(texts) == MIN_BATCH_TEXTS
    assert desk.batch(texts[:5]) == 5
    desk.ready.set()
    await desk.embed(named("a"))
    assert desk.batch(texts) == 200
    assert desk.window_texts == WINDOW_TEXTS
