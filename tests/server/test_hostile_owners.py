"""Owners of tables, types, operators and views on our servers cannot have their code run as our roles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql

from cdcsync.postgres.sessions import connect
from tests.support.roles import Roles, answered, config, grant
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

TABLES = """
CREATE SCHEMA shop;
CREATE DOMAIN public.code AS text;
CREATE TABLE shop.articles (id public.code PRIMARY KEY, tenant int, title text);
INSERT INTO shop.articles SELECT 'k' || i, i % 3, 'title ' || i FROM generate_series(1, 60) AS i;
"""

OPERATORS = """
CREATE SEQUENCE public.calls;
GRANT USAGE ON SEQUENCE public.calls TO PUBLIC;
SET search_path = '';
DO $do$
DECLARE
    types text[] := ARRAY['int2', 'int4', 'int8', 'oid', 'regtype', 'regclass', 'name', 'text', 'varchar', '"char"',
        'bytea', 'pg_lsn', 'timestamptz', 'interval', 'float8', 'numeric', 'xid', 'text[]', 'public.code'];
    symbols text[] := ARRAY['=', '<>', '<', '>=', '+', '-', '*', '/', '||', '@@'];
    l text; r text; symbol text;
BEGIN
    FOREACH l IN ARRAY types LOOP FOREACH r IN ARRAY types LOOP
        EXECUTE format('CREATE FUNCTION public.hostile(%s, %s) RETURNS bool LANGUAGE plpgsql AS '
            '$f$ BEGIN PERFORM pg_catalog.nextval(''public.calls''); RETURN true; END $f$', l, r);
        FOREACH symbol IN ARRAY symbols LOOP
            IF NOT EXISTS (SELECT FROM pg_operator WHERE oprname = symbol AND oprleft = l::regtype
                           AND oprright = r::regtype AND oprnamespace = 'pg_catalog'::regnamespace) THEN
                EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.hostile, LEFTARG = %s, RIGHTARG = %s)',
                    symbol, l, r);
            END IF;
        END LOOP;
    END LOOP; END LOOP;
    FOREACH symbol IN ARRAY ARRAY['lower', 'upper', 'length', 'octet_length', 'md5', 'sha256', 'sum', 'min', 'max',
        'hashtext', 'quote_ident', 'to_regclass', 'to_regtype', 'unnest', 'abs', 'ceil', 'round', 'sqrt', 'ln'] LOOP
        FOREACH l IN ARRAY types LOOP
            CONTINUE WHEN to_regprocedure(format('pg_catalog.%I(%s)', symbol, l)) IS NOT NULL;
            EXECUTE format('CREATE FUNCTION public.%s(%s) RETURNS text LANGUAGE plpgsql AS '
                '$f$ BEGIN PERFORM pg_catalog.nextval(''public.calls''); RETURN NULL; END $f$', symbol, l);
        END LOOP;
    END LOOP;
END $do$
"""
"""Operators and functions that fit values better than the server's own do, each of which counts its calls. A statement
that finds them by a search path, rather than by a qualified name, runs them with the privileges of its session."""


def followed(
    roles: Roles,
    make_pipeline: Callable[[str], Pipeline],
    source: Database,
    target: Database,
    *tables: str,
    worker_lines: str = "",
) -> Pipeline:
    """Have a worker follow tables of the schema `shop`, under roles with the least privilege, until they are live."""
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables=", ".join(f"shop.{table}" for table in tables))
    grant(target, target_role=writer, view_schema="search")
    text = config(roles.dsn(source, replicator), roles.dsn(target, writer), f"s_{source.name}", view="search.articles")
    index = text[text.index("[indexes.articles]") :]
    for table in tables[1:]:
        text += index.replace("articles", table)
    pipeline = make_pipeline(text.replace("[worker]", f"[worker]\n{worker_lines}"))
    pipeline.start()
    pipeline.live()
    return pipeline


def calls(database: Database) -> int:
    called, last = database.execute("SELECT is_called, last_value FROM public.calls")[0]
    return int(last) if called else 0


def test_operators_and_functions_of_others_are_never_called(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLES)
    target.execute("CREATE DOMAIN public.code AS text")
    for database in (source, target):
        database.execute(OPERATORS)
    pipeline = followed(roles, make_pipeline, source, target, "articles", worker_lines="evaluate_every_s = 60")
    source.execute("UPDATE shop.articles SET title = title || ' changed' WHERE tenant = 1")
    source.execute("DELETE FROM shop.articles WHERE tenant = 2")
    pipeline.in_step()
    for command in (
        ["check"],
        ["status"],
        ["search", "articles", "title changed"],
        ["search", "articles", "title changed", "--where", "tenant = 1"],
        ["search", "articles", '"title" -nothing', "--filter", "tenant=1"],
        ["verify", "articles"],
        ["replay", "articles", "--where", "tenant = 1"],
        ["evaluate", "articles"],
        ["failures", "articles", "list"],
    ):
        answered(pipeline, *command, "--json")
    # With the search path of its role.
    with psycopg.connect(pipeline.config.target.dsn, autocommit=True) as application:
        application.execute("SELECT * FROM cdcsync.articles_search('title changed', NULL, filter => '{\"tenant\": 1}')")
    assert pipeline.stop(pipeline.processes[-1]) == 0
    answered(pipeline, "teardown", "--purge", "--yes", "--json")

    assert (calls(source), calls(target)) == (0, 0)


def test_the_count_of_calls_can_be_other_than_zero(database: Database) -> None:
    database.execute("CREATE DOMAIN public.code AS text")
    database.execute(OPERATORS)
    database.execute("SELECT 1::float8 / 2::int8")
    assert calls(database) == 1


SWAP = """
BEGIN;
ALTER TABLE shop.articles RENAME TO articles_before;
CREATE FUNCTION shop.spy() RETURNS text LANGUAGE plpgsql VOLATILE AS
    $f$ BEGIN PERFORM pg_catalog.nextval('public.calls'); RETURN current_user; END $f$;
CREATE VIEW shop.articles AS SELECT id, tenant, title || shop.spy() AS title FROM shop.articles_before;
GRANT SELECT ON shop.articles TO PUBLIC;
COMMIT
"""


def test_a_table_that_becomes_a_view_does_not_run_its_functions_as_the_source_role(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    """Its owner may do that at any moment; the other index goes on, and the one with the view says what is wrong."""
    source, target = make_database(), make_database()
    source.execute(TABLES)
    target.execute("CREATE DOMAIN public.code AS text")
    source.execute("CREATE TABLE shop.notes (id int PRIMARY KEY, tenant int, title text)")
    source.execute("CREATE SEQUENCE public.calls; GRANT USAGE ON SEQUENCE public.calls TO PUBLIC")
    pipeline = followed(roles, make_pipeline, source, target, "articles", "notes")
    source.execute(SWAP)
    until(
        lambda: target.execute("SELECT 1 FROM cdcsync.indexes WHERE name = 'articles' AND state = 'paused'"),
        pipeline.tail,
    )
    source.execute("INSERT INTO shop.notes VALUES (1, 1, 'still followed')")
    until(lambda: target.execute("SELECT 1 FROM search.notes WHERE content = 'still followed'"), pipeline.tail)
    assert calls(source) == 0


async def test_a_source_session_reads_no_view(database: Database) -> None:
    database.execute("CREATE VIEW plain AS SELECT 1 AS one")
    async with await connect(database.dsn, "source") as source:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="restricted"):
            await source.execute(sql.SQL("SELECT * FROM public.plain"))
        await source.execute("SELECT * FROM pg_catalog.pg_tables LIMIT 1")


SPY = """
CREATE FUNCTION public.spy(anyelement) RETURNS boolean LANGUAGE plpgsql SECURITY INVOKER AS $f$ BEGIN
    IF current_user LIKE '%source%' OR current_user LIKE '%target%' THEN
        PERFORM pg_catalog.pg_advisory_lock(4711);
        RAISE EXCEPTION 'run as %', current_user;
    END IF;
    RETURN true;
END $f$;
"""
"""A function that shows whether it ever ran as one of our roles, even in a transaction that cannot write."""

ATTACKS = {
    "policy": """
        CREATE POLICY p ON shop.articles USING (public.spy(id));
        ALTER TABLE shop.articles ENABLE ROW LEVEL SECURITY
    """,
    "foreign partition": """
        ALTER TABLE shop.articles ATTACH PARTITION shop.elsewhere FOR VALUES FROM (1000) TO (2000)
    """,
    "rule": "CREATE RULE r AS ON UPDATE TO shop.articles DO ALSO SELECT public.spy(1)",
    "default": "ALTER TABLE shop.articles ALTER title SET DEFAULT public.spy(1)::text",
    "trigger": """
        CREATE FUNCTION shop.react() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM public.spy(1); RETURN NEW; END';
        CREATE TRIGGER t BEFORE INSERT OR UPDATE ON shop.articles FOR EACH ROW EXECUTE FUNCTION shop.react()
    """,
}


def said_that_it_ran(pipeline: Pipeline, *databases: Database) -> list[str]:
    """Return where the spy ran as one of our roles."""
    found = [line for line in pipeline.log.read_text().splitlines() if "run as" in line]
    for database in databases:
        found += [
            str(row)
            for row in database.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711")
        ]
    return found


@pytest.mark.parametrize(
    "attack",
    [pytest.param(one, marks=[pytest.mark.proof] * (one in ("rule", "default"))) for one in ATTACKS],
)
def test_what_owners_put_beside_their_tables_does_not_run_as_our_roles(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], attack: str
) -> None:
    source, target = make_database(), make_database()
    source.execute(SPY)
    source.execute(
        "CREATE SCHEMA shop; CREATE TABLE shop.notes (id int PRIMARY KEY, tenant int, title text);"
        " CREATE TABLE shop.articles (id int PRIMARY KEY, tenant int, title text) PARTITION BY RANGE (id);"
        " CREATE TABLE shop.articles_1 PARTITION OF shop.articles FOR VALUES FROM (0) TO (1000);"
        " INSERT INTO shop.articles SELECT i, i % 3, 'title ' || i FROM generate_series(1, 30) AS i;"
        " CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;"
        " CREATE FOREIGN TABLE shop.elsewhere (id int NOT NULL, tenant int, title text) SERVER nowhere"
    )
    pipeline = followed(roles, make_pipeline, source, target, "articles", "notes")

    with contextlib.suppress(psycopg.Error):  # PostgreSQL itself refuses some
        source.execute(ATTACKS[attack])
    with contextlib.suppress(psycopg.Error):
        source.execute("UPDATE shop.articles SET title = title || ' changed'")
    source.execute("INSERT INTO shop.notes VALUES (1, 1, 'still followed')")
    until(lambda: target.execute("SELECT 1 FROM search.notes WHERE content = 'still followed'"), pipeline.tail)
    answered(pipeline, "replay", "notes", "--json")
    for command in (["verify", "articles"], ["replay", "articles"], ["check"]):
        pipeline.command(*command, "--json")

    assert said_that_it_ran(pipeline, source, target) == []


def test_a_type_that_somebody_plants_in_the_target_runs_nothing_as_the_target_role(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    """It has the name of a type of the source's: a domain whose conditions its owner decides, an enum with casts."""
    source, target = make_database(), make_database()
    source.execute(
        "CREATE SCHEMA shop; CREATE DOMAIN public.code AS int; CREATE TYPE public.mood AS ENUM ('sad', 'happy');"
        " CREATE TABLE shop.articles (id public.code, mood public.mood, tenant int, title text,"
        " PRIMARY KEY (id, mood));"
        " INSERT INTO shop.articles SELECT i, 'sad', i % 3, 'title ' || i FROM generate_series(1, 9) AS i"
    )
    target.execute(SPY)
    stranger = roles.name("stranger")
    target.execute(sql.SQL("CREATE ROLE {0}; GRANT CREATE ON SCHEMA public TO {0}").format(sql.Identifier(stranger)))
    with target.connect() as session:
        session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(stranger)))
        session.execute(
            "CREATE DOMAIN public.code AS int CHECK (public.spy(VALUE));"
            " CREATE TYPE public.mood AS ENUM ('sad', 'happy');"
            " CREATE FUNCTION public.told(public.mood) RETURNS text LANGUAGE sql AS"
            " 'SELECT CASE WHEN public.spy(1) THEN ''sad'' END';"
            " CREATE FUNCTION public.read(text) RETURNS public.mood LANGUAGE sql AS"
            " 'SELECT CASE WHEN public.spy(1) THEN ''sad''::public.mood END';"
            " CREATE CAST (public.mood AS text) WITH FUNCTION public.told(public.mood) AS IMPLICIT;"
            " CREATE CAST (text AS public.mood) WITH FUNCTION public.read(text) AS IMPLICIT"
        )
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles")
    grant(target, target_role=writer, view_schema="search")
    pipeline = make_pipeline(
        config(roles.dsn(source, replicator), roles.dsn(target, writer), f"s_{source.name}", view="search.articles")
    )
    pipeline.start()
    pipeline.live()
    source.execute("UPDATE shop.articles SET title = title || ' changed' WHERE id < 5")
    source.execute("UPDATE shop.articles SET mood = 'happy' WHERE id = 7")
    source.execute("DELETE FROM shop.articles WHERE id = 9")
    pipeline.in_step()
    for command in (
        ["verify", "articles"],
        ["replay", "articles"],
        ["search", "articles", "title", "--filter", "tenant=1"],
    ):
        answered(pipeline, *command, "--json")
    assert said_that_it_ran(pipeline, source, target) == []
    assert target.execute(
        "SELECT format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = 'cdcsync.articles_chunks'::regclass AND attname IN ('id', 'mood') ORDER BY attname"
    ) == [("integer",), ("text",)]
    warned = [one["problem"] for one in pipeline.events() if one["event"] == "preflight"]
    assert any(f"its type public.mood belongs to {stranger} in the target" in one for one in warned), warned
