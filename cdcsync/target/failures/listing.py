"""Lists failures that wait in an index: texts that could not be embedded, rows that no document could be made of.

A text is a row of the backlog with an error, of any generation of vectors. Below `MAX_ATTEMPTS` it is tried again by
itself; from there on it waits for an operator, who may discard it: then it stays in the backlog as the reason why its
chunk has no vector, and is listed or tried again only if someone asks for what was discarded, too. A document waits
for an operator at once, in the list of `failed_documents`: what made it fail once does so again, until the row changes.
Nothing here shows a text.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import DISCARDED_ATTEMPTS, MAX_ATTEMPTS, Names
from cdcsync.target.failures.documents import TABLE, Listed, count_failed, forget_failed, has_list


class Failure(msgspec.Struct, frozen=True):
    """A row or text that failed; `next_attempt_at` is None if there will be no further attempt.

    :ivar chunk_no: which chunk of the row's document could not be embedded; none where there is no document.
    :ivar generation: the generation of vectors that lacks it; none where there is no document.
    :ivar discarded: whether an operator discarded it.
    """

    key: dict[str, str]
    chunk_no: int | None
    error: str
    attempts: int
    next_attempt_at: datetime | None
    kind: Literal["text", "document"] = "text"
    generation: int | None = None
    discarded: bool = False


class Failures:
    """The failures of one index, over a connection to the target."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        self._connection = connection
        self._schema = schema
        self._index = spec.name
        self._key = spec.shape.key
        self._generations = [one.generation for one in spec.generations]
        names = Names(schema, spec.relations)
        self._tiers = {one: names.tiers(one) for one in self._generations}
        self._parts: dict[str, sql.Composable] = {
            "backlog": names.backlog,
            "chunks": names.chunks,
            "generations": sql.Literal(self._generations),
            "most": sql.Literal(MAX_ATTEMPTS),
            "discarded": sql.Literal(DISCARDED_ATTEMPTS),
            "key": sql.SQL(", ").join(sql.SQL("concat({})").format(sql.Identifier("c", name)) for name in self._key),
            "documents": sql.Identifier(schema, TABLE),
        }

    async def some(self, limit: int, *, discarded: bool = False) -> list[Failure]:
        """Return up to `limit` failures of each kind: documents, then texts, those that wait for an operator first.

        :param discarded: also texts that were discarded, as the last ones.
        """
        # A raw cursor: a column's name may hold a % that is not a placeholder.
        cursor = psycopg.AsyncRawCursor(self._connection)
        await cursor.execute(
            self._sql(
                "SELECT b.generation, c.chunk_no, b.error, b.attempts % {discarded}, b.attempts >= {discarded},"
                " CASE WHEN b.attempts < {most} THEN b.next_attempt_at END, {key}"
                " FROM {backlog} AS b JOIN {chunks} AS c USING (chunk_id)"
                " WHERE b.generation = ANY({generations}::int[]) AND b.error IS NOT NULL"
                " AND ($2 OR b.attempts < {discarded})"
                " ORDER BY b.attempts >= {discarded}, b.attempts >= {most} DESC, b.chunk_id, b.generation LIMIT $1"
            ),
            [limit, discarded],
        )
        texts = [
            Failure(dict(zip(self._key, key, strict=True)), chunk_no, error, attempts, next_, "text", generation, was)
            for generation, chunk_no, error, attempts, was, next_, *key in await cursor.fetchall()
        ]
        return [*await self._documents(limit), *texts]

    async def _documents(self, limit: int) -> list[Failure]:
        if not await has_list(self._connection, self._schema):
            return []
        cursor = await self._connection.execute(
            self._sql(
                "SELECT key, error, attempts FROM {documents} WHERE index_name = %s AND key <> '{{}}'"
                " ORDER BY failed_at, key LIMIT %s"
            ),
            [self._index, limit],
        )
        return [
            Failure(dict(zip(self._key, key, strict=True)), None, error, attempts, None, "document")
            for key, error, attempts in await cursor.fetchall()
        ]

    async def listed(self) -> Listed:
        """Return how many documents there are."""
        if not await has_list(self._connection, self._schema):
            return Listed()
        return (await count_failed(self._connection, self._schema)).get(self._index, Listed())

    async def document_keys(self) -> list[Key]:
        """Return the keys of all documents that are listed."""
        cursor = await self._connection.execute(
            self._sql("SELECT key FROM {documents} WHERE index_name = %s AND key <> '{{}}' ORDER BY failed_at, key"),
            [self._index],
        )
        return [tuple(cast(list[str], row[0])) for row in await cursor.fetchall()]

    async def discarded(self) -> int:
        """Return how many texts were discarded, each counted in every generation of vectors that lacks it."""
        cursor = await self._connection.execute(
            self._sql(
                "SELECT count(*) FROM {backlog}"
                " WHERE generation = ANY({generations}::int[]) AND attempts >= {most} AND attempts >= {discarded}"
            )
        )
        return cast(int, (await cursor.fetchall())[0][0])

    async def retry_texts(self, *, discarded: bool = False) -> int:
        """Schedule all texts for another attempt now, as if they had had none; returns how many there are.

        A running worker notices within some seconds. A text that is being replaced or stored is left to whoever does.

        :param discarded: also those that were discarded.
        """
        done = await self._connection.execute(
            self._sql(
                "UPDATE {backlog} SET attempts = 0, error = NULL, next_attempt_at = now()"
                " WHERE (generation, chunk_id) IN (SELECT generation, chunk_id FROM {backlog}"
                " WHERE generation = ANY({generations}::int[]) AND error IS NOT NULL"
                " AND (%s OR attempts < {discarded}) FOR UPDATE SKIP LOCKED)"
            ),
            [discarded],
        )
        crash_point("texts to be tried again")
        return done.rowcount

    async def discard(self) -> int:
        """Discard the texts and the documents that wait for an operator; returns how many there are.

        The chunks keep their text and have no vector, not even one of an older text, until the text changes, another
        chunk gets a vector of the same text, or someone has them tried again. The backlog says so, for whoever finds
        them without a vector. Of the rows that no document could be made of, nothing is kept: they stay out of the
        index until they change or are read again, and a verification calls them missing.
        """
        async with self._connection.transaction():
            done = await self._connection.execute(
                self._sql(
                    "UPDATE {backlog} SET attempts = attempts + {discarded}"
                    " WHERE (generation, chunk_id) IN (SELECT generation, chunk_id FROM {backlog}"
                    " WHERE generation = ANY({generations}::int[]) AND attempts >= {most} AND attempts < {discarded}"
                    " FOR UPDATE SKIP LOCKED) RETURNING generation, chunk_id"
                )
            )
            discarded = cast(list[tuple[int, int]], await done.fetchall())
            for generation, tiers in self._tiers.items():
                tables, chunks = list(tiers.values()), [chunk for of, chunk in discarded if of == generation]
                if not chunks:
                    continue  # its tables need not be there yet
                await self._connection.execute(
                    sql.SQL("LOCK TABLE {} IN ROW EXCLUSIVE MODE").format(sql.SQL(", ").join(tables))
                )
                for table in tables:
                    await self._connection.execute(
                        sql.SQL("DELETE FROM {} WHERE chunk_id = ANY(%s)").format(table), [chunks]
                    )
            crash_point("texts discarded")
        crash_point("discarded texts committed")
        documents = 0
        if await has_list(self._connection, self._schema):
            documents = await forget_failed(self._connection, self._schema, self._index)
            crash_point("failed documents forgotten")
        return len(discarded) + documents

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts)
