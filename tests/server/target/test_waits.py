"""Waits of an application's tasks for positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

import cdcsync
from cdcsync.postgres.queries import fetch_value
from cdcsync.target.pipelines import Pipelines
from tests.support.searched import indexed, keys

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_tasks_that_wait_for_a_position_keep_no_connection_from_searches(database: Database) -> None:
    async with (
        indexed(database) as (index, config),
        cdcsync.Index.open(config, "articles", connections=1) as articles,
    ):
        await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/1'")
        reached: list[bool] = []

        async def wait() -> None:
            reached.append(await articles.wait_for("FFFFFFFF/0", timeout_s=120))

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(wait)
            pipeline = Pipelines("cdcsync", await fetch_value(index.connection, "SELECT slot FROM cdcsync.pipelines"))
            with anyio.fail_after(60):
                # The worker asks as well, and then tells its position at once.
                while not await pipeline.awaited(index.connection):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert keys(await articles.search("cat dreams", k=1)) == [1]
            assert reached == []
            await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = 'FFFFFFFF/0'")
        assert reached == [True] * 8
