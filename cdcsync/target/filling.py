"""Filling a generation: its vectors are made from the stored chunks, a page at a time, while apply writes changes.

A page is either written at once, with its vectors, or queued in the backlog, where the embed flow finds it. In both
cases a chunk may change while the page is under way. Apply looks after every chunk that it writes, for all generations;
so a page only has to stand back where apply was:

1. Apply clears and fills the backlog, and touches vectors, under a lock of the backlog (`ROW EXCLUSIVE`) that it keeps
   until it has committed. A page takes a lock that excludes it (`SHARE ROW EXCLUSIVE`) before its last statement.
2. An apply that had its lock before has committed, and the page sees what it did: a chunk that is gone, has another
   text, waits in the backlog or has a fresh vector is left alone.
3. An apply that gets its lock later deletes what the page left in the backlog for its chunks, and replaces their
   vectors, as it does with all others.

The vectors of a page go to the settled tier, which has no HNSW index yet.

Source: PostgreSQL, "Explicit Locking".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import LiteralString

import msgspec
import psycopg
from psycopg import sql

from cdcsync.model.changeset import BACKFILL
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import BY_INDEX_HERE, fetch_one, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import MAX_ATTEMPTS, Names, vector_schema
from cdcsync.target.generations import Generations
from cdcsync.target.loading import copy_vectors
from cdcsync.target.vectors import converted

UNHURRIED: LiteralString = "SET LOCAL synchronous_commit = off; " + BY_INDEX_HERE + "; "
"""A page that is lost with a crash of the server is lost with its cursor: apply need not wait for the disk. And a page
reads its own rows, however many there are."""

PAGE_BYTES = 4 * 1024 * 1024
"""Text in one page, but for its last chunk."""


class Stored(msgspec.Struct, frozen=True):
    """A chunk as it is stored."""

    chunk_id: int
    hash: bytes
    text: str


class Filling:
    """Writes the pages of one generation, over one connection in autocommit."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec, live: IndexSpec) -> None:
        """Fill the generation of `spec`, beside the one of `live`."""
        names = Names(schema, spec.relations)
        self._connection = connection
        self._schema = schema
        self._spec = spec
        self._live = live
        self._generations = Generations(schema)
        self._parts: dict[str, sql.Composable] = {
            "chunks": names.chunks,
            "backlog": names.backlog,
            "vectors": names.vectors(spec.generation),
            "live": names.vectors(live.generation),
            **names.tiers(spec.generation),
            "generation": sql.Literal(spec.generation),
            "attempts": sql.Literal(MAX_ATTEMPTS),
            "lane": sql.Literal(BACKFILL),
        }

    @property
    def takes_over(self) -> bool:
        """Whether the live vectors need only be converted: the same model made them, and as exactly."""
        return self._live.converts_to(self._spec)

    @property
    def vacuumed(self) -> Vacuumed:
        """The tables that its transactions lock."""
        return Vacuumed(self._connection, [(self._schema, self._spec.relations)])

    async def page(self, after: int, limit: int) -> list[Stored]:
        """Return up to `limit` chunks with numbers above `after`, in their order; none if there are no more."""
        cursor = await self._connection.execute(
            self._sql(
                "SELECT chunk_id, content_hash, content FROM (SELECT w.*, sum(octet_length(content)::int8)"
                " OVER (ORDER BY chunk_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before"
                " FROM (SELECT chunk_id, content_hash, content FROM {chunks} WHERE chunk_id > %s"
                " ORDER BY chunk_id LIMIT %s) AS w) AS w WHERE before IS NULL OR before < %s ORDER BY chunk_id"
            ),
            [after, limit, PAGE_BYTES],
        )
        return [Stored(*row) for row in await cursor.fetchall()]

    async def without_vector(self, page: Sequence[Stored]) -> list[Stored]:
        """Return those chunks of a page that have no vector of their text yet, in this generation."""
        cursor = await self._connection.execute(
            self._sql(
                "SELECT c.chunk_id FROM unnest(%s::int8[], %s::bytea[]) AS c(chunk_id, content_hash) WHERE NOT EXISTS"
                " (SELECT FROM {vectors} AS v WHERE v.chunk_id = c.chunk_id AND v.content_hash = c.content_hash"
                " OFFSET 0)"
            ),
            [[one.chunk_id for one in page], [one.hash for one in page]],
        )
        lacking = {row[0] for row in await cursor.fetchall()}
        return [one for one in page if one.chunk_id in lacking]

    async def store(self, page: Sequence[Stored], vectors: Mapping[bytes, FloatVector], last: int) -> bool:
        """Write the vectors of a page, queue what has none, and move the cursor to `last`.

        :returns: whether the generation is still to be filled; if not, nothing was written.
        """
        wanted, made = False, [one for one in page if one.hash in vectors]
        async with self._connection.transaction():
            await self._connection.execute(
                self._sql(UNHURRIED + BRIEFLY + "; LOCK TABLE {fresh}, {settled} IN ROW EXCLUSIVE MODE")
            )
            ids = [one.chunk_id for one in made]
            # What a page before a crash left there is of the same texts, or apply has replaced it.
            await self._connection.execute(self._sql("DELETE FROM {settled} WHERE chunk_id = ANY(%s)"), [ids])
            if made:
                await copy_vectors(
                    self._connection,
                    self._schema,
                    self._spec,
                    ids,
                    [one.hash for one in made],
                    vectors,
                )
            await self._connection.execute(self._sql("LOCK TABLE {backlog} IN SHARE ROW EXCLUSIVE MODE"))
            await self._connection.execute(
                self._sql(
                    "DELETE FROM {settled} AS s WHERE s.chunk_id = ANY(%s) AND (NOT EXISTS"
                    " (SELECT FROM {chunks} AS c WHERE c.chunk_id = s.chunk_id"
                    " AND c.content_hash = s.content_hash OFFSET 0)"
                    " OR EXISTS (SELECT FROM {fresh} AS f WHERE f.chunk_id = s.chunk_id OFFSET 0) OR EXISTS (SELECT"
                    " FROM {backlog} AS b WHERE b.chunk_id = s.chunk_id AND b.generation = {generation} OFFSET 0))"
                ),
                [ids],
            )
            wanted = await self._end_page([one.chunk_id for one in page if one.hash not in vectors], len(page), last)
            if not wanted:
                raise psycopg.Rollback
            crash_point("page of a generation written")
        crash_point("page of a generation committed")
        return wanted

    async def take_over(self, page: Sequence[Stored], last: int) -> bool:
        """Write the vectors of a page as the live generation has them, queue what it has not, and move the cursor.

        :returns: whether the generation is still to be filled.
        """
        wanted, ids = False, [one.chunk_id for one in page]
        extension = sql.Identifier(await vector_schema(self._connection))
        vector, fits = converted("v", self._live, self._spec, extension)
        async with self._connection.transaction():
            await self._connection.execute(
                self._sql(
                    UNHURRIED + BRIEFLY + "; LOCK TABLE {backlog} IN SHARE ROW EXCLUSIVE MODE;"
                    " LOCK TABLE {fresh}, {settled} IN ROW EXCLUSIVE MODE"
                )
            )
            await self._connection.execute(
                sql.SQL(
                    "INSERT INTO {settled} (chunk_id, content_hash, embedding)"
                    " SELECT v.chunk_id, v.content_hash, {vector} FROM {live} AS v JOIN {chunks} AS c"
                    " ON c.chunk_id = v.chunk_id AND c.content_hash = v.content_hash"
                    " WHERE c.chunk_id = ANY(%s) AND {fits}"
                    " AND NOT EXISTS (SELECT FROM {vectors} AS n WHERE n.chunk_id = c.chunk_id OFFSET 0)"
                    " AND NOT EXISTS (SELECT FROM {backlog} AS b"
                    " WHERE b.chunk_id = c.chunk_id AND b.generation = {generation} OFFSET 0)"
                ).format(**self._parts, vector=vector, fits=fits),
                [ids],
            )
            wanted = await self._end_page(ids, len(page), last)
            if not wanted:
                raise psycopg.Rollback
            crash_point("vectors taken over")
        crash_point("vectors taken over committed")
        return wanted

    async def _end_page(self, ids: Sequence[int], chunks: int, last: int) -> bool:
        """Queue those chunks that still have no vector, and move the cursor. The caller's transaction commits."""
        if ids:
            await self._connection.execute(
                self._sql(
                    "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
                    " SELECT {generation}, c.chunk_id, c.content_hash, {lane} FROM {chunks} AS c"
                    " WHERE c.chunk_id = ANY(%s) AND NOT EXISTS (SELECT FROM {vectors} AS v"
                    " WHERE v.chunk_id = c.chunk_id AND v.content_hash = c.content_hash OFFSET 0)"
                    " ON CONFLICT DO NOTHING"
                ),
                [list(ids)],
            )
        return await self._generations.advance(self._connection, self._spec.name, self._spec.generation, last, chunks)

    async def waiting(self, most: int) -> int:
        """Return how many chunks of the fill wait in the backlog, `most` if there are more."""
        return int(
            await fetch_value(
                self._connection,
                self._sql(
                    "SELECT count(*) FROM (SELECT FROM {backlog} WHERE generation = {generation} AND lane > 0"
                    " AND attempts < {attempts} LIMIT %s) AS b"
                ),
                [most],
            )
        )

    async def lacking(self) -> int:
        """Return how many chunks have no vector of their text and no place in the backlog either: none, unless we err.

        That place says why: a chunk waits for its vector, its text has failed, or it was discarded.
        """
        (count,) = await fetch_one(
            self._connection,
            self._sql(
                "SELECT count(*) FROM {chunks} AS c WHERE NOT EXISTS (SELECT FROM {vectors} AS v"
                " WHERE v.chunk_id = c.chunk_id AND v.content_hash = c.content_hash) AND NOT EXISTS"
                " (SELECT FROM {backlog} AS b WHERE b.chunk_id = c.chunk_id AND b.generation = {generation})"
            ),
        )
        return int(count)

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts)
