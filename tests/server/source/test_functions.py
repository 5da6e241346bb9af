"""The functions that conditions call: found without waiting for the tables that anybody's functions read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.functions import functions_called
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

CONDITION = "public.wanted(status)"

LAYOUT = """
    CREATE SCHEMA other; CREATE SCHEMA odd;
    CREATE TABLE other.settings (word text);
    CREATE FUNCTION other.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT s <> 'spam' $$;
    CREATE FUNCTION odd.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT true $$;
    CREATE FUNCTION other.near(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT a = b $$;
    CREATE OPERATOR other.<~> (FUNCTION = other.near, LEFTARG = text, RIGHTARG = text);
    CREATE FUNCTION other.checked(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT s <> '' $$;
    CREATE DOMAIN other.word AS text CHECK (other.checked(VALUE));
    CREATE FUNCTION other.fallback() RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'x'::text $$;
    CREATE FUNCTION public.wanted(s text, d text DEFAULT other.fallback()) RETURNS boolean STABLE BEGIN ATOMIC
        SELECT other.inner_one(s) AND s OPERATOR(other.<~>) ANY (ARRAY(SELECT word FROM other.settings))
            AND ARRAY[s]::other.word[] IS NOT NULL;
    END;
"""


@pytest.fixture
async def source(database: Database) -> AsyncIterator[Connection]:
    database.execute(LAYOUT)
    async with await connect(database.dsn, "source") as connection:
        yield connection


async def called(source: Connection, condition: str = CONDITION) -> dict[str, str]:
    """Return what a condition calls, without pgvector's operators: in a text, = and <> stand for those, too."""
    found = (await functions_called(source, [condition]))[condition]
    return {name: digest for name, digest in found.items() if "vec" not in name}


async def test_a_body_of_statements_calls_what_the_server_says_that_it_depends_on(source: Connection) -> None:
    assert set(await called(source)) == {
        "public.wanted(text,text)",
        "other.inner_one(text)",
        "other.near(text,text)",
        "other.checked(text)",
        "other.fallback()",
        "domain other.word",
    }


@pytest.mark.parametrize(
    ("replaced", "edit"),
    [
        ("other.inner_one(text)", "FUNCTION other.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
        ("other.near(text,text)", "FUNCTION other.near(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
        ("other.checked(text)", "FUNCTION other.checked(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
    ],
)
async def test_a_function_that_a_body_of_statements_calls_is_seen_to_change(
    database: Database, source: Connection, replaced: str, edit: str
) -> None:
    before = await called(source)
    database.execute(f"CREATE OR REPLACE {edit} $$ SELECT false $$")
    after = await called(source)

    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [replaced]


async def test_a_table_that_a_body_reads_is_not_waited_for_and_its_lock_changes_nothing(
    database: Database, source: Connection
) -> None:
    before = await called(source)
    await source.execute("SET lock_timeout = '400ms'")
    with database.connect() as other, other.transaction():
        other.execute("LOCK TABLE other.settings IN ACCESS EXCLUSIVE MODE")
        assert await called(source) == before
        # A name in a text counts as the function of that name in every schema.
        database.execute(
            "CREATE FUNCTION public.outer_one(s text) RETURNS boolean LANGUAGE sql AS"
            " $$ SELECT s <> 'wanted' /* wanted( */ $$"
        )
        found = await called(source, "public.outer_one(status)")
    assert found.keys() == {"public.outer_one(text)", *before}
