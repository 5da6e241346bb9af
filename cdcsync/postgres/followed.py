"""The server that a worker's main session is on: every other session with that side has to be there, too.

On the source the main session is the stream, on the target the one that applies changes. An address may lead to another
server while the old one still runs: a name that moved, a proxy, or a list of hosts whose former primary is back. The
main session stays where it is. A session that was opened elsewhere on the source would read rows that the stream knows
nothing of, wait for transactions that never come, and write marks into another server's WAL; on the target it would
read and write tables that are not those to which the changes go.

The rules:

1. A session is on the server that the main session is on, or was on last, or it is not used: the next host is tried.
2. If no host is that server, and one is another primary, the main session connects again, unless a host runs and only
   takes no more sessions for now. What is known of clusters, timelines and gaps then decides which host it may be on
   (`flows/setup/gaps`, `target/locked_session`). It connects again as well if a session meets a primary that was
   promoted in the place of its server.
3. A standby has nothing to offer, and a former primary less: a session that finds one is refused, and the main session
   stays.
4. When the main session connects to another server, the sessions with the one before end.

Servers are told apart by when they were started, which is the same by any address, by a socket and through a pooler.

Source: PostgreSQL, "System Information Functions" (pg_postmaster_start_time).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakSet

import anyio

from cdcsync.errors import CdcsyncError
from cdcsync.postgres.errors import fence, unavailable
from cdcsync.postgres.liveness import Backend, WatchedConnection, left_behind, same_server
from cdcsync.postgres.refusals import STILL_RUNS
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.settings import Side

STAYS_S = 10.0
"""How long the main session stays at least before a session elsewhere makes it connect again. An address that leads to
two primaries by turns would otherwise end it with every other session."""

_MAIN: dict[Side, str] = {"source": "the stream", "target": "the session that applies changes"}


class FollowedServer:
    """The server that the main session with a side is on, and the other sessions with it."""

    def __init__(self, side: Side, leave: Callable[[str], None]) -> None:
        """Know of no server yet: until the main session is on one, sessions may be on any.

        :param leave: makes the main session connect again; takes why.
        """
        self._side: Side = side
        self._main = _MAIN[side]
        self._elsewhere = f"a new session is on another server than {self._main}, or the server has been restarted"
        self._leave = leave
        self._server: Backend | None = None
        self._since = -math.inf
        self._sessions = WeakSet[WatchedConnection]()
        self._found = WeakSet[CdcsyncError]()
        """The errors of sessions that were on another primary."""

    def follow(self, server: Backend) -> None:
        """Note where the main session is from now on, and end the sessions that are elsewhere."""
        self._server, self._since = server, anyio.current_time()
        for one in list(self._sessions):
            if not same_server(one.backend, server):
                self._sessions.discard(one)
                one.cut()

    def is_on(self, connection: Connection) -> bool:
        """Say whether a session is on the server that the main session is on, or was on last."""
        assert isinstance(connection, WatchedConnection)
        return self._server is None or same_server(connection.backend, self._server)

    def admit(self, connection: Connection) -> None:
        """See that a session is on the server that the main session is on.

        :raises SourceUnavailable, TargetUnavailable: it is on another one. The caller closes it, and tries the next
            host, or again later.
        """
        assert isinstance(connection, WatchedConnection)
        backend, side, main = connection.backend, self._side, self._main
        if self._server is None or self.is_on(connection):
            self._sessions.add(connection)
            return
        where = f"{side} ({connection.info.host}:{connection.info.port})"
        if backend is not None and backend.standby:
            raise unavailable(
                side,
                f"a new session is on a standby, and {main} is on another server",
                where=where,
                hint=f"point {side}.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
            )
        if backend is not None and left_behind(backend, self._server):
            raise unavailable(
                side,
                f"a new session is on a former primary: it is on timeline {backend.timeline}, and {main} is on timeline"
                f" {self._server.timeline}",
                where=where,
                hint=fence(side),
            )
        error = unavailable(
            side,
            self._elsewhere,
            where=where,
            hint=f"{main} connects again, where {side}.dsn leads; if that changes by turns, two servers take writes:"
            f" stop the one that is not the primary, or take it out of {side}.dsn",
        )
        if backend is not None and left_behind(self._server, backend):
            self._go()
        else:
            self._found.add(error)
        raise error

    def refused(self, error: CdcsyncError) -> None:
        """Have the main session connect again if no host was its server, and one was another primary.

        :param error: why no session could be opened.
        """
        if error.sqlstate not in STILL_RUNS and any(one in self._found for one in (error, *error.beside)):
            self._go()

    def _go(self) -> None:
        if anyio.current_time() - self._since >= STAYS_S:
            self._since = anyio.current_time()
            self._leave(self._elsewhere)
