"""Snapshots from before a moment: what was committed by then is not in them.

A transaction at Repeatable Read keeps its snapshot until it ends, and a statement keeps it while it runs. Neither has
locked the tables that it reads next, so locks do not tell of it.

Source: PostgreSQL, "Transaction Isolation", "Caveats" (of concurrency control); "The Cumulative Statistics System"
(pg_stat_activity); "System Information Functions" (pg_current_snapshot).
"""

from __future__ import annotations

from typing import LiteralString

import msgspec

from cdcsync.postgres.queries import fetch_one, fetch_rows
from cdcsync.postgres.sessions import Connection


class Horizon(msgspec.Struct, frozen=True):
    """A moment of a server: later snapshots have all that this session had committed by then.

    :ivar transaction: the first transaction that had not begun.
    :ivar at: the time by the server's clock, as it writes it.
    """

    transaction: str
    at: str


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


_SNAPSHOTS: LiteralString = """
    SELECT pid, concat_ws(', ', nullif(application_name, ''), 'role ' || usename),
        date_trunc('second', clock_timestamp() - xact_start)::text
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_xmin IS NOT NULL
        -- Under the snapshots of these nobody reads other tables.
        AND backend_type NOT IN ('autovacuum worker', 'walsender') AND pid NOT IN
            (SELECT pid FROM pg_stat_progress_create_index UNION SELECT pid FROM pg_stat_progress_vacuum)
        AND coalesce(clock_timestamp() - xact_start >= make_interval(secs => %(open_for_s)s), true)
        -- A newer snapshot may name an older transaction, if that is still open; a transaction may take new snapshots.
        AND coalesce(xact_start <= %(at)s::text::timestamptz, true)
        AND coalesce(age(backend_xmin) > age(%(transaction)s::text::xid), true)
    ORDER BY xact_start
"""


async def read_horizon(connection: Connection) -> Horizon:
    """Return the present moment; the connection is in autocommit."""
    statement = "SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text, clock_timestamp()::text"
    return Horizon(*await fetch_one(connection, statement))


async def snapshots(
    connection: Connection, *, before: Horizon | None = None, open_for_s: float = 0.0
) -> list[Snapshot]:
    """Return the snapshots that sessions of this database read under, those of the oldest transactions first.

    :param before: leave out snapshots that were taken later.
    :param open_for_s: leave out those of transactions that were begun later than that.
    """
    found = await fetch_rows(
        connection,
        _SNAPSHOTS,
        {
            "open_for_s": open_for_s,
            "at": before and before.at,
            "transaction": before and before.transaction,
        },
    )
    return [Snapshot(*one) for one in found]
