"""Keys that go by a collation whose version has changed are warned of until the fix is typed; nothing else is."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import conninfo, sql

from cdcsync.demo.cluster import Cluster
from cdcsync.preflight import Finding, Report
from tests import ROOT
from tests.support.clusters import OTHER_VERSIONS
from tests.support.preflight import configured, examined, follow, warnings
from tests.support.servers import Database, Server

pytestmark = pytest.mark.server

NOTES = "CREATE TABLE notes (slug {type} PRIMARY KEY, title text, body text)"

AGED = "UPDATE pg_database SET datcollversion = '0' WHERE datname = current_database()"
"""Makes a database one whose texts were sorted by another version."""


def told(report: Report) -> list[Finding]:
    return [one for one in warnings(report) if "recorded in version" in one.message]


@pytest.fixture
def owner(server: Server) -> Iterator[str]:
    """A role that owns what it is given, and is no superuser."""
    name = f"cdcsync_test_owner_{secrets.token_hex(4)}"
    with server.connect() as admin:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield name
    with server.connect() as admin:
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def versioned(server: Server, owner: str) -> Iterator[Callable[[], Database]]:
    """Makes databases whose own collation has a version, of a provider that the server has."""
    made: list[str] = []

    def make() -> Database:
        name = f"cdcsync_test_{secrets.token_hex(6)}"
        with server.connect() as admin:
            version = admin.info.server_version
            if version < 150000:
                pytest.skip("before PostgreSQL 15 a database has no version")
            provider = "builtin BUILTIN_LOCALE 'C.UTF-8'" if version >= 170000 else "icu ICU_LOCALE 'en'"
            try:
                admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER {provider}")
            except psycopg.errors.FeatureNotSupported:
                pytest.skip("this server was built without ICU")
        made.append(name)
        database = Database(conninfo.make_conninfo(server.dsn, dbname=name), name, server)
        database.execute("CREATE EXTENSION vector")
        return database

    yield make
    with server.connect() as admin:
        for name in made:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def typed(database: Database, hint: str, owner: str) -> None:
    """Run the statements of a hint one by one, as the owner of the database."""
    found = re.match(
        r"as the owner of the database: (.+?), then (.+?)(?:, then compare: cdcsync verify \w+)?; docs/", hint
    )
    assert found is not None, hint
    with database.connect() as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(database.name), sql.Identifier(owner))
        )
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
        for statement in found.groups():
            connection.execute(statement.encode())


@pytest.mark.parametrize(
    ("type_", "warned"),
    [
        ("text", True),
        ("varchar(40)", True),
        ("text[]", True),
        ("word", True),
        ("bigint", False),
        ("uuid", False),
        ('text COLLATE "C"', False),
        ("name", False),
    ],
)
async def test_a_key_that_is_sorted_by_the_databases_own_collation_is_told_of_until_the_fix_is_typed(
    versioned: Callable[[], Database], database: Database, owner: str, type_: str, warned: bool
) -> None:
    source = versioned()
    source.execute("CREATE DOMAIN word AS text")
    source.execute(NOTES.format(type=type_))
    config = configured(source.dsn, database.dsn, notes='table = "notes"')
    assert told(await examined(config)) == []

    source.execute(AGED)
    found = told(await examined(config))

    assert bool(found) is warned
    if warned:
        (one,) = found
        assert one.where == "indexes.notes.table"
        assert one.message.startswith(
            f"rows are looked up by public.notes.slug, in the default collation of the database {source.name}, recorded"
            " in version 0, while the server sorts by version "
        )
        assert "cdcsync verify" not in str(one.hint)  # there is nothing to compare yet
        typed(source, str(one.hint), owner)
        assert told(await examined(config)) == []


async def test_in_the_target_the_indexes_on_the_chunks_count_and_nothing_else(
    versioned: Callable[[], Database], database: Database, owner: str
) -> None:
    database.execute(NOTES.format(type="text"))
    database.execute("CREATE TABLE tickets (id bigint PRIMARY KEY, state text, title text, body text)")
    target = versioned()
    notes, tickets, sorted_by = 'table = "notes"', 'table = "tickets"\ncolumns = ["state"]', '\nindexed = ["state"]'
    config = configured(database.dsn, target.dsn, slot="preflight_collations", notes=notes)
    await follow(target, config)
    target.execute(AGED)
    (one,) = told(await examined(config))
    assert one.where == "indexes.notes"
    assert one.message.startswith(
        "cdcsync.notes_chunks in the target has indexes that are sorted by the default collation"
    )
    assert one.message.endswith(": notes_chunks_slug_chunk_no_key")
    assert ", then compare: cdcsync verify notes;" in str(one.hint)
    typed(target, str(one.hint), owner)
    assert told(await examined(config)) == []
    target.execute("DROP SCHEMA cdcsync CASCADE")

    for lines, warned in ((tickets, False), (tickets + sorted_by, True)):
        config = configured(database.dsn, target.dsn, slot="preflight_collations", tickets=lines)
        await follow(target, config)
        target.execute(AGED)
        assert bool(told(await examined(config))) is warned
        target.execute("DROP SCHEMA cdcsync CASCADE")


async def test_a_collation_that_a_column_names_is_told_by_its_name(
    versioned: Callable[[], Database], database: Database, owner: str
) -> None:
    source = versioned()
    with source.connect() as connection:
        icu = connection.info.server_version < 170000
        provider = "icu, locale = 'en'" if icu else "builtin, locale = 'C.UTF-8'"
        connection.execute(f"CREATE COLLATION mine (provider = {provider})".encode())
        connection.execute(f"ALTER COLLATION mine OWNER TO {owner}".encode())
    source.execute(NOTES.format(type="text COLLATE mine"))
    source.execute(
        'INSERT INTO pg_collation SELECT (jsonb_populate_record(c, \'{"oid": 99999, "collencoding": 8}\')).*'
        " FROM pg_collation AS c WHERE collname = 'mine'"
    )  # of the same name, for databases in another encoding
    source.execute("UPDATE pg_collation SET collversion = '0' WHERE collname = 'mine'")
    config = configured(source.dsn, database.dsn, notes='table = "notes"')
    (one,) = told(await examined(config))
    assert "in the collation public.mine, recorded in version 0" in one.message
    typed(source, str(one.hint), owner)
    assert told(await examined(config)) == []


async def test_the_owner_of_a_database_is_not_sent_to_refresh_a_collation_of_the_servers(
    versioned: Callable[[], Database], database: Database
) -> None:
    source = versioned()
    with source.connect() as connection:
        if connection.info.server_version < 170000:
            pytest.skip("before PostgreSQL 17 this server may have no collation with a version")
    source.execute(NOTES.format(type='text COLLATE "pg_c_utf8"'))
    source.execute("UPDATE pg_collation SET collversion = '0' WHERE collname = 'pg_c_utf8'")
    config = configured(source.dsn, database.dsn, notes='table = "notes"')
    (one,) = told(await examined(config))
    assert str(one.hint).startswith(f"as a superuser: REINDEX DATABASE CONCURRENTLY {source.name}, then ")
    source.execute("ALTER COLLATION pg_catalog.pg_c_utf8 REFRESH VERSION")
    assert told(await examined(config)) == []


async def test_columns_by_which_related_rows_are_found_count_as_keys_do(
    versioned: Callable[[], Database], database: Database
) -> None:
    source = versioned()
    source.execute("CREATE TABLE authors (handle text PRIMARY KEY, name text)")
    source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, author text, title text, body text)")
    source.execute(AGED)
    alone, joined = (
        'table = "notes"',
        (
            'table = "notes"\ntext = "{title} {writer.name}"\n'
            '[indexes.notes.related.writer]\ntable = "authors"\non = { handle = "author" }\n'
        ),
    )
    assert told(await examined(configured(source.dsn, database.dsn, notes=alone))) == []
    (one,) = told(await examined(configured(source.dsn, database.dsn, notes=f'embedder = "hash"\n{joined}')))
    assert "public.authors.handle, public.notes.author" in one.message


async def test_each_of_many_tables_counts(versioned: Callable[[], Database], database: Database) -> None:
    source = versioned()
    for schema in ("m_1", "m_2"):
        source.execute(
            f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.notes (slug text PRIMARY KEY, title text, body text)"
        )
    source.execute(AGED)
    (one,) = told(await examined(configured(source.dsn, database.dsn, notes='tables = ["m_*.notes"]')))
    assert "m_1.notes.slug, m_2.notes.slug" in one.message


@pytest.mark.parametrize("version", OTHER_VERSIONS)
async def test_databases_of_earlier_servers_are_told_of_as_well(
    version: int, make_cluster: Callable[..., Cluster], database: Database
) -> None:
    if not OTHER_VERSIONS[version].exists():
        pytest.skip(f"PostgreSQL {version} is not there")
    source = make_cluster(bin_dir=OTHER_VERSIONS[version])
    with psycopg.connect(source.dsn(), autocommit=True) as connection:
        try:
            connection.execute("CREATE DATABASE aged TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en'")
        except psycopg.errors.FeatureNotSupported:
            pytest.skip("this server was built without ICU")
    with psycopg.connect(source.dsn("aged"), autocommit=True) as connection:
        connection.execute(NOTES.format(type="text").encode())
        config = configured(source.dsn("aged"), database.dsn, notes='table = "notes"')
        assert told(await examined(config)) == []
        connection.execute(AGED)
        (one,) = told(await examined(config))
        for statement in ("REINDEX DATABASE CONCURRENTLY aged", "ALTER DATABASE aged REFRESH COLLATION VERSION"):
            assert statement in str(one.hint)
            connection.execute(statement.encode())
    assert told(await examined(config)) == []


async def test_the_statements_of_the_page_rebuild_what_sorts_texts_and_delete_what_is_stored_twice(
    versioned: Callable[[], Database], database: Database, owner: str
) -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").split("## Another version of the operating")[1]
    listing, *_ = re.findall(r"```sql\n(.+?);", page, re.DOTALL)
    (delete,) = re.findall(r"`(SET enable_indexscan.+?;)`", page, re.DOTALL)
    (refresh,) = re.findall(r"`(ALTER DATABASE app REFRESH .+?)`", page)
    database.execute(NOTES.format(type="text"))
    target = versioned()
    config = configured(database.dsn, target.dsn, slot="preflight_collations", notes='table = "notes"')
    await follow(target, config)
    target.execute(AGED)
    target.execute("ALTER TABLE cdcsync.notes_chunks DROP CONSTRAINT notes_chunks_slug_chunk_no_key")
    for content in ("older", "newer"):
        target.execute(
            "INSERT INTO cdcsync.notes_chunks (slug, chunk_no, content, content_hash, document_hash, commit_lsn)"
            " VALUES ('a', 0, %s, '', '', '0/0')",
            [content],
        )
    target.execute(delete.replace("articles_chunks", "notes_chunks"))
    assert target.execute("SELECT content FROM cdcsync.notes_chunks") == [("newer",)]
    target.execute("ALTER TABLE cdcsync.notes_chunks ADD UNIQUE (slug, chunk_no)")

    rebuilt = [statement for (statement,) in target.execute(listing)]

    with target.connect() as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(*map(sql.Identifier, (target.name, owner))))
        for statement in rebuilt:
            connection.execute(statement.encode())
        connection.execute(refresh.replace("app", target.name).encode())
    assert "REINDEX INDEX CONCURRENTLY cdcsync.notes_chunks_slug_chunk_no_key" in rebuilt
    assert not [one for one in rebuilt if "notes_vectors" in one or "chunks_pkey" in one]
    assert told(await examined(config)) == []
