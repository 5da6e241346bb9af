"""The internal consistency of an index: of all its generations of vectors that claim to be whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cdcsync.flows.audit import soundness
from cdcsync.flows.audit.soundness import Soundness, examine_chunks
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.generations import drop_relations
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.generations import Generations
from cdcsync.target.snapshots import hold_snapshot
from tests.support.exchanges import ConnectTarget, read_after_exchange
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    begin_generations,
    changes,
    document,
    live_index,
    two_generations,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def index(target: Database) -> AsyncIterator[LiveIndex]:
    """An index of three documents, with a second generation that has no vector and nothing that waits for one."""
    async with live_index(target, two_generations()) as live:
        await begin_generations(live)
        await live.apply(changes(*(document(key, f"text {key}") for key in "123"), inline=[f"text {i}" for i in "123"]))
        await live.rows("DELETE FROM {backlog} RETURNING 1")
        yield live


async def looked_at(index: LiveIndex) -> Soundness:
    return await examine_chunks(index.connection, SCHEMA, index.spec, -1, 100)


async def test_a_generation_that_is_being_filled_may_lack_vectors(index: LiveIndex) -> None:
    assert await looked_at(index) == Soundness({}, 0, 0, None, 3)


async def test_every_generation_that_is_ready_is_looked_at(index: LiveIndex) -> None:
    await Generations(SCHEMA).stamp(index.connection, "articles", 2, "ready_at")
    faults = (await looked_at(index)).faults
    assert {fault: sorted(keys) for fault, keys in faults.items()} == {"vector_missing": [("1",), ("2",), ("3",)]}

    await index.rows(
        "INSERT INTO cdcsync.articles_vectors_2_fresh (chunk_id, content_hash, embedding)"
        " SELECT chunk_id, CASE id WHEN '2' THEN '\\x00' ELSE content_hash END, '[1,2,3]'::public.vector FROM {chunks}"
        " UNION ALL SELECT 1000, '\\x00', '[1,2,3]'::public.vector RETURNING 1"
    )
    await index.rows(
        "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
        " SELECT 2, chunk_id, content_hash, 0 FROM {chunks} WHERE id = '3' RETURNING 1"
    )
    assert await looked_at(index) == Soundness({"vector_stale": [("2",)]}, 1, 1, None, 3)


@pytest.mark.parametrize("present", ["no vector", "the vector of an older text"])
async def test_a_text_that_was_given_up_has_failed_and_is_not_missing_its_vector(
    index: LiveIndex, present: str
) -> None:
    if present == "no vector":
        await index.rows("DELETE FROM cdcsync.articles_vectors_1 RETURNING 1")
    else:
        await index.rows("UPDATE cdcsync.articles_vectors_1 SET content_hash = '\\x00' RETURNING 1")
    await index.rows(
        "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane, attempts)"
        " SELECT 1, chunk_id, content_hash, 0, CASE id WHEN '2' THEN 8 ELSE 7 END FROM {chunks} RETURNING 1"
    )
    assert await looked_at(index) == Soundness({"failed": [("2",)]}, 2, 0, None, 3)


async def test_a_page_that_waited_for_an_exchange_of_tiers_has_no_vector_twice(
    index: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(connection: Connection) -> Soundness:
        return await examine_chunks(connection, SCHEMA, index.spec, -1, 100)

    rebuild = Rebuild(await connect_target(), SCHEMA, index.spec)
    sound = await read_after_exchange(monkeypatch, connect_target, rebuild, look)
    assert sound == await look(index.connection) == Soundness({}, 0, 0, None, 3)


async def test_a_generation_that_is_gone_by_now_is_left_out(index: LiveIndex) -> None:
    await Generations(SCHEMA).stamp(index.connection, "articles", 2, "ready_at")
    await drop_relations(index.connection, SCHEMA, index.spec, 2)
    await Generations(SCHEMA).remove(index.connection, "articles", 2)
    assert await looked_at(index) == Soundness({}, 0, 0, None, 3)


async def test_a_generation_that_is_to_be_filled_again_once_the_page_is_locked_may_lack_vectors(
    index: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Generations(SCHEMA).stamp(index.connection, "articles", 2, "ready_at")
    other = await connect_target()

    async def hold_later(*arguments: Any) -> None:
        await Generations(SCHEMA).begin_again(other, "articles", 2)
        await hold_snapshot(*arguments)

    monkeypatch.setattr(soundness, "hold_snapshot", hold_later)
    assert await looked_at(index) == Soundness({}, 0, 0, None, 3)
