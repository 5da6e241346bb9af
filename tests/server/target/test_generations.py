"""The table of generations, and what a generation says of an index."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.config.sections import Hnsw
from cdcsync.postgres.sessions import Connection
from cdcsync.target.generations import Generation, Generations
from tests.support import relations
from tests.support.indexes import SCHEMA, make_spec

pytestmark = [pytest.mark.server, pytest.mark.anyio]

GENERATIONS = Generations(SCHEMA)
FIRST = Generation.of(make_spec(), "ready")
SECOND = msgspec.structs.replace(FIRST, generation=2, model="another", state="filling", max_rows_per_s=50)


@pytest.fixture
async def registered(connection: Connection) -> Connection:
    """A session on a target that has an index with two generations."""
    await relations.registered(connection)
    for one in (SECOND, FIRST):
        await GENERATIONS.add(connection, one)
    return connection


async def test_before_the_first_start_there_are_none(connection: Connection) -> None:
    assert await GENERATIONS.all(connection) == {}
    assert await GENERATIONS.of(connection, "articles") == []


async def test_generations_come_back_in_the_order_of_their_numbers(registered: Connection) -> None:
    first, second = await GENERATIONS.of(registered, "articles")
    assert (first.generation, first.made_by) == (1, FIRST.made_by)
    assert (second.generation, second.made_by, second.max_rows_per_s) == (2, SECOND.made_by, 50)
    assert await GENERATIONS.all(registered) == {"articles": [first, second]}
    await GENERATIONS.remove(registered, "articles", 1)
    assert await GENERATIONS.of(registered, "articles") == [second]


async def test_a_fill_moves_forward_only_and_ends_with_the_request_to_drop_it(registered: Connection) -> None:
    assert await GENERATIONS.advance(registered, "articles", 2, cursor=100, chunks=40)
    (_, second) = await GENERATIONS.of(registered, "articles")
    assert second.cursor == 100
    await GENERATIONS.begin_again(registered, "articles", 2)
    (_, second) = await GENERATIONS.of(registered, "articles")
    assert second.cursor == 0
    await GENERATIONS.limit(registered, "articles", 2, None)
    await GENERATIONS.drop_asked(registered, "articles", 2)
    assert not await GENERATIONS.advance(registered, "articles", 2, cursor=200, chunks=40)
    (_, second) = await GENERATIONS.of(registered, "articles")
    assert (second.state, second.max_rows_per_s, second.cursor) == ("dropping", None, 0)


@pytest.mark.parametrize(("asked_of", "stays"), [(1, "ready"), (2, "filling")])
async def test_a_refusal_stays_until_it_is_asked_again_and_is_no_reason_of_a_fill(
    registered: Connection, asked_of: int, stays: str
) -> None:
    async def of(generation: int) -> tuple[str, str | None, str | None]:
        one = (await GENERATIONS.of(registered, "articles"))[generation - 1]
        return one.state, one.refusal, one.reason

    await GENERATIONS.note_reason(registered, "articles", asked_of, "no memory")
    await GENERATIONS.drop_asked(registered, "articles", asked_of)
    assert await of(asked_of) == ("dropping", None, None)
    await GENERATIONS.refuse(registered, "articles", asked_of, "a view depends on it", drop=True)
    assert await of(asked_of) == (stays, "a view depends on it", None)
    await GENERATIONS.note_reason(registered, "articles", asked_of, "no memory")
    await GENERATIONS.advance(registered, "articles", asked_of, cursor=100, chunks=40)
    await GENERATIONS.stamp(registered, "articles", asked_of, "ready_at")
    assert await of(asked_of) == ("ready", "a view depends on it", None)

    await GENERATIONS.activation_asked(registered, "articles", asked_of)
    assert await of(asked_of) == ("ready", None, None)
    await GENERATIONS.refuse(registered, "articles", asked_of, "a dump reads it", drop=False)
    assert await of(asked_of) == ("ready", "a dump reads it", None)
    await GENERATIONS.drop_asked(registered, "articles", asked_of)
    # An activation that was tried until then must not overwrite the request to drop.
    await GENERATIONS.refuse(registered, "articles", asked_of, "a dump reads it", drop=False)
    assert await of(asked_of) == ("dropping", None, None)
    await GENERATIONS.refuse(registered, "articles", asked_of, "a dump reads it", drop=True)
    await GENERATIONS.stamp(registered, "articles", asked_of, "live_at")
    assert await of(asked_of) == ("ready", None, None)


def test_an_index_with_another_generation_has_its_vectors_and_its_graph() -> None:
    spec = make_spec(hnsw=Hnsw(m=8, ef_construction=32), distance="l2")
    other = msgspec.structs.replace(
        Generation.of(spec, "ready"),
        **{"generation": 2, "model": "another", "dimensions": 5, "vector_type": "halfvec", "m": 24},
    )
    found = other.spec(spec)
    assert (found.generation, found.model, found.dimensions, found.vector_type) == (2, "another", 5, "halfvec(5)")
    assert (found.config.hnsw.m, found.config.hnsw.ef_construction) == (24, 32)
    assert other.built_like(found.config.hnsw)
    assert not other.built_like(spec.config.hnsw)
    assert found.shape == spec.shape
