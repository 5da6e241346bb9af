"""The server that the stream is on: every session with the source has to be there, too.

An address may lead to another server while the old one still runs: a name that moved, a proxy, or a list of hosts whose
former primary is back. The stream stays where it is. A session that was opened there and not here would read rows that
the stream knows nothing of, wait for transactions that never come, and write marks into another server's WAL.

The rules:

1. A session is on the server that the stream is on, or was on last, or it is not used.
2. A session that finds another primary makes the stream connect again, where the address leads. What is known of
   clusters, timelines and gaps then decides whether the stream may be there (`flows/setup/gaps`).
3. A standby has no stream to offer: a session that finds one is refused, and the stream stays.
4. When the stream connects to another server, the sessions with the one before end.

Servers are told apart by when they were started, which is the same by any address, by a socket and through a pooler.

Source: PostgreSQL, "System Information Functions" (pg_postmaster_start_time).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakSet

import anyio

from cdcsync.errors import SourceUnavailable
from cdcsync.postgres.liveness import Backend, WatchedConnection, same_server
from cdcsync.postgres.sessions import Connection

STAYS_S = 10.0
"""How long the stream stays at least before a session elsewhere makes it connect again. An address that leads to two
primaries by turns would otherwise end it with every other session."""

_ELSEWHERE = "a new session is on another server than the stream, or the server has been restarted"


class FollowedServer:
    """The server that the stream is on, and the sessions with it."""

    def __init__(self, leave: Callable[[str], None]) -> None:
        """Know of no server yet: until the stream is on one, sessions may be on any.

        :param leave: makes the stream connect again; takes why.
        """
        self._leave = leave
        self._server: Backend | None = None
        self._since = -math.inf
        self._sessions = WeakSet[WatchedConnection]()

    def follow(self, server: Backend) -> None:
        """Note where the stream is from now on, and end the sessions that are elsewhere."""
        self._server, self._since = server, anyio.current_time()
        for one in list(self._sessions):
            if not same_server(one.backend, server):
                self._sessions.discard(one)
                one.cut()

    def admit(self, connection: Connection) -> None:
        """See that a session is on the server that the stream is on.

        :raises SourceUnavailable: it is on another one. The caller closes it, and tries again later.
        """
        assert isinstance(connection, WatchedConnection)
        backend = connection.backend
        if self._server is None or same_server(backend, self._server):
            self._sessions.add(connection)
            return
        where = f"source ({connection.info.host}:{connection.info.port})"
        if backend is not None and backend.standby:
            raise SourceUnavailable(
                "a new session is on a standby, and the stream is on another server",
                where=where,
                hint="point source.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
            )
        if anyio.current_time() - self._since >= STAYS_S:
            self._leave(_ELSEWHERE)
        raise SourceUnavailable(
            _ELSEWHERE,
            where=where,
            hint="the stream connects again, where source.dsn leads; if that changes by turns, two servers take writes:"
            " stop the one that is not the primary, or take it out of source.dsn",
        )
