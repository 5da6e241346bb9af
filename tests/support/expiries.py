"""Time limits of PostgreSQL's that end a session, as somebody may set them for ours after all."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.support.indexes import until

EXPIRIES: dict[str, tuple[str, ...]] = {
    "25P03": ("BEGIN", "SET LOCAL idle_in_transaction_session_timeout = 1"),
    "25P04": ("SET transaction_timeout = 1", "BEGIN"),
    "57P05": ("SET idle_session_timeout = 1",),
}
"""By the code that the server ends the session with, the statements that have it do so."""


async def expire(connection: psycopg.AsyncConnection[Any], code: str) -> None:
    """Have the server end a session by one of its time limits, and wait until it has."""
    if code == "25P04" and connection.info.server_version < 170000:
        pytest.skip("this server has no transaction_timeout")
    dsn, pid = connection.info.dsn, connection.info.backend_pid
    password = connection.info.password
    for statement in EXPIRIES[code]:
        await connection.execute(statement.encode())
    async with await psycopg.AsyncConnection.connect(dsn, password=password, autocommit=True) as other:

        async def ended() -> bool:
            cursor = await other.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid])
            return await cursor.fetchone() is None

        await until(ended)
