"""A table that is rewritten while it is read: a snapshot from before would find it empty."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from cdcsync.changes import Shape
from cdcsync.config import QualifiedName
from cdcsync.postgres import connect
from cdcsync.source.tables import Page, SourceTable
from tests.fixtures.servers import Database

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
