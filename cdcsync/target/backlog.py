"""The backlog: the chunks that have no current vector yet. It is the queue of the embed loop and its dead-letter list.

Each chunk without a vector of its text has a row here, whose attempts say what is to become of it. Below
`MAX_ATTEMPTS` it waits for the embed loop; from there on it has failed, and waits for an operator; from
`DISCARDED_ATTEMPTS` on the operator has discarded it, and nobody tries it until the text changes.

The embed loop writes a vector only where it holds the lock of the chunk's backlog row and that row still names the
text the vector was made from. Rows that apply is changing at that moment are skipped, never waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
from psycopg import sql

from cdcsync.backoff import MAX_DELAY_S
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.locking import WRITERS_WAIT, Lock, exclusive_locks
from cdcsync.postgres.queries import BY_INDEX, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import DISCARDED_ATTEMPTS, MAX_ATTEMPTS, Names, vector_schema
from cdcsync.target.ddl.tiers import DISCARDED
from cdcsync.target.vectors import converted, register_vectors, wire_form, within_reach

WINDOW_BYTES = 16 * 1024 * 1024
"""Text in one window: thousands of usual chunks, and a bound on memory where chunks are whole documents."""

ERROR_CHARACTERS = 500
"""Stored errors are cut to this: some providers answer with pages."""

SESSIONS_EACH = 2
"""Sessions that store the vectors of each generation: inserting into HNSW costs the server about a millisecond of one
processor for each vector, which is more than a fast model or provider takes to make it."""

SESSIONS_MOST = 8
"""Such sessions of a worker, however many indexes it has: a server's default is 100 for everybody, and more than its
processors gain nothing."""

OPEN_FOR_S = 1.0
"""A transaction that was begun later than that is in nobody's way."""


def storing_sessions(generations: int) -> int:
    """Return how many sessions a worker opens at most to store the vectors of so many generations, of all indexes."""
    return min(SESSIONS_EACH * generations, SESSIONS_MOST)


class Waiting(msgspec.Struct, frozen=True):
    """A text that needs a vector."""

    hash: bytes
    text: str
    lane: int
    attempts: int
    commit_lsn: int
    """No later than the transaction that brought it."""
    applied_at: datetime
    """When it was first written here, by the target's clock."""


class BacklogCounts(msgspec.Struct, frozen=True):
    """How many chunks wait, by lane, and how many have failed finally; those that were discarded are in neither."""

    live: int
    backfill: int
    failed: int


class Backlog:
    """One index's backlog over one connection; `open` prepares the connection's temporary table."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec, alike: Sequence[IndexSpec] = ()) -> None:
        """Serve the backlog of a generation.

        :param alike: other generations, those of other chunks included, whose vectors can serve as those of this one.
        """
        self._connection = connection
        self._spec = spec
        self._schema = schema
        self._alike = alike
        self._names = Names(schema, spec.relations)
        names = self._names
        self._stage = f"{spec.name}_made_{spec.generation}"
        self._parts: dict[str, sql.Composable] = {
            "backlog": names.backlog,
            "chunks": names.chunks,
            **names.tiers(spec.generation),
            "stage": sql.Identifier("pg_temp", self._stage),
            "generation": sql.Literal(spec.generation),
            # An expression, which no index has: the one that serves is that of the other condition.
            "of_generation": sql.SQL("generation + 0 = {}").format(sql.Literal(spec.generation)),
            "attempts": sql.Literal(MAX_ATTEMPTS),
            # A time further ahead than any wait was set before the target's clock went back, as by a failover.
            "due": sql.SQL(
                "(b.attempts = 0 OR b.next_attempt_at <= now()"
                " OR b.next_attempt_at > now() + make_interval(secs => {}))"
            ).format(sql.Literal(MAX_DELAY_S)),
            # Not the condition of the index of what is due either.
            "waits": sql.SQL("attempts + 0 < {}").format(sql.Literal(MAX_ATTEMPTS)),
            "discarded_attempts": sql.Literal(DISCARDED_ATTEMPTS),
        }
        self._wire_form = wire_form(spec)

    async def open(self) -> None:
        """Create the stage for vectors; once per connection."""
        schema = await vector_schema(self._connection)
        await register_vectors(self._connection)
        await self._connection.execute(BY_INDEX)
        await self._connection.execute(
            sql.SQL(
                "CREATE TEMP TABLE IF NOT EXISTS {} (content_hash bytea, embedding {}." + self._spec.vector_type + ")"
                " ON COMMIT DELETE ROWS"
            ).format(sql.Identifier(self._stage), sql.Identifier(schema))
        )

    async def window(
        self,
        limit: int,
        *,
        lane: int | None = None,
        most_bytes: int = WINDOW_BYTES,
        free: bool = False,
        without: Collection[bytes] = (),
        failed: bool = True,
    ) -> list[Waiting]:
        """Return up to `limit` distinct texts that are due, the live lane first.

        They are no more than `most_bytes` together, but for the last of them: at least one is returned.

        :param free: only those whose rows no other session holds just now. To tell them apart is a small write.
        :param without: texts to leave out.
        :param failed: whether texts that have failed before are wanted too.
        """
        statement = self._sql(
            "SELECT content_hash, content, lane, attempts, (commit_lsn - '0/0')::int8, applied_at FROM ("
            "SELECT w.*, sum(octet_length(content)::int8) OVER (ORDER BY lane, chunk_id"
            " ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM ("
            "SELECT b.content_hash, c.content, b.lane, b.attempts, b.chunk_id, c.commit_lsn, c.applied_at"
            " FROM {backlog} AS b JOIN {chunks} AS c USING (chunk_id)"
            " WHERE b.generation = {generation} AND b.attempts < {attempts} AND {due}"
            " AND (%s::int IS NULL OR b.lane = %s) AND b.content_hash <> ALL (%s::bytea[]) AND (b.attempts = 0 OR %s)"
            " ORDER BY b.lane, b.chunk_id LIMIT %s {locking}) AS w"
            ") AS w WHERE before IS NULL OR before < %s ORDER BY lane, chunk_id",
            locking=sql.SQL("FOR UPDATE OF b SKIP LOCKED" if free else ""),
        )
        async with self._connection.transaction() if free else contextlib.nullcontext():
            if free:
                # Nobody has to wait until the disk has that these rows were free.
                await self._connection.execute("SET LOCAL synchronous_commit = off")
            cursor = await self._connection.execute(statement, [lane, lane, list(without), failed, limit, most_bytes])
            found = await cursor.fetchall()
        distinct: dict[bytes, Waiting] = {}
        for row in found:
            distinct.setdefault(row[0], Waiting(*row))
        return list(distinct.values())

    async def due(self, *, lane: int | None = None) -> bool:
        """Say whether any text is due, whoever holds its row."""
        statement = self._sql(
            "SELECT EXISTS (SELECT FROM {backlog} AS b WHERE b.generation = {generation} AND b.attempts < {attempts}"
            " AND {due} AND (%s::int IS NULL OR b.lane = %s))"
        )
        return bool((await fetch_row(self._connection, statement, [lane, lane]) or (False,))[0])

    async def lockers(self) -> list[Lock]:
        """Return who keeps everybody from writing to the index's tables."""
        tables = self._names.written(self._spec.generation)
        return await exclusive_locks(self._connection, tables, modes=WRITERS_WAIT)

    async def row_lockers(self) -> list[Lock]:
        """Return whose transactions may hold rows of the backlog: those that have been open for a while."""
        _, backlog = self._names.written()
        modes = ("RowShareLock", "RowExclusiveLock")
        locks = await exclusive_locks(self._connection, [backlog], modes=modes, open_for_s=OPEN_FOR_S)
        return [one for one in locks if one.granted]

    async def still_waiting(self, hashes: Sequence[bytes]) -> set[bytes]:
        """Return those texts that some chunk still waits for a vector of."""
        cursor = await self._connection.execute(
            self._sql(
                "SELECT h FROM unnest(%s::bytea[]) AS h WHERE EXISTS (SELECT FROM {backlog}"
                " WHERE generation = {generation} AND content_hash = h AND {waits} OFFSET 0)"
            ),
            [list(hashes)],
        )
        return {cast(bytes, row[0]) for row in await cursor.fetchall()}

    async def store(self, vectors: Mapping[bytes, npt.NDArray[np.float32]]) -> int:
        """Store vectors for every chunk in the backlog with one of these texts; returns how many chunks."""
        if not vectors:
            return 0
        async with self._storing() as store:
            async with (
                self._connection.cursor() as cursor,
                cursor.copy(self._sql("COPY {stage} FROM STDIN (FORMAT binary)")) as copy,
            ):
                copy.set_types(["bytea", self._spec.config.vector_type])
                for text_hash, vector in vectors.items():
                    await copy.write_row((text_hash, self._wire_form(vector)))
            return await store()

    async def take_over(self, hashes: Sequence[bytes]) -> set[bytes]:
        """Store the vectors that other generations have by now of these texts; returns the texts.

        A text that waits in several generations is embedded once for all of them, also if the worker is killed between
        the two, and however long it waits. A vector that is itself to be made again is not taken. One of which apply
        holds the chunk's row at the moment is not stored: either it goes with the row, or it is taken over later.
        """
        alike = await within_reach(self._connection, self._schema, self._spec, self._alike)
        if not alike:
            return set()
        extension = sql.Identifier(await vector_schema(self._connection))
        made = sql.SQL(" UNION ALL ").join(self._of_alike(one, extension) for one in alike)
        async with self._storing() as store:
            found = await self._connection.execute(
                self._sql(
                    "INSERT INTO {stage} SELECT h.content_hash, m.embedding FROM unnest(%s::bytea[]) AS h(content_hash)"
                    " CROSS JOIN LATERAL ({made} LIMIT 1) AS m RETURNING content_hash",
                    made=made,
                ),
                [list(hashes)],
            )
            taken = {cast(bytes, one) for (one,) in await found.fetchall()}
            if taken:
                await store()
        return taken

    def _of_alike(self, one: IndexSpec, extension: sql.Identifier) -> sql.Composed:
        """Return a query of the vector of the text `h` that another generation has, and keeps.

        One of the same chunks gives it of a chunk that waits: what was to be made again in both was made again there.
        One of other chunks may have kept a vector that is to be made again here, so it gives none of such a text.
        """
        vector, fits = converted("v", one, self._spec, extension)
        names = Names(self._schema, one.relations)
        waiting = "{backlog} AS b WHERE b.generation = {generation} AND b.content_hash = h.content_hash"
        given = self._sql(
            f"EXISTS (SELECT FROM {waiting} AND b.chunk_id = v.chunk_id OFFSET 0)"
            if one.name == self._spec.name
            else f"NOT EXISTS (SELECT FROM {{mine}} AS d WHERE d.content_hash = {{discarded}}"
            f" AND d.chunk_id IN (SELECT b.chunk_id FROM {waiting}))",
            mine=self._names.vectors(self._spec.generation),
            discarded=DISCARDED,
        )
        return self._sql(
            "SELECT {vector} AS embedding FROM {vectors} AS v WHERE v.content_hash = h.content_hash AND {given}"
            " AND {fits} AND NOT EXISTS (SELECT FROM {theirs} AS w WHERE w.generation = {other}"
            " AND w.chunk_id = v.chunk_id OFFSET 0)",
            vector=vector,
            given=given,
            fits=fits,
            vectors=names.vectors(one.generation),
            theirs=names.backlog,
            other=sql.Literal(one.generation),
        )

    @contextlib.asynccontextmanager
    async def _storing(self) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        """Yield what stores the vectors of the stage, in a transaction that commits behind this.

        A lost vector goes with its lost backlog deletion, so it would be made again: no need to wait for the disk.
        """
        async with self._connection.transaction():
            await self._connection.execute("SET LOCAL synchronous_commit = off")
            yield self._store_staged
            crash_point("vectors written")
        crash_point("vectors committed")

    async def _store_staged(self) -> int:
        # The backlog first, as apply does; then the rules of `ddl/tiers`.
        await self._connection.execute(self._sql("LOCK TABLE {backlog}, {fresh}, {settled} IN ROW EXCLUSIVE MODE"))
        done = await self._connection.execute(
            self._sql(
                "WITH due AS (SELECT b.chunk_id, s.content_hash, s.embedding FROM {stage} AS s CROSS JOIN LATERAL"
                " (SELECT chunk_id FROM {backlog} WHERE generation = {generation} AND content_hash = s.content_hash"
                " FOR UPDATE SKIP LOCKED) AS b),"
                " done AS (DELETE FROM {backlog} WHERE {of_generation}"
                " AND chunk_id = ANY (ARRAY(SELECT chunk_id FROM due)))"
                " INSERT INTO {fresh} (chunk_id, content_hash, embedding)"
                " SELECT chunk_id, content_hash, embedding FROM due ON CONFLICT (chunk_id) DO UPDATE"
                " SET content_hash = excluded.content_hash, embedding = excluded.embedding,"
                " stored_at = excluded.stored_at RETURNING chunk_id"
            )
        )
        if chunks := [row[0] for row in await done.fetchall()]:
            await self._connection.execute(self._sql("DELETE FROM {settled} WHERE chunk_id = ANY(%s)"), [chunks])
        return done.rowcount

    async def postpone(self, hashes: Sequence[bytes], error: str, *, delay_s: float, final: bool = False) -> int:
        """Note a failure of these texts: they are due again after `delay_s` seconds, or never when `final`.

        A chunk with an equal text that failed before, or was discarded, stays as it is.

        :param delay_s: at most `MAX_DELAY_S`.
        :returns: of how many chunks that could be noted.
        """
        cursor = await self._connection.execute(
            self._sql(
                "WITH due AS (SELECT b.chunk_id FROM unnest(%s::bytea[]) AS h CROSS JOIN LATERAL"
                " (SELECT chunk_id FROM {backlog} WHERE generation = {generation} AND content_hash = h AND {waits}"
                " FOR UPDATE SKIP LOCKED) AS b)"
                " UPDATE {backlog} AS b SET attempts = CASE WHEN %s THEN {attempts} ELSE b.attempts + 1 END,"
                " error = %s, next_attempt_at = now() + make_interval(secs => %s)"
                " WHERE {of_generation} AND chunk_id = ANY (ARRAY(SELECT chunk_id FROM due))"
            ),
            [list(hashes), final, error[:ERROR_CHARACTERS], delay_s],
        )
        crash_point("failure of a text noted")
        return cursor.rowcount

    async def counts(self) -> BacklogCounts:
        """Return how many chunks wait or have failed."""
        row = await fetch_row(
            self._connection,
            self._sql(
                "SELECT count(*) FILTER (WHERE attempts < {attempts} AND lane = 0),"
                " count(*) FILTER (WHERE attempts < {attempts} AND lane > 0),"
                " count(*) FILTER (WHERE attempts >= {attempts})"
                " FROM {backlog} WHERE generation = {generation} AND attempts < {discarded_attempts}"
            ),
        )
        return BacklogCounts(*cast(tuple[int, int, int], row))

    def _sql(self, statement: str, **more: sql.Composable) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts, **more)
