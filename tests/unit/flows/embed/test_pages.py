"""Vectors of a load's page: as many calls at a time as the embedder takes, each with its share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed.pages import page_vectors
from cdcsync.metrics import Metrics
from cdcsync.model.vectors import FloatVector
from tests.support.gates import Gated
from tests.support.indexes import DIMENSIONS, make_spec

pytestmark = pytest.mark.anyio

PAGE = {f"{at}".encode(): f"text {at}" for at in range(200)}


@asynccontextmanager
async def page(dispatcher: Dispatcher) -> AsyncIterator[dict[bytes, FloatVector]]:
    """Begin to make a page's vectors, and yield what takes them once all calls that can have begun."""
    made: dict[bytes, FloatVector] = {}

    async def make() -> None:
        made.update(await page_vectors(dispatcher, make_spec(), PAGE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dispatcher.run)
        tasks.start_soon(make)
        await anyio.wait_all_tasks_blocked()
        yield made
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(("concurrency", "calls"), [(1, [200]), (4, [50] * 4)])
async def test_a_page_is_shared_between_the_calls_that_run_beside_each_other(
    concurrency: int, calls: list[int]
) -> None:
    embedder = Gated(concurrency, DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    async with page(dispatcher) as made:
        assert [len(call) for call in embedder.calls] == calls  # all of them before any has ended
        for gate in embedder.gates:
            gate.set()
        await anyio.wait_all_tasks_blocked()
    assert made.keys() == PAGE.keys()


async def test_what_the_other_calls_of_a_page_make_is_kept_where_one_finds_the_embedder_away() -> None:
    embedder = Gated(2, DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    dispatcher.pace.call_tokens = 1.0  # no two texts in a call
    async with page(dispatcher) as made:
        first, second = embedder.gates
        embedder.failing = True
        first.set()
        await embedder.next_call(3)  # the word that tells whether the embedder is away
        embedder.gates[2].set()
        await anyio.wait_all_tasks_blocked()
        embedder.failing = False
        second.set()
        await anyio.wait_all_tasks_blocked()
    assert list(made) == [b"1"]
    assert set(embedder.texts) - {"text 0", "text 1"} == {"word"}
