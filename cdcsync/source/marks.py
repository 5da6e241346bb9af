"""Our messages in the WAL: marks, and those that only have what came before flushed.

Source: PostgreSQL, "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection

FLUSH_PREFIX = "cdcsync flush"
"""The prefix of messages that the stream passes over."""


async def emit_mark(connection: Connection, content: str) -> None:
    """Write one of our marks into the WAL; the stream delivers it after all that committed before.

    The message is transactional: its commit flushes it, so that it does not wait for other writers to do so.
    """
    await connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, content])


async def flush(connection: Connection) -> None:
    """Have everything on the source's disk that this session has seen.

    A transaction with `synchronous_commit = off` is visible before it is flushed, and a crash of the server takes it
    back: nobody but a reader ever knew of it, and no message says that it is gone.
    """
    behind = "SELECT pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()"
    if await fetch_value(connection, behind):
        await connection.execute("SELECT pg_logical_emit_message(true, %s, '')", [FLUSH_PREFIX])
