"""Our marks in the WAL: writing them.

Source: PostgreSQL, "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.postgres.sessions import Connection


async def emit_mark(connection: Connection, content: str) -> None:
    """Write one of our marks into the WAL; the stream delivers it after all that committed before.

    The message is transactional: its commit flushes it, so that it does not wait for other writers to do so.
    """
    await connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, content])
