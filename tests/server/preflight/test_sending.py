"""What is told of publications: tables, columns and rows that they do not send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdcsync.demo.cluster import Cluster
from cdcsync.flows.audit.digests import published
from cdcsync.flows.replay import check_where
from cdcsync.postgres.sessions import connect
from tests.fixtures.preflight import ARTICLES, Role, configured, examined, the_error
from tests.fixtures.servers import Database

pytestmark = pytest.mark.server

PARTITIONED = """
    CREATE TABLE t (id int PRIMARY KEY, body text) PARTITION BY RANGE (id);
    CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9);
"""
GENERATED = "CREATE TABLE t (id int PRIMARY KEY, body text, upper text GENERATED ALWAYS AS (upper(body)) STORED)"
POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")

T = 'table = "t"\ntext = "{body}"'


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
