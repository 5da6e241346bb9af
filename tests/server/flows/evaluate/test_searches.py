"""One vector's search, by HNSW and exactly: what counts as a hit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from psycopg import sql

from cdcsync.flows.evaluate.recall import evaluate
from tests.support.indexes import SCHEMA
from tests.support.recalls import SPARSE, counted, crowd, indexed

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_equals_at_the_same_distance_are_hits_whichever_is_returned(database: Database) -> None:
    # All are equally far from each other, and HNSW comes upon them in another order than who reads the table.
    async with indexed(database, np.eye(60), m=32) as (index, spec):
        # So few are searched by HNSW where the planner likes nothing else; the exact search is exact even then.
        for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin"):
            await index.connection.execute(sql.SQL(f"SET enable_{way} = off"))
        scans, _ = await counted(index.connection)
        found = await evaluate(index.connection, SCHEMA, spec, queries=30, ef_search=[99])
        assert (await counted(index.connection))[0] == scans + 30
    assert [(one.recall, one.by_hnsw) for one in found.measured] == [(1.0, True)]


async def test_the_exact_search_is_exact_whatever_the_session_has_off(database: Database) -> None:
    async with indexed(database, crowd(), m=SPARSE) as (index, spec):
        await index.connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off")
        scans, _ = await counted(index.connection)
        found = await evaluate(index.connection, SCHEMA, spec, queries=20, ef_search=[12])
        assert (await counted(index.connection))[0] == scans + 20
    assert found.measured[0].by_hnsw
    assert found.measured[0].recall < 0.9


async def test_a_vector_does_not_find_itself(database: Database) -> None:
    async with indexed(database, crowd(), m=SPARSE) as (index, spec):
        # A vector that found itself would never miss.
        found = await evaluate(index.connection, SCHEMA, spec, queries=40, k=1, ef_search=[1])
    assert found.measured[0].recall < 0.9
