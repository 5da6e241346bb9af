"""The tool server's role may read what serving needs, on tables that are created later too, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from psycopg import sql

from cdcsync.target.ddl.generations import create_generations
from cdcsync.target.ddl.searching import create_words
from cdcsync.target.ddl.serving import grant_serving
from tests.support.indexes import SCHEMA, LiveIndex, begin_generations, live_index, make_spec, two_generations
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SHARED = {"indexes", "pipelines", "generations"}
LIVE = {"articles_chunks", "articles_vectors_1", "articles_vectors_1_fresh", "articles_vectors_1_settled"}
OTHER = {"articles_vectors_2", "articles_vectors_2_fresh", "articles_vectors_2_settled"}


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role whose name needs quotation marks; it goes after the test."""
    name = f'cdcsync "test", {secrets.token_hex(4)}'
    database.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield name
    database.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


async def readable(live: LiveIndex, role: str) -> set[str]:
    cursor = await live.connection.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'cdcsync'::regnamespace AND relkind IN ('r', 'p', 'v')"
        " AND has_table_privilege(%s, oid, 'SELECT') AND has_schema_privilege(%s, relnamespace, 'USAGE')",
        [role, role],
    )
    return {name for (name,) in await cursor.fetchall()}


async def test_of_a_new_index_the_role_may_read_its_tables_and_of_the_others_three(
    database: Database, role: str
) -> None:
    async with live_index(database, make_spec(search="english")) as live:
        await live.connection.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA cdcsync FROM PUBLIC")
        for absent in (None, "nobody of that name"):
            await grant_serving(live.connection, SCHEMA, live.spec, absent, new=True)
        assert await readable(live, role) == set()
        for _ in range(2):
            await grant_serving(live.connection, SCHEMA, live.spec, role, new=True)
        assert await readable(live, role) == SHARED | LIVE | {"articles_words"}
        cursor = await live.connection.execute(
            "SELECT has_table_privilege(%s, 'cdcsync.calls', 'INSERT'),"
            " has_column_privilege(%s, 'cdcsync.calls', 'query', 'SELECT')",
            [role, role],
        )
        assert await cursor.fetchone() == (True, False)
        cursor = await live.connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'cdcsync'::regnamespace"
            " AND has_function_privilege(%s, oid, 'EXECUTE')",
            [role],
        )
        assert {name for (name,) in await cursor.fetchall()} == {"articles_search", "standing", "wait_for"}


async def test_a_role_that_may_not_read_the_chunks_of_an_index_is_granted_nothing_of_it(
    database: Database, role: str
) -> None:
    async with live_index(database, make_spec(search="english")) as live:
        await grant_serving(live.connection, SCHEMA, live.spec, role, new=False)
        assert await readable(live, role) == set()


async def test_a_role_that_may_read_the_chunks_may_read_the_tables_that_are_added(
    database: Database, role: str
) -> None:
    async with live_index(database, make_spec(search=None)) as live:
        await grant_serving(live.connection, SCHEMA, live.spec, role, new=True)
        searched = make_spec(search="english")
        await create_words(live.connection, SCHEMA, searched)
        assert await readable(live, role) == SHARED | LIVE
        await grant_serving(live.connection, SCHEMA, searched, role, new=False)
        assert await readable(live, role) == SHARED | LIVE | {"articles_words"}


async def test_who_may_read_the_vectors_may_read_both_tiers_of_another_generation(
    database: Database, role: str
) -> None:
    """The worker need not know the role."""
    async with live_index(database, two_generations()) as live:
        for table in LIVE:
            grant = sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {0}; GRANT SELECT ON cdcsync.{1} TO {0}")
            await live.connection.execute(grant.format(sql.Identifier(role), sql.Identifier(table)))
        await begin_generations(live)
        assert await readable(live, role) == LIVE | OTHER
        await live.connection.execute("DROP TABLE cdcsync.articles_vectors_2 CASCADE")
        await create_generations(live.connection, SCHEMA, live.spec)
        assert await readable(live, role) == LIVE | OTHER


async def test_vectors_that_would_open_what_an_operator_guards_are_not_granted(database: Database, role: str) -> None:
    async with live_index(database, two_generations()) as live:
        granted = SHARED | LIVE | OTHER | {"articles_words"}
        await live.connection.execute("ALTER TABLE cdcsync.articles_vectors_1 ENABLE ROW LEVEL SECURITY")
        await begin_generations(live)
        for new in (True, False):
            await grant_serving(live.connection, SCHEMA, live.spec, role, new=new)
            assert await readable(live, role) == granted - {"articles_vectors_2"}
        await live.connection.execute("ALTER TABLE cdcsync.articles_vectors_2 ENABLE ROW LEVEL SECURITY")
        await grant_serving(live.connection, SCHEMA, live.spec, role, new=False)
        assert await readable(live, role) == granted
