"""A device is kept busy: while it computes, the next call is ready and the vectors of the last one are stored."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from cdcsync.flows.embed import Dispatcher, EmbedLoop, Pool
from cdcsync.metrics import Metrics
from tests.support.gates import Gated
from tests.support.indexes import DIMENSIONS, SCHEMA, LiveIndex, changes, document, until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

LONG = "word " * 200
"""A few of these fill a call."""


async def test_vectors_are_stored_while_other_calls_are_under_way(index: LiveIndex, target: Database) -> None:
    await index.apply(changes(*(document(str(number), f"{number} {LONG}") for number in range(40))))
    embedder = Gated(concurrency=2, dimensions=DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    pool = Pool(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            tasks.start_soon(loop.run)
            for ended in range(3):
                await embedder.next_call(ended + 2)  # two at a time
                embedder.gates[ended].set()
                # The calls that have begun meanwhile are held.
                ready = sum(len(call) for call in embedder.calls[: ended + 1])
                await until(partial(index.rows, "SELECT FROM {vectors} OFFSET %s LIMIT 1", ready - 1))
            tasks.cancel_scope.cancel()
    await pool.aclose()
    assert max(embedder.texts.values()) == 1
