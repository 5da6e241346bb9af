"""The slot's connection: a walsender session driven through libpq's COPY functions.

The rules:

1. One task owns the connection and does both directions on it: what it may do is read what has come, wait, and send.
2. Only what is committed in the target is ever reported as flushed: the source then throws that WAL away.
3. A status is sent at least every third of the server's `wal_sender_timeout`, however busy it is. The timer is the
   caller's; `receive` takes the time that is left until then. A status may ask for a reply: an idle server says nothing
   by itself for half of that time, and so a dead one would not be told from it.
4. Relation messages belong to the connection: after a reconnect nothing of the old one is remembered.

psycopg has no replication interface, and cancelling its own wait would send a cancel request to the walsender. So
psycopg connects, and from START_REPLICATION on the socket is driven here.

Source: PostgreSQL, "Streaming Replication Protocol"; "libpq - C Library", Functions Associated with the COPY Command.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Self

import anyio
import msgspec
import psycopg
from psycopg import pq, sql

from cdcsync.errors import (
    CdcsyncError,
    DecodingFailed,
    GapError,
    ProtocolError,
    SetupError,
    SlotInUse,
    SourceUnavailable,
)
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.frames import Keepalive, XLogData, decode_frame, encode_status_update
from cdcsync.pgoutput.wire import from_datetime
from cdcsync.postgres.errors import first_line, passing, translate, without_values
from cdcsync.postgres.interrupts import CANCEL_S
from cdcsync.postgres.liveness import SERVER, Backend
from cdcsync.postgres.logins import Host, log_in, refuse_left_behind
from cdcsync.postgres.refusals import allow_replication
from cdcsync.postgres.settings import LEAVING, RENDERING, SAFETY, conninfo_for, describe

FOLLOWER = "cdcsync"
"""The application_name of a session that reads a slot for a worker."""

COMMAND_S = 60.0
"""A command that a server answers at once has been lost if it is not answered within this time."""

MIN_VERSION = 140000
"""PostgreSQL 14: pgoutput with logical messages and protocol 2; older ones are out of support."""


RESYNC = (
    'set source.on_gap = "resync" to read everything again with a new slot; docs/operations.md, "After a gap",'
    " says what that costs"
)
"""The fix for changes that cannot be received any more."""

_EXCHANGED = ("was not created in this database", "physical replication slot")
"""Of a slot that is foreign: the server's code is that of a slot that has lost WAL, but a resync would not help."""

_SETTINGS = ("wal_level", "max_replication_slots")
"""Settings without which a server decodes nothing: of these, too, the code is that of a slot that has lost WAL."""


_UNNOTED = (
    "could not map filen|could not open relation with OID|catalog is missing .* attribute|cache lookup failed for"
    "|invalid internal value for enum"
)
"""The server's words where the catalogs by which it decodes lack a table, a column, a type or a label, see
`source/definitions`."""


class ServerIdentity(msgspec.Struct, frozen=True):
    """The answer to IDENTIFY_SYSTEM: the cluster, its timeline and the end of its flushed WAL."""

    system_identifier: str
    timeline: int
    lsn: Lsn
    database: str

    @property
    def name(self) -> str:
        """Cluster and timeline in one word."""
        return f"{self.system_identifier}/{self.timeline}"


def silence(for_s: float) -> SourceUnavailable:
    """Return the error of a stream on which nothing has come for so many seconds, although the server was asked."""
    return SourceUnavailable(
        f"nothing has come from the source for {for_s:.0f} s, although it was asked to reply",
        where="replication connection",
        hint="check the network between here and the source, and any proxy in it",
    )


class SlotConnection:
    """A walsender session on one database; use `connect`, then `start`, then `receive` and `send_status`."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], where: str) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._where = where

    @classmethod
    async def connect(cls, dsn: str, right: Callable[[Self], Awaitable[None]] | None = None) -> Self:
        """Open the session with the first host that is the right server. The caller closes it.

        :param right: raises the error of a server that is not the right one. Without it, the server is none that
            another host of the DSN shows to be a former primary.
        :raises SetupError: the login is wrong, or the role may not replicate.
        :raises SourceUnavailable: the server does not answer now.
        """
        where = f"source ({describe(dsn)})"
        settings = conninfo_for(dsn, application_name=FOLLOWER, replication="database")
        opened: list[Self] = []

        async def fits(connection: psycopg.AsyncConnection[Any], others: Sequence[Host]) -> None:
            slot = cls(connection, where)
            await slot._command(RENDERING)
            await slot._command(SAFETY)
            if right is not None:
                await right(slot)
            await refuse_left_behind(await slot.backend(), others, "source", where)
            opened.append(slot)

        await log_in(psycopg.AsyncConnection[Any], settings, "source", where, fits)
        return opened[0]

    async def identify(self) -> ServerIdentity:
        """Ask the server for its identity: system identifier, timeline and position."""
        rows = await self._command("IDENTIFY_SYSTEM")
        system, timeline, position, database = rows[0]
        return ServerIdentity(str(system), int(timeline), Lsn.parse(position), str(database))

    @property
    def version(self) -> int:
        """The server's version as a number: 180006 is 18.6."""
        return self._pgconn.server_version

    async def backend(self) -> Backend:
        """Return the server process of this session, and with it the server."""
        server = await self.identify()
        ((pid, started, standby),) = await self._command(SERVER)
        timeline = None if standby == "t" else server.timeline
        return Backend(int(pid), int(started), standby == "t", server.system_identifier, timeline)

    @property
    def address(self) -> str:
        """Host and port of the server that this is: a DSN may name several."""
        return f"{self._connection.info.host}:{self._connection.info.port}"

    async def in_recovery(self) -> bool:
        """Say whether the server is a standby just now."""
        rows = await self._command("SELECT pg_is_in_recovery()")
        return str(rows[0][0]) == "t"

    async def end_of_timeline(self, timeline: int, newer: int) -> Lsn | None:
        """Return where the history of `newer` left `timeline`; None if it never was on it, or its file is gone."""
        try:
            rows = await self._command(f"TIMELINE_HISTORY {newer:d}")
        except CdcsyncError as error:
            if error.sqlstate != "58P01":  # undefined_file
                raise
            return None
        for line in str(rows[0][1]).splitlines():
            fields = line.split()
            if fields and fields[0] == str(timeline):
                return Lsn.parse(fields[1])
        return None

    async def create_slot(self, name: str, *, failover: bool = False) -> Lsn:
        """Create a permanent pgoutput slot and return the position from which it sends.

        Waits for every write transaction that is open now to end. Cancelled or killed meanwhile, this process leaves no
        slot behind.

        :param failover: let standbys have it too (PostgreSQL 17 and later).
        """
        options = ", ".join(["SNAPSHOT 'nothing'", *(["FAILOVER"] if failover else [])])
        form = f"({options})" if self.version >= 150000 else "NOEXPORT_SNAPSHOT"
        statement = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput " + form).format(sql.Identifier(name))
        await self._notice_our_end()
        try:
            rows = await self._command(statement.as_string(self._connection), within_s=None)
        except anyio.get_cancelled_exc_class():
            # A walsender that waits for a transaction does not read what its client sends.
            with anyio.move_on_after(CANCEL_S, shield=True), contextlib.suppress(psycopg.Error, CdcsyncError):
                await self._connection.cancel_safe(timeout=CANCEL_S)
                while await self._result() is not None:
                    pass
            raise
        return Lsn.parse(rows[0][1])

    async def _notice_our_end(self) -> None:
        """Make the walsender notice, while the next command runs, if this process ends.

        Otherwise it would wait for the transactions on behalf of a process that was killed, and hold the slot against
        its successor. The server's timer begins with an ordinary statement; commands of replication only keep it
        going.
        """
        with contextlib.suppress(CdcsyncError):  # not every version and operating system can tell
            await self._command(LEAVING)
        await self._command("SELECT 1")

    async def set_failover(self, name: str) -> None:
        """Turn an existing slot into a failover slot, which standbys synchronise (PostgreSQL 17 and later).

        :raises SlotInUse: another connection reads the slot.
        """
        statement = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER)").format(sql.Identifier(name))
        await self._command(statement.as_string(self._connection), slot=name)

    async def start(self, slot: str, publications: Sequence[str], lsn: Lsn, *, streaming: bool) -> int:
        """Begin to stream from `lsn`; returns the protocol version spoken.

        :raises SlotInUse: another connection reads the slot.
        :raises GapError: the slot is gone or has lost WAL.
        """
        version = 4 if self.version >= 160000 else 2
        options = {
            "proto_version": str(version),
            "publication_names": ",".join('"' + name.replace('"', '""') + '"' for name in publications),
            "messages": "true",
        }
        if streaming:
            options["streaming"] = "on"
        # In this protocol a backslash in a string is a backslash, and the driver's literals (E'…') are an error.
        body = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL("'" + value.replace("'", "''") + "'"))
            for name, value in options.items()
        )
        statement = sql.SQL("START_REPLICATION SLOT {} LOGICAL " + str(lsn) + " ({})").format(
            sql.Identifier(slot), body
        )
        with self._answered(COMMAND_S):
            await self._send(statement.as_string(self._connection))
            result = await self._result()
        if result is None or result.status != pq.ExecStatus.COPY_BOTH:
            failure = self._failure(result, slot=slot)
            # All of the refusal is read, so that the session can try again.
            while result is not None:
                result = await self._result()
            raise failure
        return version

    async def receive(self, timeout_s: float) -> XLogData | Keepalive | None:
        """Return the next frame; None when nothing came within `timeout_s` seconds (0: only what is here already).

        :raises SourceUnavailable: the connection or the server ended.
        :raises ProtocolError: the bytes are not of the protocol.
        """
        frame = self.poll()
        if frame is None and timeout_s > 0:
            with anyio.move_on_after(timeout_s):
                while frame is None:
                    await anyio.wait_readable(self._pgconn.socket)
                    frame = self.poll()
        return frame

    def poll(self) -> XLogData | Keepalive | None:
        """Return the next frame that has arrived already, reading the socket once without waiting."""
        try:
            size, data = self._pgconn.get_copy_data(1)
            if not size:
                self._pgconn.consume_input()
                size, data = self._pgconn.get_copy_data(1)
            if size > 0:
                return decode_frame(data)
        except psycopg.Error as error:
            raise self._lost(error) from error
        except MemoryError as error:
            raise self._does_not_fit() from error
        if size == 0:
            return None
        raise self._failure(self._pgconn.get_result(), decoding=True)

    async def send_status(self, received: Lsn, durable: Lsn, *, ask: bool = False) -> None:
        """Report what was received, and what is committed in the target: all before `durable` may be recycled.

        :param ask: whether the server should answer with a keepalive at once.
        """
        message = encode_status_update(
            received=received,
            flushed=durable,
            applied=durable,
            at_us=from_datetime(datetime.now(UTC)),
            reply_requested=ask,
        )
        try:
            self._pgconn.put_copy_data(message)
        except psycopg.Error as error:
            raise self._lost(error) from error
        await self._flush()

    async def aclose(self) -> None:
        """End the session: the server frees the slot at once instead of noticing a dead peer."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _flush(self) -> None:
        try:
            while self._pgconn.flush():
                # A server that blocks on sending to us reads nothing until we read: take in what it sends meanwhile.
                async with anyio.create_task_group() as either:
                    either.start_soon(_then_cancel, anyio.wait_writable, self._pgconn.socket, either.cancel_scope)
                    either.start_soon(_then_cancel, anyio.wait_readable, self._pgconn.socket, either.cancel_scope)
                self._pgconn.consume_input()
        except psycopg.Error as error:
            raise self._lost(error) from error

    async def _send(self, statement: str) -> None:
        try:
            self._pgconn.send_query(statement.encode())
        except psycopg.Error as error:
            raise self._lost(error) from error
        await self._flush()

    async def _result(self) -> pq.abc.PGresult | None:
        try:
            while self._pgconn.is_busy():
                await anyio.wait_readable(self._pgconn.socket)
                self._pgconn.consume_input()
            return self._pgconn.get_result()
        except psycopg.Error as error:
            raise self._lost(error) from error

    @contextlib.contextmanager
    def _answered(self, within_s: float | None) -> Iterator[None]:
        """Take a server that does not answer in time for one that is gone."""
        try:
            with anyio.fail_after(within_s):
                yield
        except TimeoutError:
            raise SourceUnavailable(
                f"the replication connection has not answered for {within_s:.0f} s", where=self._where
            ) from None

    async def _command(
        self, statement: str, *, within_s: float | None = COMMAND_S, slot: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a command of the replication grammar and return its rows as text.

        :param slot: the slot that there has to be for it.
        :raises SourceUnavailable: it was not answered in time.
        """
        with self._answered(within_s):
            return await self._answer(statement, slot)

    async def _answer(self, statement: str, slot: str | None) -> list[tuple[Any, ...]]:
        await self._send(statement)
        rows: list[tuple[Any, ...]] = []
        while (result := await self._result()) is not None:
            if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
                failure = self._failure(result, slot=slot)
                while await self._result() is not None:
                    pass
                raise failure
            for row in range(result.ntuples):
                values = [result.get_value(row, column) for column in range(result.nfields)]
                # The file of a timeline is sent as it was written, in the encoding that a restore point was named in.
                rows.append(tuple(None if value is None else value.decode(errors="replace") for value in values))
        return rows

    def _failure(self, result: pq.abc.PGresult | None, *, slot: str | None = None, decoding: bool = False) -> Exception:
        """Return what an error result of the server, or a COPY that ended, means.

        :param slot: the slot that was to be read or changed, so that the error may be about it.
        :param decoding: whether changes were being sent, so that the error may be about one of them.
        """
        if result is None or result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_IN):
            return SourceUnavailable("the server ended the replication stream", where=self._where)
        error = psycopg.errors.error_from_result(result)
        message, code = without_values(error), error.sqlstate
        where = f"slot {slot}" if slot else self._where
        if code == "55006":
            return SlotInUse(
                message, where=where, hint="another worker reads this slot; it takes over when that one ends"
            )
        if code == "42704" and slot:
            return GapError(message, where=where, hint=f"the slot was dropped; {RESYNC}")
        if code == "55000" and any(sign in message for sign in _EXCHANGED):
            # Only since somebody looked at it: whoever looks again says how to continue.
            return SourceUnavailable(message, where=where)
        # A file of its own that a server lacks, such as a spilled transaction's, says nothing of the WAL that it has.
        lacks_wal = code == "58P01" and "WAL" in message
        of_a_setting = any(name in message for name in _SETTINGS)
        if (slot or decoding) and (lacks_wal or (code == "55000" and not of_a_setting)):
            return GapError(message, where=where, hint=f"the slot has lost WAL that it needs; {RESYNC}")
        if code == "55000":  # the server is not prepared for what was asked of it
            hint = "`cdcsync check` names the settings that the source needs, and how to change them"
            return SetupError(message, where=where, hint=hint)
        if code == "42501":
            return SetupError(message, where=where, hint=f"for the role in the DSN: {allow_replication('…')}")
        if code and code.startswith("08P"):
            return ProtocolError(message, where=where)
        if decoding and not passing(error):
            return DecodingFailed(message, where=where, hint=_undecodable(code, message))
        return translate(error, "source", where=where)

    def _does_not_fit(self) -> DecodingFailed:
        return DecodingFailed(
            "a change does not fit into the worker's memory",
            where=self._where,
            hint="give the worker more memory (some eight times the size of the largest row), or make the row smaller",
        )

    def _lost(self, error: psycopg.Error) -> SourceUnavailable:
        if re.search("out of memory|cannot allocate memory", str(error)):  # the client library's words
            return self._does_not_fit()
        return SourceUnavailable(
            f"the replication connection broke: {first_line(error)}",
            where=self._where,
            hint="check that the source server runs and is reachable",
        )


def _undecodable(code: str | None, message: str) -> str:
    """Return why a server may fail at a change each time, and what can be done besides reading everything again."""
    if "invalid memory alloc request size" in message or code == "54000":
        return "a row is larger than 1 GB as text, which PostgreSQL cannot send: make the row smaller"
    if code == "42704":
        return (
            "the publication was dropped and created again: before PostgreSQL 18 the server cannot send what was"
            " written in between"
        )
    if re.search(_UNNOTED, message):
        return (
            "a table was created or altered while the slot was being made, which PostgreSQL takes no note of: this slot"
            " gets past it never"
        )
    if code in ("22021", "22P05"):
        return "a row holds bytes that are not text in UTF-8: correct the row, and the database's encoding"
    if code is not None and code.startswith("22"):
        return (
            "most likely the publication's condition on the rows of a table fails for a row: correct the condition"
            " first, as it fails at the next such row again"
        )
    return "the source's log says more"


async def _then_cancel(wait: Any, socket: int, scope: anyio.CancelScope) -> None:
    await wait(socket)
    scope.cancel()
