"""DSNs that lead to several servers: whether every session that the worker opens by one ends on the primary.

A DSN may name several hosts, and the name of one host may have several addresses. libpq takes the first that answers.
Unless the DSN asks for more than that, sessions that are opened later, after a server was away or a standby was
promoted, may be on another server than those that are open.

Source: PostgreSQL, "libpq - C Library", "Specifying Multiple Hosts" and target_session_attrs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import anyio
import psycopg
from psycopg import conninfo

from cdcsync.postgres.liveness import Backend, WatchedConnection, backend_of, same_server
from cdcsync.postgres.logins import ANSWER_S, addresses_of, server_at
from cdcsync.postgres.settings import Side, conninfo_for, options_with
from cdcsync.preflight.findings import Finding

PRIMARY_ONLY = ("read-write", "primary")
"""The values of target_session_attrs that let no standby in."""


def connection_options(dsn: str) -> dict[str, str]:
    """Return what libpq goes by, as `options_with` does; nothing of a faulty DSN.

    :raises SetupError: those of the service or the environment cannot be read.
    """
    try:
        own = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return {}
    return options_with(own)


def host_faults(side: Side, options: Mapping[str, str]) -> Iterator[Finding]:
    """Say if sessions may end on a standby, although the primary can be reached, because several hosts are named."""
    hosts = max(len(options.get(key, "").split(",")) for key in ("host", "hostaddr"))
    if hosts > 1 and _lets_in(options) not in PRIMARY_ONLY:
        yield _any_of_several(side, f"names {hosts} hosts", options)


async def examine_addresses(side: Side, dsn: str, connection: WatchedConnection) -> list[Finding]:
    """Say if the one host that a DSN names has addresses of several servers, so that sessions may end on any of them.

    :param connection: a session by that DSN.
    """
    options = connection_options(dsn)
    if list(host_faults(side, options)) or _lets_in(options) in PRIMARY_ONLY:
        return []
    others = [one for one in await _addresses(options) if one != connection.info.hostaddr]
    found: dict[str, Backend] = {}

    async def ask(address: str) -> None:
        if (server := await _server_at(dsn, address)) is not None:
            found[address] = server

    async with anyio.create_task_group() as tasks:
        for address in others:
            tasks.start_soon(ask, address)
    if all(same_server(connection.backend, one) for one in found.values()):
        return []
    try:
        # It may have been restarted in between.
        servers = {connection.info.hostaddr: await backend_of(connection)} | found
    except psycopg.Error:
        return []
    return list(address_faults(side, options, servers))


def address_faults(side: Side, options: Mapping[str, str], servers: Mapping[str, Backend]) -> Iterator[Finding]:
    """Say if the addresses of one host lead to several servers.

    :param servers: the server at each address that answers.
    """
    different: dict[int, str] = {}
    for address, server in servers.items():
        different.setdefault(server.started, f"{address}, a standby" if server.standby else address)
    if len(different) < 2:
        return
    host = options["host"]
    what = f"names the host {host}, whose addresses lead to {len(different)} servers ({'; '.join(different.values())})"
    if len({server.started for server in servers.values() if not server.standby}) > 1:
        yield Finding.error(
            f"{side}.dsn",
            f"{what}, more than one of which takes writes: sessions would read and write on any of them",
            f"let {host} lead to one server, or name the address of the right one in {side}.dsn",
        )
        return
    yield _any_of_several(side, what, options)


def _lets_in(options: Mapping[str, str]) -> str:
    return options.get("target_session_attrs") or "any"


def _any_of_several(side: Side, what: str, options: Mapping[str, str]) -> Finding:
    return Finding.error(
        f"{side}.dsn",
        f"{what} and, with target_session_attrs={_lets_in(options)}, accepts whichever answers first, even if that is a"
        " standby",
        f"set target_session_attrs=read-write in {side}.dsn, so that every session is on the primary, and follows it"
        " when another server is promoted",
    )


async def _addresses(options: Mapping[str, str]) -> Sequence[str]:
    """Return the addresses of the one host that is named; none of a socket's directory or an address."""
    host = options.get("host") or ""
    if options.get("hostaddr") or not host or host.startswith(("/", "@")):
        return ()
    try:
        with anyio.fail_after(ANSWER_S):
            found = await addresses_of(host)
    except (OSError, UnicodeError):
        return ()  # the session is there: it had the address from the same resolver a moment ago
    return tuple(dict.fromkeys(found))


async def _server_at(dsn: str, address: str) -> Backend | None:
    """Return the server that lets us in at one address of a DSN's host; None if nobody does."""
    return await server_at(conninfo_for(dsn, application_name="cdcsync check", hostaddr=address))
