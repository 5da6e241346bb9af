"""Our messages in the WAL: marks, and those that only have what came before flushed.

Source: PostgreSQL, "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.postgres.queries import fetch_row, fetch_value
from cdcsync.postgres.sessions import Connection

FLUSH_PREFIX = "cdcsync flush"
"""The prefix of messages that the stream passes over."""


async def emit_mark(connection: Connection, content: str) -> None:
    """Write one of our marks into the WAL; the stream delivers it after all that committed before.

    The message is transactional: its commit flushes it, so that it does not wait for other writers to do so.
    """
    await connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, content])


async def unflushed(connection: Connection) -> str | None:
    """Return up to where the WAL has to be flushed before what this session has seen is on the source's disk.

    A transaction with `synchronous_commit = off` is visible before it is flushed, and a crash of the source takes it
    back: nobody but a reader ever knew of it, and no message says that it is gone.

    :returns: an LSN; None if everything is on disk.
    """
    behind = "SELECT i.lsn::text FROM pg_current_wal_insert_lsn() AS i(lsn) WHERE pg_current_wal_flush_lsn() < i.lsn"
    row = await fetch_row(connection, behind)
    return None if row is None else row[0]


async def flush(connection: Connection, lsn: str) -> None:
    """Have the WAL flushed up to there, if the commits of others have not done so by now."""
    if await fetch_value(connection, "SELECT pg_current_wal_flush_lsn() < %s::pg_lsn", [lsn]):
        await connection.execute("SELECT pg_logical_emit_message(true, %s, '')", [FLUSH_PREFIX])
