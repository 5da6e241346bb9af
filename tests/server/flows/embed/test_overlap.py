"""A device is kept busy: while it computes, the next call is ready and the vectors of the last one are stored.

And while it cannot be asked, nobody asks the target again and again what waits for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import psycopg
import pytest

from cdcsync import config
from cdcsync.documents.templates import hash_text
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.protocol import WORD, Kind, Vectors
from cdcsync.errors import EmbedError
from cdcsync.flows.embed import BacklogPool, Dispatcher, EmbedLoop, calls
from cdcsync.flows.embed.pace import Pace
from cdcsync.flows.embed.suspects import Suspicion
from cdcsync.metrics import Metrics
from cdcsync.model.changeset import BACKFILL
from cdcsync.model.spec import IndexSpec
from cdcsync.target.backlog import Backlog
from tests.support.gates import Gated
from tests.support.indexes import (
    DIMENSIONS,
    SCHEMA,
    LiveIndex,
    begin_generations,
    changes,
    document,
    live_index,
    two_generations,
    until,
    vector_of,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

LONG = "word " * 200
"""A few of these fill a call."""


@asynccontextmanager
async def running(loop: EmbedLoop, dispatcher: Dispatcher, pool: BacklogPool) -> AsyncIterator[None]:
    """Embed for as long as the block lasts."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            tasks.start_soon(loop.run)
            yield
            tasks.cancel_scope.cancel()
    await pool.aclose()


@asynccontextmanager
async def embedding(embedder: HashEmbedder, index: LiveIndex, target: Database) -> AsyncIterator[EmbedLoop]:
    """Empty an index's backlog by an embedder for as long as the block lasts."""
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    pool = BacklogPool(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())
    async with running(loop, dispatcher, pool):
        yield loop


async def test_vectors_are_stored_while_other_calls_are_under_way(index: LiveIndex, target: Database) -> None:
    await index.apply(changes(*(document(str(number), f"{number} {LONG}") for number in range(40))))
    embedder = Gated(concurrency=2, dimensions=DIMENSIONS)
    async with embedding(embedder, index, target):
        for ended in range(3):
            await embedder.next_call(ended + 2)  # two at a time
            embedder.gates[ended].set()
            # The calls that have begun meanwhile are held.
            ready = sum(len(call) for call in embedder.calls[: ended + 1])
            await until(partial(index.rows, "SELECT FROM {vectors} OFFSET %s LIMIT 1", ready - 1))
    assert max(embedder.texts.values()) == 1


async def test_no_window_ends_in_small_calls_where_others_follow(
    index: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "window_texts", 128)
    await index.apply(changes(*(document(str(number), f"text {number}") for number in range(512))))
    embedder = Gated(concurrency=4, dimensions=DIMENSIONS)
    async with embedding(embedder, index, target):
        await embedder.next_call(4)
        assert len(embedder.calls[0]) == 128 / 4  # its share of the first window
        ended = 0
        while sum(embedder.texts.values()) < 512:
            embedder.gates[ended].set()
            ended += 1
            await embedder.next_call(ended + 4)
        assert len(embedder.calls) <= 512 / 32
        for gate in embedder.gates:
            gate.set()
        while await index.rows("SELECT FROM {backlog} LIMIT 1"):
            await anyio.lowlevel.checkpoint()
    assert max(embedder.texts.values()) == 1


async def test_live_changes_beside_a_load_share_the_calls_as_if_they_were_alone(
    index: LiveIndex, target: Database
) -> None:
    await index.apply(changes(*(document(str(number), f"load {number}", lane=BACKFILL) for number in range(640))))
    embedder = Gated(concurrency=4, dimensions=DIMENSIONS)
    async with embedding(embedder, index, target) as loop:
        await embedder.next_call(4)
        await index.apply(changes(*(document(str(number), f"live {number}") for number in range(1000, 1064))))
        loop.notify(live=True)
        ended = 0
        while len(live := [len(call) for call in embedder.calls if call[0].startswith("live")]) < 4:
            embedder.gates[ended].set()
            ended += 1
            await embedder.next_call(ended + 1)
        assert live == [64 / 4] * 4


class Counted(BacklogPool):
    """A pool that counts how often it is asked."""

    lent = 0

    @asynccontextmanager
    async def backlog(self, spec: IndexSpec, alike: Sequence[IndexSpec] = ()) -> AsyncIterator[Backlog]:
        self.lent += 1
        async with super().backlog(spec, alike) as backlog:
            yield backlog


async def test_an_embedder_that_breaks_between_a_load_and_a_live_change_is_waited_for_in_peace(
    index: LiveIndex, target: Database
) -> None:
    await index.apply(changes(*(document(str(number), f"{number} {LONG}", lane=BACKFILL) for number in range(40))))
    embedder = Gated(dimensions=DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    pool = Counted(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())
    async with running(loop, dispatcher, pool):
        await embedder.next_call(1)
        await index.apply(changes(document("99", "live")))
        loop.notify(live=True)
        # The live change is called for while calls of the load are under way, and then nothing works.
        number = 0
        while "live" not in embedder.texts:
            embedder.gates[number].set()
            number += 1
            await embedder.next_call(number + 1)
        embedder.failing = True
        broke = None
        while embedder.texts[WORD] < 4:
            embedder.gates[-1].set()
            await embedder.next_call(len(embedder.calls) + 1)
            if dispatcher.health.problem is not None and broke is None:
                broke = pool.lent
        assert broke is not None
        assert pool.lent - broke <= 10
        embedder.failing = False
        for gate in embedder.gates:
            gate.set()
        while await index.rows("SELECT FROM {backlog} LIMIT 1"):
            for gate in embedder.gates:
                gate.set()
            await anyio.lowlevel.checkpoint()


async def test_the_target_is_not_asked_again_and_again_while_a_text_hangs_and_nothing_else_waits(
    index: LiveIndex, target: Database
) -> None:
    await index.apply(changes(document("1", "hangs")))
    embedder = Gated(concurrency=2, dimensions=DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    pool = Counted(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())
    async with running(loop, dispatcher, pool):
        await embedder.next_call(1)
        await anyio.sleep(0.5)
        assert pool.lent <= 5
        dispatcher.suspects.note([hash_text("late")], Suspicion())
        await index.apply(changes(document("2", "late")))
        loop.notify(live=True)
        await embedder.next_call(2)
        before = pool.lent
        await anyio.sleep(0.5)
        assert pool.lent - before <= 5
        assert sorted(embedder.texts) == ["hangs", "late"]
        for gate in embedder.gates:
            gate.set()
        await until(partial(index.rows, "SELECT FROM {vectors} OFFSET 1"))


async def test_a_suspect_of_a_load_has_its_turn_however_many_live_ones_come(index: LiveIndex, target: Database) -> None:
    embedder = Gated(dimensions=DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    for text in ("load", "live 1", "live 2", "live 3"):
        dispatcher.suspects.note([hash_text(text)], Suspicion())
    await index.apply(changes(document("1", "live 1"), document("2", "load", lane=BACKFILL)))
    pool = BacklogPool(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())
    async with running(loop, dispatcher, pool):
        await embedder.next_call(1)
        await index.apply(changes(document("3", "live 2"), document("4", "live 3")))
        loop.notify(live=True)
        await until(lambda: _true(len(loop._apart) == 4))
        embedder.gates[0].set()
        await embedder.next_call(2)
    assert embedder.calls == [["live 1"], ["load"]]


async def _true(holds: bool) -> bool:
    return holds


SUSPECTED = 40


class Stuck(HashEmbedder):
    """Fails at texts that it has not seen, and hangs at others until it is let go."""

    concurrency = 2

    def __init__(self) -> None:
        super().__init__("stuck", config.HashEmbedder(dimensions=DIMENSIONS))
        self.seen: set[str] = set()
        self.all_seen, self.let = anyio.Event(), anyio.Event()

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        await anyio.sleep(0.01)
        new = set(texts) - self.seen - {WORD}
        self.seen |= new
        if len(self.seen) == SUSPECTED:
            self.all_seen.set()
        if new:
            raise EmbedError("no")
        if list(texts) != [WORD]:
            await self.let.wait()
        return self.vectors(texts)


async def test_no_more_suspects_are_kept_than_a_window_has_and_the_others_are_found_again(
    index: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "window_texts", 4)
    monkeypatch.setattr(calls, "QUICK_S", 0.0)
    await index.apply(changes(*(document(str(number), f"text {number}") for number in range(SUSPECTED))))
    embedder = Stuck()
    async with embedding(embedder, index, target) as loop:
        await embedder.all_seen.wait()
        assert len(loop._apart) <= 2 * 4
        embedder.let.set()
        await until(partial(index.rows, "SELECT FROM {vectors} OFFSET %s", SUSPECTED - 1))


async def test_a_text_that_another_generation_has_is_not_asked_for_while_its_row_is_held(target: Database) -> None:
    spec = two_generations(model="three-numbers")
    (other,) = spec.others
    async with live_index(target, spec) as live:
        await begin_generations(live)
        await live.apply(changes(document("1", "one"), document("2", "two")))
        own = Backlog(live.embedding, SCHEMA, spec)
        await own.open()
        await own.store({hash_text("one"): vector_of("one")})
        embedder = Gated(dimensions=other.dimensions)
        dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
        pool = BacklogPool(target.dsn, SCHEMA, 1)
        loop = EmbedLoop(pool, other, dispatcher, Metrics(), alike=spec.alike(other))

        async def waiting(number: int) -> bool:
            return len(await live.rows("SELECT FROM {backlog} WHERE generation = 2")) == number

        async with running(loop, dispatcher, pool):
            # As an apply does that has not committed. Nobody remembers the call: a worker was killed between the two.
            with psycopg.connect(target.dsn) as holder:
                holder.execute(
                    "SELECT FROM cdcsync.articles_backlog WHERE generation = 2 AND content_hash = %s FOR UPDATE",
                    [hash_text("one")],
                )
                await embedder.next_call(1)
                embedder.gates[0].set()
                await until(partial(waiting, 1))
            await until(partial(waiting, 0))
        assert embedder.texts["one"] == 0
        assert embedder.texts["two"] == 1


async def test_who_held_rows_is_no_longer_told_once_they_are_free_however_many_texts_still_wait(
    index: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.backlog.OPEN_FOR_S", 0.1)
    monkeypatch.setattr("cdcsync.flows.embed.loop.LOOK_S", 0.2)
    monkeypatch.setattr("cdcsync.flows.embed.loop.LOOK_MOST_S", 0.2)
    monkeypatch.setattr("cdcsync.flows.embed.pace.WINDOW_TEXTS", 8)
    await index.apply(changes(*(document(str(number), f"{number} {LONG}") for number in range(200))))
    embedder = Gated(dimensions=DIMENSIONS)
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    pool = BacklogPool(target.dsn, SCHEMA, 1)
    loop = EmbedLoop(pool, index.spec, dispatcher, Metrics())

    async def told(is_it: bool) -> bool:
        return ("report" in pool.problems.get("articles", "")) is is_it

    async def waits(does_it: bool = True) -> bool:
        return bool(await index.rows("SELECT FROM {backlog} LIMIT 1")) is does_it

    async def let_go() -> None:
        """Let calls end, as many as are needed."""
        for number in range(10_000):
            await embedder.next_call(number + 1)
            embedder.gates[number].set()
            await anyio.sleep(0.05)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            with psycopg.connect(target.dsn, application_name="report") as holder:
                holder.execute("SELECT FROM cdcsync.articles_backlog FOR UPDATE")
                tasks.start_soon(dispatcher.run)
                tasks.start_soon(loop.run)
                tasks.start_soon(let_go)
                await until(partial(told, True))
            await until(partial(told, False))
            assert await waits(), "texts still wait"
            await until(partial(waits, False))
            tasks.cancel_scope.cancel()
    await pool.aclose()
