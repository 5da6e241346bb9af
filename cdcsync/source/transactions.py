"""The source's transactions: those that a snapshot sees, those that are open, and whose they are.

Source: PostgreSQL, "System Information Functions" (Transaction ID and Snapshot Information Functions); "System Views"
(pg_locks, pg_prepared_xacts).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import LiteralString, cast

import anyio
import msgspec

from cdcsync.errors import leading
from cdcsync.model.visibility import XID_SPAN, Snapshot
from cdcsync.postgres.locking import PREPARED
from cdcsync.postgres.queries import fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection


async def current_snapshot(connection: Connection) -> Snapshot:
    """Return which transactions a statement begun now sees."""
    return Snapshot.parse(cast(str, await fetch_value(connection, "SELECT pg_current_snapshot()::text")))


_ELSEWHERE: LiteralString = """
    SELECT transactionid::text::int8 FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted
        AND datid <> (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION ALL SELECT transaction::text::int8 FROM pg_prepared_xacts WHERE database <> current_database()
"""
# Every role sees all of these columns. A transaction holds its own id locked until it ends.


async def running_transactions(connection: Connection, *, anywhere: bool = False) -> frozenset[int]:
    """Return the transactions (64-bit ids) that are open now and may have written in this database.

    A snapshot lists what runs below the newest *finished* id, and leaves out what began after that. So an id is
    drawn and finished first: everything older is below it. It lists the transactions of all databases. Those that are
    known to be of another one are left out: they may stay open for days, and cannot write here.

    :param anywhere: keep them, for what waits for every transaction of the server: the creation of a slot.
    """
    await connection.execute("SELECT pg_current_xact_id()")
    running = (await current_snapshot(connection)).running
    if anywhere or not running:
        return running
    elsewhere = {xid for (xid,) in await fetch_rows(connection, _ELSEWHERE)}
    return frozenset(xid for xid in running if xid % XID_SPAN not in elsewhere)


_CONFIRMED: LiteralString = """
    BEGIN; SET LOCAL synchronous_commit = remote_apply;
    SELECT pg_logical_emit_message(true, 'cdcsync doubt', ''); COMMIT
"""

_IN_DOUBT: LiteralString = """
    WITH waiting AS (
        SELECT backend_xid::text::int8 AS xid FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND (wait_event = 'SyncRep' OR query = '<insufficient privilege>')
    )
    SELECT xid FROM waiting WHERE xid IS NOT NULL
    UNION SELECT transaction::text::int8 FROM pg_prepared_xacts WHERE EXISTS (SELECT FROM waiting WHERE xid IS NULL)
"""
# The session of a COMMIT PREPARED has no id; the transaction is listed as prepared until it is visible.


CONFIRMED_S = 1.0
"""How long a commit of ours may wait for the synchronous standbys before others are taken to wait, too."""


async def in_doubt(connection: Connection) -> set[int]:
    """Return the transactions (32-bit ids) that may be delivered already although no snapshot shows them yet.

    They wait for a synchronous standby, so there are none if that confirms a commit which came after theirs. If it does
    not, those of sessions that we may not look into are among them.
    """
    if await fetch_value(connection, "SELECT current_setting('synchronous_standby_names') = ''"):
        return set()
    late = anyio.Event()

    async def give_up() -> None:
        await anyio.sleep(CONFIRMED_S)
        late.set()
        await connection.cancel_safe()  # the commit stands, and waits no longer

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(give_up)
            await connection.execute(_CONFIRMED)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None
    return {xid for (xid,) in await fetch_rows(connection, _IN_DOUBT)} if late.is_set() else set()


async def next_transaction(connection: Connection) -> int:
    """Return an id (of 64 bits) that every transaction which begins from now on has, or a later one."""
    return cast(int, await fetch_value(connection, "SELECT pg_current_xact_id()::text::bigint"))


class Blocker(msgspec.Struct, frozen=True):
    """A transaction that others wait for: as an operator knows it, and the statement that ends it."""

    words: str
    ending: str

    def __str__(self) -> str:
        return self.words


async def blockers(connection: Connection, xids: Iterable[int]) -> list[Blocker]:
    """Describe for an operator whose transactions are among `xids`, the oldest first."""
    cursor = await connection.execute(
        """
        SELECT words, ending FROM (
            SELECT xact_start, format('pid %%s (%%s, %%s, transaction open for %%s)', pid, coalesce(usename, '?'),
                       coalesce(state, '?'), date_trunc('second', now() - xact_start)),
                   format('SELECT pg_terminate_backend(%%s)', pid)
            FROM pg_stat_activity WHERE backend_xid::text::bigint = ANY(%s)
            UNION ALL
            SELECT prepared, words, ending FROM ("""
        + PREPARED
        + """) AS p WHERE transaction::text::bigint = ANY(%s)
        ) AS b (since, words, ending) ORDER BY since
        """,
        [(recent := [xid % XID_SPAN for xid in xids]), recent],
    )
    return [Blocker(*row) for row in await cursor.fetchall()]
