"""The relations of generations beside the live one: made where they are missing, and filled again if they were lost."""

from __future__ import annotations

import pytest

from cdcsync.target.ddl.generations import create_generations
from tests.support.indexes import SCHEMA, begin_generations, live_index, two_generations
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize("dropped", ["articles_vectors_2", "articles_vectors_2_settled", "articles_vectors_2_fresh"])
async def test_a_generation_that_lost_a_table_is_made_whole_and_told_of(database: Database, dropped: str) -> None:
    async with live_index(database, two_generations()) as live:
        await begin_generations(live)
        assert await create_generations(live.connection, SCHEMA, live.spec) == []
        await live.connection.execute(
            f"GRANT SELECT ON cdcsync.articles_vectors_2 TO PUBLIC; DROP TABLE cdcsync.{dropped} CASCADE".encode()
        )

        created = await create_generations(live.connection, SCHEMA, live.spec)

        assert created == [2]
        assert await live.rows(
            "SELECT count(*) FROM pg_inherits WHERE inhparent = 'cdcsync.articles_vectors_2'::regclass"
        ) == [(2,)]
