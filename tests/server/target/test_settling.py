"""Moving vectors between the tiers: whatever happens meanwhile, a chunk has one vector of its text, in one tier."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import psycopg
import pytest

from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.apply import IndexWriter
from cdcsync.target.backlog import Backlog
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.keys import discard_vectors
from cdcsync.target.settling import Settling
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    OpenIndex,
    changes,
    document,
    until_blocked,
    vector_of,
    vector_text,
)

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]
Action = Callable[[], Awaitable[Any]]

TIERS = "SELECT c.content, v.tier FROM {vectors} v JOIN {chunks} c USING (chunk_id) ORDER BY c.id"


class Interrupted(Settling):
    """A move in the middle of which something else happens."""

    before_release: Action | None = None
    after_release: Action | None = None

    async def _release(self, copied: dict[int, str]) -> set[int]:
        if self.before_release is not None:
            await self.before_release()
        moved = await super()._release(copied)
        if self.after_release is not None:
            await self.after_release()
        return moved


@pytest.fixture
async def settling(index: LiveIndex, connect_target: ConnectTarget) -> Interrupted:
    """What settles an index of two documents, `a` and `b`, over a connection of its own; both vectors are fresh."""
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a", "b"]))
    return Interrupted(await connect_target(), SCHEMA, index.spec)


async def move(settling: Settling) -> int:
    return await settling.settle(await settling.rested(1_000, rest_s=0))


async def embed_again(index: LiveIndex) -> None:
    """Make the vectors of the document 1 anew, of the same text."""
    async with index.connection.transaction():
        await discard_vectors(index.connection, SCHEMA, index.spec, [("1",)])
    await index.embed()


CHANGES: dict[str, tuple[Callable[[LiveIndex], Coroutine[Any, Any, Any]], list[tuple[str, str]]]] = {
    "another text with its vector": (
        lambda index: index.apply(changes(document("1", "new", existed=True), inline=["new"])),
        [("new", "fresh"), ("b", "settled")],
    ),
    "another text that waits for its vector": (
        lambda index: index.apply(changes(document("1", "new", existed=True))),
        [("new", "settled"), ("b", "settled")],
    ),
    "a deletion": (lambda index: index.apply(changes(deleted=["1"])), [("b", "settled")]),
    "a vector made anew of the same text": (embed_again, [("a", "fresh"), ("b", "settled")]),
    "a moved key": (
        lambda index: index.apply(changes(document("3", "a"), deleted=["1"])),
        [("b", "settled"), ("a", "fresh")],
    ),
}


async def test_vectors_that_have_rested_move_and_stay_what_they_are(index: LiveIndex, settling: Settling) -> None:
    before = await index.rows("SELECT chunk_id, content_hash, embedding::text, stored_at FROM {vectors} ORDER BY 1")

    assert await settling.rested(10, rest_s=3_600) == []
    assert await move(settling) == 2

    assert await index.rows(TIERS) == [("a", "settled"), ("b", "settled")]
    after = await index.rows("SELECT chunk_id, content_hash, embedding::text, stored_at FROM {vectors} ORDER BY 1")
    assert after == before
    assert await move(settling) == 0
    assert await index.faults() == []


@pytest.mark.parametrize(("ahead_s", "rested"), [(300, []), (7_200, [1])])
async def test_a_vector_that_was_stored_before_the_clock_went_back_has_rested(
    index: LiveIndex, settling: Settling, ahead_s: int, rested: list[int]
) -> None:
    await index.connection.execute(
        "UPDATE cdcsync.articles_vectors_1_fresh SET stored_at = now() + make_interval(secs => %s) WHERE chunk_id = 1",
        [ahead_s],
    )
    assert await settling.rested(10, rest_s=3_600) == rested


async def test_a_settled_tier_without_statistics_is_not_taken_for_empty(index: LiveIndex, settling: Settling) -> None:
    """As after pg_upgrade: everything fresh would be more than a share of nothing, and all HNSW be built anew."""
    await move(settling)
    without = "SELECT reltuples FROM pg_class WHERE oid = 'cdcsync.articles_vectors_1'::regclass"
    assert await index.rows(without) == [(-1,)]
    assert (await settling.look()).settled == 2


async def test_the_oldest_vectors_move_first(index: LiveIndex, settling: Settling) -> None:
    await index.apply(changes(document("1", "a, again", existed=True), inline=["a, again"]))
    assert await settling.settle(await settling.rested(1, rest_s=0)) == 1
    assert await index.rows(TIERS) == [("a, again", "fresh"), ("b", "settled")]


async def test_a_vector_whose_text_has_changed_already_does_not_move(index: LiveIndex, settling: Settling) -> None:
    await index.apply(changes(document("1", "new", existed=True)))
    assert await move(settling) == 1
    assert await index.rows(TIERS) == [("new", "fresh"), ("b", "settled")]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_that_commits_during_a_move_wins(index: LiveIndex, settling: Interrupted, change: str) -> None:
    apply, expected = CHANGES[change]
    settling.before_release = lambda: apply(index)

    await move(settling)

    assert await index.rows(TIERS) == expected
    assert await index.faults() == []


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_that_waits_for_the_end_of_a_move_finds_what_it_moved(
    index: LiveIndex, settling: Interrupted, connect_target: ConnectTarget, change: str
) -> None:
    apply, expected = CHANGES[change]
    watching = await connect_target()
    async with anyio.create_task_group() as tasks:

        async def begin() -> None:
            tasks.start_soon(apply, index)
            if change != "another text that waits for its vector":  # it has no vector to write
                await until_blocked(watching, index.connection)

        settling.after_release = begin
        assert await move(settling) == 2

    assert await index.rows(TIERS) == expected
    assert await index.faults() == []


async def test_a_change_that_is_still_open_keeps_its_vector_fresh_and_delays_nobody(
    index: LiveIndex, settling: Interrupted
) -> None:
    async with index.connection.transaction(force_rollback=True):
        await index.writer.apply(changes(document("1", "new", existed=True), inline=["new"]))
        assert await move(settling) == 1
    assert await index.rows(TIERS) == [("a", "fresh"), ("b", "settled")]
    assert await index.faults() == []


async def test_two_sessions_that_move_the_same_vectors_leave_each_in_one_tier(
    index: LiveIndex, settling: Interrupted, connect_target: ConnectTarget
) -> None:
    """A worker was killed and its session still moves when the next one begins."""
    successor, watching = Settling(await connect_target(), SCHEMA, index.spec), await connect_target()
    async with anyio.create_task_group() as tasks:

        async def begin() -> None:
            tasks.start_soon(move, successor)
            await until_blocked(watching, successor._connection)

        settling.after_release = begin
        assert await move(settling) == 2

    assert await index.rows(TIERS) == [("a", "settled"), ("b", "settled")]
    assert await index.faults() == []


async def test_two_sessions_that_read_the_same_vectors_in_another_order_never_wait_in_a_circle(
    index: LiveIndex, connect_target: ConnectTarget
) -> None:
    for text in ("3", "2", "1"):
        await index.apply(changes(document(text, text), inline=[text]))
    # The table's order is now another one than that of the chunks' numbers, whose row in the middle is held.
    await index.connection.execute("UPDATE cdcsync.articles_vectors_1_fresh SET stored_at = now() WHERE chunk_id = 1")
    holding, watching = await connect_target(), await connect_target()
    ways = ("enable_indexscan", "enable_bitmapscan"), ("enable_seqscan", "enable_bitmapscan")
    movers = []
    for way in ways:
        connection = await connect_target()
        await connection.execute("".join(f"SET {one} = off;" for one in way))
        movers.append(Settling(connection, SCHEMA, index.spec))
    moved: list[int] = []

    async def begin(mover: Settling) -> None:
        moved.append(await mover.settle([1, 2, 3]))

    async with anyio.create_task_group() as tasks, holding.transaction(force_rollback=True):
        await holding.execute(
            "INSERT INTO cdcsync.articles_vectors_1_settled (chunk_id, content_hash, embedding, stored_at)"
            " SELECT chunk_id, content_hash, embedding, stored_at FROM cdcsync.articles_vectors_1_fresh"
            " WHERE chunk_id = 2"
        )
        for mover in movers:
            tasks.start_soon(begin, mover)
            await until_blocked(watching, mover._connection)

    assert sorted(moved) == [0, 3]
    assert await index.faults() == []


async def test_a_session_that_dies_in_a_move_leaves_everything_where_it_was(
    index: LiveIndex, settling: Interrupted
) -> None:
    pid = settling._connection.info.backend_pid
    settling.after_release = lambda: index.rows("SELECT pg_terminate_backend(%s, 5000)", pid)

    with pytest.raises(psycopg.OperationalError):
        await move(settling)

    assert await index.rows(TIERS) == [("a", "fresh"), ("b", "fresh")]
    assert await index.faults() == []


async def test_an_index_is_emptied_while_a_move_is_open(
    index: LiveIndex, settling: Interrupted, connect_target: ConnectTarget
) -> None:
    watching = await connect_target()
    async with anyio.create_task_group() as tasks:

        async def begin() -> None:
            tasks.start_soon(index.apply, changes(truncated=True))
            await until_blocked(watching, index.connection)

        settling.before_release = begin
        await move(settling)

    assert await index.rows("SELECT FROM {vectors}") == []
    assert await index.faults() == []


async def test_a_look_tells_how_many_vectors_are_where_and_what_fresh_costs(
    index: LiveIndex, settling: Settling
) -> None:
    await settling.settle(await settling.rested(1, rest_s=0))
    await build_hnsw(index.connection, SCHEMA, index.spec)
    await index.connection.execute("ANALYZE cdcsync.articles_vectors_1_settled")

    found = await settling.look()

    assert (found.fresh, found.settled, found.built) == (1, 1, True)
    assert found.scan_ms > 0


async def test_before_hnsw_is_built_a_look_searches_nothing_and_counts_no_more_than_it_has_to(
    index: LiveIndex, settling: Settling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.settling.COUNTED", 1)

    found = await settling.look()

    assert (found.fresh, found.scan_ms, found.built) == (1, 0.0, False)


# -- all at once -----------------------------------------------------------------------------------------------------

KEYS, TEXTS, ROUNDS = 40, 25, 60


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(2))
async def test_whoever_writes_at_the_same_time_each_chunk_has_one_vector_in_one_tier(
    open_index: OpenIndex, target: Any, seed: int
) -> None:
    """Apply, two embed sessions, three that move, TRUNCATE, VACUUM and searches, all without a deadlock."""
    index = await open_index(search=None)
    await build_hnsw(index.connection, SCHEMA, index.spec)
    chance = random.Random(seed)
    done = anyio.Event()
    doubled: list[tuple[Any, ...]] = []
    moved = 0

    async def until_done(work: Callable[[Connection], Awaitable[None]]) -> None:
        connection = await connect(target.dsn, "target")
        try:
            while not done.is_set():
                await work(connection)
                await anyio.sleep(chance.random() / 500)
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close()

    async def embed(connection: Connection) -> None:
        backlog = Backlog(connection, SCHEMA, index.spec)
        await backlog.open()
        window = await backlog.window(chance.randint(1, 20))
        await backlog.store({waiting.hash: vector_of(waiting.text) for waiting in window})

    async def settle(connection: Connection) -> None:
        settling = Settling(connection, SCHEMA, index.spec)
        nonlocal moved
        chunks = await settling.rested(KEYS, rest_s=0)
        try:
            count = await settling.settle(chance.sample(chunks, min(len(chunks), 8)))
        except psycopg.errors.LockNotAvailable:  # behind a TRUNCATE, which waits for the moves of others
            return
        moved += count

    async def look(connection: Connection) -> None:
        cursor = await connection.execute(
            "SELECT chunk_id FROM cdcsync.articles_vectors_1 GROUP BY chunk_id HAVING count(*) > 1"
        )
        doubled.extend(await cursor.fetchall())
        await connection.execute(
            "SELECT FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>) '[1,2,3]'::public.vector LIMIT 5"
        )

    async def vacuum(connection: Connection) -> None:
        await connection.execute("VACUUM cdcsync.articles_vectors_1")

    async with anyio.create_task_group() as tasks:
        for work in (embed, embed, settle, settle, settle, look, vacuum):
            tasks.start_soon(until_done, work)
        writer = IndexWriter(index.connection, SCHEMA, index.spec)
        await writer.open()
        there: set[str] = set()
        for _ in range(ROUNDS):
            keys = chance.sample([str(at) for at in range(KEYS)], 8)
            chosen = keys[: chance.randint(1, 6)]
            documents = [document(key, f"text {chance.randrange(TEXTS)}", existed=key in there) for key in chosen]
            written = {one.key[0] for one in documents}
            gone = [key for key in keys if key not in written and chance.random() < 0.3]
            truncated = chance.random() < 0.05
            inline = sorted({one.chunks[0].text for one in documents if chance.random() < 0.5})
            async with index.connection.transaction():
                if chance.random() < 0.3:
                    await discard_vectors(index.connection, SCHEMA, index.spec, [(key,) for key in keys])
                await writer.apply(
                    changes(*documents, deleted=[] if truncated else gone, inline=inline, truncated=truncated)
                )
            there = (set() if truncated else there - set(gone)) | written
            assert (
                await index.rows(
                    "SELECT 1 FROM {vectors} v WHERE NOT EXISTS (SELECT FROM {chunks} c WHERE c.chunk_id = v.chunk_id)"
                )
                == []
            )
        done.set()

    while await index.embed():
        pass
    assert moved > 0
    assert doubled == []
    assert await index.faults() == []
    assert {text: set(found) for text, found in (await index.embedded()).items()} == {
        text: {vector_text(text)} for (text,) in await index.rows("SELECT DISTINCT content FROM {chunks}")
    }
