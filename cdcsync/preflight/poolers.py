"""Poolers between us and a server. In session mode one is as good as the server; in the other modes it is of no use.

Our sessions hold a lock for as long as they live, have settings of their own, listen to notifications, and stage rows
in temporary tables. A pooler that gives a client another session with each transaction takes all of that away, mostly
when several clients are at work: so it has to be found out beforehand.

Source: PgBouncer's documentation, "Configuration" (pool_mode) and "Features" (SQL feature map for pooling modes).
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg

from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.postgres.settings import Side
from cdcsync.preflight.findings import Finding

PID = "SELECT pg_backend_pid()"


async def shares_sessions(connection: Connection, dsn: str, side: Side) -> bool:
    """Say whether a pooler gives this connection another session of the server from one transaction to the next.

    Poolers tell clients a process id of their own. Behind one, a second client takes the session that was used last,
    and keeps it busy: if the first one then has another, sessions are shared.
    """
    first = await fetch_value(connection, PID)
    if first == connection.info.backend_pid:
        return False
    async with await connect(dsn, side, application_name="cdcsync check") as other, other.transaction():
        await fetch_value(other, PID)
        return bool(first != await fetch_value(connection, PID))


def sharing_faults(side: Side) -> Iterator[Finding]:
    """Say why a pooler that shares sessions is of no use."""
    yield Finding.error(
        f"{side}.dsn",
        "leads to a pooler that gives each transaction another session: locks, settings and temporary tables of the"
        " worker's sessions would be lost",
        "connect to the server itself, or to a pool in session mode (PgBouncer: pool_mode = session)",
    )


def refuses_transactions(error: BaseException | None) -> bool:
    """Say whether a failed connection is that of a pooler in statement mode, which takes no transactions."""
    return isinstance(error, psycopg.Error) and "statement pooling mode" in str(error)
