"""A DSN of several hosts leads to the one that is the right server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import TargetUnavailable
from cdcsync.postgres import logins
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import connect
from cdcsync.source.slot import SlotConnection
from tests.support.clusters import several

pytestmark = [pytest.mark.server, pytest.mark.anyio]


class Caller:
    """A host that counts who calls, and says nothing.

    :ivar calls: how often somebody connected.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.calls = 0


@contextlib.asynccontextmanager
async def answering_nobody() -> AsyncIterator[Caller]:
    found = Caller(0)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.calls += 1
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        found.port = server.sockets[0].getsockname()[1]
        yield found


async def port_of(dsn: str) -> int:
    async with await connect(dsn, "target") as connection:
        return connection.info.port


async def test_a_former_primary_is_left_for_the_one_that_was_promoted_in_its_place(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    former = make_cluster()
    with former.standby() as standby:
        assert await port_of(several(former, standby)) == former.port
        standby.promote()
        monkeypatch.setattr(logins, "_asked_until", {})  # as if it had been a while
        assert await port_of(several(former, standby)) == standby.port
        assert await port_of(several(standby, former)) == standby.port
        async with await SlotConnection.connect(several(former, standby)) as slot:
            assert slot.address == f"127.0.0.1:{standby.port}"
        # Alone it is what there is.
        assert await port_of(former.dsn()) == former.port


async def test_the_other_hosts_are_not_asked_by_each_session(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = make_cluster()

    async def right(_: WatchedConnection) -> None:
        """Take any server."""

    async with answering_nobody() as away:
        dsn = several(primary, away)
        for _ in range(3):
            assert await port_of(dsn) == primary.port
        assert away.calls == 1
        # What decides where the others have to be asks each time.
        await (await connect(dsn, "target", right=right)).close()
        assert away.calls == 2
        primary.restart()
        assert await port_of(dsn) == primary.port
        assert away.calls == 3
        monkeypatch.setattr(logins, "ASKED_S", -1.0)
        primary.restart()
        for _ in range(2):
            assert await port_of(dsn) == primary.port
        assert away.calls == 5
        # Nor twice by one session: a host that is tried as a standby, and then as any server, is one host.
        primary.restart()
        dsn = dsn.replace("read-write", "prefer-standby")
        async with await connect(dsn, "target") as connection:
            assert connection.info.port == primary.port
        assert away.calls == 7  # before the primary was tried as any server, and as the other host


async def test_a_host_that_is_the_right_one_again_is_tried_in_its_place(make_cluster: Callable[..., Cluster]) -> None:
    server = make_cluster()
    wrong = True

    async def right(_: WatchedConnection) -> None:
        if wrong:
            raise TargetUnavailable("it was restarted just now")

    async with answering_nobody() as away:
        dsn = several(server, away)
        with pytest.raises(TargetUnavailable, match="it was restarted just now"):
            await connect(dsn, "target", right=right)
        wrong = False
        for _ in range(2):
            away.calls = 0
            await (await connect(dsn, "target", right=right)).close()
        assert away.calls == 1  # by the first of both it was tried before the other one, and by the second it was asked


async def test_a_host_that_is_wrong_for_one_dsn_is_tried_in_its_place_by_another(
    make_cluster: Callable[..., Cluster],
) -> None:
    server, other = make_cluster(), make_cluster()

    async def right(connection: WatchedConnection) -> None:
        if connection.info.port == server.port:
            raise TargetUnavailable("this is the wrong one")

    dsn = several(server, other)
    await (await connect(dsn, "target", right=right)).close()
    async with await connect(dsn, "source") as connection:
        assert connection.info.port == server.port


async def test_a_wrong_host_is_tried_last_for_a_while(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, other = make_cluster(), make_cluster()
    tried: list[int] = []

    async def right(connection: WatchedConnection) -> None:
        tried.append(connection.info.port)
        if connection.info.port == wrong.port:
            raise TargetUnavailable("this is the wrong one")

    dsn = several(wrong, other)
    for _ in range(3):
        await (await connect(dsn, "target", right=right)).close()
    assert tried == [wrong.port, other.port, other.port, other.port]
    other.stop()
    with pytest.raises(TargetUnavailable, match="this is the wrong one"):
        await connect(dsn, "target", right=right)
    other.start()
    monkeypatch.setattr(logins, "ASIDE_S", -1.0)
    tried.clear()
    logins._aside.clear()
    for _ in range(2):
        await (await connect(dsn, "target", right=right)).close()
    assert tried == [wrong.port, other.port] * 2
