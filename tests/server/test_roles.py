"""config/roles.sql: what it grants is enough for a worker, and is no more than that."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import psycopg
import pytest
import structlog
from psycopg import conninfo

from cdcsync.config import Config, Serve
from cdcsync.serve.reader import Reader
from cdcsync.tracing import Tracing
from tests.support.roles import Roles, answered, config, grant, psql, run_script
from tests.support.servers import Database
from tests.support.serving import served
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


TABLE = """
CREATE SCHEMA shop;
CREATE TABLE shop.articles (id bigint PRIMARY KEY, tenant int, title text);
CREATE TABLE shop.secrets (id bigint PRIMARY KEY, word text);
INSERT INTO shop.articles SELECT i, i % 3, 'title ' || i FROM generate_series(1, 60) AS i
"""


SECRETS = """
[indexes.secrets]
table = "shop.secrets"
view = "search.secrets"
text = "{word}"
embedder = "fake"
"""


def allowed(dsn: str, statement: str) -> bool:
    """Whether a role may do something; nothing of it stays."""
    with psycopg.connect(dsn) as connection:
        try:
            connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            return False
        finally:
            connection.rollback()
    return True


@pytest.fixture
def alone(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> tuple[Database, Pipeline]:
    """A database that is source and target, under one role for both, and its pipeline."""
    database = make_database()
    database.execute(TABLE)
    role = roles.name("both")
    grant(database, source_role=role, target_role=role, tables="shop.articles")
    dsn = roles.dsn(database, role)
    return database, make_pipeline(config(dsn, dsn, f"s_{database.name}", view="public.articles_index"))


def test_a_worker_runs_end_to_end_under_roles_with_the_least_privilege(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    reader, replicator, writer = roles.create("reader"), roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles", publication="for search")
    grant(target, target_role=writer, reader_role=reader, view_schema="search")
    source_dsn, target_dsn = roles.dsn(source, replicator), roles.dsn(target, writer)

    pipeline = make_pipeline(
        config(source_dsn, target_dsn, f"s_{source.name}", publication="for search", view="search.articles")
    )
    worker = pipeline.start()
    pipeline.live()
    source.execute("UPDATE shop.articles SET title = title || ' changed' WHERE id < 20")
    source.execute("DELETE FROM shop.articles WHERE id > 50")
    source.execute("INSERT INTO shop.articles VALUES (1000, 1, 'a new one')")
    pipeline.in_step()

    read = roles.dsn(target, reader)
    assert allowed(read, "SELECT count(*) FROM search.articles")
    assert allowed(read, "SELECT cdcsync.wait_for('articles', '0/1', '1 s')")
    assert not allowed(read, "DELETE FROM cdcsync.articles_chunks")

    # One role may search by SQL and be the tool server's; what both read exists only now.
    grant(target, target_role=writer, reader_role=reader, serve_role=reader, view_schema="search")
    serving = msgspec.structs.replace(pipeline.config, serve=Serve(listen="127.0.0.1:0", dsn=read, anonymous=True))
    assert anyio.run(called, serving) == [200, 200, 200, 200]
    assert target.execute("SELECT DISTINCT tool FROM cdcsync.calls ORDER BY 1") == [
        ("embed",),
        ("fetch",),
        ("list_indexes",),
        ("search",),
    ]
    assert pipeline.stop(worker) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "REVOKE EXECUTE ON FUNCTION pg_current_wal_insert_lsn() FROM PUBLIC",
        "ALTER FUNCTION pg_current_wal_insert_lsn() RENAME TO pg_another",  # as on a service that has none
    ],
    ids=["not granted", "absent"],
)
def test_a_target_on_the_sources_server_is_written_also_where_the_end_of_the_wal_may_not_be_asked_for(
    roles: Roles,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    statement: str,
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles")
    grant(target, target_role=writer)
    target.execute(statement)
    slot = f"s_{source.name}"
    pipeline = make_pipeline(
        config(roles.dsn(source, replicator), roles.dsn(target, writer), slot, view="public.articles_index")
    )
    worker = pipeline.start()
    pipeline.live()
    source.execute("UPDATE shop.articles SET title = title || ' changed' WHERE id < 20")
    pipeline.in_step()
    (checkpoint,) = pipeline.target.execute("SELECT checkpoint FROM cdcsync.pipelines").fetchone() or (None,)
    acknowledged = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    until(lambda: source.execute(acknowledged, [checkpoint, slot]) == [(True,)], pipeline.tail)
    assert pipeline.stop(worker) == 0


@pytest.mark.proof
def test_what_a_first_try_as_superuser_made_is_handed_over_by_the_command_that_check_names(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    database.execute(f'{TABLE}; CREATE SCHEMA search; CREATE SCHEMA "Shown"')
    slot = f"s_{database.name}"
    second = SECRETS.replace("secrets", "second").replace("shop.second", "shop.articles").replace("word", "title")
    second = second.replace('"search.second"', "'\"Shown\".second'")
    pipeline = make_pipeline(config(database.dsn, database.dsn, slot, view="search.articles") + second)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    database.execute("CREATE TABLE cdcsync.mine (id int)")

    role = roles.name("both")
    grant(database, source_role=role, target_role=role, tables="shop.articles")
    dsn = roles.dsn(database, role)
    text = config(dsn, dsn, slot, view="search.articles") + second
    pipeline.configure(text)
    findings = pipeline.answer("check", status=2)["findings"]
    commands = {one["hint"].partition("target: ")[2] for one in findings if "does not own" in one["message"]}
    (command,) = commands
    administrator(command, database.dsn)
    assert (run := pipeline.command("check")).returncode == 0, run.stdout
    assert database.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'mine'") == [("postgres",)]
    assert database.execute("SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'cdcsync'") == [
        ("postgres",)
    ]

    worker = pipeline.start()  # as the role
    database.execute("INSERT INTO shop.articles VALUES (100, 1, 'a new one')")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    pipeline.configure(text.replace("{title}", "{title} again", 1).replace('columns = ["tenant"]', ""))
    worker = pipeline.start()
    until(pipeline.in_step_now, lambda: f"the index to be built anew: {pipeline.difference}")
    assert pipeline.stop(worker) == 0
    assert pipeline.command("teardown", "--purge", "--yes").returncode == 0
    left = "SELECT count(*) FROM pg_class WHERE relnamespace IN ('cdcsync'::regnamespace, 'search'::regnamespace)"
    assert database.execute(left) == [(1,)]


def test_an_administrator_who_is_no_superuser_hands_over_views_in_several_schemas_by_the_same_command(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    former, role, admin = roles.name("former"), roles.create("target"), roles.create("admin")
    database.execute(f'{TABLE}; CREATE SCHEMA search; CREATE SCHEMA "Shown"')
    grant(database, target_role=former, view_schema="search")
    database.execute(
        f'GRANT USAGE, CREATE ON SCHEMA "Shown" TO {former}; ALTER ROLE {admin} CREATEROLE;'
        f" GRANT {former} TO {admin}; GRANT {role} TO {admin} WITH ADMIN OPTION;"
        f' ALTER SCHEMA search OWNER TO {admin}; ALTER SCHEMA "Shown" OWNER TO {admin};'
        f" ALTER DATABASE {database.name} OWNER TO {admin}"
    )
    second = SECRETS.replace('"search.secrets"', "'\"Shown\".secrets'")
    slot = f"s_{database.name}"
    pipeline = make_pipeline(config(database.dsn, roles.dsn(database, former), slot, view="search.articles") + second)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    pipeline.configure(config(database.dsn, roles.dsn(database, role), slot, view="search.articles") + second)
    pipeline.connect_target()
    findings = pipeline.answer("check", status=2)["findings"]
    (command,) = {one["hint"].partition("target: ")[2] for one in findings if "does not own" in one["message"]}

    administrator(command, roles.dsn(database, admin))

    assert (run := pipeline.command("check")).returncode == 0, run.stdout
    worker = pipeline.start()
    database.execute("INSERT INTO shop.articles VALUES (100, 1, 'a new one')")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0


def test_what_is_handed_over_is_cdcsyncs_and_not_the_schema_that_others_have_tables_in(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    former, role = roles.create("former"), roles.name("target")
    database.execute(
        f"CREATE SCHEMA search AUTHORIZATION {former}; SET ROLE {former}; CREATE TABLE search.theirs (id int);"
        " CREATE TABLE search.ours (id int); COMMENT ON TABLE search.ours IS 'cdcsync: ours.';"
        " CREATE FUNCTION search.our_own() RETURNS int RETURN 1;"
        " COMMENT ON FUNCTION search.our_own IS 'cdcsync: ours.'; RESET ROLE"
    )
    for _ in range(2):
        grant(database, target_role=role, former_role=former, schema="search", view_schema="search")

    worker, owner = roles.dsn(database, role), roles.dsn(database, former)
    for statement in ("DROP TABLE search.ours", "DROP FUNCTION search.our_own", "CREATE TABLE search.more ()"):
        assert allowed(worker, statement), statement
    for statement in ("DROP TABLE search.theirs", "SELECT FROM search.theirs", "DROP SCHEMA search CASCADE"):
        assert not allowed(worker, statement), statement
    for statement in ("SELECT FROM search.theirs", "CREATE TABLE search.more ()", "DROP SCHEMA search CASCADE"):
        assert allowed(owner, statement), statement


def administrator(command: str, dsn: str) -> None:
    """Run a command as it is typed, in a shell whose psql connects to a server as an administrator."""
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
    parts = conninfo.conninfo_to_dict(dsn)
    environment = {names[name]: str(value) for name, value in parts.items() if name in names}
    path = f"{Path(psql()).parent}:{os.environ['PATH']}"
    typed = f'cdcsync() {{ {shlex.quote(sys.executable)} -m cdcsync "$@"; }}; {command}'
    done = subprocess.run(
        ["sh", "-ec", typed],
        env={**os.environ, **environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_tool_servers_role_reads_the_rows_of_its_callers_tenant_and_no_others(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    server, reader, writer = roles.create("serve"), roles.create("reader"), roles.name("target")
    grant(source, source_role=(replicator := roles.name("source")), tables="shop.articles")
    granted = {"target_role": writer, "serve_role": server, "reader_role": reader, "view_schema": "search"}
    grant(target, **granted)
    text = config(roles.dsn(source, replicator), roles.dsn(target, writer), f"s_{source.name}", view="search.articles")
    text += f'\n[serve]\nrole = "{server}"\ntenant = {{ column = "tenant", claim = "tenant" }}\n'
    pipeline = make_pipeline(text)
    worker = pipeline.start()
    pipeline.live()
    assert readable(target, server) == SERVED | {"calls"}
    # By itself the role gets all of this as well.
    late = roles.create("late")
    grant(target, serve_role=late)
    assert readable(target, late) == SERVED | {"calls"}
    read = Serve(listen="127.0.0.1:0", dsn=roles.dsn(target, late), anonymous=True)
    assert anyio.run(called, msgspec.structs.replace(pipeline.config, serve=read)) == [200, 200, 200, 200]
    # Earlier versions of the script let the role read all tables, also those that were to come.
    target.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {server}")
    target.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {writer} IN SCHEMA cdcsync GRANT SELECT ON TABLES TO {server}")
    grant(target, **granted)
    grant(target, serve_role=server)
    target.execute(f"SET ROLE {writer}; CREATE TABLE cdcsync.later (); RESET ROLE")
    assert readable(target, server) == SERVED | {"calls"}
    dsn = roles.dsn(target, server)
    assert allowed(dsn, "SELECT at FROM cdcsync.calls")
    assert not allowed(dsn, "SELECT query FROM cdcsync.calls")
    for view in ("search.articles", "search.articles_chunks"):
        assert not allowed(dsn, f"SELECT * FROM {view}")
        assert allowed(roles.dsn(target, reader), f"SELECT * FROM {view}")
    with psycopg.connect(dsn) as session:
        seen = "SELECT array_agg(DISTINCT tenant) FROM cdcsync.articles_chunks"
        assert session.execute(seen).fetchone() == (None,)
        session.execute("SET cdcsync.tenant = '2'")
        assert session.execute(seen).fetchone() == ([2],)

    serve = Serve(listen="127.0.0.1:0", dsn=dsn, role=server, tokens_file="tokens", tenant=pipeline.config.serve.tenant)
    held = msgspec.structs.replace(pipeline.config, serve=serve)
    assert anyio.run(exposure, held) == []
    # A view that the role may read shows it all tenants.
    target.execute(f"GRANT USAGE ON SCHEMA search TO {server}; GRANT SELECT ON search.articles TO {server}")
    assert anyio.run(exposure, held) == ["view search.articles"]
    target.execute("ALTER VIEW search.articles SET (security_invoker)")
    assert anyio.run(exposure, held) == []
    assert anyio.run(called, msgspec.structs.replace(held, serve=Serve(listen="127.0.0.1:0", dsn=dsn, anonymous=True)))
    assert pipeline.stop(worker) == 0


def test_a_reader_reads_what_searches_need_and_writes_nothing(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    reader, replicator, writer = roles.create("reader"), roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles")
    granted = {"target_role": writer, "reader_role": reader, "view_schema": "search"}
    grant(target, **granted)
    text = config(roles.dsn(source, replicator), roles.dsn(target, writer), f"s_{source.name}", view="search.articles")
    pipeline = make_pipeline(text)
    worker = pipeline.start()
    pipeline.live()
    read = roles.dsn(target, reader)
    assert readable(target, reader) == set()
    assert allowed(read, "SELECT * FROM search.articles")
    # Earlier versions of the script let the role read all tables, also those that were to come, and write one.
    target.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {reader}")
    target.execute(f"GRANT INSERT, DELETE ON cdcsync.calls TO {reader}")
    target.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {writer} IN SCHEMA cdcsync GRANT SELECT ON TABLES TO {reader}")
    target.execute(f"CREATE TABLE cdcsync.mine (); GRANT SELECT, INSERT ON cdcsync.mine TO {reader}")

    for _ in range(2):
        grant(target, **granted)

    target.execute(f"SET ROLE {writer}; CREATE TABLE cdcsync.later (); RESET ROLE")
    assert readable(target, reader) == SERVED | {"mine"}
    assert writable(target, reader) == {"mine"}
    for statement in (
        *SEARCHES[:2],
        "SELECT cdcsync.wait_for('articles', '0/1', '1 s')",
        "TABLE search.articles_chunks",
    ):
        assert allowed(read, statement), statement
    assert pipeline.stop(worker) == 0
    pipeline.configure(text.replace(roles.dsn(target, writer), read))
    assert "title 7" in [hit["content"] for hit in answered(pipeline, "search", "articles", "title 7", "--json")]


def test_what_readers_passed_on_of_other_tables_is_taken_back_with_it_and_of_searched_tables_it_stays(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    role, reader, server, other = roles.name("target"), *map(roles.create, ("reader", "serve", "other"))
    granted = {"target_role": role, "reader_role": reader, "serve_role": server}
    grant(database, **granted)
    for name, columns in (("articles_chunks", "id int"), ("calls", "at timestamptz"), ("audits", "id int")):
        table = f"cdcsync.{name}"
        database.execute(f"CREATE TABLE {table} ({columns}); COMMENT ON TABLE {table} IS 'cdcsync: ours.'")
        for one in (reader, server):
            database.execute(f"GRANT SELECT, INSERT, DELETE ON {table} TO {one} WITH GRANT OPTION")
            database.execute(f"SET ROLE {one}; GRANT SELECT, INSERT, DELETE ON {table} TO {other}; RESET ROLE")

    for _ in range(2):
        grant(database, **granted)

    assert readable(database, reader) == readable(database, other) == {"articles_chunks"}
    assert readable(database, server) == {"articles_chunks", "calls"}
    assert writable(database, reader) == writable(database, other) == set()
    passing = "SELECT has_table_privilege(%s, 'cdcsync.articles_chunks', 'SELECT WITH GRANT OPTION')"
    assert [database.execute(passing, [one]) for one in (reader, server)] == [[(True,)]] * 2


def test_a_reader_searches_an_index_from_when_its_words_are_there(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    database.execute(TABLE)
    both, reader = roles.name("both"), roles.create("reader")
    granted = {"source_role": both, "target_role": both, "tables": "shop.articles", "reader_role": reader}
    grant(database, **granted)
    dsn = roles.dsn(database, both)
    text = config(dsn, dsn, f"s_{database.name}", view="public.articles_index")
    pipeline = make_pipeline(text + 'search = ""\n')
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    grant(database, **granted)
    read, by_vector = roles.dsn(database, reader), SEARCHES[1].replace("'title'", "NULL")
    assert allowed(read, by_vector)
    assert pipeline.stop(worker) == 0

    pipeline.configure(text)
    worker = pipeline.start()
    pipeline.live()
    until(lambda: database.execute("SELECT to_regclass('cdcsync.articles_words')") != [(None,)], pipeline.tail)

    assert [allowed(read, search) for search in (by_vector, *SEARCHES[:2])] == [True] * 3
    assert pipeline.stop(worker) == 0


def test_a_role_that_owns_the_tables_keeps_them_as_a_reader_and_as_the_tool_servers(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    role = roles.name("all")
    grant(database, target_role=role)
    database.execute(
        f"SET ROLE {role}; CREATE TABLE cdcsync.ours (); COMMENT ON TABLE cdcsync.ours IS 'cdcsync: ours.'"
    )

    grant(database, target_role=role, reader_role=role, serve_role=role)

    for statement in ("TABLE cdcsync.ours", "DELETE FROM cdcsync.ours"):
        assert allowed(roles.dsn(database, role), statement)


def test_views_in_the_schema_of_the_tables_do_not_open_these_to_a_reader(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    role, reader = roles.name("target"), roles.create("reader")
    granted = {"target_role": role, "reader_role": reader, "view_schema": "cdcsync"}
    grant(database, **granted)
    for kind, name in (("TABLE", "a_backlog"), ("VIEW", "a")):
        what = "()" if kind == "TABLE" else "AS SELECT 1"
        database.execute(f"SET ROLE {role}; CREATE {kind} cdcsync.{name} {what}; RESET ROLE")
    assert readable(database, reader) == set()

    grant(database, **granted)

    assert readable(database, reader) == {"a"}


SCATTERED = """
CREATE TYPE shop.status AS ENUM ('open', 'done');
ALTER TABLE shop.articles ADD status shop.status NOT NULL DEFAULT 'open';
CREATE SCHEMA extensions;
ALTER EXTENSION vector SET SCHEMA extensions
"""

SEARCHES = (
    "SELECT FROM cdcsync.articles_search('title')",
    "SELECT FROM cdcsync.articles_search('title', (SELECT embedding FROM cdcsync.articles_vectors_1 LIMIT 1))",
    "SELECT FROM cdcsync.articles_search('title', filter => '{\"status\": \"open\"}')",
)


def test_roles_search_an_index_whose_types_and_pgvector_are_in_schemas_of_their_own(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    database.execute(TABLE)
    database.execute(SCATTERED)
    both, reader, server = roles.name("both"), roles.create("reader"), roles.create("serve")
    granted = {"source_role": both, "target_role": both, "tables": "shop.articles", "view_schema": "search"}
    granted |= {"reader_role": reader, "serve_role": server}
    grant(database, **granted)
    dsn = roles.dsn(database, both)
    text = config(dsn, dsn, f"s_{database.name}", view="search.articles")
    pipeline = make_pipeline(text.replace('["tenant"]', '["tenant", "status"]'))
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    read = roles.dsn(database, reader)
    assert [allowed(read, search) for search in SEARCHES] == [False] * 3
    grant(database, **granted)
    database.execute(f"REVOKE USAGE ON SCHEMA shop FROM {reader}, {server}")
    assert [allowed(read, search) for search in SEARCHES] == [True, True, False]
    serving = msgspec.structs.replace(pipeline.config, serve=Serve(dsn=read, anonymous=True))
    remedy = f"GRANT USAGE ON SCHEMA shop TO {reader}"
    assert anyio.run(told, serving) == [remedy]

    grant(database, **granted)

    for role in (reader, server):
        assert [allowed(roles.dsn(database, role), search) for search in SEARCHES] == [True] * 3
    assert anyio.run(told, serving) == []
    assert not allowed(roles.dsn(database, reader), "SELECT FROM shop.articles")
    assert pipeline.stop(worker) == 0


async def told(config: Config) -> list[str]:
    """Return the remedies that the tool server names when it starts."""
    reader = Reader(config, Tracing())
    try:
        with structlog.testing.capture_logs() as logs:
            await reader.load()
        return [line["fix"] for line in logs if line["event"] == "index_not_searchable"]
    finally:
        await reader.aclose()


SERVED = {"indexes", "pipelines", "generations", "articles_chunks", "articles_words"} | {
    f"articles_vectors_1{tier}" for tier in ("", "_fresh", "_settled")
}


def readable(database: Database, role: str) -> set[str]:
    """Return the tables of cdcsync that a role may read, all of them or some columns."""
    rows = database.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'cdcsync'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')"
        " AND has_any_column_privilege(%s, oid, 'SELECT')",
        [role],
    )
    return {name for (name,) in rows}


def writable(database: Database, role: str) -> set[str]:
    """Return the tables of cdcsync whose rows a role may change."""
    rows = database.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'cdcsync'::regnamespace AND relkind IN ('r', 'p', 'v')"
        " AND (has_table_privilege(%(role)s, oid, 'INSERT, UPDATE, DELETE, TRUNCATE, TRIGGER')"
        " OR has_any_column_privilege(%(role)s, oid, 'INSERT, UPDATE'))",
        {"role": role},
    )
    return {name for (name,) in rows}


async def exposure(config: Config) -> list[str]:
    """Return what leads the tool server past its callers' tenants, as it sees that."""
    reader = Reader(config, Tracing())
    try:
        return await reader.index("articles").exposure()
    finally:
        await reader.aclose()


async def called(config: Config) -> list[int]:
    """Call each tool of the server; returns the statuses."""
    async with served(config) as client:
        answers = [
            await client.get("/v1/indexes"),
            await client.post("/v1/indexes/articles/search", json={"query": "title", "after_lsn": "0/1"}),
            await client.get("/v1/indexes/articles/documents/7"),
            await client.post("/v1/embed", json={"index": "articles", "texts": ["title"]}),
        ]
    return [answer.status_code for answer in answers]


@pytest.mark.timeout(300)  # a dozen processes, on a machine that may be busy
def test_every_command_does_its_work_under_the_least_privilege(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    source.execute("ALTER TABLE shop.articles ALTER title SET STORAGE EXTERNAL")
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles")
    grant(target, target_role=writer, view_schema="search")
    source_dsn, target_dsn = roles.dsn(source, replicator), roles.dsn(target, writer)
    pipeline = make_pipeline(config(source_dsn, target_dsn, f"s_{source.name}", view="search.articles"))

    checked = answered(pipeline, "check", "--json")
    assert {finding["level"] for finding in checked["findings"]} == {"ok"}
    worker = pipeline.start()
    pipeline.live()
    for change in (
        "INSERT INTO shop.articles VALUES (100, 1, repeat('too large to be sent again ', 900))",
        "UPDATE shop.articles SET tenant = 7 WHERE id = 100",
        "UPDATE shop.articles SET id = 200 WHERE id = 7",
        "DELETE FROM shop.articles WHERE id = 8",
        "BEGIN; TRUNCATE shop.articles; INSERT INTO shop.articles VALUES (1, 1, 'one'), (2, 2, 'two'); COMMIT",
        "INSERT INTO shop.articles SELECT i, i % 3, 'title ' || i FROM generate_series(3, 60) AS i",
    ):
        source.execute(change)
        pipeline.in_step()

    damage = "UPDATE cdcsync.articles_chunks SET content = 'wrong', document_hash = '\\x00' WHERE id < 5"
    target.execute(damage)
    assert pipeline.command("verify", "articles").returncode == 1
    assert pipeline.command("verify", "articles", "--repair").returncode == 0
    target.execute(damage)
    assert answered(pipeline, "replay", "articles", "--where", "id < 10", "--json")["rows"] == 9
    assert answered(pipeline, "replay", "articles", "--key", "20", "--force-embed", "--json")["rows"] == 1
    pipeline.in_step()
    status = answered(pipeline, "status", "--json")
    assert (status["indexes"]["articles"]["state"], status["problems"]) == ("live", [])
    assert status["slot"]["wal_status"] == "reserved"
    hits = answered(pipeline, "search", "articles", "title 20", "--where", "tenant = 2", "--json")
    assert "title 20" in [hit["content"] for hit in hits]
    assert answered(pipeline, "failures", "articles", "list", "--json") == []

    assert pipeline.stop(worker) == 0
    target.execute(damage)
    assert answered(pipeline, "replay", "articles", "--json")["rows"] == 60
    pipeline.compare()
    done = answered(pipeline, "teardown", "--purge", "--yes", "--json")
    assert "dropped" in {step["outcome"] for step in done}
    assert source.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", [f"s_{source.name}"]) == []


def test_a_lost_slot_is_made_again_under_the_same_roles(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles")
    grant(target, target_role=writer, view_schema="search")
    slot = f"s_{source.name}"
    text = config(roles.dsn(source, replicator), roles.dsn(target, writer), slot, view="search.articles")
    pipeline = make_pipeline(text.replace("[source]", '[source]\non_gap = "resync"'))
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    source.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    source.execute("DELETE FROM shop.articles WHERE id < 10")

    pipeline.start()

    pipeline.event("resync_requested")
    until(
        lambda: target.execute("SELECT 1 FROM cdcsync.backfills WHERE kind = 'resync' AND state = 'done'"),
        pipeline.tail,
    )
    pipeline.in_step()


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("table", ["chunks", "backlog", "vectors_1", "vectors_1_fresh", "vectors_1_settled"])
def test_policies_that_an_operator_forces_on_the_worker_pause_that_index_and_hide_nothing(
    roles: Roles, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], table: str
) -> None:
    source, target = make_database(), make_database()
    source.execute(TABLE)
    replicator, writer = roles.name("source"), roles.name("target")
    grant(source, source_role=replicator, tables="shop.articles, shop.secrets")
    grant(target, target_role=writer, view_schema="search")
    text = config(roles.dsn(source, replicator), roles.dsn(target, writer), f"s_{source.name}", view="search.articles")
    pipeline = make_pipeline(text + SECRETS)
    watched = table == "backlog"
    if watched:
        pipeline.hurry |= {"cdcsync.flows.watch.RELATIONS_S": 1.0, "cdcsync.flows.watch.WATCH_S": 1.0}
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    forced = f"cdcsync.articles_{table}"
    target.execute(f"ALTER TABLE {forced} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    target.execute(f"CREATE POLICY own ON {forced} USING (current_user = 'somebody else')")

    # What the policy hides, nobody looks for before the next minute.
    source.execute("UPDATE shop.articles SET title = title || ' changed' WHERE id < 20")
    source.execute("DELETE FROM shop.articles WHERE id > 50")
    source.execute("INSERT INTO shop.secrets VALUES (1, 'swordfish')")

    said = f"articles_{table} has policies that hide rows from the worker"
    remedy = f'ALTER TABLE "cdcsync"."articles_{table}" NO FORCE ROW LEVEL SECURITY'
    reason = "SELECT reason, remedy FROM cdcsync.indexes WHERE name = 'articles' AND state = 'paused'"
    until(lambda: target.execute(reason) == [(f"{said}; {remedy}", remedy)], pipeline.tail)
    pipeline.in_step("secrets")
    planned = pipeline.command("plan")
    assert planned.returncode == 3, planned.stderr
    assert said in planned.stdout
    assert remedy in planned.stdout
    compared = pipeline.command("verify", "articles")
    assert compared.returncode not in (0, 1), compared.stdout
    assert "NO FORCE ROW LEVEL SECURITY" in compared.stderr

    target.execute(f"ALTER TABLE {forced} NO FORCE ROW LEVEL SECURITY")
    if not watched:
        assert pipeline.stop(worker) == 0
        pipeline.start()
    pipeline.live()
    pipeline.in_step()


def test_policies_on_a_table_that_all_indexes_share_are_refused_with_the_remedy(
    alone: tuple[Database, Pipeline],
) -> None:
    database, pipeline = alone
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    database.execute("ALTER TABLE cdcsync.backfills ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")

    refused = pipeline.command("run")

    remedy = "ALTER TABLE cdcsync.backfills NO FORCE ROW LEVEL SECURITY"
    assert refused.returncode not in (0, None)
    assert remedy in refused.stderr
    assert "Traceback" not in refused.stderr
    database.execute(remedy)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()


def test_a_purge_keeps_what_the_roles_could_not_make_again(
    alone: tuple[Database, Pipeline],
) -> None:
    database, pipeline = alone
    for _ in range(2):
        worker = pipeline.start()
        pipeline.live()
        assert pipeline.stop(worker) == 0

        done = pipeline.command("teardown", "--purge", "--yes")

        assert done.returncode == 0, done.stderr
        assert "publication cdcsync kept: it was not made by a worker" in done.stdout
        assert database.execute("SELECT 1 FROM pg_class WHERE relnamespace = 'cdcsync'::regnamespace") == []


def test_one_role_serves_both_sides_of_one_database(
    alone: tuple[Database, Pipeline],
) -> None:
    database, pipeline = alone
    pipeline.start()
    pipeline.live()
    database.execute("UPDATE shop.articles SET title = 'changed' WHERE id = 7")

    pipeline.in_step()


def test_the_source_role_can_neither_write_nor_read_other_tables(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    database.execute(TABLE)
    role = roles.name("source")
    grant(database, source_role=role, tables="shop.articles")
    dsn = roles.dsn(database, role)

    assert allowed(dsn, "SELECT * FROM shop.articles")
    for statement in (
        "SELECT * FROM shop.secrets",
        "UPDATE shop.articles SET title = ''",
        "TRUNCATE shop.articles",
        "CREATE TABLE shop.mine ()",
        "CREATE SCHEMA mine",
        "DROP PUBLICATION cdcsync",
        "CREATE ROLE mine",
    ):
        assert not allowed(dsn, statement), statement


def test_the_target_role_writes_nowhere_but_in_its_own_schemas(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    database.execute(TABLE)
    role = roles.name("target")
    grant(database, target_role=role, view_schema="search")
    dsn = roles.dsn(database, role)

    assert allowed(dsn, "CREATE TABLE cdcsync.mine ()")
    assert allowed(dsn, "CREATE VIEW search.mine AS SELECT 1")
    for statement in (
        "CREATE TABLE public.mine ()",
        "CREATE SCHEMA mine",
        "SELECT * FROM shop.articles",
        "DROP EXTENSION vector",
        "SELECT pg_create_logical_replication_slot('mine', 'pgoutput')",
    ):
        assert not allowed(dsn, statement), statement


def test_running_the_script_again_adds_what_is_missing(roles: Roles, make_database: Callable[[], Database]) -> None:
    database = make_database()
    database.execute(TABLE)
    role = roles.name("source")
    grant(database, source_role=role, tables="shop.articles")
    grant(database, source_role=role, target_role=role, tables="shop.articles, shop.secrets")
    grant(database, source_role=role, target_role=role, tables="shop.secrets,shop.articles")

    published = database.execute("SELECT tablename FROM pg_publication_tables WHERE pubname = 'cdcsync' ORDER BY 1")
    assert published == [("articles",), ("secrets",)]
    assert allowed(roles.dsn(database, role), "SELECT * FROM shop.secrets")


def test_default_privileges_that_an_earlier_script_gave_the_tool_servers_role_are_taken_back_without_naming_their_giver(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database = make_database()
    server, writer = roles.create("serve"), roles.name("target")
    grant(database, target_role=writer)
    for what in ("SELECT ON TABLES", "EXECUTE ON FUNCTIONS"):
        database.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {writer} IN SCHEMA cdcsync GRANT {what} TO {server}")

    grant(database, serve_role=server)

    assert database.execute("SELECT FROM pg_default_acl") == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "no role is given"),
        ({"schema": "cdcsync", "publication": "p"}, "no role is given"),
        ({"reader_role": "one"}, "reader_role needs target_role"),
        ({"reader_role": "one", "source_role": "one"}, "reader_role needs target_role"),
        ({"former_role": "one"}, "former_role needs target_role"),
        ({"former_role": "one", "serve_role": "one"}, "former_role needs target_role"),
        ({"tables": "shop.articles"}, "tables needs source_role"),
        ({"tables": "shop.articles", "target_role": "one"}, "tables needs source_role"),
        ({"serve_role": "one"}, "serve_role needs target_role, because the schema cdcsync is not there yet"),
        ({"serve_role": "one", "schema": "An index"}, 'the schema "An index" is not there yet'),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_a_variable_without_the_role_that_it_is_about_stops_the_script_before_it_grants_anything(
    roles: Roles, make_database: Callable[[], Database], variables: dict[str, str], said: str
) -> None:
    database = make_database()
    database.execute(TABLE)
    one = roles.create("one")

    done = run_script(database, **{name: value.replace("one", one) for name, value in variables.items()})

    assert done.returncode != 0
    assert said in done.stderr
    assert "psql -v NAME=VALUE" in done.stderr
    assert database.execute("SELECT FROM pg_namespace WHERE nspname = 'cdcsync'") == []
    assert database.execute("SELECT rolreplication FROM pg_roles WHERE rolname = %s", [one]) == [(False,)]


def test_names_may_hold_whatever_a_name_may(roles: Roles, make_database: Callable[[], Database]) -> None:
    source, target = make_database(), make_database()
    names = ('shop."a, b"', '"the ""shop"", of".articles', 'shop."it\'s\\"', "shop.plain")
    source.execute('CREATE SCHEMA shop; CREATE SCHEMA "the ""shop"", of"')
    for name in names:
        source.execute(f"CREATE TABLE {name} (id int PRIMARY KEY)")
    role = roles.name('an "odd", name')
    for tables in (", ".join(names[:2]), " ,\n".join(names), names[3]):
        grant(source, source_role=role, tables=tables, publication='for "search", of all')
    published = source.execute('SELECT tablename FROM pg_publication_tables ORDER BY tablename COLLATE "C"')
    assert [one for (one,) in published] == ["a, b", "articles", "it's\\", "plain"]
    for name in names:
        assert allowed(roles.dsn(source, role), f"SELECT FROM {name}")

    odd = {"schema": 'its "own", one', "view_schema": "the 'views', too"}
    server, reader = roles.create('a "server"'), roles.create("a, reader")
    for _ in range(2):
        grant(target, target_role=role, serve_role=server, reader_role=reader, **odd)
        target.execute('CREATE TABLE IF NOT EXISTS "its ""own"", one".calls (at timestamptz, query text)')
        target.execute('CREATE TABLE IF NOT EXISTS "its ""own"", one"."odd, ""name""_chunks" (id int)')
    assert allowed(roles.dsn(target, server), 'SELECT at FROM "its ""own"", one".calls')
    assert allowed(roles.dsn(target, server), 'SELECT FROM "its ""own"", one"."odd, ""name""_chunks"')
    assert not allowed(roles.dsn(target, server), 'SELECT query FROM "its ""own"", one".calls')
    assert allowed(roles.dsn(target, role), "CREATE VIEW \"the 'views', too\".mine AS SELECT 1")


def test_a_failure_leaves_nothing_behind(roles: Roles, make_database: Callable[[], Database]) -> None:
    database = make_database()
    role = roles.name("source")

    with pytest.raises(AssertionError, match='schema "shop" does not exist'):
        grant(database, source_role=role, tables="shop.absent")

    assert not database.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role])
