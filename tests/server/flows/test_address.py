"""The source's address is looked at for as long as a worker runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import CdcsyncError, SourceUnavailable
from cdcsync.flows import address
from cdcsync.flows.address import watch_address
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import Connection, admitting
from cdcsync.postgres.settings import Side
from tests.support.proxies import Proxy

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_server_that_the_address_leads_to_by_now_is_found_and_also_after_an_outage(
    make_cluster: Callable[..., Cluster], make_proxy: Callable[[int], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "LOOK_S", 0.02)
    warned: list[dict[str, Any]] = []
    monkeypatch.setattr(address.log, "warning", lambda event, **said: warned.append({"event": event, **said}))
    here, there = make_cluster(), make_cluster()
    moving = make_proxy(here.port)
    found: list[int] = []
    more = anyio.Event()

    async def admit(connection: Connection, side: Side) -> None:
        nonlocal more
        assert side == "source"
        assert isinstance(connection, WatchedConnection)
        assert connection.backend is not None
        found.append(connection.backend.started)
        more.set()
        more = anyio.Event()
        if len(set(found)) == 2:
            raise SourceUnavailable("this is another one", hint="stay")

    async def refused(error: CdcsyncError) -> None:
        assert isinstance(error, SourceUnavailable)

    with anyio.fail_after(60), admitting(admit, refused):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                watch_address, f"host=127.0.0.1 port={moving.port} user=postgres dbname=postgres", "source"
            )
            await more.wait()
            await more.wait()
            assert len(set(found)) == 1
            moving.move(1)
            while not warned:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
            moving.move(there.port)
            while len(set(found)) < 2:
                await more.wait()
            while len(warned) < 2:  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert [one["event"] for one in warned] == ["source_sessions_wait"] * 2
    assert warned[-1]["fix"] == "stay"
