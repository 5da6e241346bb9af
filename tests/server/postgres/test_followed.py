"""Every session with the source is on the server that the stream is on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import anyio.lowlevel
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import CdcsyncError, SourceUnavailable
from cdcsync.postgres import followed
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.followed import FollowedServer
from cdcsync.postgres.liveness import Backend
from cdcsync.postgres.sessions import Connection, Session, admitting, connect
from cdcsync.postgres.settings import Side
from cdcsync.source.slot import SlotConnection
from tests.support.clusters import several
from tests.support.poolers import pooled
from tests.support.proxies import Proxy

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ELSEWHERE = "on another server than the stream"


class Following:
    """A stream beside which sessions are opened, and why it was to connect again."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.server = FollowedServer("source", self.left.append)

    @contextlib.contextmanager
    def admitting(self) -> Iterator[None]:
        async def admit(connection: Connection, side: Side) -> None:
            assert side == "source"
            self.server.admit(connection)

        async def refused(error: CdcsyncError) -> None:
            self.server.refused(error)

        with admitting(admit, refused):
            yield


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Following:
    monkeypatch.setattr(followed, "STAYS_S", 0.0)
    return Following()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the pooler's user can reach."""
    with TemporaryDirectory(prefix="cdcsync-pooler-", dir="/tmp") as name:
        yield Path(name)


async def server_of(cluster: Cluster) -> Backend:
    """Return the server as a stream knows it."""
    async with await SlotConnection.connect(cluster.dsn()) as slot:
        return await slot.backend()


def session(dsn: str) -> Session:
    return Session(dsn, "source", application_name="cdcsync test")


async def test_a_server_is_the_same_one_by_any_of_its_addresses(
    make_cluster: Callable[..., Cluster], make_proxy: Callable[[int], Proxy], following: Following, directory: Path
) -> None:
    here = make_cluster(settings={"unix_socket_directories": "/tmp", "listen_addresses": "*"})
    following.server.follow(await server_of(here))
    with pooled(here.dsn(), "session", directory) as through_a_pooler, following.admitting():
        by_name, by_socket = here.dsn().replace("127.0.0.1", "localhost"), f"host=/tmp port={here.port} user=postgres"
        by_proxy = f"host=127.0.0.1 port={make_proxy(here.port).port} user=postgres dbname=postgres"
        for dsn in (here.dsn(), by_name, by_socket, by_proxy, through_a_pooler):
            await (await connect(dsn, "source")).close()
    assert following.left == []


async def test_a_session_elsewhere_is_refused_and_makes_the_stream_connect_again(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here, there = make_cluster(), make_cluster()
    following.server.follow(await server_of(here))
    with following.admitting(), pytest.raises(SourceUnavailable, match=ELSEWHERE) as raised:
        await (await connect(there.dsn(), "source")).close()
    assert f"127.0.0.1:{there.port}" in str(raised.value)
    assert "take it out of source.dsn" in (raised.value.hint or "")
    ((why),) = following.left
    assert ELSEWHERE in why


async def test_a_session_goes_past_another_server_to_the_one_that_the_stream_is_on(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here, there = make_cluster(), make_cluster()
    following.server.follow(await server_of(here))
    with following.admitting():
        for _ in range(2):
            async with await connect(several(there, here), "source") as connection:
                assert connection.info.port == here.port
        assert following.left == []
        here.stop()
        with pytest.raises(SourceUnavailable, match=ELSEWHERE) as raised:
            await connect(several(there, here), "source")
    # Each of them is told.
    assert f"host 127.0.0.1, port {there.port}" in str(raised.value)
    assert f"no server listens on 127.0.0.1, port {here.port}" in str(raised.value)
    assert len(following.left) == 1


async def test_another_server_is_noticed_beside_a_host_that_is_none_for_another_reason(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here = make_cluster()
    following.server.follow(await server_of(here))
    with here.standby() as standby, following.admitting():
        dsn = several(standby, here).replace("read-write", "any")
        here.restart()
        # A standby of it is the reason that is told first.
        with pytest.raises(SourceUnavailable, match="on a standby"):
            await connect(dsn, "source")
        assert len(following.left) == 1


async def test_the_stream_stays_although_another_server_is_found_while_its_own_takes_no_sessions(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here, there = make_cluster(settings={"max_connections": "4"}), make_cluster()
    following.server.follow(await server_of(here))
    with contextlib.ExitStack() as stack, following.admitting():
        for _ in range(4):
            stack.enter_context(psycopg.connect(here.dsn()))
        with pytest.raises(SourceUnavailable, match="all connections of the server are in use"):
            await connect(several(here, there), "source")
    assert following.left == []


async def test_the_stream_stays_a_while_although_sessions_are_elsewhere(
    make_cluster: Callable[..., Cluster], following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed, "STAYS_S", 60.0)
    here, there = make_cluster(), make_cluster()
    following.server.follow(await server_of(here))
    with following.admitting(), pytest.raises(SourceUnavailable, match=ELSEWHERE):
        await connect(there.dsn(), "source")
    assert following.left == []


async def test_a_session_on_a_standby_is_refused_and_the_stream_stays(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here = make_cluster()
    following.server.follow(await server_of(here))
    with here.standby() as standby, following.admitting():
        with pytest.raises(SourceUnavailable, match="on a standby") as raised:
            await connect(standby.dsn(), "source")
        assert "target_session_attrs=read-write" in (raised.value.hint or "")
        assert following.left == []
        # What was a standby when the session began is where the stream may be now.
        standby.promote()
        with pytest.raises(SourceUnavailable, match=ELSEWHERE):
            await connect(standby.dsn(), "source")
    assert len(following.left) == 1


async def test_a_restarted_server_is_another_one_until_the_stream_is_on_it(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here = make_cluster()
    following.server.follow(await server_of(here))
    here.restart()
    with following.admitting():
        with pytest.raises(SourceUnavailable, match="has been restarted"):
            await connect(here.dsn(), "source")
        following.server.follow(await server_of(here))
        await (await connect(here.dsn(), "source")).close()


async def test_sessions_elsewhere_end_when_the_stream_connects_also_amid_a_statement(
    make_cluster: Callable[..., Cluster], following: Following
) -> None:
    here, there = make_cluster(), make_cluster()
    ended: list[str] = []

    async def sleep(connection: Connection) -> None:
        with pytest.raises(SourceUnavailable), speaking_of("source"):
            await connection.execute("SELECT pg_sleep(600)")
        ended.append("sleeper")

    with following.admitting():
        # Before the stream is on any, nobody knows which is right.
        async with session(there.dsn()) as idle, session(there.dsn()) as busy, session(here.dsn()) as right:
            before = await idle.connection()
            sleeping, kept = await busy.connection(), await right.connection()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sleep, sleeping)
                while sleeping.pgconn.transaction_status != 1:
                    await anyio.lowlevel.checkpoint()
                following.server.follow(await server_of(here))
            assert ended == ["sleeper"]
            with pytest.raises(SourceUnavailable), speaking_of("source"):
                await before.execute("SELECT 1")
            assert await right.connection() is kept
            following.server.follow(await server_of(there))
            with speaking_of("source"):
                await (await idle.connection()).execute("SELECT 1")
                await (await busy.connection()).execute("SELECT 1")
