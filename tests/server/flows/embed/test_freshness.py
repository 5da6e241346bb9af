"""How fresh vectors are that come from the backlog: from the commit on the source, where that is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import anyio
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.flows.embed import BacklogPool, Dispatcher, EmbedLoop
from cdcsync.metrics import Metrics
from cdcsync.model.changeset import BACKFILL
from tests.support.indexes import DIMENSIONS, SCHEMA, LiveIndex, changes, document, kept
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

HOUR_S = 3600.0


class Embedding:
    """An embed loop that is run until nothing is left, and what it tells."""

    def __init__(self, index: LiveIndex, dsn: str) -> None:
        self.index = index
        self.pool = BacklogPool(dsn, SCHEMA, 1)
        self.metrics = Metrics()
        embedder = HashEmbedder("words", config.HashEmbedder(dimensions=DIMENSIONS))
        self.dispatcher = Dispatcher(embedder, self.metrics, anyio.current_time)
        self.loop = EmbedLoop(self.pool, index.spec, self.dispatcher, self.metrics)

    async def drain(self) -> tuple[float, float]:
        """Return how many vectors were measured so far, and how many seconds they took together."""
        async with anyio.create_task_group() as tasks:
            self.loop.drained = tasks.cancel_scope.cancel
            tasks.start_soon(self.dispatcher.run)
            await self.dispatcher.ready.wait()
            tasks.start_soon(self.loop.run)
        await self.pool.aclose()
        assert await self.index.waiting() == []
        value = self.metrics.registry.get_sample_value
        name = "cdcsync_vector_freshness_seconds"
        return value(f"{name}_count") or 0.0, value(f"{name}_sum") or 0.0


@pytest.fixture
def embedding(index: LiveIndex, target: Database) -> Embedding:
    return Embedding(index, target.dsn)


async def test_a_vector_is_as_old_as_the_commit_of_its_text(index: LiveIndex, embedding: Embedding) -> None:
    await index.apply(changes(document("1", "a", lsn=0x150), document("2", "b", lsn=0x250)))
    now = datetime.now(UTC)
    embedding.loop.commits.note(0x100, 0x200, now - timedelta(hours=10))
    embedding.loop.commits.note(0x200, 0x300, now - timedelta(hours=2))
    count, seconds = await embedding.drain()
    assert (count, seconds // HOUR_S) == (2, 12)


async def test_one_that_waited_before_the_worker_started_counts_from_when_it_was_applied(
    index: LiveIndex, embedding: Embedding
) -> None:
    await index.apply(changes(document("1", "a", lsn=0x50)))
    await index.rows("UPDATE {chunks} SET applied_at = now() - interval '5 h' RETURNING 1")
    embedding.loop.commits.note(0x100, 0x200, datetime.now(UTC))
    count, seconds = await embedding.drain()
    assert (count, seconds // HOUR_S) == (1, 5)


async def test_a_text_ages_while_it_waits_whatever_else_of_its_row_changes(
    index: LiveIndex, embedding: Embedding
) -> None:
    await index.apply(changes(document("1", "a", lsn=0x150)))
    await index.apply(changes(document("1", "b", "a", lsn=0x250, existed=True), inline=["b"]))
    await index.apply(changes(kept("1", "5")))
    now = datetime.now(UTC)
    embedding.loop.commits.note(0x100, 0x200, now - timedelta(hours=10))
    embedding.loop.commits.note(0x200, 0x300, now - timedelta(hours=2))
    count, seconds = await embedding.drain()
    assert (count, seconds // HOUR_S) == (1, 10)


async def test_what_a_load_brings_is_no_change_that_someone_waits_for(index: LiveIndex, embedding: Embedding) -> None:
    await index.apply(changes(document("1", "a", lane=BACKFILL), document("2", "b", lane=BACKFILL)))
    assert await embedding.drain() == (0, 0)
