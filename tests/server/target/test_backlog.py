"""The backlog: what is due and in which order, and that embedding and apply never undo each other's work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import numpy as np
import pytest

from cdcsync.backoff import MAX_DELAY_S
from cdcsync.documents.templates import hash_text
from cdcsync.model.changeset import BACKFILL, LIVE
from cdcsync.postgres.sessions import Connection
from cdcsync.target.backlog import ERROR_CHARACTERS, Backlog, BacklogCounts, Waiting
from cdcsync.target.ddl.relations import MAX_ATTEMPTS
from tests.support.clocks import set_back
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    OpenIndex,
    Waits,
    changes,
    document,
    make_spec,
    until_blocked,
    vector_of,
    vector_text,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def texts(backlog: Backlog, limit: int = 100, *, lane: int | None = None) -> list[str]:
    return [waiting.text for waiting in await backlog.window(limit, lane=lane)]


async def refuse_to_wait(connection: Connection) -> None:
    """Make whatever waits for a lock on this session fail instead."""
    await connection.execute("SET lock_timeout = '500ms'")


# -- what is due -----------------------------------------------------------------------------------------------------


async def test_live_texts_come_first_then_the_oldest(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "old 1", lane=BACKFILL), document("2", "old 2", lane=BACKFILL)))
    await index.apply(changes(document("3", "new 1", "new 2")))
    await index.apply(changes(document("4", "new 3")))

    assert await texts(index.backlog) == ["new 1", "new 2", "new 3", "old 1", "old 2"]
    assert await texts(index.backlog, 4) == ["new 1", "new 2", "new 3", "old 1"]
    assert await texts(index.backlog, lane=LIVE) == ["new 1", "new 2", "new 3"]
    assert await texts(index.backlog, lane=BACKFILL) == ["old 1", "old 2"]


async def test_texts_that_failed_finally_are_not_read_again_to_find_those_that_are_due(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await index.rows(
        "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane, attempts)"
        " SELECT generation, -n, '\\x00', 0, %s FROM {backlog}, generate_series(1, 20000) AS n RETURNING 1",
        MAX_ATTEMPTS,
    )
    await index.connection.execute("ANALYZE cdcsync.articles_backlog")
    async with index.embedding.transaction():
        assert await texts(index.backlog) == ["a"]
        assert [await index.backlog.due(lane=lane) for lane in (None, LIVE, BACKFILL)] == [True, True, False]
        cursor = await index.embedding.execute(
            "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relid = 'cdcsync.articles_backlog'::regclass"
        )
        ((in_sequence, by_index),) = await cursor.fetchall()
    assert in_sequence == 0
    assert by_index < 10


async def test_a_text_in_several_chunks_is_due_once(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b", lane=BACKFILL)))
    await index.apply(changes(document("2", "b", "b")))
    assert [(one.text, one.lane) for one in await index.backlog.window(100)] == [("b", LIVE), ("a", BACKFILL)]


async def test_a_text_comes_with_what_is_known_of_it(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", lsn=0x1_0000_00AB)))
    ((applied_at,),) = await index.rows("SELECT applied_at FROM {chunks}")
    assert await index.backlog.window(1) == [Waiting(hash_text("a"), "a", LIVE, 0, 0x1_0000_00AB, applied_at)]


async def test_a_window_is_bounded_by_its_texts_together_and_has_one_at_least(index: LiveIndex) -> None:
    await index.apply(changes(*(document(str(number), f"{number}" + "ä" * 99) for number in range(1, 6))))

    for most_bytes, expected in ((1, 1), (199, 1), (200, 2), (399, 3), (10_000, 5)):
        window = await index.backlog.window(100, most_bytes=most_bytes)
        assert [one.text[0] for one in window] == [str(number) for number in range(1, expected + 1)], most_bytes


async def test_the_window_shows_the_text_as_it_is_now(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await index.apply(changes(document("1", "b", existed=True)))
    assert await texts(index.backlog) == ["b"]


async def test_another_generation_has_a_backlog_of_its_own(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await index.apply(changes(document("1", "a")))
    other = Backlog(await connect_target(), SCHEMA, make_spec(generation=2))
    await other.open()
    assert await other.window(10) == []
    assert await other.counts() == BacklogCounts(0, 0, 0)
    assert await texts(index.backlog) == ["a"]


async def test_an_empty_backlog_has_nothing_due_and_nothing_to_store(index: LiveIndex) -> None:
    assert await index.backlog.window(10) == []
    assert await index.backlog.store({}) == 0
    assert await index.backlog.counts() == BacklogCounts(0, 0, 0)


# -- storing ---------------------------------------------------------------------------------------------------------


async def test_one_vector_serves_every_chunk_with_its_text(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), document("2", "a"), document("3", "a", lane=BACKFILL)))
    assert await index.backlog.store({hash_text("a"): vector_of("a")}) == 3
    assert await index.embedded() == {"a": [vector_text("a")] * 3}
    assert await index.waiting() == [Waits("b", LIVE, 0)]
    assert await index.faults() == []


async def test_a_vector_that_no_chunk_waits_for_is_not_stored(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    assert await index.backlog.store({hash_text("a"): vector_of("b"), hash_text("x"): vector_of("x")}) == 0
    assert await index.rows("SELECT embedding::text FROM {vectors}") == [(vector_text("a"),)]


async def test_a_vector_of_a_text_that_has_changed_meanwhile_is_not_stored(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    (waiting,) = await index.backlog.window(10)
    await index.apply(changes(document("1", "b", existed=True)))
    assert await index.backlog.store({waiting.hash: vector_of(waiting.text)}) == 0
    assert await index.waiting() == [Waits("b", LIVE, 0)]
    assert await index.faults() == []


async def test_a_stale_vector_is_replaced(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.apply(changes(document("1", "b", existed=True)))
    assert await index.embed() == 1
    assert await index.rows("SELECT embedding::text, content_hash FROM {vectors}") == [
        (vector_text("b"), hash_text("b"))
    ]


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
async def test_vectors_arrive_as_the_model_made_them(open_index: OpenIndex, vector_type: str) -> None:
    index = await open_index(vector_type=vector_type)
    await index.apply(changes(document("1", "a")))
    numbers = [0.1, -3.4028235e38, 1e-45] if vector_type == "vector" else [0.099975586, -65504, 5.9604645e-08]
    await index.backlog.store({hash_text("a"): np.array(numbers, dtype=np.float32)})
    ((stored,),) = await index.rows("SELECT embedding::text FROM {vectors}")
    assert [np.float32(number) for number in stored.strip("[]").split(",")] == [
        np.float32(number) for number in numbers
    ]


async def test_several_windows_are_stored_over_one_connection(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b", "c")))
    assert [await index.embed(1) for _ in range(4)] == [1, 1, 1, 0]
    assert await index.faults() == []


async def test_pgvector_may_live_in_any_schema(
    open_index: OpenIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    connection = await connect_target()
    await connection.execute("CREATE SCHEMA cdcsync; ALTER EXTENSION vector SET SCHEMA cdcsync")
    try:
        index = await open_index()
        await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
        assert await index.embed() == 1
        assert await index.faults() == []
    finally:
        await connection.execute("ALTER EXTENSION vector SET SCHEMA public")


# -- beside apply ----------------------------------------------------------------------------------------------------


async def test_chunks_that_apply_is_changing_are_skipped_and_not_waited_for(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await index.apply(changes(document("1", "a"), document("2", "a"), document("3", "a"), document("4", "b")))
    await refuse_to_wait(index.embedding)
    vectors = {hash_text("a"): vector_of("a"), hash_text("b"): vector_of("b")}
    async with index.connection.transaction():
        await index.writer.apply(changes(document("1", "c", existed=True), document("4", "b"), deleted=["2"]))
        assert await index.backlog.store(vectors) == 1

    assert await index.texts() == {("1",): ["c"], ("3",): ["a"], ("4",): ["b"]}
    assert await index.embedded() == {"a": [vector_text("a")]}
    assert await index.waiting() == [Waits("c", LIVE, 0), Waits("b", LIVE, 0)]
    assert await index.faults() == []
    # What was skipped is still due, and its vector still fits.
    assert await index.backlog.store(vectors) == 1
    assert await index.faults() == []


async def test_chunks_that_apply_changes_and_rolls_back_are_due_again(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await refuse_to_wait(index.embedding)
    async with index.connection.transaction(force_rollback=True):
        await index.writer.apply(changes(document("1", "b", existed=True)))
        assert await index.embed() == 0
    assert await index.embed() == 1
    assert await index.embedded() == {"a": [vector_text("a")]}


async def test_apply_waits_for_vectors_that_are_being_stored_and_has_the_last_word(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """The embed loop holds both backlog rows and has not yet written a vector: so it never waits for apply."""
    await index.apply(changes(document("1", "a"), document("2", "b")))
    embedding, watching = await connect_target(), await connect_target()
    await refuse_to_wait(embedding)

    async def apply() -> None:
        await index.apply(changes(document("1", "c", existed=True), deleted=["2"]))

    async with anyio.create_task_group() as tasks, embedding.transaction():
        await embedding.execute("SELECT FROM cdcsync.articles_backlog FOR UPDATE")
        tasks.start_soon(apply)
        await until_blocked(watching, index.connection)
        await embedding.execute(
            "INSERT INTO cdcsync.articles_vectors_1"
            " SELECT chunk_id, content_hash, '[1,1,1]'::public.vector FROM cdcsync.articles_chunks"
        )
        await embedding.execute("DELETE FROM cdcsync.articles_backlog")

    assert await index.texts() == {("1",): ["c"]}
    assert await index.rows("SELECT content_hash FROM {vectors}") == [(hash_text("a"),)]
    assert await index.waiting() == [Waits("c", LIVE, 0)]
    assert await index.faults() == []


async def test_two_embed_loops_share_the_work(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """As when a worker takes over while its predecessor's last statement still runs."""
    await index.apply(changes(document("1", "a"), document("2", "b")))
    other = await connect_target()
    await refuse_to_wait(index.embedding)
    async with other.transaction():
        await other.execute("SELECT FROM cdcsync.articles_backlog WHERE content_hash = %s FOR UPDATE", [hash_text("a")])
        assert await index.embed() == 1
    assert await index.embedded() == {"b": [vector_text("b")]}
    assert await index.faults() == []


async def test_a_transaction_from_before_the_clock_went_back_counts_as_open_for_a_while(
    index: LiveIndex, target: Database, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    other = await connect_target()
    async with other.transaction():
        await other.execute("SELECT FROM cdcsync.articles_backlog FOR UPDATE")
        await set_back(index.embedding, target)
        held = await index.backlog.row_lockers()
    assert held
    assert all(f"pid {other.info.backend_pid}" in str(one) for one in held)


# -- failures --------------------------------------------------------------------------------------------------------


async def test_a_postponed_text_is_due_after_its_delay_and_keeps_its_error(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "a"), document("3", "b")))

    await index.backlog.postpone([hash_text("a")], "no such tongue", delay_s=MAX_DELAY_S)

    assert await texts(index.backlog) == ["b"]
    assert (
        await index.rows(
            "SELECT attempts, error, next_attempt_at - now() BETWEEN '1 s' AND make_interval(secs => %s) FROM {backlog}"
            " WHERE error IS NOT NULL",
            MAX_DELAY_S,
        )
        == [(1, "no such tongue", True)] * 2
    )
    assert await index.backlog.counts() == BacklogCounts(3, 0, 0)

    await index.backlog.postpone([hash_text("a")], "again", delay_s=0)
    assert [(one.text, one.attempts) for one in await index.backlog.window(10)] == [("a", 2), ("b", 0)]
    assert [one.text for one in await index.backlog.window(10, failed=False)] == ["b"]
    assert [one.text for one in await index.backlog.window(10, without=[hash_text("b")])] == ["a"]


@pytest.mark.parametrize(("attempts", "ahead_s", "due"), [(0, 1, True), (1, MAX_DELAY_S / 2, False), (1, 3600, True)])
async def test_a_text_waits_no_longer_than_the_longest_pause_though_the_clock_went_back(
    index: LiveIndex, attempts: int, ahead_s: float, due: bool
) -> None:
    await index.apply(changes(document("1", "a")))
    await index.rows(
        "UPDATE {backlog} SET attempts = %s, next_attempt_at = now() + make_interval(secs => %s) RETURNING 1",
        attempts,
        ahead_s,
    )
    assert (await texts(index.backlog) == ["a"]) is due
    assert await index.backlog.due() is due


async def test_a_text_fails_for_good_after_so_many_attempts_or_at_once(index: LiveIndex) -> None:
    await index.apply(
        changes(document("1", "a"), document("2", "b", lane=BACKFILL), document("3", "c"), document("4", "d"))
    )
    for attempt in range(MAX_ATTEMPTS):
        assert await index.backlog.counts() == BacklogCounts(3, 1, 0), attempt
        await index.backlog.postpone([hash_text("a")], "hopeless", delay_s=0)
    await index.backlog.postpone([hash_text("b"), hash_text("c")], "refused", delay_s=0, final=True)

    assert await texts(index.backlog) == ["d"]
    assert await index.backlog.counts() == BacklogCounts(1, 0, 3)


async def test_a_text_that_failed_is_tried_again_once_it_changes(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await index.backlog.postpone([hash_text("a")], "refused", delay_s=0, final=True)
    await index.apply(changes(document("1", "b", existed=True)))
    assert await index.rows("SELECT attempts, error FROM {backlog}") == [(0, None)]
    assert await texts(index.backlog) == ["b"]


async def test_a_long_error_is_cut(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await index.backlog.postpone([hash_text("a")], "x" * 10_000, delay_s=1)
    assert await index.rows("SELECT length(error) FROM {backlog}") == [(ERROR_CHARACTERS,)]


async def test_postponing_skips_what_apply_is_changing(index: LiveIndex) -> None:
    """Waiting there, with another chunk of the text locked already, could end in a circle with apply."""
    await index.apply(changes(document("1", "a"), document("2", "a")))
    await refuse_to_wait(index.embedding)
    async with index.connection.transaction():
        await index.writer.apply(changes(deleted=["1"]))
        await index.backlog.postpone([hash_text("a")], "too long", delay_s=0)
    assert await index.waiting() == [Waits("a", LIVE, 1)]
