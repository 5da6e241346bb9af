"""Whom the build of a search index waits for, as the server shows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.status import builds
from cdcsync.status.builds import read_builds
from tests.support.clocks import set_back
from tests.support.indexes import SCHEMA, LiveIndex, until_blocked
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]


@pytest.mark.parametrize(
    ("open_for_s", "behind", "told"),
    [(0.0, False, True), (600.0, False, False), (600.0, True, True)],
    ids=["old", "young", "from before the clock went back"],
)
async def test_a_transaction_that_a_build_waits_for_is_told_once_it_is_old(
    index: LiveIndex,
    target: Database,
    connect_target: ConnectTarget,
    monkeypatch: pytest.MonkeyPatch,
    open_for_s: float,
    behind: bool,
    told: bool,
) -> None:
    monkeypatch.setattr(builds, "OPEN_FOR_S", open_for_s)
    holding, building, watching = await connect_target(), await connect_target(), await connect_target()

    async def build() -> None:
        await building.execute("CREATE INDEX CONCURRENTLY ON cdcsync.articles_chunks (chunk_no)")

    async with anyio.create_task_group() as tasks, holding.transaction():
        await holding.execute("LOCK TABLE cdcsync.articles_chunks IN ROW EXCLUSIVE MODE")
        tasks.start_soon(build)
        await until_blocked(watching, building)
        if behind:
            await set_back(watching, target)
        found = await read_builds(watching, SCHEMA)

    assert found["articles_chunks"].waits_for == (holding.info.backend_pid if told else None)
