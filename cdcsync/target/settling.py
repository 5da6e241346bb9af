"""Settling: vectors move from the fresh tier, which searches compare one by one, into HNSW in the settled tier.

A move is a transaction of its own, by the rules of `ddl/tiers`: a copy goes to settled, which is where the time goes,
and only then are the rows of fresh deleted that are still what was copied. Apply and the embed loop therefore wait for
the end of a move at most, never for HNSW, and a search sees each vector in exactly one tier. A process that dies leaves
nothing half done.

Source: PostgreSQL, "Transaction Isolation" (Read Committed: a row that was changed is compared again); "System Columns"
(xmin); "EXPLAIN".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.estimates import estimate_rows
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import OPERATORS, Names, vector_schema

TABLE = "tiers"
"""Where what was seen of an index's tiers is written down."""

NOTED_S = 60.0
"""Figures older than this say nothing about the present, nor do those from further ahead, if the clock went back."""


COUNTED = 10_000
"""So many fresh vectors are counted while the settled tier has no HNSW index: some ten megabytes."""


class Noted(msgspec.Struct, frozen=True):
    """The milliseconds that fresh adds to a search of an index, and the number of vectors that settle in a second."""

    scan_ms: float
    per_s: float


async def noted(connection: Connection, schema: str) -> dict[str, Noted]:
    """Return what was written down lately about each index of a schema."""
    cursor = await connection.execute(
        sql.SQL(
            "SELECT index_name, scan_ms, settled_per_s FROM {} WHERE measured_at BETWEEN"
            " now() - make_interval(secs => %s) AND now() + make_interval(secs => %s)"
        ).format(sql.Identifier(schema, TABLE)),
        [NOTED_S, NOTED_S],
    )
    return {index: Noted(*figures) for index, *figures in await cursor.fetchall()}


class Tiers(msgspec.Struct, frozen=True):
    """How the vectors of an index are distributed.

    :ivar fresh: how many are fresh; `COUNTED` at most while the settled tier has no HNSW index.
    :ivar settled: how many are settled, about.
    :ivar scan_ms: milliseconds of the server that fresh adds to a search now.
    :ivar built: whether the settled tier has its HNSW index.
    """

    fresh: int
    settled: int
    scan_ms: float
    built: bool


class Settling:
    """Moves the vectors of one index, over one connection in autocommit."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        names = Names(schema, spec.relations)
        self._connection = connection
        self._spec = spec
        self._hnsw = sql.Identifier(schema, names.hnsw_name(spec.generation)).as_string(connection)
        self._tiers = names.tiers(spec.generation)
        self._parts: dict[str, sql.Composable] = {
            **self._tiers,
            "backlog": names.backlog,
            "noted": sql.Identifier(schema, TABLE),
            "indexes": sql.Identifier(schema, "indexes"),
            "generation": sql.Literal(spec.generation),
        }

    async def look(self) -> Tiers:
        """Return how the vectors are distributed, and what that costs a search: one is made.

        Before HNSW is built nothing settles, and everything may be fresh: then no search is made, and counting ends at
        `COUNTED`.
        """
        built = await fetch_value(
            self._connection,
            "SELECT coalesce((SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)), false)",
            [self._hnsw],
        )
        settled, _ = await estimate_rows(self._connection, self._tiers["settled"])
        fresh = cast(
            int,
            await fetch_value(
                self._connection,
                self._sql("SELECT count(*) FROM (SELECT FROM {fresh} LIMIT %s) AS f"),
                [None if built else COUNTED],
            ),
        )
        return Tiers(fresh, settled, await self._scan_ms() if fresh and built else 0.0, built)

    async def _scan_ms(self) -> float:
        """Return how long the server takes to find the ten nearest fresh vectors to one of them."""
        extension = sql.Identifier(await vector_schema(self._connection))
        plan = await fetch_value(
            self._connection,
            sql.SQL(
                "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) SELECT chunk_id FROM {fresh}"
                " ORDER BY embedding OPERATOR({extension}.{operator}) (SELECT embedding FROM {fresh} LIMIT 1) LIMIT 10"
            ).format(**self._parts, extension=extension, operator=sql.SQL(OPERATORS[self._spec.distance])),
        )
        return cast(float, plan[0]["Execution Time"])

    async def rested(self, limit: int, *, rest_s: float) -> list[int]:
        """Return the chunks of fresh vectors that have not changed for so many seconds, the oldest first.

        Those whose text has changed already are left out: their vector is about to be replaced. A vector that is from
        further ahead than that was stored before the target's clock went back.
        """
        cursor = await self._connection.execute(
            self._sql(
                "SELECT f.chunk_id FROM {fresh} AS f WHERE f.stored_at NOT BETWEEN"
                " now() - make_interval(secs => %s) AND now() + make_interval(secs => %s)"
                " AND NOT EXISTS (SELECT FROM {backlog} AS b"
                " WHERE b.chunk_id = f.chunk_id AND b.generation = {generation} OFFSET 0)"
                " ORDER BY f.stored_at, f.chunk_id LIMIT %s"
            ),
            [rest_s, rest_s, limit],
        )
        return [row[0] for row in await cursor.fetchall()]

    async def page(self, after: int, limit: int) -> tuple[list[int], int | None]:
        """Return the chunks of the next fresh vectors in the order of their numbers, and the last number looked at.

        Chunks whose text has changed already are left out, as in `rested`, but the page ends where it would end with
        them: so all pages together read each vector once, whereas finding the oldest ones reads all of fresh. The last
        number is None behind the last vector.

        :param after: the last number of the page before; 0 for the first page.
        :param limit: how many vectors the page has at most.
        """
        cursor = await self._connection.execute(
            self._sql(
                "SELECT f.chunk_id, EXISTS (SELECT FROM {backlog} AS b"
                " WHERE b.chunk_id = f.chunk_id AND b.generation = {generation} OFFSET 0)"
                " FROM (SELECT chunk_id FROM {fresh} WHERE chunk_id > %s ORDER BY chunk_id LIMIT %s) AS f"
                " ORDER BY f.chunk_id"
            ),
            [after, limit],
        )
        looked_at = cast(list[tuple[int, bool]], await cursor.fetchall())
        last = looked_at[-1][0] if len(looked_at) == limit else None
        return [chunk for chunk, waits in looked_at if not waits], last

    async def settle(self, chunks: Sequence[int]) -> int:
        """Move the vectors of these chunks to the settled tier; returns how many were moved.

        What changes or goes meanwhile stays as it is.

        :raises LockNotAvailable, DeadlockDetected: somebody holds the tiers.
        """
        async with self._connection.transaction():
            # A crash of the server can lose only a whole move, never half of it. Inserts into HNSW wait for each other,
            # which a busy server may take longer for than others should wait for a table.
            await self._connection.execute(
                self._sql(
                    BRIEFLY + "; SET LOCAL synchronous_commit = off;"
                    " LOCK TABLE {fresh}, {settled} IN ROW EXCLUSIVE MODE; SET LOCAL lock_timeout = '10s'"
                )
            )
            copied = await self._copy(chunks)
            moved = await self._release(copied) if copied else set()
            if changed := copied.keys() - moved:
                await self._connection.execute(
                    self._sql("DELETE FROM {settled} WHERE chunk_id = ANY(%s)"), [list(changed)]
                )
            crash_point("vectors moved")
        crash_point("move committed")
        return len(moved)

    async def _copy(self, chunks: Sequence[int]) -> dict[int, str]:
        """Copy vectors to the settled tier; returns which version of each, by its chunk.

        One that is there already, by a session whose worker died and whose last move came through, is not ours. The
        order keeps two sessions that copy the same vectors from waiting for each other in a circle.
        """
        cursor = await self._connection.execute(
            self._sql(
                "WITH batch AS MATERIALIZED (SELECT chunk_id, content_hash, embedding, stored_at, xmin FROM {fresh}"
                " WHERE chunk_id = ANY(%s)), copied AS (INSERT INTO {settled}"
                " (chunk_id, content_hash, embedding, stored_at)"
                " SELECT chunk_id, content_hash, embedding, stored_at FROM batch ORDER BY chunk_id"
                " ON CONFLICT (chunk_id) DO NOTHING RETURNING chunk_id)"
                " SELECT chunk_id, batch.xmin::text FROM batch JOIN copied USING (chunk_id)"
            ),
            [list(chunks)],
        )
        return dict(cast(list[tuple[int, str]], await cursor.fetchall()))

    async def _release(self, copied: dict[int, str]) -> set[int]:
        """Delete from fresh what is still as it was copied and nobody is changing; returns the chunks."""
        cursor = await self._connection.execute(
            self._sql(
                "WITH held AS MATERIALIZED (SELECT f.chunk_id FROM unnest(%s::int8[], %s::text[])"
                " AS c(chunk_id, version) CROSS JOIN LATERAL (SELECT chunk_id FROM {fresh} AS f"
                " WHERE f.chunk_id = c.chunk_id AND f.xmin::text = c.version FOR UPDATE SKIP LOCKED) AS f)"
                " DELETE FROM {fresh} WHERE chunk_id = ANY (ARRAY(SELECT chunk_id FROM held)) RETURNING chunk_id"
            ),
            [list(copied), list(copied.values())],
        )
        return {row[0] for row in await cursor.fetchall()}

    async def note(self, scan_ms: float, per_s: float) -> None:
        """Write down what fresh adds to a search and how fast it settles, for the status."""
        await self._connection.execute(
            self._sql(
                "INSERT INTO {noted} (index_name, generation, scan_ms, settled_per_s, measured_at)"
                " SELECT name, generation, %s, %s, now() FROM {indexes} WHERE name = %s AND generation = {generation}"
                " ON CONFLICT (index_name) DO UPDATE SET generation = excluded.generation, scan_ms = excluded.scan_ms,"
                " settled_per_s = excluded.settled_per_s, measured_at = excluded.measured_at"
            ),
            [scan_ms, per_s, self._spec.name],
        )
        crash_point("tiers noted")

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts)
