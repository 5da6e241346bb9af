"""The search by vector alone, which recall is measured with."""

from __future__ import annotations

import psycopg
import pytest

from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.search import nearest_statement, tune
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, vector_text

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_condition_and_a_line_comment_at_its_end_stay_a_condition(index: LiveIndex) -> None:
    await index.apply(changes(*(document(str(at), f"text {at}", carried=(str(at % 2),)) for at in range(8)), inline=[]))
    await index.embed()
    raw = psycopg.AsyncRawCursor(index.connection)
    for exact in (True, False):
        statement = nearest_statement(SCHEMA, "public", index.spec, "tenant = 1 -- odd ones", exact=exact)
        await raw.execute(statement, [vector_text("text 3"), 10])
        found = [chunk for chunk, _ in await raw.fetchall()]
        odd = await index.rows("SELECT chunk_id FROM {chunks} WHERE tenant = 1")
        assert sorted(found) == sorted(chunk for (chunk,) in odd)


async def test_how_far_a_search_looks_holds_for_its_transaction(index: LiveIndex) -> None:
    settings = "SELECT current_setting(%s, true)"
    names = ("hnsw.ef_search", "hnsw.iterative_scan", "search_path")
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await Settling(index.connection, SCHEMA, index.spec).settle(
        await Settling(index.connection, SCHEMA, index.spec).rested(1, rest_s=0)
    )
    await build_hnsw(index.connection, SCHEMA, index.spec)  # which has the server load pgvector
    before = [(await index.rows(settings, name))[0][0] for name in names]
    async with index.connection.transaction():
        await tune(index.connection, 123, filtered=True)
        during = [(await index.rows(settings, name))[0][0] for name in names]
    assert during[:2] == ["123", "relaxed_order"]
    assert "public" in during[2]
    assert [(await index.rows(settings, name))[0][0] for name in names] == before
