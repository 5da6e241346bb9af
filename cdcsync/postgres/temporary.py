"""Temporary tables of sessions that live for weeks.

Autovacuum cannot reach them. A table whose rows were last frozen long ago keeps the server from forgetting the
transactions since then, in the whole database, until it runs out of transaction ids. So a session freezes its own.

Source: PostgreSQL, "Preventing Transaction ID Wraparound Failures"; `pg_class.relfrozenxid`.
"""

from __future__ import annotations

import anyio
from psycopg import sql

from cdcsync.postgres.sessions import Connection

FREEZE_EVERY_S = 3_600.0
"""The busiest servers use some ten million transaction ids in this time; autovacuum begins to hurry at two hundred."""


class TemporaryTables:
    """The temporary tables of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._frozen_at = anyio.current_time()

    async def freeze(self) -> None:
        """Freeze them if that was last done `FREEZE_EVERY_S` ago; not inside of a transaction.

        :raises psycopg.Error: the connection broke, or the server refused.
        """
        if anyio.current_time() - self._frozen_at < FREEZE_EVERY_S:
            return
        self._frozen_at = anyio.current_time()
        cursor = await self._connection.execute(
            "SELECT relname::text FROM pg_catalog.pg_class"
            " WHERE relnamespace = pg_catalog.pg_my_temp_schema() AND relkind = 'r'"
        )
        tables = [sql.Identifier("pg_temp", name) for (name,) in await cursor.fetchall()]
        if tables:
            await self._connection.execute(sql.SQL("VACUUM (FREEZE) {}").format(sql.SQL(", ").join(tables)))
