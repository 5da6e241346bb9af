"""Liveness: finding out that the far end of a connection no longer answers, although the socket is open.

A proxy or a firewall may keep a connection open and forward nothing. TCP does not notice, because the machine next to
us acknowledges every packet. So a statement that has not been answered for a while is looked for: over another
connection, the server is asked what the session is doing. The rules:

1. A statement that the server works on, or that waits there for a lock, may take any time.
2. A connection is hung up if the server proves that the statement is lost (`lost`), or if nobody answers a login at
   all. The task that waits for the statement gets the error of a broken connection.
3. Everything else proves nothing, and the statement lives: the session's state is hidden or not tracked, another server
   answers, the login is refused (no connection to spare, another password, a pooler that is full), or its address is
   not known just now. Where a login is refused, nothing is gained by connecting again either; once it is accepted, the
   server says whether the session still exists.

The other way round, a server that is cut off from us keeps our session, and with it our locks. A session whose locks
others wait for *beats*: it sends a statement now and then even if it has nothing to do. So a session that waits can
tell a session that has nothing to do from one that nobody has any more (`Pipelines.end_silent`). And if a connection
breaks, or is given up, in a transaction, the server is asked later, over another connection, to end the session once it
waits for us, be it for the next statement or in the midst of a COPY.

Source: PostgreSQL, "The Cumulative Statistics System" (pg_stat_activity); "libpq - C Library", `tcp_user_timeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString, TypeVar

import anyio
import msgspec
import psycopg
from psycopg import conninfo, generators
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from cdcsync.logs import get_logger
from cdcsync.postgres.interrupts import connected, hang_up

log = get_logger()

RV = TypeVar("RV")

TCP_USER_TIMEOUT_MS = 60_000
"""How long a far end may be gone before that is noticed, where the DSN has no `tcp_user_timeout` of its own."""

PATIENCE_S = TCP_USER_TIMEOUT_MS / 2000
"""How long a far end may say nothing before somebody looks whether it is there, unless the DSN says otherwise."""

REFUSED_S = 10.0
"""How long a session that was refused a write is used before another one is opened in its place."""

BEATS = 6
"""So many beats in the time after which a session is taken for dead."""

UNFINISHED = (TransactionStatus.ACTIVE, TransactionStatus.UNKNOWN)
"""The states of a connection whose statement was given up, or that broke."""

LOOKS = 2
"""So many looks in a row must find nothing: an answer may be under way during one."""

SERVER: LiteralString = (
    "SELECT pg_catalog.pg_backend_pid(), (extract(epoch FROM pg_catalog.pg_postmaster_start_time())"
    " OPERATOR(pg_catalog.*) 1000000)::bigint, pg_catalog.pg_is_in_recovery()"
)
"""The first three fields of `Backend`, asked for under any search_path."""

SYSTEM: LiteralString = "SELECT system_identifier::pg_catalog.text FROM pg_catalog.pg_control_system()"
"""The fourth field of `Backend`. Everybody may ask for it, unless an administrator has revoked that."""

_SEGMENT: LiteralString = (
    "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery()"
    " THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END"
)
"""The file that a primary writes WAL to: its first 8 digits are the timeline. Not every service has it."""

_KNOWN_TO_ALL: tuple[LiteralString, ...] = (
    f"SELECT * FROM ({SERVER}) AS here, ({SYSTEM}) AS cluster, ({_SEGMENT}) AS wal",
    f"SELECT * FROM ({SERVER}) AS here, ({SYSTEM}) AS cluster",
    SERVER,
)
"""What is asked of a server about itself, and what if it does not tell all of that."""

_SEEN: LiteralString = f"""
    SELECT here.started, here.standby, a.pid IS NOT NULL, a.state, a.wait_event
    FROM ({SERVER}) AS here (asking, started, standby) LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = %s
"""


_END: LiteralString = f"""
    SELECT (pg_catalog.starts_with(a.state, 'idle in transaction') OR a.wait_event IN ('ClientRead', 'ClientWrite'))
        IS TRUE AND pg_catalog.pg_terminate_backend(a.pid)
    FROM ({SERVER}) AS here (asking, started, standby) JOIN pg_catalog.pg_stat_activity AS a ON a.pid = %s
    WHERE here.started = %s AND a.application_name = %s AND a.usename = session_user
    AND pg_catalog.clock_timestamp() - a.xact_start > %s * interval '1 s'
"""
"""Ends a session whose transaction waits for its client: for the next statement, for more of a COPY, or until it takes
what a statement returns. One that still works has no such answer, and waits for its client once it is through. A pooler
may have given the process to another client by now: that one's transaction is younger."""

_ENDING: set[asyncio.Task[None]] = set()
"""Tasks that are to end sessions; the event loop itself holds tasks weakly."""


class Backend(msgspec.Struct, frozen=True):
    """The server process that a session has, and the server to which it belongs.

    :ivar pid: its number on the server; a pooler tells its clients another one.
    :ivar started: when the server was started, in microseconds: of two servers behind one address, the one that it is.
    :ivar standby: whether the server was a standby.
    :ivar system: the system identifier of the server's cluster; None if we may not know it.
    :ivar timeline: of a primary, the timeline that it writes; None if we may not know it.
    """

    pid: int
    started: int
    standby: bool
    system: str | None = None
    timeline: int | None = None

    @property
    def started_at(self) -> datetime:
        """When the server was started, as `pg_postmaster_start_time()` has it."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.started)


class Seen(msgspec.Struct, frozen=True):
    """What the server that answers says of a session.

    :ivar exists: whether it has a session with that process.
    :ivar state: of the session: None if it is hidden from our role, "disabled" where the server does not track it.
    :ivar wait_event: what the session waits for, if for anything; None as well if it is hidden.
    """

    started: int
    standby: bool
    exists: bool
    state: str | None = None
    wait_event: str | None = None
    system: str | None = None


def lost(backend: Backend, seen: Seen) -> bool:
    """Say whether a session whose statement has not been answered has certainly lost it."""
    if seen.started != backend.started:
        # A cluster has one primary at a time, so ours was restarted, or another server was promoted in its place.
        primaries = not backend.standby and not seen.standby
        return primaries and backend.system is not None and seen.system == backend.system
    if not seen.exists:
        return True
    # A session that waits for its client, while its client waits for it, has lost what was sent.
    return seen.wait_event == "ClientRead" or (seen.state or "").startswith("idle")


def same_cluster(one: psycopg.AsyncConnection[Any], other: psycopg.AsyncConnection[Any]) -> bool:
    """Say whether two sessions are certainly of one cluster: they share its WAL if both are of its primary."""
    systems = [it.backend and it.backend.system for it in (one, other) if isinstance(it, WatchedConnection)]
    return len(systems) == 2 and systems[0] is not None and systems[0] == systems[1]


def same_server(one: Backend | None, other: Backend | None) -> bool:
    """Say whether two sessions are certainly of one server, and not of two copies of a cluster: they share its WAL."""
    return one is not None and other is not None and one.started == other.started


def left_behind(one: Backend, other: Backend) -> bool:
    """Say whether a server is certainly a former primary, which another one was promoted in the place of."""
    if one.system is None or one.system != other.system or one.timeline is None or other.timeline is None:
        return False
    return one.timeline < other.timeline


class WatchedConnection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection whose unanswered statements are looked for on the server."""

    backend: Backend | None = None
    """Its server process; None until the server has told."""
    _watched: str = ""
    _name: str = ""
    """The session's name on the server."""
    _patience_s: float = PATIENCE_S
    used_at: float = 0.0
    """When it was last waited for, by the event loop's clock."""
    _refused_at: float | None = None
    """When the server first refused to write in this session."""
    _cut: bool = False
    """Whether the session was ended from here."""
    _look: asyncio.Task[None] | None = None
    _beat: asyncio.Task[None] | None = None
    _beats: bool = False
    _next_beat: asyncio.TimerHandle | None = None

    def watch(self, dsn: str) -> None:
        """Look for statements from now on.

        :param dsn: leads to the same server; its `tcp_user_timeout` is the time within which a dead end is noticed,
            unless that is left to the system by a 0.
        """
        settings = conninfo.conninfo_to_dict(dsn)
        self._name = str(settings.get("application_name") or "")
        limit_ms = int(settings.get("tcp_user_timeout") or 0)
        self._patience_s = (limit_ms if limit_ms > 0 else TCP_USER_TIMEOUT_MS) / 2000
        settings |= {
            "application_name": "cdcsync liveness",
            "connect_timeout": max(2, round(self._patience_s / LOOKS)),  # libpq takes 1 for 2
        }
        self._watched = conninfo.make_conninfo("", **settings)

    @property
    def patience_s(self) -> float:
        """How long a far end may say nothing before somebody looks whether it is there."""
        return self._patience_s

    @property
    def free(self) -> bool:
        """Whether it can be used again: it is in no transaction, does nothing but beat, and may write.

        A session that was refused a write stays refused after the setting of the database or the role is removed,
        because the server applies that only to new sessions. It is given up after a while, not at the first refusal:
        otherwise every attempt would log in again.
        """
        refused = self._refused_at is not None and asyncio.get_running_loop().time() - self._refused_at >= REFUSED_S
        return not (refused or self._cut) and (self._beats or self.pgconn.transaction_status == TransactionStatus.IDLE)

    def beat(self) -> None:
        """Show the server that we are there, from now on until the connection closes."""
        if self._next_beat is not None:
            self._next_beat.cancel()
        # Who waits may be more impatient than we: nobody is less patient than by default without having said so.
        pause_s = min(self._patience_s, PATIENCE_S) / BEATS
        self._next_beat = asyncio.get_running_loop().call_later(pause_s, self._begin_to_beat)

    def _begin_to_beat(self) -> None:
        if not self.closed:
            self._beat = asyncio.get_running_loop().create_task(self._be_heard())
            self.beat()

    async def _be_heard(self) -> None:
        if self.lock.locked():
            return
        with contextlib.suppress(psycopg.Error, OSError):
            async with self.lock:
                # A session that waited longer for the lock may have begun a transaction.
                if self.pgconn.transaction_status == TransactionStatus.IDLE:
                    self._beats = True
                    try:
                        self.pgconn.send_query(b"SELECT")
                        await self.wait(generators.execute(self.pgconn))
                    finally:
                        self._beats = False

    async def close(self) -> None:
        """Close the connection."""
        if self._next_beat is not None:
            self._next_beat.cancel()
        await super().close()

    async def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        """Wait for the server, and look for the statement if that takes long."""
        loop = asyncio.get_running_loop()
        self.used_at = loop.time()
        if not self._watched:
            return await super().wait(gen, *arguments, **options)
        timer = loop.call_later(self._patience_s, self._begin_to_look)
        in_transaction = self.pgconn.transaction_status != TransactionStatus.IDLE
        try:
            return await super().wait(gen, *arguments, **options)
        except BaseException as error:
            if self._refused_at is None and isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                self._refused_at = loop.time()
            if in_transaction and self.pgconn.transaction_status in UNFINISHED:
                self._end_later()
            raise
        finally:
            self.used_at = loop.time()
            timer.cancel()
            if self._look is not None:
                self._look.cancel()
                self._look = None

    def _begin_to_look(self) -> None:
        self._look = asyncio.get_running_loop().create_task(self._look_until_answered())

    async def _look_until_answered(self) -> None:
        missed = 0
        while missed < LOOKS:
            missed = missed + 1 if await self.unanswerable() else 0
            await asyncio.sleep(self._patience_s / (LOOKS if missed else 1))
        self.cut()

    def cut(self) -> None:
        """End the session, also amid a statement: that fails as one does whose server is gone."""
        self._cut = True
        with contextlib.suppress(psycopg.Error, OSError):
            hang_up(self.pgconn.socket)

    @property
    def was_cut(self) -> bool:
        """Whether the session was ended from here."""
        return self._cut

    @contextlib.contextmanager
    def cut_after(self, seconds: float) -> Iterator[None]:
        """End the session if a block takes longer: for when others wait for what the server does, or that it fails."""
        timer = asyncio.get_running_loop().call_later(seconds, self.cut)
        try:
            yield
        finally:
            timer.cancel()

    def _end_later(self) -> None:
        """Have the server end this session, if it still has it after the time in which it should notice by itself."""
        if self.backend is not None:
            ending = _end_left_behind(self._watched, self._name, self.backend, self._patience_s)
            task = asyncio.get_running_loop().create_task(ending)
            _ENDING.add(task)
            task.add_done_callback(_ENDING.discard)

    async def unanswerable(self) -> bool:
        """Say whether this connection's statement is lost, or the server is silent, so that no answer can come."""
        asking = None
        try:
            with anyio.move_on_after(self._patience_s):
                asking = await connected(psycopg.AsyncConnection, self._watched)
            if asking is None:
                return True
            with anyio.move_on_after(self._patience_s):
                return self.backend is not None and lost(self.backend, await _look(asking, self.backend))
        except psycopg.errors.ConnectionTimeout:
            return True
        except (psycopg.Error, OSError):
            pass
        finally:
            if asking is not None:
                asking.pgconn.finish()
        return False


async def _end_left_behind(dsn: str, name: str, backend: Backend, patience_s: float) -> None:
    began = anyio.current_time()
    works = True
    while works:
        await asyncio.sleep(patience_s)
        asking, found = None, None
        try:
            with anyio.move_on_after(patience_s):
                asking = await connected(psycopg.AsyncConnection, dsn)
                await asking.execute("SET ROLE NONE")
                age_s = anyio.current_time() - began
                found = await (await asking.execute(_END, [backend.pid, backend.started, name, age_s])).fetchone()
        except (psycopg.Error, OSError):
            pass  # the server may be away for long, and ends its sessions by then
        finally:
            if asking is not None:
                asking.pgconn.finish()
        works = found == (False,)
        if found == (True,):
            log.warning("lost_session_ended", session=name, pid=backend.pid)


def at_its_host(connection: psycopg.AsyncConnection[Any], dsn: str) -> str:
    """Return a DSN with the one of its hosts that a connection is with: a silent host before it says nothing of it."""
    settings = conninfo.conninfo_to_dict(dsn)
    own = {"host": connection.info.host, "hostaddr": connection.info.hostaddr or None, "port": connection.info.port}
    return conninfo.make_conninfo("", **{**settings, **own, "target_session_attrs": "any"})


async def _look(asking: psycopg.AsyncConnection[tuple[Any, ...]], backend: Backend) -> Seen:
    """Return what the server says of a session, asked as the role that logs in: its sessions are not hidden from it."""
    await asking.execute("SET ROLE NONE")
    row = await (await asking.execute(_SEEN, [backend.pid])).fetchone()
    assert row is not None
    seen = Seen(*row)
    if seen.started == backend.started:
        return seen
    return msgspec.structs.replace(seen, system=await system_of(asking))


async def backend_of(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> Backend:
    """Return the server process that a connection has now. Nothing is set for that."""
    row: Sequence[Any] | None = None
    # Together, because each statement of its own would take the time of the way there and back.
    for asked in _KNOWN_TO_ALL:
        try:
            row = await (await connection.execute(asked)).fetchone()
        except (psycopg.ProgrammingError, psycopg.NotSupportedError, psycopg.errors.ObjectNotInPrerequisiteState):
            if asked is SERVER:
                raise
            continue
        break
    assert row is not None
    pid, started, standby, system, segment = (*row, None, None)[:5]
    return Backend(pid, started, standby, system, None if segment is None else int(segment[:8], 16))


async def system_of(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> str | None:
    """Return the system identifier of a connection's cluster, None if we may not know it."""
    try:
        row = await (await connection.execute(SYSTEM)).fetchone()
    except (psycopg.ProgrammingError, psycopg.NotSupportedError):
        return None
    return None if row is None else str(row[0])
