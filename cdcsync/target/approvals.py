"""The table `approvals`: changes of the configuration that somebody approved, although they embed many texts.

An approval holds for one change of one index, by its fingerprint, and once: it goes with the request of the load it was
for, and the next change waits again. That of a first load stays until that load has begun, because until then each
start asks again. An approval needs no row in `indexes`, because the index may not exist yet; it goes when the index is
dropped.
"""

from __future__ import annotations

import hashlib
from typing import LiteralString

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point

TABLE = "approvals"

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.approvals (
        index_name text NOT NULL,
        change text NOT NULL,
        texts bigint NOT NULL,
        approved_by text NOT NULL DEFAULT session_user,
        approved_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (index_name, change)
    )
    """,
    "COMMENT ON TABLE {schema}.approvals IS"
    " 'cdcsync: changes of the configuration that may embed more texts than confirm_above_texts.'",
    "COMMENT ON COLUMN {schema}.approvals.change IS 'The fingerprint of what the index becomes.'",
    "COMMENT ON COLUMN {schema}.approvals.texts IS 'About how many texts it was said to embed.'",
)


def change_of(spec: IndexSpec) -> str:
    """Return the fingerprint of what an index is to become: of its documents, their chunks and their vectors."""
    condition = "" if spec.where is None else spec.where.text
    facts = "\0".join((str(spec.shape.table), spec.fingerprint, spec.model, condition))
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


class Approvals:
    """The table of a schema. A statement commits by itself unless it says otherwise, or there is a transaction."""

    def __init__(self, schema: str) -> None:
        self._table = sql.Identifier(schema, TABLE)

    async def present(self, connection: Connection) -> bool:
        """Say whether the table is there, which it is not before `run` has made it."""
        table = self._table.as_string(connection)
        return await fetch_row(connection, "SELECT WHERE to_regclass(%s) IS NOT NULL", [table]) is not None

    async def given(self, connection: Connection, index: str, change: str) -> bool:
        """Say whether a change of an index was approved."""
        if not await self.present(connection):
            return False
        statement = sql.SQL("SELECT FROM {} WHERE index_name = %s AND change = %s").format(self._table)
        return await fetch_row(connection, statement, [index, change]) is not None

    async def give(self, connection: Connection, index: str, change: str, texts: int) -> None:
        """Approve a change of an index; doing it twice does no harm."""
        await connection.execute(
            sql.SQL("INSERT INTO {} (index_name, change, texts) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING").format(
                self._table
            ),
            [index, change, texts],
        )
        crash_point("approval given")

    async def spend(self, connection: Connection, index: str, change: str) -> None:
        """Remove the approval of a change that an index has made, if there is one. The caller commits."""
        await connection.execute(
            sql.SQL("DELETE FROM {} WHERE index_name = %s AND change = %s").format(self._table), [index, change]
        )

    async def remove(self, connection: Connection, index: str) -> None:
        """Remove all approvals of an index."""
        if not await self.present(connection):
            return
        await connection.execute(sql.SQL("DELETE FROM {} WHERE index_name = %s").format(self._table), [index])
        crash_point("approvals removed")
