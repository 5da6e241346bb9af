"""What is told of publications: tables, columns and rows that they do not send."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.demo.cluster import Cluster
from cdcsync.flows.audit.digests import published
from cdcsync.flows.replay import check_where
from cdcsync.postgres.sessions import connect
from cdcsync.preflight.sending import failing_writes
from cdcsync.source.catalog import read_catalog
from tests.support.preflight import ARTICLES, Role, configured, examined, the_error
from tests.support.servers import Database, Server, fresh_database

pytestmark = pytest.mark.server

PARTITIONED = """
    CREATE TABLE t (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
    CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9);
"""
GENERATED = "CREATE TABLE t (id int PRIMARY KEY, body text, upper text GENERATED ALWAYS AS (upper(body)) STORED)"
POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")

T = 'table = "t"\ntext = "{body}"'
T_NAME = QualifiedName("public", "t")
PARTS = "PARTITION BY RANGE (id)"


async def test_a_publication_that_the_role_may_not_create_is_told_as_a_statement_for_the_owner(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"{ARTICLES}; CREATE TABLE notes (id int PRIMARY KEY, body text)")
    lone_database.execute(f"GRANT SELECT ON articles, notes TO {role.name}")
    config = configured(
        role.dsn, lone_database.dsn, articles="", notes='table = "notes"\ntext = "{body}"', publication="by owner"
    )
    error = the_error(await examined(config))
    assert error.where == "publication by owner"
    assert "does not own public.articles, public.notes" in error.message
    statement = str(error.hint).removeprefix("as an owner of the tables: ")
    lone_database.execute(statement)
    assert (await examined(config)).errors == []


async def test_the_tables_that_the_role_does_not_own_are_those_of_the_statement(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"{ARTICLES}; CREATE TABLE notes (id int PRIMARY KEY, article_id bigint, body text)")
    lone_database.execute(f"GRANT SELECT ON articles, notes TO {role.name}")
    articles = 'table = "articles"\nembedder = "hash"\ntext = "{title} {notes}"\n[indexes.articles.related.notes]\n'
    related = 'table = "notes"\non = { article_id = "id" }\ntext = "{body}"'
    config = configured(role.dsn, lone_database.dsn, articles=articles + related)
    (error,) = [one for one in (await examined(config)).errors if "does not own" in one.message]
    assert "does not own public.articles, public.notes" in error.message
    assert '"public"."articles", "public"."notes"' in str(error.hint)


async def test_a_fault_of_a_dsn_that_is_that_of_both_servers_is_told_once() -> None:
    error = the_error(await examined(configured("host=127.0.0.1 prot=5432 dbname=x")))
    assert (error.message, error.hint) == ("libpq knows no parameter prot", "did you mean port?")


async def test_a_table_that_only_its_owner_could_add_is_told_as_a_statement(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync; GRANT SELECT ON articles TO {role.name}")
    config = configured(role.dsn, lone_database.dsn)
    error = the_error(await examined(config))
    assert error.hint == "ALTER PUBLICATION cdcsync ADD TABLE public.articles"
    lone_database.execute(error.hint)
    assert (await examined(config)).errors == []


async def test_a_table_that_run_can_add_itself_is_no_fault(database: Database) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync")
    assert (await examined(configured(database.dsn))).errors == []


async def test_a_role_has_to_read_the_columns_of_a_row_filter_and_none_that_nobody_asks_for(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"{ARTICLES}; ALTER TABLE articles ADD secret text; GRANT SELECT (id) ON articles TO public")
    lone_database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles WHERE (tenant > 1 AND title <> '%')")
    lone_database.execute(f"GRANT SELECT (title, body) ON articles TO {role.name}")
    config = configured(role.dsn, lone_database.dsn)
    error = the_error(await examined(config))
    assert error.where == "public.articles"
    assert "may not read every column by which the publication chooses rows: ((tenant > 1)" in error.message
    assert f"GRANT SELECT ON public.articles TO {role.name}" in str(error.hint)

    lone_database.execute(f"GRANT SELECT (tenant) ON articles TO {role.name}")
    report = await examined(config)

    assert report.errors == []
    (spec,) = report.specs
    lone_database.execute("INSERT INTO articles VALUES (1, 1, 'left out'), (2, 2, 'sent'), (3, 2, '%')")
    async with await connect(role.dsn, "source") as source:
        await check_where(source, spec, "tenant = 2")
        cursor = await source.execute(sql.SQL("SELECT id FROM {} AS t").format(published(spec)))
        assert await cursor.fetchall() == [(2,)]


@pytest.mark.parametrize("what", ["ALL TABLES", "TABLES IN SCHEMA public"])
async def test_a_publication_of_many_tables_serves_as_well(database: Database, what: str) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR {what}")
    assert (await examined(configured(database.dsn))).errors == []


async def test_partitions_sent_under_their_own_names_are_told_with_the_statement_that_changes_it(
    database: Database,
) -> None:
    database.execute(f"{PARTITIONED} CREATE PUBLICATION cdcsync FOR TABLE t")
    config = configured(database.dsn, t=T)
    error = the_error(await examined(config))
    assert error.hint == "ALTER PUBLICATION cdcsync SET (publish_via_partition_root = true)"
    database.execute(error.hint)
    assert (await examined(config)).errors == []


@pytest.mark.parametrize("published", [True, False], ids=["published root", "indexed root"])
async def test_a_partition_whose_changes_are_sent_as_its_roots_is_refused(database: Database, published: bool) -> None:
    database.execute(PARTITIONED)
    low = 'table = "low"\ntext = "{body}"'
    if published:
        database.execute("CREATE PUBLICATION cdcsync FOR TABLE t WITH (publish_via_partition_root = true)")
        config = configured(database.dsn, low=low)
    else:
        config = configured(database.dsn, low=low, t=T)
    error = the_error(await examined(config))
    assert "sends the changes of the partition public.low as those of public.t" in error.message


async def test_a_partition_alone_can_be_indexed(database: Database) -> None:
    database.execute(PARTITIONED)
    assert (await examined(configured(database.dsn, low='table = "low"\ntext = "{body}"'))).errors == []


async def test_a_column_list_that_lacks_a_column_is_told_with_the_statements_that_add_it(database: Database) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles (id, body) WHERE (id > 7)")
    config = configured(database.dsn, articles='columns = ["tenant"]')
    error = the_error(await examined(config))
    assert "lacks tenant, title" in error.message
    assert error.hint is not None
    database.execute(error.hint)
    report = await examined(config)
    assert report.errors == []
    assert report.specs[0].row_filter == "(id > 7)"


async def test_a_row_filter_is_mentioned_and_goes_into_the_specification(database: Database) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles WHERE (tenant = 1)")
    database.execute("ALTER TABLE articles REPLICA IDENTITY FULL")
    report = await examined(configured(database.dsn))
    assert report.errors == []
    assert report.specs[0].row_filter == "(tenant = 1)"
    assert any("sends only the rows" in finding.message for finding in report.findings)


async def test_stored_generated_columns_are_sent_by_a_publication_that_run_creates(database: Database) -> None:
    with database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute(GENERATED)
    assert (await examined(configured(database.dsn, t='table = "t"\ntext = "{upper}"'))).errors == []


@pytest.mark.parametrize("tables", ["FOR TABLE t", ""], ids=["sent already", "to be added"])
async def test_a_publication_without_generated_columns_is_told_the_statement_that_sends_them(
    database: Database, tables: str
) -> None:
    with database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute(f"{GENERATED}; CREATE PUBLICATION cdcsync {tables}")
    config = configured(database.dsn, t='table = "t"\ntext = "{upper}"')
    error = the_error(await examined(config))
    assert error.hint == "ALTER PUBLICATION cdcsync SET (publish_generated_columns = stored)"
    database.execute(error.hint)
    assert (await examined(config)).errors == []


async def test_a_table_that_could_not_be_updated_any_more_once_it_is_published_is_refused(database: Database) -> None:
    with database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute(f"{GENERATED}; ALTER TABLE t REPLICA IDENTITY FULL; CREATE PUBLICATION cdcsync")
        error = the_error(await examined(configured(database.dsn, t=T)))
        assert "its UPDATEs fail" in error.message
        connection.execute("ALTER PUBLICATION cdcsync ADD TABLE t; INSERT INTO t VALUES (1, 'a')")
        with pytest.raises(psycopg.errors.InvalidColumnReference):
            connection.execute("UPDATE t SET body = 'b'")
        connection.execute(str(error.hint))
        connection.execute("UPDATE t SET body = 'b'")


async def test_a_virtual_generated_column_is_refused(database: Database) -> None:
    with database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute(GENERATED.replace("STORED", "VIRTUAL"))
    error = the_error(await examined(configured(database.dsn, t='table = "t"\ntext = "{upper}"')))
    assert "virtual generated column is never sent: upper" in error.message


@pytest.mark.skipif(not POSTGRESQL_15.exists(), reason="needs PostgreSQL 15")
async def test_an_older_source_sends_no_generated_column(
    make_cluster: Callable[..., Cluster], database: Database
) -> None:
    source = make_cluster(bin_dir=POSTGRESQL_15)
    with psycopg.connect(source.dsn(), autocommit=True) as connection:
        connection.execute(GENERATED)
        sound = configured(source.dsn(), database.dsn, t=T)
        assert (await examined(sound)).errors == []
        error = the_error(await examined(configured(source.dsn(), database.dsn, t='table = "t"\ntext = "{upper}"')))
        assert error.message == "before PostgreSQL 18 no generated column is sent: upper"
        connection.execute("CREATE PUBLICATION cdcsync FOR TABLE t (id)")
        assert "lacks body" in the_error(await examined(sound)).message


IDENTITIES = {
    "a virtual generated column in a full identity": (
        180000,
        "ALTER TABLE t ADD double int GENERATED ALWAYS AS (n * 2) VIRTUAL; ALTER TABLE t REPLICA IDENTITY FULL",
        "FOR TABLE t",
        "holds virtual generated columns, double",
    ),
    "a stored generated column in a full identity": (
        180000,
        "ALTER TABLE t ADD double int GENERATED ALWAYS AS (n * 2) STORED; ALTER TABLE t REPLICA IDENTITY FULL",
        "FOR TABLE t",
        "holds generated columns that are not sent, double",
    ),
    "a column list and a full identity": (
        150000,
        "ALTER TABLE t REPLICA IDENTITY FULL",
        "FOR TABLE t (id, body, n)",
        "the column list for public.t does not cover the replica identity of public.t",
    ),
    "a column list without the whole identity": (
        150000,
        "CREATE UNIQUE INDEX u ON t (id, n); ALTER TABLE t REPLICA IDENTITY USING INDEX u",
        "FOR TABLE t (id, body)",
        "the column list for public.t does not cover the replica identity of public.t",
    ),
    "a row filter by other columns": (
        150000,
        "",
        "FOR TABLE t WHERE (n > 1)",
        "reads columns outside the replica identity of public.t, n",
    ),
    "no identity": (140000, "ALTER TABLE t REPLICA IDENTITY NOTHING", "FOR TABLE t", "has no replica identity"),
    "nothing of that": (140000, "", "FOR TABLE t", None),
    "a filter by the key": (150000, "", "FOR TABLE t WHERE (id > 1)", None),
    "a column list with the key": (150000, "", "FOR TABLE t (id, body)", None),
    "a filter by other columns, of inserts": (150000, "", "FOR TABLE t WHERE (n > 1)@publish = 'insert'", None),
    "a full identity": (140000, "ALTER TABLE t REPLICA IDENTITY FULL", "FOR TABLE t", None),
    "a virtual column outside the identity": (
        180000,
        "ALTER TABLE t ADD double int GENERATED ALWAYS AS (n * 2) VIRTUAL",
        "FOR TABLE t",
        None,
    ),
}
"""By name: since which version, what is done to the table, the publication, and why writes fail, if they do."""


@pytest.fixture(scope="module", params=[18, 15])
def old_and_new(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """A database of the tests' own server, and one of PostgreSQL 15."""
    if request.param == 18:
        with fresh_database(server) as database:
            yield database.dsn
        return
    if not POSTGRESQL_15.exists():
        pytest.skip("PostgreSQL 15 is not installed")
    with Cluster(bin_dir=POSTGRESQL_15) as cluster:
        yield cluster.dsn()


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
@pytest.mark.parametrize("case", IDENTITIES)
async def test_what_is_said_of_failing_writes_is_what_the_server_does(
    old_and_new: str, case: str, partitioned: bool
) -> None:
    version, alter, published, reason = IDENTITIES[case]
    with psycopg.connect(old_and_new, autocommit=True) as connection:
        if connection.info.server_version < version:
            pytest.skip(f"needs PostgreSQL {version // 10000}")
        connection.execute("DROP TABLE IF EXISTS t; DROP PUBLICATION IF EXISTS cdcsync")
        connection.execute(
            f"CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, body text) {PARTS if partitioned else ''}"
        )
        if partitioned:
            connection.execute("CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9)")
            # The identity that counts is that of the partition that is written to.
            alter += ";" + re.sub(r"\bt\b", "low", alter) if "IDENTITY" in alter and "INDEX" not in alter else ""
            if "INDEX" in alter:
                alter += "; ALTER TABLE low REPLICA IDENTITY USING INDEX low_id_n_idx"
            alter = re.sub(r"ALTER TABLE low ADD [^;]*;", "", alter)
        for statement in filter(str.strip, alter.split(";")):
            connection.execute(statement)
        what, _, options = published.partition("@")
        connection.execute(
            f"CREATE PUBLICATION cdcsync {what} WITH (publish_via_partition_root = true{options and f', {options}'})"
        )
        connection.execute("INSERT INTO t VALUES (1, 1, 'a')")
        fails = False
        try:
            connection.execute("UPDATE t SET body = 'b'")
        except psycopg.Error:
            fails = True

    async with await connect(old_and_new, "source") as source:
        catalog = await read_catalog(source, "cdcsync", [T_NAME])
    assert catalog.publication is not None
    table, sent = catalog.tables[T_NAME], catalog.publication.tables[T_NAME]
    said = [why for why, _ in failing_writes(table, catalog.publication, sent, catalog.version)]

    assert bool(said) == fails == (reason is not None)
    if reason is not None:
        where = "public.low" if partitioned else "public.t"
        assert any(reason.replace("identity of public.t", f"identity of {where}") in one for one in said), said


@pytest.mark.parametrize("rows", ["", " WHERE (id > 0)"])
async def test_the_remedy_for_a_column_list_that_fails_writes_leaves_the_other_tables_published(
    database: Database, rows: str
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, body text, n int); INSERT INTO t VALUES (1, 'a', 1)")
    database.execute("CREATE TABLE other (id int PRIMARY KEY, n int); ALTER TABLE t REPLICA IDENTITY FULL")
    database.execute(f"CREATE PUBLICATION cdcsync FOR TABLE t (id, body){rows}, other (id) WHERE (id > 1)")
    others = "SELECT attnames::text[], rowfilter FROM pg_publication_tables WHERE tablename = 'other'"
    before, config = database.execute(others), configured(database.dsn, t=T)
    (fix,) = [str(one.hint) for one in (await examined(config)).findings if "does not cover" in one.message]
    alternative, _, remedy = fix.partition("; or, to send every column: ")
    assert alternative == "ALTER TABLE public.t REPLICA IDENTITY DEFAULT"

    database.execute(remedy)

    assert len(before) == 1
    assert database.execute(others) == before
    database.execute("UPDATE t SET body = 'b'")
    report = await examined(config)
    assert not [one for one in report.findings if one.level != "ok"]
    assert report.specs[0].row_filter == (rows.removeprefix(" WHERE ") or None)


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
async def test_the_remedy_for_a_column_list_without_the_identity_sends_no_column_besides(
    old_and_new: str, database: Database, partitioned: bool
) -> None:
    with psycopg.connect(old_and_new, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS t; DROP PUBLICATION IF EXISTS cdcsync")
        parts = ("low", "high") if partitioned else ("t",)
        connection.execute(
            "CREATE TABLE t (id int PRIMARY KEY, body text, n int NOT NULL, m int NOT NULL, hidden text)"
            f" {PARTS if partitioned else ''}"
        )
        if partitioned:
            connection.execute("CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9)")
            connection.execute("CREATE TABLE high PARTITION OF t FOR VALUES FROM (9) TO (2000)")
        for part, column in zip(parts, ("n", "m"), strict=False):
            connection.execute(f"CREATE UNIQUE INDEX {part}_u ON {part} (id, {column})".encode())
            connection.execute(f"ALTER TABLE {part} REPLICA IDENTITY USING INDEX {part}_u".encode())
        connection.execute("INSERT INTO t VALUES (1, 'a', 1, 1, 'a'), (1000, 'a', 1, 1, 'a')")
        connection.execute("CREATE PUBLICATION cdcsync FOR TABLE t (id, body) WITH (publish_via_partition_root)")
        config = configured(old_and_new, database.dsn, t=T)
        fixes = [str(one.hint) for one in (await examined(config)).findings if "does not cover" in one.message]
        assert len(fixes) == len(parts)
        remedies = {fix.partition("; or: ALTER TABLE ")[0] for fix in fixes}
        (remedy,) = remedies  # the same for each partition: a list holds for all

        connection.execute(remedy.encode())

        connection.execute("UPDATE t SET body = 'b'")
        assert not [one for one in (await examined(config)).findings if "UPDATE and DELETE" in one.message]
        listed = connection.execute("SELECT attnames::text[] FROM pg_publication_tables").fetchall()
        assert listed == [(["id", "body", "n", *(["m"] if partitioned else [])],)]


async def test_a_table_whose_writes_would_fail_is_refused_before_it_is_published_and_warned_of_afterwards(
    database: Database,
) -> None:
    with database.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, body text, n int GENERATED ALWAYS AS (id * 2) VIRTUAL)")
        connection.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        config = configured(database.dsn, t=T)
        refused = the_error(await examined(config))
        assert "once it sends public.t, its UPDATEs fail" in refused.message
        connection.execute("CREATE PUBLICATION cdcsync FOR TABLE t")
        report = await examined(config)
        assert report.errors == []
        assert [one.hint for one in report.findings if "UPDATE and DELETE of public.t fail" in one.message] == [
            "ALTER TABLE public.t REPLICA IDENTITY DEFAULT"
        ]
        connection.execute(str(refused.hint))
        assert not [one for one in (await examined(config)).findings if one.level != "ok"]
