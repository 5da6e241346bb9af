"""Logging in: finding the addresses of the hosts, and connecting to the first host that is the right server.

The driver would ask the name servers itself, but `connect_timeout` begins only when they have answered, and a name
server that is out of reach may take minutes. So they are asked here, within that limit, and all hosts at a time.

The driver would also be content with the first host that lets us in. A former primary that came back does, and takes
writes, as does another cluster. So whoever opens a session says in `fits` which server it has to be, and every host is
tried at every address, in the driver's order, until one fits. The rules:

1. A host that is not the server, or cannot be used, is left, and the next one is tried. If none fits, the error tells
   what each of them is.
2. A host that was not the server is tried last by that DSN for a while (`ASIDE_S`), or until it is. It is not skipped:
   nobody else may answer.
3. If no server is known yet that it has to be, the other hosts are asked, too: one that was promoted in the place of
   the host that let us in shows that this is a former primary (`refuse_left_behind`). Sessions that follow from what
   others are on do not ask again for a while (`ASKED_S`): each host would have a login for each of them, and all of
   them would wait for a host that does not answer.

Source: PostgreSQL, "libpq - C Library", "Parameter Key Words" (host, hostaddr, connect_timeout, load_balance_hosts).
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import anyio
import msgspec
import psycopg
from psycopg import conninfo

from cdcsync.config.values import is_address
from cdcsync.errors import AnotherServer, SetupError, Unavailable
from cdcsync.postgres.errors import Attempt, fence, none_of, refused, unavailable
from cdcsync.postgres.interrupts import connected
from cdcsync.postgres.liveness import Backend, backend_of, left_behind
from cdcsync.postgres.settings import Side, options_with

C = TypeVar("C", bound=psycopg.AsyncConnection[Any])

ASIDE_S = 30.0
"""How long a host that was not the right server is tried after the others. Otherwise every session of a worker would
log in there first."""

ANSWER_S = 3
"""How long another host may take to say what it is, while a session waits for that: one that does not answer is no
successor as far as we can tell."""

ASKED_S = 30.0
"""How long it holds that no other host was promoted in the place of a server. A session that was opened before such a
promotion stays where it is for longer."""

_NOT_HERE = (Unavailable, SetupError, AnotherServer)
"""The errors of a host after which the next one is tried. Any other is said by the right server."""

_Place = tuple[str, str, str]

_aside: dict[tuple[str, _Place], float] = {}
"""The hosts that were not the right server for a DSN, and until when they are tried last."""

_asked_until: dict[tuple[str, int], float] = {}
"""By DSN and start, the servers in whose place no other host was promoted, and until when that is not asked again."""


class Host(msgspec.Struct, frozen=True):
    """A host of a DSN at one of its addresses.

    :ivar settings: the DSN that leads there only.
    """

    host: str
    address: str
    port: str
    settings: str

    @property
    def place(self) -> _Place:
        """Host, address and port."""
        return self.host, self.address, self.port

    @property
    def label(self) -> str:
        """The host as errors name it."""
        name = self.host or self.address
        return f"{name}, port {self.port}" if self.port else name


Fits = Callable[[C, Sequence[Host]], Awaitable[None]]
"""Raises the error of a host that is not the right server. Takes a connection and the other hosts."""


async def log_in(kind: type[C], settings: str, side: Side, where: str, fits: Fits[C] | None = None) -> C:
    """Return a connection in autocommit with the first host that lets us in and fits. The caller closes it.

    :param settings: as `conninfo_for` returns them.
    :param fits: see `Fits`. It may make what it needs of the connection.
    :raises SetupError: the login is refused for good.
    :raises SourceUnavailable, TargetUnavailable: the server, or a name server, does not answer now.
    :raises CdcsyncError: an error of `fits`, where that is of the right server or none of the hosts fits.
    """
    try:
        hosts = hosts_of(await resolved(settings))
    except psycopg.Error as error:
        raise refused(str(error), side, where) from error
    several = len({one.label for one in hosts}) > 1
    attempts: list[Attempt] = []
    cause: Exception | None = None
    now = anyio.current_time()
    for one in sorted(hosts, key=lambda it: _aside.get((where, it.place), now) > now):
        try:
            connection = await connected(kind, one.settings)
        except psycopg.Error as error:
            cause = error
            found = refused(str(error), side, where, host=one.label if several else None)
            attempts.append(Attempt(one.label, one.address, found))
            continue
        try:
            if fits is not None:
                await fits(connection, [it for at, it in {it.place: it for it in hosts}.items() if at != one.place])
        except _NOT_HERE as error:
            connection.pgconn.finish()
            cause = error
            if several:
                error.message += f" (host {one.label})"
            attempts.append(Attempt(one.label, one.address, error, inside=True))
            if len(hosts) > 1:
                _aside[where, one.place] = anyio.current_time() + ASIDE_S
        except BaseException:
            connection.pgconn.finish()
            raise
        else:
            _aside.pop((where, one.place), None)
            return connection
    said = none_of(attempts)
    if said is cause:
        raise said
    raise said from cause


async def refuse_left_behind(
    backend: Backend, others: Sequence[Host], side: Side, where: str, *, anew: bool = True
) -> None:
    """Refuse a former primary: another host was promoted in its place.

    :param others: the other hosts of the DSN, which are asked all at a time.
    :param anew: whether they are asked although they were a moment ago.
    :raises SourceUnavailable, TargetUnavailable: it is one.
    """
    if backend.standby or backend.system is None or backend.timeline is None:
        return
    if not anew and anyio.current_time() < _asked_until.get((where, backend.started), -math.inf):
        return
    newer: dict[str, int] = {}

    async def ask(one: Host) -> None:
        other = await server_at(one.settings)
        if other is not None and left_behind(backend, other):
            assert other.timeline is not None
            newer[one.label] = other.timeline

    async with anyio.create_task_group() as tasks:
        for one in others:
            tasks.start_soon(ask, one)
    for label, timeline in newer.items():
        raise unavailable(
            side,
            f"the server is a former primary: it is on timeline {backend.timeline}, and {label}, which was promoted in"
            f" its place, is on timeline {timeline}",
            where=where,
            hint=fence(side),
        )
    _asked_until[where, backend.started] = anyio.current_time() + ASKED_S


async def server_at(settings: str) -> Backend | None:
    """Return the server at the one host and address of a DSN; None if it does not let us in by now.

    :param settings: as for `log_in`.
    """
    own = conninfo.conninfo_to_dict(settings)
    own |= {"connect_timeout": ANSWER_S, "target_session_attrs": "any", "replication": ""}
    try:
        with anyio.fail_after(ANSWER_S):
            connection = await connected(psycopg.AsyncConnection, conninfo.make_conninfo("", **own))
            try:
                return await backend_of(connection)
            finally:
                connection.pgconn.finish()
    except (psycopg.Error, OSError):
        return None


def hosts_of(settings: str) -> list[Host]:
    """Return the hosts of a DSN in the order in which the driver tries them.

    :param settings: as `resolved` returns them. If they cannot be told apart, the driver tells what is wrong.
    """
    own = conninfo.conninfo_to_dict(settings)
    options = options_with(own)
    named, addresses, ports = (options.get(key, "").split(",") for key in ("host", "hostaddr", "port"))
    number = max(len(named), len(addresses))
    each = [values * number if len(values) == 1 else values for values in (named, addresses, ports)]
    if number == 1 or any(len(values) != number for values in each):
        return [Host(named[0], addresses[0], ports[0], settings)]
    found = []
    for host, address, port in zip(*each, strict=True):
        here = {**own, "host": host, "hostaddr": address, "port": port}
        found.append(Host(host, address, port, conninfo.make_conninfo("", **here)))
    if options.get("load_balance_hosts") == "random":
        random.shuffle(found)
    if options.get("target_session_attrs") == "prefer-standby":
        attributes = [("standby", one) for one in found] + [("any", one) for one in found]
        found = [
            msgspec.structs.replace(one, settings=conninfo.make_conninfo(one.settings, target_session_attrs=wanted))
            for wanted, one in attributes
        ]
    return found


async def resolved(settings: str) -> str:
    """Return a DSN with the addresses of its hosts, each host once for each address; hosts that have none are left out.

    A DSN that has addresses, or no name to ask for, is returned as it is, but for what its service says of both.

    :raises psycopg.OperationalError: no host has an address, in the words of the driver; or no answer came in time.
    """
    own = conninfo.conninfo_to_dict(settings)
    options = options_with(own)
    if own.get("service"):
        # For the driver a host of the environment comes before one of the service.
        own |= {key: options[key] for key in ("host", "hostaddr", "port") if key in options}
        settings = conninfo.make_conninfo("", **own)
    hosts, ports = options.get("host", "").split(","), options.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    if options.get("hostaddr") or len(ports) != len(hosts) or not any(map(_is_name, hosts)):
        return settings  # the driver tells what is wrong with it
    within_s = conninfo.timeout_from_conninfo(own)
    found: list[list[str]] = [[] for _ in hosts]
    failures: list[str] = []

    async def ask(at: int, host: str) -> None:
        try:
            with anyio.fail_after(within_s):
                found[at] = await addresses_of(host)
        except TimeoutError:
            failures.append(f"failed to resolve host {host!r}: no name server has answered for {within_s} s")
        except OSError as error:
            failures.append(f"failed to resolve host {host!r}: {error}")

    async with anyio.create_task_group() as tasks:
        for at, host in enumerate(hosts):
            if _is_name(host):
                tasks.start_soon(ask, at, host)
            else:
                found[at] = [host if is_address(host) else ""]  # of a socket there is none
    known = [
        (host, address, port)
        for host, port, addresses in zip(hosts, ports, found, strict=True)
        for address in addresses
    ]
    if not known:
        raise psycopg.OperationalError(failures[-1])
    each = [",".join(values) for values in zip(*known, strict=True)]
    return conninfo.make_conninfo("", **own | dict(zip(("host", "hostaddr", "port"), each, strict=True)))


_asked: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[list[str]]] = {}
"""The look-ups under way: an event loop asks for a host once at a time. A name server that does not answer keeps a
thread for minutes, long after nobody waits for it any more, and there are few; so each host has one at most."""


async def addresses_of(host: str) -> list[str]:
    """Return the addresses of a host, in the order in which they are tried.

    :raises OSError: no name server has one.
    """
    loop = asyncio.get_running_loop()
    key = loop, host
    answer = _asked.get(key)
    if answer is None:
        answer = _asked[key] = asyncio.ensure_future(_ask_for(loop, host))
        answer.add_done_callback(lambda done: _done(key, done))
    # A caller that gives up leaves the look-up to the others, and to those who ask again meanwhile.
    return await asyncio.shield(answer)


def _done(key: tuple[asyncio.AbstractEventLoop, str], answer: asyncio.Future[list[str]]) -> None:
    _asked.pop(key, None)
    if not answer.cancelled():
        answer.exception()  # nobody may be waiting for it any more


async def _ask_for(loop: asyncio.AbstractEventLoop, host: str) -> list[str]:
    # Without the port: of one that is no number, libpq says what is wrong.
    answer = await loop.getaddrinfo(host, None, proto=socket.IPPROTO_TCP, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answer]


def _is_name(host: str) -> bool:
    """Say whether a host has to be asked for: it is neither a directory of sockets nor an address."""
    return bool(host) and not host.startswith("/") and not is_address(host)
