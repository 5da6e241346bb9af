"""Logging in: finding the addresses of the hosts, and connecting to one of them.

The driver would ask the name servers itself, but `connect_timeout` begins only when they have answered, and a name
server that is out of reach may take minutes. So they are asked here, within that limit, and all hosts at a time.

Source: PostgreSQL, "libpq - C Library", "Parameter Key Words" (host, hostaddr, connect_timeout).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, TypeVar

import anyio
import psycopg
from psycopg import conninfo

from cdcsync.config.values import is_address
from cdcsync.postgres.errors import connect_error
from cdcsync.postgres.settings import Side, options_with

C = TypeVar("C", bound=psycopg.AsyncConnection[Any])


async def log_in(kind: type[C], settings: str, side: Side, where: str) -> C:
    """Return a connection in autocommit. The caller closes it.

    :param settings: as `conninfo_for` returns them.
    :raises SetupError: the login is refused for good.
    :raises SourceUnavailable, TargetUnavailable: the server, or a name server, does not answer now.
    """
    try:
        return await kind.connect(await resolved(settings), autocommit=True)
    except psycopg.Error as error:
        raise connect_error(error, side, where) from error


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


async def addresses_of(host: str) -> list[str]:
    """Return the addresses of a host, in the order in which they are tried.

    :raises OSError: no name server has one.
    """
    # Without the port: of one that is no number, libpq says what is wrong.
    answer = await asyncio.get_running_loop().getaddrinfo(host, None, proto=socket.IPPROTO_TCP, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answer]


def _is_name(host: str) -> bool:
    """Say whether a host has to be asked for: it is neither a directory of sockets nor an address."""
    return bool(host) and not host.startswith("/") and not is_address(host)
