"""The search function as it is created and upgraded, with objects of users that depend on it."""

from __future__ import annotations

import pytest

from cdcsync.target.ddl import search_function
from cdcsync.target.ddl.relations import create_index_relations
from tests.support.indexes import SCHEMA, live_index, make_spec
from tests.support.searching import SHELF, filled, find
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_function_of_an_earlier_definition_is_replaced(
    target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    defined = "SELECT prosrc LIKE '%visited >= 77;%' FROM pg_proc WHERE proname = 'articles_search'"
    with monkeypatch.context() as earlier:
        earlier.setattr(search_function, "VISITS", 77)
        async with live_index(target, make_spec()) as index:
            assert await index.rows(defined) == [(True,)]
    async with live_index(target, make_spec()) as index:
        assert await index.rows(defined) == [(False,)]
        await filled(index, SHELF)
        assert await find(index.connection, "hums") == ["3"]


async def test_a_column_that_is_added_comes_to_the_function_and_views_on_it_stay(target: Database) -> None:
    spec = make_spec()
    async with live_index(target, spec) as index:
        await filled(index, SHELF)
        await index.connection.execute(
            "CREATE VIEW cdcsync.own AS SELECT id, tenant FROM cdcsync.articles_search('hums')"
        )
        more = make_spec(carried={"tenant": "integer", "place": "text"})
        async with index.connection.transaction():
            await create_index_relations(index.connection, SCHEMA, more)
        cursor = await index.connection.execute("SELECT id, place FROM cdcsync.articles_search('hums')")
        assert await cursor.fetchall() == [(3, None)]
        cursor = await index.connection.execute("SELECT * FROM cdcsync.own")
        assert await cursor.fetchall() == [(3, 1)]
        # Another type cannot be had while the view is there: hits keep the type that they had, and can be searched.
        other = make_spec(carried={"tenant": "bigint", "place": "text"})
        async with index.connection.transaction():
            await create_index_relations(index.connection, SCHEMA, other)
        cursor = await index.connection.execute("SELECT * FROM cdcsync.own")
        assert await cursor.fetchall() == [(3, 1)]
        # A value that their type cannot have is NULL, rather than an error of every search that finds its row.
        await index.connection.execute("UPDATE cdcsync.articles_chunks SET tenant = 1::bigint << 40 WHERE id = 3")
        cursor = await index.connection.execute("SELECT * FROM cdcsync.own")
        assert await cursor.fetchall() == [(3, None)]
