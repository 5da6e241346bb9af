"""About how many rows a table has, with statistics, with old ones, and without any."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from psycopg import sql

from cdcsync.postgres.estimates import SAMPLED, estimate_rows
from cdcsync.postgres.sessions import Connection, connect
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TABLE = sql.Identifier("public", "t")
ROWS = 5 * SAMPLED


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    database.execute("CREATE TABLE public.t (id int, body text) WITH (autovacuum_enabled = off)")
    async with await connect(database.dsn, "target") as connected:
        yield connected


async def fill(connection: Connection) -> None:
    await connection.execute("INSERT INTO public.t SELECT n, 'row ' || n FROM generate_series(1, %s) AS n", [ROWS])


async def test_a_table_without_statistics_is_estimated_by_its_size_and_a_sample(connection: Connection) -> None:
    await fill(connection)
    rows, analysed = await estimate_rows(connection, TABLE)
    assert rows == pytest.approx(ROWS, rel=0.1)
    assert not analysed


async def test_statistics_are_scaled_by_the_size_that_the_table_has_now(connection: Connection) -> None:
    await fill(connection)
    await connection.execute("ANALYZE public.t")
    assert await estimate_rows(connection, TABLE) == (ROWS, True)
    await fill(connection)
    rows, analysed = await estimate_rows(connection, TABLE)
    assert rows == pytest.approx(2 * ROWS, rel=0.1)
    assert analysed


@pytest.mark.parametrize("analysed", [False, True])
async def test_an_empty_table_has_no_rows(connection: Connection, analysed: bool) -> None:
    if analysed:
        await connection.execute("ANALYZE public.t")
    assert (await estimate_rows(connection, TABLE))[0] == 0
