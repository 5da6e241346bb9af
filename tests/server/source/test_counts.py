"""How many rows a table has, counted and as the planner expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.rows import Shape
from cdcsync.postgres.sessions import Connection
from cdcsync.source.tables import SourceTable
from tests.support.tables import pages, source_table

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_the_estimate_is_the_planners_also_over_partitions(
    database: Database, source_session: Connection
) -> None:
    database.execute('CREATE SCHEMA "My %"; CREATE TABLE "My %"."Tab.le" (id int PRIMARY KEY)')
    database.execute("CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    database.execute("CREATE TABLE high PARTITION OF parted FOR VALUES FROM (10) TO (100) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE higher PARTITION OF high FOR VALUES FROM (10) TO (100)")
    shape = Shape("i", QualifiedName("My %", "Tab.le"), ("id",), (), ())
    tables = [SourceTable(shape, ("integer",)), source_table({"id": "integer"}, name="parted")]

    assert [await table.estimate(source_session) for table in tables] == [0, 0]
    for name in ('"My %"."Tab.le"', "parted"):
        database.execute(f"INSERT INTO {name} SELECT n FROM generate_series(1, 50) n")
        database.execute(f"ANALYZE {name}")
    assert [await table.estimate(source_session) for table in tables] == [50, 50]
    assert [await table.count(source_session) for table in tables] == [50, 50]
    assert [await table.expected(source_session) for table in tables] == [50, 50]
    assert all([0 < await table.expected(source_session, "id <= 10") < 50 for table in tables])
    assert [len(await pages(table, source_session, 20)) for table in tables] == [3, 3]
