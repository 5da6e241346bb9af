"""The search function as it is created and upgraded, with objects of users that depend on it."""

from __future__ import annotations

import pytest

from cdcsync.target.ddl import search_function
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.searching import put_search, search_outdated
from tests.support.indexes import SCHEMA, changes, document, live_index, make_spec
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


RENAMES = {
    "pgvector was moved": "ALTER EXTENSION vector SET SCHEMA attic",
    "a type was renamed": "ALTER TYPE public.status RENAME TO state",
    "a type was moved": "ALTER TYPE public.status SET SCHEMA attic",
    "the key's type was moved": "ALTER EXTENSION citext SET SCHEMA attic",
}


@pytest.mark.parametrize("change", RENAMES)
async def test_a_function_that_knows_a_type_by_an_earlier_name_is_outdated(
    lone_database: Database, change: str
) -> None:
    lone_database.execute("CREATE SCHEMA attic; CREATE TYPE public.status AS ENUM ('open', 'done')")
    lone_database.execute("CREATE EXTENSION citext SCHEMA public")
    key, carried = {"name": "public.citext"}, {"status": "public.status"}
    async with live_index(lone_database, make_spec(key=key, carried=carried)) as index:
        connection = index.connection
        await index.apply(changes(document("Ann", "it hums", carried=("open",)), inline=["it hums"]))
        assert not await search_outdated(connection, SCHEMA, index.spec)
        lone_database.execute(RENAMES[change])

        assert await search_outdated(connection, SCHEMA, index.spec)

        cursor = await connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = 'cdcsync.articles_chunks'::regclass AND attname IN ('name', 'status')"
        )
        now: dict[str, str] = dict(await cursor.fetchall())
        renamed = make_spec(key={"name": now["name"]}, carried={"status": now["status"]})
        assert await put_search(connection, SCHEMA, renamed)
        assert not await search_outdated(connection, SCHEMA, renamed)
        cursor = await connection.execute(
            "SELECT content FROM cdcsync.articles_search('hums', '[1,1,1]', filter => '{\"status\": \"open\"}')"
        )
        assert await cursor.fetchall() == [("it hums",)]


async def test_a_function_that_is_not_there_or_cannot_be_replaced_is_not_outdated(target: Database) -> None:
    async with live_index(target, make_spec()) as index:
        await index.connection.execute("COMMENT ON FUNCTION cdcsync.articles_search IS 'of our own'")
        assert await search_outdated(index.connection, SCHEMA, index.spec)
        await index.connection.execute("DROP FUNCTION cdcsync.articles_search")
        assert not await search_outdated(index.connection, SCHEMA, index.spec)
        # As in earlier versions.
        await index.connection.execute(
            "CREATE FUNCTION cdcsync.articles_search(query text) RETURNS void LANGUAGE sql AS ''"
        )
        assert not await search_outdated(index.connection, SCHEMA, index.spec)
