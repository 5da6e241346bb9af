"""A host whose name has several addresses: they are of one server, or sessions must be told which one is meant."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import connect
from cdcsync.preflight import Report
from tests.support.preflight import ARTICLES, configured, examined
from tests.support.proxies import Proxy

pytestmark = pytest.mark.server

NAME = "db.cdcsync.example"
"""A host that only these tests know."""

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Gives the name these addresses, in this order."""
    asked = socket.getaddrinfo
    known: list[str] = []

    def answer(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if host != NAME:
            return asked(host, port, *more, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, int(port or 0))) for one in known]

    monkeypatch.setattr(socket, "getaddrinfo", answer)

    def give(addresses: Sequence[str]) -> None:
        known[:] = addresses

    return give


@contextlib.contextmanager
def also_at(address: str, port: int, server: Cluster) -> Iterator[None]:
    """Let a server be reached at another address, too, by the port of the first."""
    try:
        proxy = Proxy(server.port, at=(address, port))
    except OSError:
        pytest.skip(f"{address} is no address of this machine")
    try:
        yield
    finally:
        proxy.close()


def prepared(cluster: Cluster) -> str:
    """Return a DSN that names the host, after making there what is examined."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute(f"{ARTICLES}; CREATE EXTENSION IF NOT EXISTS vector")
    return cluster.dsn().replace("127.0.0.1", NAME)


def of_dsns(report: Report) -> list[tuple[str, str, str | None]]:
    return [(one.where, one.message, one.hint) for one in report.errors if one.where.endswith(".dsn")]


@pytest.mark.parametrize("order", [ADDRESSES[:2], ADDRESSES[1::-1]], ids=["primary first", "standby first"])
async def test_a_name_that_leads_to_a_standby_as_well_is_refused_until_the_dsn_asks_for_the_primary(
    cluster: Cluster, named: Callable[[Sequence[str]], None], order: Sequence[str]
) -> None:
    dsn = prepared(cluster)
    named(order)
    with cluster.standby() as standby, also_at("127.0.0.2", cluster.port, standby):
        found = of_dsns(await examined(configured(dsn)))

        assert [where for where, _, _ in found] == ["source.dsn", "target.dsn"]
        message, hint = found[0][1:]
        assert message.startswith(f"names the host {NAME}, whose addresses lead to 2 servers (")
        assert "127.0.0.1" in message
        assert "127.0.0.2, a standby" in message
        assert str(hint).startswith("set target_session_attrs=read-write in source.dsn")

        fixed = f"{dsn}?target_session_attrs=read-write"
        assert (await examined(configured(fixed))).errors == []
        async with await connect(fixed, "source") as connection:
            assert connection.backend is not None
            assert not connection.backend.standby


@pytest.mark.parametrize(
    "order",
    [ADDRESSES[:2], ADDRESSES[1::-1], ADDRESSES, ADDRESSES[::-1]],
    ids=["two", "the other first", "one of which nobody answers", "that one first"],
)
async def test_addresses_of_one_server_and_those_of_nobody_are_nothing_to_tell(
    cluster: Cluster, named: Callable[[Sequence[str]], None], order: Sequence[str]
) -> None:
    dsn = prepared(cluster)
    named(order)
    with also_at("127.0.0.2", cluster.port, cluster):
        assert (await examined(configured(dsn))).errors == []


async def test_a_name_that_leads_to_two_servers_that_take_writes_is_refused_by_another_fix(
    make_cluster: Callable[[], Cluster], named: Callable[[Sequence[str]], None]
) -> None:
    cluster, other = make_cluster(), make_cluster()
    dsn = prepared(cluster)
    prepared(other)
    named(ADDRESSES[:2])
    with also_at("127.0.0.2", cluster.port, other):
        found = of_dsns(await examined(configured(dsn)))
        assert [where for where, _, _ in found] == ["source.dsn", "target.dsn"]
        message, hint = found[0][1:]
        assert "more than one of which takes writes" in message
        assert hint == f"let {NAME} lead to one server, or name the address of the right one in source.dsn"
        named(ADDRESSES[:1])
        assert (await examined(configured(dsn))).errors == []
        named(ADDRESSES[:2])
        assert (await examined(configured(cluster.dsn()))).errors == []
