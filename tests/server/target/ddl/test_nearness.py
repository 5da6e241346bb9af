"""The nearest vectors as SQL: by HNSW and exactly, in both tiers and in the settled one alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdcsync.config.sections import Hnsw
from cdcsync.documents.templates import hash_text
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.ddl.nearness import PAGE_DEPTH, exactly_nearest, nearest
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ROWS, DIMENSIONS = 40, 16
VECTORS = np.random.default_rng(7).normal(size=(ROWS, DIMENSIONS)).round(3).astype(np.float32)
QUERY = VECTORS[3] + np.float32(0.01)


async def stored(index: LiveIndex, rows: range) -> None:
    texts = {at: f"text {at}" for at in rows}
    documents = [document(str(at), text, carried=(str(at % 2),)) for at, text in texts.items()]
    vectors = {hash_text(text): VECTORS[at] for at, text in texts.items()}
    await index.apply(msgspec.structs.replace(changes(*documents), vectors=vectors))


@pytest.fixture
async def index(target: Database, request: pytest.FixtureRequest) -> AsyncIterator[LiveIndex]:
    """An index of which the first half is settled, and the second fresh."""
    spec = make_spec(dimensions=DIMENSIONS, search=None, **getattr(request, "param", {}))
    async with live_index(target, spec) as index:
        await stored(index, range(ROWS // 2))
        settling = Settling(index.connection, SCHEMA, spec)
        await settling.settle(await settling.rested(ROWS, rest_s=0))
        await build_hnsw(index.connection, SCHEMA, spec)
        await stored(index, range(ROWS // 2, ROWS))
        yield index


async def found(index: LiveIndex, how: Any, limit: int, condition: str = "true", **options: bool) -> list[int]:
    """Return the keys that a statement finds, the nearest first."""
    statement = how(
        SCHEMA,
        sql.Identifier("public"),
        index.spec,
        vector=sql.SQL("$1"),
        limit=sql.SQL("$2"),
        rows=sql.SQL(" JOIN {} AS c USING (chunk_id) WHERE {}").format(index.names.chunks, sql.SQL(condition)),
        **options,
    )
    cursor = psycopg.AsyncRawCursor(index.connection)
    await cursor.execute(statement, [str(QUERY.tolist()), limit])
    places = [chunk for chunk, _ in await cursor.fetchall()]
    keys = dict(await index.rows("SELECT chunk_id, id FROM {chunks}"))
    return [keys[one] for one in places]


def by_hand(limit: int, distance: str = "cosine", rows: range = range(ROWS)) -> list[int]:
    match distance:
        case "l2":
            away = ((VECTORS - QUERY) ** 2).sum(1)
        case "inner_product":
            away = -(VECTORS @ QUERY)
        case _:
            away = -(VECTORS @ QUERY) / np.linalg.norm(VECTORS, axis=1)
    return sorted(rows, key=lambda at: away[at])[:limit]


KINDS: list[dict[str, Any]] = [
    {"distance": "cosine"},
    {"distance": "l2"},
    {"distance": "inner_product"},
    {"distance": "cosine", "vector_type": "halfvec"},
    {"distance": "cosine", "hnsw": Hnsw(quantise="binary")},
]


@pytest.mark.parametrize("index", KINDS, indirect=True, ids=str)
@pytest.mark.parametrize("how", [nearest, exactly_nearest])
async def test_what_is_nearest_is_found_in_both_tiers_and_in_the_settled_one_alone(index: LiveIndex, how: Any) -> None:
    distance = index.spec.distance
    assert await found(index, how, 5) == by_hand(5, distance)
    assert await found(index, how, 5, settled=True) == by_hand(5, distance, range(ROWS // 2))


@pytest.mark.parametrize("how", [nearest, exactly_nearest])
async def test_a_condition_holds_in_both_tiers(index: LiveIndex, how: Any) -> None:
    assert await found(index, how, 5, "c.tenant = 1") == by_hand(5, rows=range(1, ROWS, 2))


async def test_the_exact_statement_uses_no_index_of_distances(index: LiveIndex) -> None:
    await index.connection.execute("SET enable_seqscan = off")
    plans = {}
    for how in (nearest, exactly_nearest):
        statement = how(
            SCHEMA,
            sql.Identifier("public"),
            index.spec,
            vector=sql.Literal(str(QUERY.tolist())),
            limit=sql.SQL("5"),
            rows=sql.SQL(""),
        )
        cursor = await index.connection.execute(sql.SQL("EXPLAIN {}").format(statement))
        plans[how] = "\n".join(line for (line,) in await cursor.fetchall())
    assert "articles_vectors_1_hnsw" in plans[nearest]
    assert "_hnsw" not in plans[exactly_nearest]
    assert "_near" not in plans[exactly_nearest]


async def test_by_signs_more_candidates_are_compared_than_are_asked_for(index: LiveIndex) -> None:
    spec = make_spec(dimensions=DIMENSIONS, hnsw=Hnsw(quantise="binary"))
    statement = nearest(
        SCHEMA,
        sql.Identifier("public"),
        spec,
        vector=sql.SQL("$1"),
        limit=sql.SQL("$2"),
        rows=sql.SQL(""),
    )
    assert f"greatest($2, {PAGE_DEPTH})" in statement.as_string(index.connection)
