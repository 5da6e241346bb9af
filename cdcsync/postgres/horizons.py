"""Snapshots from before a moment: what was committed by then is not in them.

A transaction at Repeatable Read keeps its snapshot until it ends, and a statement keeps it while it runs. Neither has
locked the tables that it reads next, so locks do not tell of it.

When a snapshot was taken nothing tells, and when its transaction began only a member of its role may know. So a moment
is kept with the virtual transactions that had a snapshot, as CREATE INDEX CONCURRENTLY does, and older ones are those
of them that are still there.

Source: PostgreSQL, "Transaction Isolation", "Caveats" (of concurrency control); "The Cumulative Statistics System"
(pg_stat_activity); "pg_locks" (virtualxid); "System Information Functions" (pg_current_snapshot).
"""

from __future__ import annotations

from typing import LiteralString

import msgspec

from cdcsync.postgres.queries import fetch_one, fetch_rows
from cdcsync.postgres.sessions import Connection


class Horizon(msgspec.Struct, frozen=True):
    """A moment of a server: later snapshots have all that this session had committed by then.

    :ivar transaction: the first transaction that had not begun.
    :ivar reading: the virtual transactions that had a snapshot then.
    """

    transaction: str
    reading: list[str]


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot that a session of this database has.

    :ivar session: its application and role.
    :ivar age: how long its transaction has been open; None if we may not know.
    """

    pid: int
    session: str
    age: str | None

    def __str__(self) -> str:
        lasting = "" if self.age is None else f", which has been open for {self.age}"
        return f"the transaction of pid {self.pid} ({self.session}){lasting}"

    @property
    def remedy(self) -> str:
        """The fix, as an instruction."""
        return f"wait until that transaction ends, or end it: SELECT pg_terminate_backend({self.pid})"


_READING: LiteralString = """
    FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)
    -- Which virtual transaction a session is in, anybody may know; what began when, and which backends are clients',
    -- only members of its role and of pg_read_all_stats.
    WHERE l.locktype = 'virtualxid' AND l.virtualxid = l.virtualtransaction
        AND a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_xmin IS NOT NULL
        -- Under the snapshots of these nobody reads other tables. Autovacuum is of no role.
        AND a.usesysid IS NOT NULL AND a.pid NOT IN (SELECT pid FROM pg_stat_replication
            UNION SELECT pid FROM pg_stat_progress_create_index UNION SELECT pid FROM pg_stat_progress_vacuum)
"""
"""The sessions that read under a snapshot."""

_HORIZON: LiteralString = (
    "SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text, ARRAY(SELECT l.virtualtransaction" + _READING + ")"
)

_SNAPSHOTS: LiteralString = (
    """
    SELECT a.pid, concat_ws(', ', nullif(a.application_name, ''), 'role ' || a.usename),
        date_trunc('second', clock_timestamp() - a.xact_start)::text
    """
    + _READING
    + """
        -- What began ahead of now did so before the clock went back.
        AND (a.xact_start BETWEEN clock_timestamp() - make_interval(secs => %(open_for_s)s) AND clock_timestamp())
            IS NOT TRUE
        -- A newer snapshot may name an older transaction, if that is still open; a transaction may take new snapshots.
        AND coalesce(l.virtualtransaction = ANY (%(reading)s::text[]), true)
        AND coalesce(age(a.backend_xmin) > age(%(transaction)s::text::xid), true)
    ORDER BY a.xact_start, age(a.backend_xmin) DESC
"""
)


async def read_horizon(connection: Connection) -> Horizon:
    """Return the present moment; the connection is in autocommit."""
    return Horizon(*await fetch_one(connection, _HORIZON))


async def snapshots(
    connection: Connection, *, before: Horizon | None = None, open_for_s: float = 0.0
) -> list[Snapshot]:
    """Return the snapshots that sessions of this database read under, those of the oldest transactions first.

    :param before: leave out snapshots that were taken later.
    :param open_for_s: leave out those of transactions that were begun later than that, where we may know it.
    """
    found = await fetch_rows(
        connection,
        _SNAPSHOTS,
        {
            "open_for_s": open_for_s,
            "reading": before and before.reading,
            "transaction": before and before.transaction,
        },
    )
    return [Snapshot(*one) for one in found]
