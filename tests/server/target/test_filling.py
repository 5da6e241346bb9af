"""Filling a generation beside whoever applies: each chunk gets one vector of its text, whoever was first."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import msgspec
import numpy as np
import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.flows.build import settle_all
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.locking import until_locked
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target import vectors
from cdcsync.target.backlog import Backlog
from cdcsync.target.filling import Filling, Stored
from cdcsync.target.generations import Generations
from cdcsync.target.keys import discard_vectors
from cdcsync.target.stage import FEW_ROWS
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    begin_generations,
    changes,
    document,
    live_index,
    make_spec,
    two_generations,
    until_blocked,
    vector_of,
    vector_text,
)

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


class Migration:
    """An index that is applied to, and its second generation that is filled."""

    def __init__(self, live: LiveIndex, connection: Connection, backlog: Backlog) -> None:
        self.live = live
        (self.spec,) = live.spec.others
        self.connection = connection
        self.backlog = backlog
        self.filling = Filling(connection, SCHEMA, self.spec, live.spec)

    async def store(self, page: list[Stored], *texts: str) -> bool:
        """Store a page, with the vectors of these texts."""
        vectors = {hash_text(text): vector_of(text) for text in texts}
        last = page[-1].chunk_id
        return await until_locked(lambda: self.filling.store(page, vectors, last), table="vectors")

    async def embed(self) -> int:
        """Do what the embed loop of the second generation does with one window."""
        window = await self.backlog.window(100)
        return await self.backlog.store({waiting.hash: vector_of(waiting.text) for waiting in window})

    async def vectors(self) -> dict[str, list[str]]:
        """Return the vectors of each chunk's text, in the second generation."""
        found: dict[str, list[str]] = {}
        for content, embedding in await self.live.rows(
            "SELECT c.content, v.embedding::text FROM {chunks} AS c LEFT JOIN cdcsync.articles_vectors_2 AS v"
            " ON v.chunk_id = c.chunk_id AND v.content_hash = c.content_hash"
        ):
            found.setdefault(content, []).append(embedding)
        return found

    async def strays(self) -> list[tuple[Any, ...]]:
        """Return vectors of the second generation that are of no chunk, or of a text that it no longer has."""
        return await self.live.rows(
            "SELECT v.chunk_id FROM cdcsync.articles_vectors_2 AS v WHERE NOT EXISTS (SELECT FROM {chunks} AS c"
            " WHERE c.chunk_id = v.chunk_id AND c.content_hash = v.content_hash) AND NOT EXISTS"
            " (SELECT FROM {backlog} AS b WHERE b.chunk_id = v.chunk_id AND b.generation = 2)"
        )


@pytest.fixture
async def migration(database: Database) -> AsyncIterator[Migration]:
    async with AsyncExitStack() as stack:
        live = await stack.enter_async_context(live_index(database, two_generations()))
        await begin_generations(live)
        connection, embedding = await connect(database.dsn, "target"), await connect(database.dsn, "target")
        for one in (connection, embedding):
            stack.push_async_callback(one.close)
        backlog = Backlog(embedding, SCHEMA, live.spec.others[0])
        await backlog.open()
        yield Migration(live, connection, backlog)


async def test_a_page_gives_vectors_to_some_chunks_and_queues_the_others(migration: Migration) -> None:
    await migration.live.apply(changes(document("1", "one"), document("2", "two"), inline=["one", "two"]))
    await migration.live.rows("DELETE FROM {backlog} WHERE generation = 2 RETURNING 1")  # as if it had begun later
    page = await migration.filling.page(0, 10)
    assert [one.text for one in page] == ["one", "two"]
    assert await migration.store(page, "one")
    assert await migration.filling.waiting(10) == 1
    assert await migration.filling.lacking() == 0
    assert await migration.embed() == 1
    assert await migration.vectors() == {"one": [vector_text("one")], "two": [vector_text("two")]}
    assert await migration.filling.page(page[-1].chunk_id, 10) == []
    (entry,) = [one for one in await Generations(SCHEMA).of(migration.connection, "articles") if one.generation == 2]
    assert (entry.cursor, entry.queued) == (page[-1].chunk_id, 2)


@pytest.mark.parametrize("page_first", [True, False])
@pytest.mark.parametrize("deleted", [True, False])
async def test_a_chunk_that_changes_while_its_page_is_under_way_keeps_no_vector_of_before(
    migration: Migration, page_first: bool, deleted: bool
) -> None:
    live = migration.live
    await live.apply(changes(document("1", "before"), inline=["before"]))
    await live.rows("DELETE FROM {backlog} WHERE generation = 2 RETURNING 1")
    page = await migration.filling.page(0, 10)
    change = changes(deleted=["1"]) if deleted else changes(document("1", "after", existed=True))
    if page_first:
        await migration.store(page, "before")
        await live.apply(change)
    else:
        async with anyio.create_task_group() as tasks, live.connection.transaction():
            await live.writer.apply(change)
            tasks.start_soon(migration.store, page, "before")
            await until_blocked(live.embedding, migration.connection)
    await migration.embed()
    assert await migration.vectors() == ({} if deleted else {"after": [vector_text("after")]})
    assert await migration.strays() == []


async def test_a_page_that_was_filled_before_changes_nothing(migration: Migration) -> None:
    """The place was noted, and what it gave has been replaced and settled since."""
    live = migration.live
    await live.apply(changes(document("1", "before"), inline=["before"]))
    await live.rows("DELETE FROM {backlog} WHERE generation = 2 RETURNING 1")
    page = await migration.filling.page(0, 10)
    assert await migration.store(page, "before")
    await live.apply(changes(document("1", "after", existed=True)))
    await migration.embed()
    await settle_all(live.embedding, SCHEMA, migration.spec)

    assert not await migration.store(page, "before")

    assert await migration.vectors() == {"after": [vector_text("after")]}
    (entry,) = [one for one in await Generations(SCHEMA).of(migration.connection, "articles") if one.generation == 2]
    assert (entry.cursor, entry.queued) == (page[-1].chunk_id, 1)


async def test_the_vectors_of_the_same_model_are_taken_over(database: Database) -> None:
    spec = two_generations(model="three-numbers")
    second = msgspec.structs.replace(
        spec.others[0], config=msgspec.structs.replace(spec.config, vector_type="halfvec"), distance="l2"
    )
    spec = msgspec.structs.replace(spec, others=(second,))
    async with live_index(database, spec) as live, await connect(database.dsn, "target") as connection:
        await begin_generations(live)
        await live.apply(changes(document("1", "one"), document("2", "two"), inline=["one"]))
        # What comes along with a change is of both.
        assert await live.rows("SELECT count(*) FROM cdcsync.articles_vectors_2") == [(1,)]
        await live.rows("DELETE FROM cdcsync.articles_vectors_2 RETURNING 1")
        await live.rows("DELETE FROM {backlog} WHERE generation = 2 RETURNING 1")
        filling = Filling(connection, SCHEMA, second, spec)
        page = await filling.page(0, 10)
        assert filling.takes_over
        assert await filling.take_over(page, page[-1].chunk_id)
        assert await live.rows("SELECT embedding::text FROM cdcsync.articles_vectors_2") == [(vector_text("one"),)]
        assert await filling.waiting(10) == 1


def in_two_precisions() -> IndexSpec:
    """Return an index whose second generation is of the same model, at half the precision."""
    spec = two_generations(model="three-numbers")
    halves = msgspec.structs.replace(spec.config, vector_type="halfvec")
    return msgspec.structs.replace(spec, others=(msgspec.structs.replace(spec.others[0], config=halves),))


async def in_each(live: LiveIndex, text: str) -> list[tuple[Any, ...]]:
    """Return how many chunks with a text have its vector in each generation, and how many wait in each."""
    return await live.rows(
        "SELECT g, (SELECT count(*) FROM (SELECT chunk_id, content_hash, 1 AS g, embedding::text FROM"
        " cdcsync.articles_vectors_1 UNION ALL SELECT chunk_id, content_hash, 2, embedding::text FROM"
        " cdcsync.articles_vectors_2) AS v (chunk_id, content_hash, of, embedding) JOIN {chunks} AS c"
        " USING (chunk_id, content_hash) WHERE v.of = g AND c.content = %s AND v.embedding = %s),"
        " (SELECT count(*) FROM {backlog} AS b WHERE b.generation = g) FROM generate_series(1, 2) AS g ORDER BY g",
        *(text, vector_text(text)),
    )


@pytest.mark.parametrize("vector", [[1e5, 1, 1], [1e-9, 1e-9, 0], None], ids=["too long", "too short", "too many"])
async def test_what_comes_along_with_a_change_is_stored_in_the_generations_that_can_hold_it(
    database: Database, vector: list[float] | None
) -> None:
    """Another one embeds the text by itself, and notes why it cannot have it."""
    spec = in_two_precisions()
    if vector is None:
        other = msgspec.structs.replace(spec.others[0], dimensions=4)
        spec, vector = msgspec.structs.replace(spec, others=(other,)), [1.0, 2.0, 3.0]
    async with live_index(database, spec) as live:
        await begin_generations(live)
        change = changes(document("1", "odd"), document("2", "one"), inline=["one"])
        odd = {hash_text("odd"): np.asarray(vector, np.float32)}
        await live.apply(msgspec.structs.replace(change, vectors={**change.vectors, **odd}))
        assert await live.rows("SELECT count(*) FROM cdcsync.articles_vectors_1") == [(2,)]
        waiting = "SELECT content FROM {backlog} JOIN {chunks} USING (chunk_id) WHERE generation = 2 ORDER BY 1"
        takes_one = spec.others[0].dimensions == spec.dimensions
        assert await live.rows(waiting) == ([("odd",)] if takes_one else [("odd",), ("one",)])
        assert await live.rows("SELECT count(*) FROM cdcsync.articles_vectors_2") == [(int(takes_one),)]


async def test_a_text_that_any_generation_of_the_model_has_a_vector_of_waits_in_none(database: Database) -> None:
    async with live_index(database, in_two_precisions()) as live:
        await begin_generations(live)
        await live.apply(changes(document("1", "one"), inline=["one"]))
        # As before the fill comes to it.
        await live.rows("DELETE FROM cdcsync.articles_vectors_2 RETURNING 1")
        applied = await live.apply(changes(document("2", "one")))
        assert (applied.reused, applied.queued, applied.beside) == (1, 0, 0)
        assert await in_each(live, "one") == [(1, 2, 0), (2, 1, 0)]


async def test_a_text_that_waits_in_two_generations_is_embedded_for_one(database: Database) -> None:
    spec = in_two_precisions()
    async with live_index(database, spec) as live, await connect(database.dsn, "target") as connection:
        await begin_generations(live)
        halves = Backlog(connection, SCHEMA, spec.others[0], spec.alike(spec.others[0]))
        await halves.open()
        exact = Backlog(live.embedding, SCHEMA, spec, spec.alike(spec))
        await exact.open()
        await live.apply(changes(document("1", "one"), document("2", "one"), document("3", "two")))
        assert await halves.take_over([hash_text("one"), hash_text("two")]) == set()
        await exact.store({hash_text("one"): vector_of("one")})
        assert await exact.take_over([hash_text("two")]) == set()
        assert await halves.take_over([hash_text("one"), hash_text("two")]) == {hash_text("one")}
        assert await in_each(live, "one") == [(1, 2, 1), (2, 2, 1)]
        # What somebody wants to have made again is not taken from where it is to be made again, too.
        async with live.connection.transaction():
            await discard_vectors(live.connection, SCHEMA, spec, [("1",), ("2",)])
        assert await halves.take_over([hash_text("one")]) == set()
        await exact.store({hash_text("one"): vector_of("one")})
        assert await halves.take_over([hash_text("one")]) == {hash_text("one")}
        assert await in_each(live, "one") == [(1, 2, 1), (2, 2, 1)]


@asynccontextmanager
async def beside(database: Database) -> AsyncIterator[list[tuple[LiveIndex, Backlog]]]:
    """Yield two indexes with other chunks for the same name, each with its backlog."""
    searched, hidden = make_spec(), make_spec(name="articles~other")
    pair = (msgspec.structs.replace(searched, beside=hidden), msgspec.structs.replace(hidden, beside=searched))
    async with AsyncExitStack() as stack:
        found = []
        for spec in pair:
            live = await stack.enter_async_context(live_index(database, spec))
            found.append((live, Backlog(live.embedding, SCHEMA, spec, spec.alike(spec))))
        for _, backlog in found:
            await backlog.open()
        yield found


async def test_a_text_that_waits_in_an_index_with_other_chunks_too_is_embedded_for_one(database: Database) -> None:
    async with beside(database) as ((searched, own), (hidden, other)):
        # Before either has a vector. What they have in common is the text, not the chunk's number.
        for live, number, lacking in ((searched, "7", "unlike"), (hidden, "8", "other")):
            await live.apply(changes(document(number, lacking)))
            await live.apply(changes(document("1", "one"), document("2", "one")))
        one = [hash_text("one")]
        assert [await backlog.take_over(one) for backlog in (own, other)] == [set(), set()]
        await own.store({hash_text("one"): vector_of("one")})
        assert await other.take_over([*one, hash_text("other")]) == set(one)
        for live, lacking in ((searched, "unlike"), (hidden, "other")):
            assert await live.rows(
                "SELECT content, embedding::text FROM {chunks} LEFT JOIN {vectors} USING (chunk_id, content_hash)"
                " ORDER BY content"
            ) == sorted([("one", vector_text("one"))] * 2 + [(lacking, None)])
            assert await live.rows("SELECT count(*) FROM {backlog}") == [(1,)]
        # What somebody wants to have made again here is not taken from where nobody wanted that, not even for a chunk
        # that nobody wanted it of: the text has one vector.
        async with hidden.connection.transaction():
            await discard_vectors(hidden.connection, SCHEMA, hidden.spec, [("1",)])
        await hidden.rows(
            "INSERT INTO {backlog} SELECT 1, chunk_id, content_hash, 0 FROM {chunks} WHERE id = 2 RETURNING 1"
        )
        assert await other.take_over(one) == set()
        assert await other.still_waiting(one) == set(one)


async def test_equal_texts_are_taken_over_at_a_cost_in_proportion_to_their_number(database: Database) -> None:
    async with beside(database) as ((searched, own), (hidden, other)):
        same = [document(str(number), "same") for number in range(300)]
        for live in (searched, hidden):
            await live.apply(changes(*same))
        await own.store({hash_text("same"): vector_of("same")})
        assert await other.take_over([hash_text("same")]) == {hash_text("same")}
        assert await hidden.rows("SELECT count(*) FROM {vectors}") == [(300,)]
        await hidden.embedding.execute("SELECT pg_stat_force_next_flush()")
        ((fetched,),) = await searched.rows(
            "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables"
            " WHERE relname = 'articles_vectors_1_fresh'"
        )
        assert fetched < 3_000


@pytest.mark.parametrize("table", ["vectors_1", "vectors_1_settled", "backlog"])
async def test_tables_beside_that_somebody_holds_are_not_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(vectors, "HELD_FOR_S", 0.0)
    async with beside(database) as ((searched, own), (hidden, _)), await connect(database.dsn, "target") as holder:
        await hidden.apply(changes(document("1", "one"), inline=["one"]))
        for connection in (searched.connection, searched.embedding):
            await connection.execute("SET lock_timeout = 1000")
        async with holder.transaction():
            await holder.execute(f'LOCK TABLE cdcsync."articles~other_{table}" IN ACCESS EXCLUSIVE MODE'.encode())
            assert await searched.writer.known_vectors([hash_text("one")]) == set()
            await searched.apply(changes(document("1", "one")))
            assert await own.take_over([hash_text("one")]) == set()
            assert await own.store({hash_text("one"): vector_of("one")}) == 1
            for more in (0, FEW_ROWS):
                await searched.apply(changes(document("1", "one")))
                gone = [str(number) for number in range(1, 2 + more)]
                assert (await searched.apply(changes(deleted=gone))).deleted == 1
                assert (await searched.apply(changes(absent=gone))).deleted == 0
        applied = await searched.apply(changes(document("2", "one", existed=False), document("3", "another")))
        assert (applied.reused, applied.queued) == (1, 1)


@pytest.mark.parametrize("vector", ["[70000, 1, 1]", "[1e-9, 0, 0]"])
async def test_a_vector_that_a_halfvec_cannot_hold_is_made_again_and_judged_then(
    database: Database, vector: str
) -> None:
    spec = in_two_precisions()
    async with live_index(database, spec) as live, await connect(database.dsn, "target") as connection:
        await begin_generations(live)
        await live.apply(changes(document("1", "one"), inline=["one"]))
        await live.rows("DELETE FROM cdcsync.articles_vectors_2 RETURNING 1")
        await live.rows("UPDATE {vectors} SET embedding = %s RETURNING 1", vector)
        await live.apply(changes(document("2", "one")))
        assert await live.rows("SELECT generation, count(*) FROM {backlog} GROUP BY generation") == [(2, 1)]
        filling = Filling(connection, SCHEMA, spec.others[0], spec)
        page = await filling.page(0, 10)
        assert await until_locked(lambda: filling.take_over(page, page[-1].chunk_id), table="vectors")
        assert await live.rows("SELECT generation, count(*) FROM {backlog} GROUP BY generation") == [(2, 2)]


def test_vectors_of_half_precision_cannot_become_exact_again() -> None:
    exact = make_spec()
    halves = msgspec.structs.replace(exact, config=msgspec.structs.replace(exact.config, vector_type="halfvec"))
    nobody: Any = None
    assert Filling(nobody, SCHEMA, halves, exact).takes_over
    assert not Filling(nobody, SCHEMA, exact, halves).takes_over


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(3))
async def test_a_generation_is_whole_after_a_fill_beside_random_changes(migration: Migration, seed: int) -> None:
    randomly = random.Random(seed)
    live, over = migration.live, anyio.Event()
    stored: set[str] = set()

    async def change() -> None:
        key, texts = (
            str(randomly.randrange(12)),
            [f"text {randomly.randrange(30)}" for _ in range(randomly.choice((1, 2)))],
        )
        if key in stored and randomly.random() < 0.25:
            stored.discard(key)
            await live.apply(changes(deleted=[key]))
        elif randomly.random() < 0.02:
            stored.clear()
            await live.apply(changes(truncated=True))
        else:
            inline = texts if randomly.random() < 0.5 else []
            await live.apply(changes(document(key, *texts, existed=key in stored), inline=inline))
            stored.add(key)

    async def applying() -> None:
        for _ in range(120):
            await change()
        over.set()

    async def embedding() -> None:
        while not over.is_set():
            await migration.embed()
            await live.embed()
            await anyio.lowlevel.checkpoint()

    for _ in range(20):
        await change()
    await live.rows("DELETE FROM {backlog} WHERE generation = 2 RETURNING 1")
    await live.rows("DELETE FROM cdcsync.articles_vectors_2 RETURNING 1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(applying)
        tasks.start_soon(embedding)
        cursor = 0
        while page := await migration.filling.page(cursor, 3):
            cursor = page[-1].chunk_id
            lacking = await migration.filling.without_vector(page)
            vectors: Mapping[bytes, Any] = {one.hash: vector_of(one.text) for one in lacking if randomly.random() < 0.5}
            await until_locked(lambda: migration.filling.store(lacking, vectors, cursor), table="vectors")  # noqa: B023
    assert await migration.filling.lacking() == 0
    while await migration.embed() or await live.embed():
        pass
    for text, found in (await migration.vectors()).items():
        assert set(found) == {vector_text(text)}
    assert await migration.strays() == []
    assert await live.rows("SELECT chunk_id FROM cdcsync.articles_vectors_2 GROUP BY 1 HAVING count(*) > 1") == []
    assert await live.rows("SELECT FROM {backlog}") == []


async def test_vectors_that_are_to_be_made_again_are_so_in_every_generation(migration: Migration) -> None:
    live = migration.live
    await live.apply(changes(document("1", "one"), document("2", "two"), inline=["one", "two"]))
    assert await migration.embed() == 2
    await live.rows("UPDATE {vectors} SET embedding = '[9,9,9]' RETURNING 1")
    await live.rows("UPDATE cdcsync.articles_vectors_2 SET embedding = '[9,9,9]' RETURNING 1")

    async with live.connection.transaction():
        assert await discard_vectors(live.connection, SCHEMA, live.spec, [("1",)]) == 2

    assert await live.rows("SELECT generation FROM {backlog} ORDER BY 1") == [(1,), (2,)]
    assert await migration.embed() == 1
    assert await migration.vectors() == {"one": [vector_text("one")], "two": ["[9,9,9]"]}
