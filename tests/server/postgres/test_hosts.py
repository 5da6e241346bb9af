"""A DSN of several hosts leads to the one that is the right server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import TargetUnavailable
from cdcsync.postgres import logins
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import connect
from cdcsync.source.slot import SlotConnection

pytestmark = [pytest.mark.server, pytest.mark.anyio]


def several(*clusters: Cluster) -> str:
    """Return a DSN of several hosts, in this order."""
    hosts, ports = ",".join("127.0.0.1" for _ in clusters), ",".join(str(one.port) for one in clusters)
    return f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write"


async def port_of(dsn: str) -> int:
    async with await connect(dsn, "target") as connection:
        return connection.info.port


async def test_a_former_primary_is_left_for_the_one_that_was_promoted_in_its_place(
    make_cluster: Callable[..., Cluster],
) -> None:
    former = make_cluster()
    with former.standby() as standby:
        assert await port_of(several(former, standby)) == former.port
        standby.promote()
        assert await port_of(several(former, standby)) == standby.port
        assert await port_of(several(standby, former)) == standby.port
        async with await SlotConnection.connect(several(former, standby)) as slot:
            assert slot.address == f"127.0.0.1:{standby.port}"
        # Alone it is what there is.
        assert await port_of(former.dsn()) == former.port


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
