"""The watch of a pipeline's tables: what it tells the stream."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import psycopg
import pytest

from cdcsync.config import parse
from cdcsync.demo.cluster import Cluster
from cdcsync.flows import watch
from cdcsync.flows.watch import Watch
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.pauses import Pauses
from tests.support.configs import configuration
from tests.support.indexes import until as eventually
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_source_that_refuses_connections_is_told_of_for_as_long_as_it_does(
    make_cluster: Callable[..., Cluster], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It may be shut down a second time before it was looked at, and would wait for the stream, which waits for it.
    monkeypatch.setattr(watch, "AWAITED_S", 0.1)
    monkeypatch.setattr(watch, "WATCH_S", 0.1)
    source = make_cluster()
    source.stop()
    config = parse(configuration(source.dsn(), target=database.dsn), {}, where="the test's configuration")
    told: list[float] = []
    watching = Watch(
        *(config, [], [], Pauses(), lambda error: None, Metrics()),
        deliveries={},
        received=lambda: Lsn(0),
        unapproved={},
        source_ends=lambda: told.append(anyio.current_time()),
    )

    async def often() -> bool:
        return len(told) >= 3

    async def looked() -> bool:
        with psycopg.connect(source.dsn()) as session:
            looks = "SELECT query_start FROM pg_stat_activity WHERE application_name = 'cdcsync watch'"
            seen.update(session.execute(looks).fetchall())
        return len(seen) > 4

    seen: set[object] = set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watching.run)
        await eventually(often)
        source.start()
        await eventually(looked)
        before = len(told)
        seen.clear()
        await eventually(looked)
        assert len(told) == before
        tasks.cancel_scope.cancel()
