"""The view of all chunks, also of those that have no vector yet."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.indexes import (
    LiveIndex,
    changes,
    document,
    live_index,
    make_spec,
)
from tests.support.relations import create
from tests.support.searching import SHELF, filled
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_whoever_may_read_the_view_of_chunks_still_may_when_a_column_has_another_type(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.connection.execute("GRANT SELECT ON public.articles_index_chunks TO PUBLIC")
    await create(index.connection, make_spec(carried={"tenant": "bigint"}, search=None))
    assert await index.rows(
        "SELECT id, pg_typeof(tenant)::text,"
        " has_table_privilege('pg_monitor', 'public.articles_index_chunks', 'SELECT') FROM public.articles_index_chunks"
    ) == [(1, "bigint", True)]


@pytest.fixture
async def articles(target: Database) -> AsyncIterator[LiveIndex]:
    async with live_index(target, make_spec()) as index:
        yield index


async def test_chunks_without_a_vector_are_in_the_view_of_chunks(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    cursor = await articles.connection.execute(
        "SELECT id FROM public.articles_index_chunks WHERE search @@ to_tsquery('english', 'hums')"
    )
    assert await cursor.fetchall() == [(3,)]
    cursor = await articles.connection.execute("SELECT count(*) FROM public.articles_index")
    assert await cursor.fetchone() == (0,)
