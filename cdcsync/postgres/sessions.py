"""Sessions on either server, and what their errors mean.

Every session pins how values are rendered, so that the stream, a backfill page and a comparison show the same text
for the same value under any settings of the role or database.

Source: PostgreSQL, "Client Connection Defaults"; "PostgreSQL Error Codes".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, LiteralString, Self

import anyio
import psycopg
from psycopg import conninfo
from psycopg.pq import TransactionStatus

from cdcsync.config import redact_dsn
from cdcsync.config.redaction import dsn_fault
from cdcsync.errors import (
    CdcsyncError,
    SchemaChanged,
    SetupError,
    SourceUnavailable,
    TargetUnavailable,
    Unavailable,
)
from cdcsync.logs import without_quoted
from cdcsync.postgres.liveness import SERVER, TCP_USER_TIMEOUT_MS, Backend, WatchedConnection, at_its_host, system_of
from cdcsync.postgres.refusals import explain

Side = Literal["source", "target"]
Connection = psycopg.AsyncConnection[tuple[Any, ...]]

RENDERING: LiteralString = (
    "SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex';"
    " SET timezone = 'UTC'; SET search_path = ''; SET xmloption = 'content';"
    " SET lc_monetary = 'C'; SET array_nulls = on; SET standard_conforming_strings = on;"
    " SET quote_all_identifiers = off"
)
"""Settings by which values and names are written and read. An empty search_path makes names in values (regclass, say)
come out qualified. In another `lc_monetary` an amount of money would be another number to a reader. The driver writes
bytes as the server reads them only where strings are standard."""

SAFETY: LiteralString = (
    "SELECT set_config(name, setting, false) FROM (VALUES ('statement_timeout', '0'), ('lock_timeout', '0'),"
    " ('transaction_timeout', '0'), ('idle_in_transaction_session_timeout', '0'), ('idle_session_timeout', '0'),"
    " ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),"
    " ('tcp_user_timeout', '60000'), ('default_transaction_isolation', 'read committed'), ('jit', 'off'))"
    " AS ours (name, setting)"
    " WHERE current_setting(name, true) IS NOT NULL"
)
"""A role's own limits are for its queries: a build, a slot or a large page takes the time that it takes. And a server
whose client is gone without a word ends the session within a minute, rather than keep its locks for two hours. Each
statement is planned anew for the rows of its batch or page, and compiling it would take longer than running it. Not
every version has all of these."""

LEAVING: LiteralString = (
    "SELECT set_config('client_connection_check_interval', '1s', false)"
    " WHERE current_setting('client_connection_check_interval', true) IS NOT NULL"
)
"""A session whose client is gone ends within a second even while it waits for a lock: otherwise what a killed worker
asked for would still be in the queue, and hold up everybody behind it. Not every version and operating system can
tell."""

TABLES_ONLY: LiteralString = (
    "SELECT set_config('restrict_nonsystem_relation_kind', 'view, foreign-table', false)"
    " WHERE current_setting('restrict_nonsystem_relation_kind', true) IS NOT NULL"
)
"""The source's tables are read by name. If their owner replaces one by a view, the view's functions would run with our
role's privileges; the server then refuses the statement instead. Supported since the minor releases of August 2024."""

ALWAYS_BRIEFLY: LiteralString = "SET lock_timeout = '400ms'"
"""In all of a session. Less than PostgreSQL's default `deadlock_timeout`, 1 s: so that the server never breaks a circle
by failing somebody's statement, we give up."""

DURABILITY: dict[Side, LiteralString] = {
    # Our writes on the source are marks and publications: flushed at commit, waiting for no standby. And
    # replication does not know row-level security: a policy that would hide rows from us must be an error.
    # And a table of an application may be locked for hours, which must not hold up what is for another index.
    "source": "SET synchronous_commit = local; SET row_security = off; " + ALWAYS_BRIEFLY,
    # Changes acknowledged to the source must survive a crash of the target, whatever the role's default is. And if a
    # proxy keeps a session open whose process has ended in the middle of a transaction, its locks must not stay: none
    # of our transactions there waits for anything but the server.
    "target": "SET synchronous_commit = on; SET idle_in_transaction_session_timeout = '120s'",
}
"""Settings that only one side's sessions need."""

IDLE_S = 20.0
"""How long a session that is used now and then keeps its connection: a server has few, and a new one costs 10 ms."""

CONNECT_TIMEOUT_S = 10
"""Long enough for a server that is starting, short enough that an operator waits for the message."""

SETTINGS_S = 30.0
"""How long a server that has accepted a login may take for the first statements, which wait for nothing."""

_DEAD_PEER = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
}
"""A peer that vanished without a word is noticed within a minute, not after the kernel's two hours."""

_DAMAGE = 'docs/operations.md, "Damaged tables", says how to continue'

_HINTS: dict[str, tuple[str, str]] = {
    "28P01": ("the password is wrong", "correct the password in the DSN, in PGPASSWORD, or in the password file"),
    "28000": ("the server refuses this role or host", "allow the role in pg_hba.conf, or use another role"),
    "3D000": ("the database does not exist", "create it, or correct the database name in the DSN"),
    "42501": ("the role lacks a privilege", "grant it; `cdcsync config roles` lists what each role needs"),
    "53100": ("the disk is full", "free disk space on the server, or make it larger"),
    "53200": ("the server is out of memory", "give the server more memory, or lower work_mem and maintenance_work_mem"),
    "53300": ("too many connections", "raise max_connections, or close some"),
    "53400": ("a limit of the configuration is reached", "raise it: the server's log names it"),
    "55P03": ("another session holds a lock", "wait for that session, or end it: pg_locks names it"),
    "58030": ("the server cannot read or write a file", _DAMAGE),
    "XX001": ("data of the server is damaged", _DAMAGE),
    "XX002": ("an index of the server is damaged", "find out what damaged it, then REINDEX it"),
}

_SHARED_MEMORY = "give the server more shared memory: /dev/shm of a container has 64 MB (docker run --shm-size)"
"""The fix if 53100 is not about a disk: parallel workers keep shared data in a file in /dev/shm."""

_EARLIER_TABLES = (
    "if our tables are those of an earlier cdcsync, start `cdcsync run` of this one: it adds what they lack"
)
"""The fix if a column is missing: a command may read columns that a worker which still runs did not add."""

_PASSING = ("55P03", "25006", "57014", "25P03", "25P04")


def describe(dsn: str) -> str:
    """Return a DSN as it may be shown: without secrets; libpq's own settings when it is empty."""
    return redact_dsn(dsn) if dsn else "libpq's environment (PGHOST, PGSERVICE, …)"


def unavailable(
    side: Side, message: str, *, where: str | None = None, hint: str | None = None, sqlstate: str | None = None
) -> SourceUnavailable | TargetUnavailable:
    """Return the error of a server that cannot be reached just now."""
    kind = SourceUnavailable if side == "source" else TargetUnavailable
    hint = hint or f"check that the {side} server runs and is reachable"
    return kind(message, where=where or side, hint=hint, sqlstate=sqlstate)


def passing(error: psycopg.Error) -> bool:
    """Say whether an error goes away by itself: the server or the network, not what we asked for.

    Classes 08 (connection), 53 (resources), 57P (shutdown), 40 (serialisation, deadlock), 55P03 (lock timeout), 25P03
    and 25P04 (time limits that somebody set for us after all), and errors without a code raised by libpq when the
    connection broke.
    """
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return code[:2] in ("08", "53", "40") or code.startswith("57P") or code in _PASSING


def locked_out(error: BaseException) -> bool:
    """Say whether a statement was given up because another session holds a lock on what it needs."""
    if isinstance(error, psycopg.Error):
        return isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected)
    return isinstance(error, Unavailable) and error.sqlstate in ("55P03", "40P01")


def answers(connection: Connection, error: CdcsyncError) -> bool:
    """Say whether a server answers although a statement failed, so that others may succeed on this connection."""
    if not isinstance(error, Unavailable):
        return not connection.closed
    code = error.sqlstate
    return code is not None and not connection.closed and code[:2] != "08" and not code.startswith("57P")


def translate(error: psycopg.Error, side: Side, *, where: str | None = None) -> CdcsyncError:
    """Return the error of our tree that says what a driver's error means for the pipeline."""
    message = without_values(error)
    _, hint = _HINTS.get(error.sqlstate or "", (message, None))
    if error.sqlstate == "55P03":
        message = _HINTS["55P03"][0]  # in place of the limit that we ourselves have set
    if error.sqlstate == "53100" and "shared memory" in message:
        hint = _SHARED_MEMORY
    if error.sqlstate == "42703" and side == "target":
        hint = _EARLIER_TABLES
    if passing(error):
        return unavailable(side, message, where=where, hint=hint, sqlstate=error.sqlstate)
    return SetupError(message, where=where or side, hint=hint or error.diag.message_hint, sqlstate=error.sqlstate)


def ours(error: psycopg.Error) -> bool:
    """Say whether an error is a mistake of this program, which no operator can fix: a misuse of the driver or session.

    The driver reports its misuse without a code. Classes 25 (transaction state), 26, 34 (names of statements and
    cursors), and parameters without a meaning (42P02) or type (42P18) come from the server.
    """
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.ProgrammingError | psycopg.NotSupportedError)
    return code[:2] in ("26", "34") or code in ("25P01", "25P02", "25001", "42P02", "42P18")


REFUSALS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
"""The errors by which a server refuses a value."""


def fault_of(index: str, error: psycopg.Error, side: Side, *, where: str | None = None) -> SchemaChanged:
    """Return the error of a statement for one index as the reason why that index, and only that one, is paused.

    The server's words about a value hold the value, so of those only the kind of error is passed on.
    """
    where = where or f"index {index}"
    if not isinstance(error, REFUSALS):
        hint = error.diag.message_hint or f"correct that in the {side}; the index is tried again from time to time"
        return SchemaChanged(f"the {side} says: {without_values(error)}", index=index, where=where, hint=hint)
    what = f"the {side} refuses a value: {type(error).__name__} ({error.sqlstate})"
    hint = "compare the types of the table's key and carried columns with those of the chunks table"
    if isinstance(error, psycopg.errors.ProgramLimitExceeded):
        # A value of more than 8 kB after compression is refused before the server says for which index.
        what += f", too long for the index {error.diag.constraint_name or 'of a key or column'}"
        hint = 'docs/operations.md, "What is followed, and what pauses", says how long it may be, and what to do'
    return SchemaChanged(what, index=index, where=where, hint=hint)


@contextmanager
def speaking_of(side: Side, *, where: str | None = None, index: str | None = None) -> Iterator[None]:
    """Turn driver errors raised inside into errors of our tree.

    Every statement that is for one index goes through here with its name, so that what goes wrong with it stops that
    index alone.

    :param index: the index that the statements inside are for.
    :raises SourceUnavailable, TargetUnavailable: waiting may help.
    :raises SchemaChanged: it will not, and `index` has to be paused.
    :raises SetupError: it will not.
    :raises psycopg.Error: it is a mistake of ours.
    """
    try:
        yield
    except psycopg.Error as error:
        if ours(error):
            raise
        if index is not None and not passing(error):
            raise fault_of(index, error, side, where=where) from error
        said = translate(error, side, where=where)
        if isinstance(said, Unavailable) and locked_out(error):
            said.index = index
        raise said from error


def without_values(error: psycopg.Error) -> str:
    """Return the server's primary message without the value of a cell that it may quote: fit to be logged and stored.

    Data exceptions quote what they are about: `invalid input syntax for type integer: "…"`.
    """
    return without_quoted(first_line(error), error.sqlstate)


def first_line(error: psycopg.Error) -> str:
    """Return the server's primary message, or libpq's words in one line."""
    text = error.diag.message_primary or str(error)
    return " ".join(text.split()) or type(error).__name__


async def connect(
    dsn: str, side: Side, *, application_name: str = "cdcsync", autocommit: bool = True, lock_wait_ms: int | None = None
) -> WatchedConnection:
    """Open an SQL session with pinned rendering. The caller closes it.

    :param lock_wait_ms: how long a statement waits for a lock, if that is not for the side to say.
    :raises SetupError: wrong password, database, host name or DSN: waiting does not help.
    :raises SourceUnavailable, TargetUnavailable: the server does not answer now.
    """
    where = f"{side} ({describe(dsn)})"
    settings = conninfo_for(dsn, application_name=application_name)
    try:
        connection = await WatchedConnection.connect(settings, autocommit=True)
    except psycopg.Error as error:
        raise connect_error(error, side, where) from error
    connection.watch(at_its_host(connection, settings))
    # Planned anew each time: a plan made while a table was empty would scan it for ever, and one that is kept over an
    # ALTER TABLE is an error.
    connection.prepare_threshold = None
    try:
        with speaking_of(side, where=where), anyio.fail_after(SETTINGS_S):
            await _set_up(connection, side, lock_wait_ms)
            await connection.set_autocommit(autocommit)
    except TimeoutError:
        connection.pgconn.finish()
        raise unavailable(side, f"it let us in, and said nothing for {SETTINGS_S:g} s", where=where) from None
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


async def _set_up(connection: WatchedConnection, side: Side, lock_wait_ms: int | None) -> None:
    """Pin the settings of a session, and note which one it is: until then nobody could tell that it is lost."""
    # Together, because each statement of its own would take the time of the way there and back.
    ours = [RENDERING, SAFETY, DURABILITY[side], *([TABLES_ONLY] if side == "source" else [])]
    if lock_wait_ms is not None:
        ours.append(f"SET lock_timeout = {lock_wait_ms:d}")
    ours.append(SERVER)
    cursor = await connection.execute("; ".join(ours))
    while cursor.nextset():
        pass
    row = await cursor.fetchone()
    assert row is not None
    pid, started, standby = row
    connection.backend = Backend(pid, started, standby, await system_of(connection))
    with contextlib.suppress(psycopg.errors.InvalidParameterValue):
        await connection.execute(LEAVING)


def conninfo_for(dsn: str, **settings: str | int) -> str:
    """Return `dsn` with our settings added where it does not say otherwise itself.

    The encoding is always ours: the stream and texts are read as UTF-8.

    :raises SetupError: it is not a DSN.
    """
    if fault := dsn_fault(dsn):
        raise SetupError(fault, where=describe(dsn), hint="correct the DSN")
    try:
        own = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # libpq's own words would repeat the part that it stumbled over, which may be the password.
        raise SetupError(
            "not a connection string",
            where=describe(dsn),
            hint="write postgresql://user@host/database, or key=value pairs",
        ) from None
    defaults = {"connect_timeout": CONNECT_TIMEOUT_S, **_DEAD_PEER}
    merged: dict[str, Any] = {**defaults, **own, "client_encoding": "UTF8", **settings}
    return conninfo.make_conninfo("", **merged)


def connect_error(error: psycopg.Error, side: Side, where: str) -> CdcsyncError:
    """Return what a failed attempt to connect means.

    libpq gives no error code for a refused login: its words are what the server sent, so they are looked for.
    """
    text = first_line(error)
    if (refusal := explain(text)) is not None:
        if refusal.lasting:
            return SetupError(refusal.message, where=where, hint=refusal.hint, sqlstate=error.sqlstate)
        return unavailable(side, refusal.message, where=where, hint=refusal.hint, sqlstate=error.sqlstate)
    for code, pattern in (
        ("28P01", r"password authentication failed|no password supplied"),
        ("28000", r'pg_hba\.conf|role ".*" does not exist|role ".*" is not permitted to log in'),
        ("3D000", r'database ".*" does not exist'),
    ):
        if error.sqlstate == code or re.search(pattern, text):
            problem, hint = _HINTS[code]
            return SetupError(f"{problem}: {text}", where=where, hint=hint)
    return unavailable(side, text, where=where)


class Session:
    """A connection that is opened when it is needed and again after it broke. For one task at a time."""

    def __init__(
        self,
        dsn: str,
        side: Side,
        *,
        application_name: str,
        idle_s: float | None = None,
        lock_wait_ms: int | None = None,
    ) -> None:
        """Make a session that has no connection yet.

        :param idle_s: close the connection once it has not been used for so long; nothing may live in it between uses.
        :param lock_wait_ms: see `connect`.
        """
        self._dsn = dsn
        self._side: Side = side
        self._application_name = application_name
        self._idle_s = idle_s
        self._lock_wait_ms = lock_wait_ms
        self._rest: asyncio.TimerHandle | None = None
        self._connection: WatchedConnection | None = None

    @property
    def used_at(self) -> float:
        """When its connection was last waited for, by the event loop's clock; minus infinity if it has none."""
        return -math.inf if self._connection is None else self._connection.used_at

    async def connection(self) -> Connection:
        """Return the open connection.

        :raises SourceUnavailable, TargetUnavailable, SetupError: as `connect`.
        """
        if self._connection is None or self._connection.info.transaction_status != TransactionStatus.IDLE:
            await self.aclose()
            self._connection = await connect(
                self._dsn, self._side, application_name=self._application_name, lock_wait_ms=self._lock_wait_ms
            )
            if self._idle_s is not None:
                self._rest = asyncio.get_running_loop().call_later(self._idle_s, self._close_if_idle)
        return self._connection

    def _close_if_idle(self) -> None:
        connection, loop = self._connection, asyncio.get_running_loop()
        assert connection is not None
        assert self._idle_s is not None
        unused_s = loop.time() - connection.used_at
        if unused_s < self._idle_s or connection.info.transaction_status != TransactionStatus.IDLE:
            self._rest = loop.call_later(self._idle_s, self._close_if_idle)
            return
        self._connection = None
        connection.pgconn.finish()

    async def aclose(self) -> None:
        """Close the connection, if one is open; the next use opens another."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(psycopg.Error):
                await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
