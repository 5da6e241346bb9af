"""Chunks whose text could not be embedded: what they are, another chance, or none.

They are rows of the backlog with an error. Below `MAX_ATTEMPTS` they are tried again by themselves; from there on they
wait for an operator. Nothing here shows a text.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
from psycopg import sql

from cdcsync.index.schema import MAX_ATTEMPTS, IndexSpec, Names
from cdcsync.postgres import Connection


class Failure(msgspec.Struct, frozen=True):
    """One chunk that could not be embedded; `next_attempt_at` is none when nobody will try again."""

    key: dict[str, str]
    chunk_no: int
    error: str
    attempts: int
    next_attempt_at: datetime | None


class Failures:
    """The failures of one index, over a connection to the target."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        self._connection = connection
        self._key = spec.shape.key
        names = Names(schema, spec.name)
        self._parts: dict[str, sql.Composable] = {
            "backlog": names.backlog,
            "chunks": names.chunks,
            "vectors": names.vectors(spec.generation),
            "generation": sql.Literal(spec.generation),
            "most": sql.Literal(MAX_ATTEMPTS),
            "key": sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier("c", name)) for name in self._key),
        }

    async def list(self, limit: int) -> list[Failure]:
        """Return up to `limit` failures, those that wait for an operator first."""
        cursor = await self._connection.execute(
            self._sql(
                "SELECT c.chunk_no, b.error, b.attempts,"
                " CASE WHEN b.attempts < {most} THEN b.next_attempt_at END, {key}"
                " FROM {backlog} AS b JOIN {chunks} AS c USING (chunk_id)"
                " WHERE b.generation = {generation} AND b.error IS NOT NULL"
                " ORDER BY b.attempts >= {most} DESC, b.chunk_id LIMIT %s"
            ),
            [limit],
        )
        return [Failure(dict(zip(self._key, row[4:], strict=True)), *row[:4]) for row in await cursor.fetchall()]

    async def retry(self) -> int:
        """Have all failures tried again now, their attempts forgotten; returns how many there are.

        A running worker notices within some seconds.
        """
        done = await self._connection.execute(
            self._sql(
                "UPDATE {backlog} SET attempts = 0, error = NULL, next_attempt_at = now()"
                " WHERE generation = {generation} AND error IS NOT NULL"
            )
        )
        return done.rowcount

    async def discard(self) -> int:
        """Give up the chunks that wait for an operator; returns how many there are.

        They keep their text and have no vector, not even one of an older text, until the text changes or someone has
        the row replayed or the index repaired.
        """
        done = await self._connection.execute(
            self._sql(
                "WITH gone AS (DELETE FROM {backlog} WHERE generation = {generation} AND attempts >= {most}"
                " RETURNING chunk_id), emptied AS (DELETE FROM {vectors} AS v USING gone"
                " WHERE v.chunk_id = gone.chunk_id) SELECT chunk_id FROM gone"
            )
        )
        return done.rowcount

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts)
