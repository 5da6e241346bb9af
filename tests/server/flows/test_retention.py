"""The watch of the slot: what it tells the stream of a source that refuses to answer."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.flows import retention
from cdcsync.flows.retention import Retention, watch_slot
from cdcsync.metrics import Metrics
from tests.support.indexes import until as eventually

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_source_that_refuses_connections_is_told_of_for_as_long_as_it_does(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It may be shut down a second time before it was looked at, and would wait for the stream, which waits for it.
    monkeypatch.setattr(retention, "AWAY_LOOK_S", 0.1)
    monkeypatch.setattr(retention, "LOOK_S", 0.1)
    source = make_cluster()
    source.stop()
    told: list[float] = []

    async def often() -> bool:
        return len(told) >= 3

    async def looked() -> bool:
        with psycopg.connect(source.dsn()) as session:
            looks = "SELECT query_start FROM pg_stat_activity WHERE application_name = 'cdcsync slot'"
            seen.update(session.execute(looks).fetchall())
        return len(seen) > 4

    seen: set[object] = set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_slot, source.dsn(), "cdcsync", Metrics(), lambda: told.append(anyio.current_time()))
        await eventually(often)
        source.start()
        await eventually(looked)
        before = len(told)
        seen.clear()
        await eventually(looked)
        assert len(told) == before
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "refusal",
    [
        "ALTER ROLE ann CONNECTION LIMIT 0",
        "ALTER DATABASE app ALLOW_CONNECTIONS false",
        "REVOKE CONNECT ON DATABASE app FROM public",
    ],
)
async def test_a_running_source_that_lets_our_role_in_no_more_is_none_that_ends(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    # The stream goes on, and could not be opened again.
    monkeypatch.setattr(retention, "AWAY_LOOK_S", 0.1)
    monkeypatch.setattr(retention, "LOOK_S", 0.1)
    source = make_cluster()
    with psycopg.connect(source.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE ann LOGIN")
        admin.execute("CREATE DATABASE app")
        admin.execute(refusal.encode())
    looks: list[object] = []
    monkeypatch.setattr(Retention, "look_at", lambda _, slot: looks.append(slot))

    async def often() -> bool:
        return len(looks) > 5

    async with anyio.create_task_group() as tasks:
        given_up: list[None] = []
        tasks.start_soon(watch_slot, source.dsn("app", "ann"), "cdcsync", Metrics(), lambda: given_up.append(None))
        await eventually(often)
        assert (set(looks), given_up) == ({None}, [])
        tasks.cancel_scope.cancel()
