"""The tool server's role may read what serving needs, on tables that are created later too, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.target.ddl.generations import create_generations
from cdcsync.target.ddl.searching import create_words
from cdcsync.target.ddl.serving import grant_serving, require_schemas
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    begin_generations,
    changes,
    document,
    live_index,
    make_spec,
    two_generations,
)
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


SCATTERED = """
CREATE SCHEMA "the shop"; CREATE TYPE "the shop".status AS ENUM ('open', 'done');
CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions
"""

FILTERED: LiteralString = (
    "SELECT FROM cdcsync.articles_search('a', '[1,1,1]', filter => '{\"status\": [\"open\"], \"id\": 1}')"
)


async def test_the_role_may_use_the_schemas_that_searches_name_or_is_told_the_grant(
    lone_database: Database,
) -> None:
    lone_database.execute(SCATTERED)
    role = f"serving_{secrets.token_hex(4)}"
    spec = make_spec(carried={"status": '"the shop".status'})
    async with live_index(lone_database, spec) as live:
        await live.apply(changes(document("1", "a", carried=("open",)), inline=["a"]))
        await live.connection.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdcsync TO {role}")
        await live.connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {role}; SET ROLE {role}")
        with pytest.raises(SetupError) as refused:
            await require_schemas(live.connection, SCHEMA, spec)
        assert refused.value.hint == f'GRANT USAGE ON SCHEMA extensions, "the shop" TO {role}'
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await live.connection.execute(FILTERED)

        await live.connection.execute("RESET ROLE")
        await grant_serving(live.connection, SCHEMA, spec, role, new=True)

        await live.connection.execute(f"SET ROLE {role}")
        await require_schemas(live.connection, SCHEMA, spec)
        assert (await live.connection.execute(FILTERED)).rowcount == 1


async def test_a_search_without_a_filter_needs_no_schema_of_a_columns_type(database: Database, role: str) -> None:
    granted = sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {0}; GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {0}")
    database.execute("CREATE SCHEMA shop; CREATE TYPE shop.status AS ENUM ('open', 'done')")
    async with live_index(database, make_spec(carried={"status": "shop.status"})) as live:
        await live.apply(changes(document("1", "it hums", carried=("open",))))
        await live.connection.execute(granted.format(sql.Identifier(role)))
        await live.connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        cursor = await live.connection.execute("SELECT status::text FROM cdcsync.articles_search('hums')")
        assert await cursor.fetchall() == [("open",)]
