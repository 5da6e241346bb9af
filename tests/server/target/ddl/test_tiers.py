"""The two tiers of vectors: what writers leave in them, and how searches through the view read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cdcsync.model.spec import Distance
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.ddl.names import OPERATORS
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def fill(index: LiveIndex, ids: Sequence[int]) -> None:
    texts = {at: f"text {at}" for at in ids}
    written = [document(str(at), text, carried=(str(at % 7),)) for at, text in texts.items()]
    await index.apply(changes(*written, inline=list(texts.values())))


async def settle(index: LiveIndex) -> int:
    settling = Settling(index.connection, SCHEMA, index.spec)
    return await settling.settle(await settling.rested(10_000, rest_s=0))


async def with_both(open_index: OpenIndex, **settings: object) -> LiveIndex:
    """Return an index with 3,000 settled vectors and 200 fresh ones."""
    index = await open_index(**settings)
    await fill(index, range(3_000))
    await settle(index)
    await build_hnsw(index.connection, SCHEMA, index.spec)
    await fill(index, range(3_000, 3_200))
    await index.connection.execute("ANALYZE")
    return index


async def plan(connection: Connection, query: str) -> str:
    cursor = await connection.execute(f"EXPLAIN {query}".encode())
    return "\n".join(row[0] for row in await cursor.fetchall())


@pytest.mark.proof_from(2)
@pytest.mark.parametrize(
    ("distance", "vector_type"),
    [("cosine", "vector"), ("l2", "vector"), ("inner_product", "vector"), ("cosine", "halfvec"), ("l2", "halfvec")],
)
async def test_a_search_through_the_view_merges_the_hnsw_index_with_a_sort_of_what_is_fresh(
    open_index: OpenIndex, distance: Distance, vector_type: str
) -> None:
    index = await with_both(open_index, distance=distance, vector_type=vector_type)

    ((definition,),) = await index.rows("SELECT pg_get_indexdef('cdcsync.articles_vectors_1_hnsw'::regclass)")
    found = await plan(
        index.connection,
        "SELECT id, content FROM public.articles_index"
        f" ORDER BY embedding OPERATOR(public.{OPERATORS[distance]}) '[1,200,3]'::public.{vector_type} LIMIT 10",
    )

    opclass = {"cosine": "cosine_ops", "l2": "l2_ops", "inner_product": "ip_ops"}[distance]
    assert f"ON cdcsync.articles_vectors_1_settled USING hnsw (embedding public.{vector_type}_{opclass})" in definition
    assert "Merge Append" in found
    assert "Index Scan using articles_vectors_1_hnsw" in found
    assert "Seq Scan on articles_vectors_1_settled" not in found
    assert "Seq Scan on articles_chunks" not in found


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id FROM public.articles_index WHERE tenant <> 3 ORDER BY {distance} LIMIT 10",
        "SELECT a.id FROM public.articles_index AS a JOIN public.tenants AS t ON t.id = a.tenant"
        " WHERE t.active ORDER BY a.{distance} LIMIT 10",
    ],
    ids=["filter", "join"],
)
async def test_filters_and_joins_keep_the_hnsw_index(open_index: OpenIndex, query: str) -> None:
    index = await with_both(open_index)
    await index.connection.execute(
        "CREATE TABLE public.tenants AS SELECT n AS id, n <> 3 AS active FROM generate_series(0, 6) AS n;"
        " ANALYZE public.tenants"
    )
    try:
        found = await plan(
            index.connection, query.format(distance="embedding OPERATOR(public.<=>) '[1,200,3]'::public.vector")
        )
    finally:
        await index.connection.execute("DROP TABLE public.tenants")

    assert "Merge Append" in found
    assert "Index Scan using articles_vectors_1_hnsw" in found
    assert "Seq Scan on articles_vectors_1_settled" not in found


async def test_a_search_through_the_view_does_not_sort_what_is_fresh_if_that_is_much(open_index: OpenIndex) -> None:
    index = await with_both(open_index)
    await fill(index, range(3_200, 8_000))
    await index.connection.execute("ANALYZE; SET work_mem = '64kB'")

    found = await plan(
        index.connection,
        "SELECT id FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>) '[1,200,3]'::public.vector"
        " LIMIT 10",
    )

    assert "Merge Append" in found
    assert "Index Scan using articles_vectors_1_fresh_near" in found
    assert "Index Scan using articles_vectors_1_hnsw" in found
    assert "Sort  " not in found


async def test_a_selective_filter_compares_the_few_rows_exactly_in_both_tiers(open_index: OpenIndex) -> None:
    index = await with_both(open_index, indexed=("tenant",), carried={"tenant": "integer"})
    await index.connection.execute("UPDATE cdcsync.articles_chunks SET tenant = id")
    await index.connection.execute("ANALYZE")

    found = await plan(
        index.connection,
        "SELECT id FROM public.articles_index WHERE tenant = 5"
        " ORDER BY embedding OPERATOR(public.<=>) '[1,200,3]'::public.vector LIMIT 10",
    )

    assert "articles_chunks_by_tenant" in found
    assert "articles_vectors_1_hnsw" not in found
    assert "articles_vectors_1_pkey" in found


async def test_a_search_finds_settled_and_fresh_vectors_in_one_order(open_index: OpenIndex) -> None:
    index = await with_both(open_index)
    query = (
        "SELECT id FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>)"
        " (SELECT embedding FROM public.articles_index WHERE id = 3001) LIMIT 100"
    )
    async with index.connection.transaction():
        await index.connection.execute("SET LOCAL hnsw.ef_search = 400")
        found = await index.rows(query)
        await index.connection.execute("SET LOCAL enable_indexscan = off")
        exactly = await index.rows(query)

    assert found[0] == (3001,)
    assert len({row for row in found} & {row for row in exactly}) >= 98
    assert any(key >= 3_000 for (key,) in found[1:])
    assert any(key < 3_000 for (key,) in found)


async def test_a_changed_text_leaves_the_settled_tier_once_and_stays_fresh_while_it_changes(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a", "b"]))
    assert await settle(index) == 2

    for version in range(5):
        await index.apply(changes(document("1", f"a{version}", existed=True), inline=[f"a{version}"]))

    tiers = "SELECT c.content, v.tier FROM {vectors} v JOIN {chunks} c USING (chunk_id) ORDER BY c.id"
    assert await index.rows(tiers) == [("a4", "fresh"), ("b", "settled")]
    assert await index.faults() == []


async def test_a_settled_vector_stays_searchable_as_stale_until_its_successor_is_there(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await settle(index)
    await index.apply(changes(document("1", "b", existed=True)))
    stale = "SELECT tier, stale FROM public.articles_index JOIN {chunks} c USING (id) JOIN {vectors} USING (chunk_id)"

    assert await index.rows(stale) == [("settled", True)]

    await index.embed()
    assert await index.rows(stale) == [("fresh", False)]


async def test_a_deleted_row_leaves_both_tiers(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a", "b"]))
    await settle(index)
    await index.apply(changes(document("3", "c"), inline=["c"]))

    await index.apply(changes(deleted=["1", "3"]))

    assert await index.rows("SELECT tier, content_hash IS NULL FROM {vectors}") == [("settled", False)]
    assert await index.faults() == []


async def test_truncate_empties_both_tiers(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await settle(index)
    await index.apply(changes(document("2", "b"), inline=["b"]))

    await index.apply(changes(truncated=True))

    assert await index.rows("SELECT FROM {vectors}") == []


async def test_a_vector_of_an_equal_text_is_taken_over_from_either_tier(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "settled"), inline=["settled"]))
    await settle(index)
    await index.apply(changes(document("2", "fresh"), inline=["fresh"]))

    applied = await index.apply(changes(document("3", "settled"), document("4", "fresh")))

    assert (applied.reused, applied.queued) == (2, 0)
    assert await index.faults() == []


async def test_an_insert_through_the_partitioned_table_goes_to_the_fresh_tier(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    await index.connection.execute(
        "INSERT INTO cdcsync.articles_vectors_1 (chunk_id, content_hash, embedding)"
        " SELECT chunk_id, content_hash, '[1,1,1]' FROM cdcsync.articles_chunks"
    )
    assert await index.rows("SELECT tier FROM {vectors}") == [("fresh",)]
