"""A caller's temporary objects, and what its search_path leads to, have no part in what our functions do."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
import psycopg
import pytest
from psycopg import conninfo

from cdcsync.config.sections import Hnsw
from cdcsync.postgres.sessions import connect
from cdcsync.target.ddl import search_function
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.ddl.searching import search_outdated
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.search import search
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    begin_generations,
    live_index,
    make_spec,
    register,
    two_generations,
)
from tests.support.roles import Roles
from tests.support.searching import SHELF, filled
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

COUNTER = "CREATE SEQUENCE public.calls; GRANT USAGE ON SEQUENCE public.calls TO PUBLIC"

TEMPORARY = """
CREATE FUNCTION pg_temp.planted() RETURNS boolean LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_catalog.nextval(''public.calls''); RETURN true; END';
CREATE FUNCTION pg_temp.planted(anyelement, anyelement) RETURNS boolean LANGUAGE sql AS 'SELECT pg_temp.planted()';
CREATE FUNCTION pg_temp.to_regclass(text) RETURNS regclass LANGUAGE sql AS
    'SELECT pg_temp.planted(); SELECT NULL::regclass';
CREATE FUNCTION pg_temp.length(text) RETURNS int LANGUAGE sql AS 'SELECT pg_temp.planted(); SELECT 1';
CREATE OPERATOR pg_temp.= (FUNCTION = pg_temp.planted, LEFTARG = anyelement, RIGHTARG = anyelement);
DO $do$
DECLARE
    one text;
    columns text;
BEGIN
    FOR one, columns IN
        SELECT c.relname, string_agg(a.attname, ', ')
        FROM pg_catalog.pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
        WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind IN ('r', 'v')
            AND has_table_privilege(c.oid, 'SELECT')
            AND a.atttypid NOT IN ('anyarray'::regtype, 'pg_statistic[]'::regtype) GROUP BY c.relname
    LOOP
        EXECUTE format('CREATE TEMP VIEW %1$I AS SELECT %2$s FROM pg_catalog.%1$I WHERE pg_temp.planted()',
            one, columns);
        EXECUTE format('GRANT SELECT ON pg_temp.%I TO PUBLIC', one);
    END LOOP;
    FOR one IN SELECT t.typname FROM pg_catalog.pg_type AS t WHERE t.typnamespace = 'pg_catalog'::regnamespace
               AND t.typrelid = 0 AND t.typcategory <> 'A' LOOP
        EXECUTE format('CREATE TEMP TABLE %I ()', one);
    END LOOP;
END $do$
"""
"""For each relation of pg_catalog a temporary view that counts when it is read, and for each type a temporary table,
and so a type, of its name; with some functions and operators."""

SEARCHES = (
    "SELECT id FROM cdcsync.articles_search('hums OR \"printer hums\" -reset', '[1,1,1]',"
    ' filter => \'{"tenant": [1], "id": {"gte": 1}}\') ORDER BY id',
    "SELECT id FROM cdcsync.articles_search('hums', mode => 'text', per_document => false)",
)


@pytest.fixture
async def articles(database: Database) -> AsyncIterator[LiveIndex]:
    async with live_index(database, make_spec()) as index:
        await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
        await register(index.connection, index.spec, slot="s", state="paused")
        await filled(index, SHELF)
        await index.embed()
        database.execute(COUNTER)
        yield index


def calls(database: Database) -> int:
    called, last = database.execute("SELECT is_called, last_value FROM public.calls")[0]
    return int(last) if called else 0


async def test_every_function_has_a_path_of_two_names_of_which_pg_temp_is_the_last(database: Database) -> None:
    hidden = make_spec(name="beside~other")
    specs = [
        make_spec(name="plain"),
        make_spec(name="wordless", search=None),
        make_spec(name="characters", search="cjk"),
        make_spec(name="languages", carried={"language": "text"}, search="{language}"),
        make_spec(name="counted", ranking="sql"),
        make_spec(name="signs", hnsw=Hnsw(quantise="binary")),
        make_spec(name="halves", vector_type="halfvec", distance="l2"),
        make_spec(name="beside"),
        two_generations(),
    ]
    async with contextlib.AsyncExitStack() as stack:
        indexes = [await stack.enter_async_context(live_index(database, spec)) for spec in specs]
        beside = msgspec.structs.replace(specs[-2], beside=hidden)
        await stack.enter_async_context(live_index(database, msgspec.structs.replace(hidden, beside=specs[-2])))
        await stack.enter_async_context(live_index(database, beside))
        await begin_generations(indexes[-1])
        await Rebuild(indexes[0].connection, SCHEMA, specs[0]).record()
        functions = await indexes[0].rows(
            "SELECT p.proname::text, setting FROM pg_proc AS p LEFT JOIN LATERAL unnest(p.proconfig) AS setting"
            " ON starts_with(setting, 'search_path=') WHERE p.pronamespace = 'cdcsync'::regnamespace"
        )
    assert {path for _, path in functions} == {"search_path=pg_catalog, pg_temp"}
    named = {name for name, _ in functions}
    assert named >= {"wait_for", "standing", *(f"{spec.name}_search" for spec in specs)}
    assert any(name.endswith("_note") for name in named)


async def test_temporary_objects_of_a_session_have_no_part_in_its_searches(
    database: Database, articles: LiveIndex
) -> None:
    asked = (*SEARCHES, "SELECT cdcsync.standing('articles', 1) IS NOT NULL")
    with psycopg.connect(database.dsn, autocommit=True) as session:
        found = [session.execute(one.encode()).fetchall() for one in asked]
        session.execute("SET pg_textsearch.default_limit = 1")  # as if the extension were loaded
        session.execute(TEMPORARY)

        assert [session.execute(one.encode()).fetchall() for one in asked] == found
        with pytest.raises(psycopg.errors.RaiseException, match="is paused"):
            session.execute("SELECT cdcsync.wait_for('articles', '0/1')")
    assert found[1:] == [[(3,)], [(True,)]]
    assert calls(database) == 0


async def test_a_caller_of_a_function_with_its_owners_privileges_cannot_have_the_search_run_its_code(
    roles: Roles, database: Database, articles: LiveIndex
) -> None:
    caller = roles.create("caller")
    for number, one in enumerate(SEARCHES):
        database.execute(
            f"CREATE FUNCTION public.found_{number}() RETURNS SETOF bigint LANGUAGE sql SECURITY DEFINER"
            f" SET search_path = pg_catalog, pg_temp AS $$ {one} $$"
        )
    with psycopg.connect(roles.dsn(database, caller), autocommit=True) as session:
        session.execute("SET pg_textsearch.default_limit = 1")
        session.execute(TEMPORARY)
        for number in range(len(SEARCHES)):
            assert session.execute(f"SELECT 3 IN (SELECT public.found_{number}())".encode()).fetchone() == (True,)
    assert calls(database) == 0


async def test_a_condition_brings_only_its_own_names_to_the_path_that_it_needs(
    database: Database, articles: LiveIndex
) -> None:
    database.execute(
        "CREATE SCHEMA planted;"
        " CREATE FUNCTION planted.planted(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT nextval(''public.calls'')';"
        " CREATE AGGREGATE planted.count(*) (SFUNC = planted.planted, STYPE = bigint, INITCOND = '0');"
        # With so many chunks it estimates how many of them the condition leaves.
        f" UPDATE cdcsync.articles_words SET chunks = {search_function.BUDGET + 1} WHERE lexeme = ''"
    )
    connection = await connect(
        conninfo.make_conninfo(database.dsn, options="-c search_path=planted,pg_catalog"), "target"
    )
    try:
        hits = await search(
            connection, SCHEMA, articles.spec, text="hums", vector=[1, 1, 1], k=1, where="tenant IS NOT NULL"
        )
    finally:
        await connection.close()
    assert [hit.key for hit in hits] == [{"id": 3}]
    assert calls(database) == 0


async def test_a_function_whose_path_is_one_quoted_name_is_replaced_at_the_next_start(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "SELECT array_to_string(proconfig, ' ') FROM pg_proc WHERE proname = 'articles_search'"
    with monkeypatch.context() as earlier:
        earlier.setattr(search_function, "PATH", '"pg_catalog, pg_temp"')
        async with live_index(database, make_spec()) as index:
            [(before,)] = await index.rows(path)
            earlier.undo()
            assert await search_outdated(index.connection, SCHEMA, index.spec)  # which a start and the watch ask
    assert before.startswith('search_path="pg_catalog, pg_temp"')
    async with live_index(database, make_spec()) as index:
        [(now,)] = await index.rows(path)
    assert now.startswith("search_path=pg_catalog, pg_temp")
