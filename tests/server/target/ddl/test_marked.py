"""Comments say whose a relation or function is: they follow an index that is renamed, and tell what goes with it."""

from __future__ import annotations

import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.marked import (
    describe_again,
    drop_all,
    drop_functions,
    marker,
    tables_of,
    views_on,
)
from cdcsync.target.ddl.rebuilding import Rebuild
from tests.support import relations
from tests.support.indexes import SCHEMA, make_spec

pytestmark = [pytest.mark.server, pytest.mark.anyio]

FUNCTIONS = """
    SELECT proname::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE nspname = 'cdcsync' AND starts_with(obj_description(p.oid, 'pg_proc'), %s) ORDER BY 1
"""


@pytest.fixture
async def rebuilt(connection: Connection) -> Connection:
    """A target with two indexes, of which one has what a kill leaves of a rebuild."""
    await relations.create(connection, make_spec(), make_spec(name="articles_notes"))
    await Rebuild(connection, SCHEMA, make_spec()).record()
    return connection


async def test_tables_and_the_functions_of_their_triggers_follow_an_index_to_its_name(rebuilt: Connection) -> None:
    before = await tables_of(rebuilt, SCHEMA, ["articles"])
    others = await tables_of(rebuilt, SCHEMA, ["articles_notes"])

    await describe_again(rebuilt, SCHEMA, "articles", "articles", "articles~other")

    assert await tables_of(rebuilt, SCHEMA, ["articles~other"]) == before
    assert await tables_of(rebuilt, SCHEMA, ["articles"]) == {}
    assert await tables_of(rebuilt, SCHEMA, ["articles_notes"]) == others
    # A search function keeps the name that applications call.
    assert await relations.rows(rebuilt, FUNCTIONS, marker("articles")) == [("articles_search",)]
    assert await relations.rows(rebuilt, FUNCTIONS, marker("articles~other")) == [("articles_vectors_1_new_note",)]


async def test_functions_of_triggers_go_after_their_tables(rebuilt: Connection) -> None:
    tables = await tables_of(rebuilt, SCHEMA, ["articles"])
    assert await views_on(rebuilt, list(tables)) == ["public.articles_index", "public.articles_index_chunks"]

    await rebuilt.execute("DROP FUNCTION cdcsync.articles_search")
    await drop_all(rebuilt, "VIEW", await views_on(rebuilt, list(tables)))
    await drop_all(rebuilt, "TABLE", list(tables.values()))
    await drop_functions(rebuilt, SCHEMA, marker("articles"))

    assert await relations.rows(rebuilt, FUNCTIONS, marker("articles")) == []
    assert await tables_of(rebuilt, SCHEMA, ["articles"]) == {}
    assert await relations.rows(rebuilt, FUNCTIONS, marker("articles_notes")) == [("articles_notes_search",)]
