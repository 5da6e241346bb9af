"""A table that is rewritten while it is read: a snapshot from before would find it empty."""

from __future__ import annotations

import secrets

import anyio
import anyio.lowlevel
import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.rows import Shape
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.reads import Page
from cdcsync.source.tables import SourceTable
from tests.support.relations import rows
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_a_page_that_waited_for_a_rewrite_of_the_table_has_all_its_rows(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, body text)")
    database.execute("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 50) i")
    table = SourceTable(Shape("i", QualifiedName("public", "t"), ("id",), (), ("body",)), ("integer",))
    pages: list[Page] = []

    with database.connect() as rewriter:
        async with await connect(database.dsn, "source") as reader, anyio.create_task_group() as tasks:
            rewriter.execute("BEGIN")
            rewriter.execute("ALTER TABLE t ADD COLUMN token uuid DEFAULT gen_random_uuid()")

            async def read() -> None:
                pages.append(await table.page(reader, None, 100))

            tasks.start_soon(read)
            while not database.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"):
                await anyio.lowlevel.checkpoint()
            rewriter.execute("COMMIT")

    assert len(pages[0].rows) == 50


async def test_a_page_that_waited_for_a_table_to_be_made_anew_has_all_its_rows(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, body text)")
    table = SourceTable(Shape("i", QualifiedName("public", "t"), ("id",), (), ("body",)), ("integer",))
    pages: list[Page] = []

    with database.connect() as writer:
        async with await connect(database.dsn, "source") as reader, anyio.create_task_group() as tasks:
            writer.execute("BEGIN")
            writer.execute("ALTER TABLE t RENAME TO old")
            writer.execute("CREATE TABLE t (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)")
            writer.execute("CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (99)")
            writer.execute("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 50) i")

            async def read() -> None:
                pages.append(await table.page(reader, None, 100))

            tasks.start_soon(read)
            while not database.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"):
                await anyio.lowlevel.checkpoint()
            writer.execute("COMMIT")

    assert len(pages[0].rows) == 50


async def test_the_right_to_read_the_columns_that_are_used_is_enough(database: Database) -> None:
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    database.execute("CREATE TABLE t (id int PRIMARY KEY, body text, secret text)")
    database.execute("INSERT INTO t SELECT i, 'x', 'secret' FROM generate_series(1, 5) i")
    database.execute(f"CREATE ROLE {role}")
    try:
        database.execute(f"GRANT SELECT (id, body) ON t TO {role}")
        table = SourceTable(Shape("i", QualifiedName("public", "t"), ("id",), (), ("body",)), ("integer",))
        async with await connect(database.dsn, "source") as reader:
            await reader.execute(f"SET ROLE {role}".encode())
            page = await table.page(reader, ("1",), 3, "body = 'x'")
            again = await table.by_keys(reader, [("1",), ("7",)])
            counted = await table.count(reader)
            _, absent = await table.absent(reader, [("1",), ("7",)])
    finally:
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")

    assert [row[0] for row in page.rows] == ["2", "3", "4"]
    assert again.rows == [("1", "x")]
    assert counted == 5
    assert absent == [("7",)]


async def test_a_page_says_which_transactions_it_saw(database: Database, source_session: Connection) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    table = SourceTable(Shape("i", QualifiedName("public", "t"), ("id",), (), ()), ("integer",))
    with database.connect() as writing:
        writing.execute("BEGIN")
        writing.execute("INSERT INTO t VALUES (1)")
        ((xid,),) = writing.execute("SELECT pg_current_xact_id()::text").fetchall()
        before = await table.page(source_session, None, 10)
        writing.execute("COMMIT")
        after = await table.page(source_session, None, 10)

    assert (before.rows, before.snapshot.sees(int(xid))) == ([], False)
    assert (after.rows, after.snapshot.sees(int(xid))) == ([("1",)], True)


async def test_a_read_holds_nothing_once_it_is_done(database: Database, source_session: Connection) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    await SourceTable(Shape("i", QualifiedName("public", "t"), ("id",), (), ()), ("integer",)).page(
        source_session, None, 10
    )
    held = await rows(
        source_session,
        "SELECT backend_xmin IS NULL OR pid = pg_backend_pid(), xact_start = query_start"
        " FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    )
    assert held == [(True, True)]
    database.execute("SET lock_timeout = '500ms'")
    database.execute("DROP TABLE t")
