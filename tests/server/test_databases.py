"""The databases that tests get, and that they go with everything in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psycopg
import pytest
from psycopg import pq

from tests.support.servers import Database, Server, Shared, fresh_database

pytestmark = pytest.mark.server


def names(server: Server) -> set[str]:
    with server.connect() as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database").fetchall()}


def test_a_database_has_vectors_and_is_empty(database: Database) -> None:
    assert database.execute("SELECT '[1]'::vector::text") == [("[1]",)]
    assert database.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]


def test_databases_know_nothing_of_each_other(make_database: Callable[[], Database]) -> None:
    first, second = make_database(), make_database()
    first.execute("CREATE TABLE t AS SELECT 1")
    assert second.execute("SELECT to_regclass('t')") == [(None,)]


def test_a_database_goes_with_its_slots_transactions_and_clients(server: Server) -> None:
    with contextlib.ExitStack() as outlives:
        with fresh_database(server) as database:
            database.execute("CREATE PUBLICATION p FOR ALL TABLES")
            database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [database.name])
            client = outlives.enter_context(contextlib.closing(database.connect()))
            for statement in ("CREATE TABLE t ()", "BEGIN", "DROP TABLE t", "PREPARE TRANSACTION 'left'"):
                client.execute(statement)
            walsender = pq.PGconn.connect(f"{database.dsn} replication=database".encode())
            outlives.callback(walsender.finish)
            started = walsender.exec_(
                f"START_REPLICATION SLOT {database.name} LOGICAL 0/0"
                " (proto_version '1', publication_names 'p')".encode()
            )
            assert started.status == pq.ExecStatus.COPY_BOTH
        assert database.name not in names(server)
        with server.connect() as connection:
            slots = connection.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [database.name])
            assert slots.fetchall() == []
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE SCHEMA other",
        "CREATE TABLE t ()",
        "CREATE TYPE mood AS ENUM ('calm')",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql RETURN 1",
        "CREATE EXTENSION hstore",
        "CREATE PUBLICATION p",
        "CREATE TEXT SEARCH CONFIGURATION words (COPY = simple)",
        "REVOKE USAGE ON SCHEMA public FROM public",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO public",
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET work_mem = 64', current_database()); END $$",
        "SELECT pg_create_logical_replication_slot(current_database()::text, 'pgoutput')",
        "DROP EXTENSION vector",
    ],
)
def test_what_a_test_leaves_goes_with_its_database(server: Server, statement: str) -> None:
    with contextlib.closing(Shared(server)) as shared:
        with shared.lent() as first:
            first.execute(statement)
        with shared.lent() as second:
            assert second.name != first.name


def test_the_next_test_has_the_same_database_without_the_schema_of_indexes(server: Server) -> None:
    with contextlib.closing(Shared(server)) as shared:
        with shared.lent() as first:
            first.execute("CREATE SCHEMA cdcsync CREATE TABLE t (id int PRIMARY KEY, embedding vector(3))")
        with shared.lent() as second:
            assert second.name == first.name
            assert second.execute("SELECT to_regnamespace('cdcsync')") == [(None,)]
