"""The generations of indexes: each is a set of vectors of the same chunks, with what makes them.

The table `generations` has one row a generation; `indexes.generation` says which of them is *live*: the one that
searches use. Every statement on the table is here. The rules:

1. A generation is created and dropped by the holder of the pipeline's lock, because apply writes all of them.
   A command only asks for it: it adds the row, or marks it `dropping`.
2. Which generation is live changes in one transaction, with the view and the search function, under the lock of the
   index's row in `indexes`. Any process may do that: a worker writes the same to all generations but the first vectors
   of small batches.
3. A generation is *filling* until each chunk has a vector of it or a reason why not, and its HNSW index is built; then
   it is *ready*. Only a ready one becomes live.
4. A number is given once: `indexes.last_generation` remembers it after its generation was dropped, and
   `dropped_indexes` after its index was, so that a search which names that one is refused rather than answered by
   another model's vectors.
5. `cursor` only moves forward: all chunks up to it were queued or embedded once, and apply looks after the changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal, LiteralString, cast

import msgspec
from psycopg import sql

from cdcsync.config import Index
from cdcsync.config.names import beside_name, own_name
from cdcsync.config.sections import Hnsw
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection

TABLE = "generations"

VectorType = Literal["vector", "halfvec"]

Quantise = Literal["none", "binary"]

State = Literal["filling", "ready", "dropping"]

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.generations (
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        generation int NOT NULL,
        embedder text,
        model text NOT NULL,
        dimensions int NOT NULL,
        vector_type text NOT NULL,
        distance text NOT NULL,
        m int,
        ef_construction int,
        state text NOT NULL CHECK (state IN ('filling', 'ready', 'dropping')),
        cursor bigint NOT NULL DEFAULT 0,
        queued bigint NOT NULL DEFAULT 0,
        max_rows_per_s int CHECK (max_rows_per_s > 0),
        begun_at timestamptz NOT NULL DEFAULT now(),
        filled_at timestamptz,
        ready_at timestamptz,
        live_at timestamptz,
        PRIMARY KEY (index_name, generation)
    )
    """,
    "COMMENT ON TABLE {schema}.generations IS"
    " 'cdcsync: the sets of vectors of each index, and what each is made by; indexes.generation says which is live.'",
    "COMMENT ON COLUMN {schema}.generations.embedder IS 'The section of the configuration that made the vectors.'",
    "COMMENT ON COLUMN {schema}.generations.cursor IS"
    " 'While it is filled: chunks with numbers up to this one were queued or embedded.'",
    "COMMENT ON COLUMN {schema}.generations.queued IS 'How many chunks that were.'",
    "ALTER TABLE {schema}.generations ADD COLUMN IF NOT EXISTS quantise text NOT NULL DEFAULT 'none'",
    "COMMENT ON COLUMN {schema}.generations.quantise IS 'What the HNSW index keeps of numbers: binary, a bit.'",
    "ALTER TABLE {schema}.generations ADD COLUMN IF NOT EXISTS reason text",
    "COMMENT ON COLUMN {schema}.generations.reason IS"
    " 'Why the generation could not be filled or built when that was last tried.'",
    "ALTER TABLE {schema}.generations ADD COLUMN IF NOT EXISTS refusal text",
    "COMMENT ON COLUMN {schema}.generations.refusal IS"
    " 'Why the worker did not drop the generation, or make it live, when that was last asked.'",
    "ALTER TABLE {schema}.generations ADD COLUMN IF NOT EXISTS has_embedder boolean",
    "COMMENT ON COLUMN {schema}.generations.has_embedder IS"
    " 'Whether the worker that was started last has an embedder that makes these vectors; NULL: none has looked.'",
    # Those of the versions before this table.
    """
    INSERT INTO {schema}.generations
        (index_name, generation, model, dimensions, vector_type, distance, state, ready_at, live_at)
    SELECT i.name, i.generation, i.model, i.dimensions, i.vector_type, i.distance, 'ready', i.live_at, i.live_at
    FROM {schema}.indexes AS i
    WHERE NOT EXISTS (SELECT FROM {schema}.generations AS g WHERE g.index_name = i.name)
    """,
)
"""Needs the table `indexes`."""


class Generation(msgspec.Struct, frozen=True):
    """A generation as it is stored; the fields are the columns of its row.

    :ivar embedder: None in a row that an earlier version's index left.
    :ivar m: None, as `ef_construction`, where the configuration says it.
    :ivar has_embedder: whether the worker that was started last has an embedder for it; None if none has looked.
    """

    index_name: str
    generation: int
    embedder: str | None
    model: str
    dimensions: int
    vector_type: str
    distance: str
    state: State
    m: int | None = None
    ef_construction: int | None = None
    quantise: Quantise = "none"
    cursor: int = 0
    queued: int = 0
    max_rows_per_s: int | None = None
    begun_at: datetime | None = None
    filled_at: datetime | None = None
    live_at: datetime | None = None
    reason: str | None = None
    refusal: str | None = None
    has_embedder: bool | None = None

    @classmethod
    def of(cls, spec: IndexSpec, state: State) -> Generation:
        """Return the generation that a spec is of."""
        hnsw = spec.config.hnsw
        return cls(
            *(spec.name, spec.generation, spec.config.embedder, spec.model, spec.dimensions),
            *(spec.config.vector_type, spec.distance, state, hnsw.m, hnsw.ef_construction),
            quantise=hnsw.quantise,
        )

    @property
    def of_other_chunks(self) -> bool:
        """Whether it has chunks of its own, which stand beside those that are searched."""
        return own_name(self.index_name) != self.index_name

    @property
    def made_by(self) -> tuple[object, ...]:
        """The facts that decide which vectors these are, and how they are stored and compared."""
        return self.model, self.dimensions, self.vector_type, self.distance

    def built_like(self, hnsw: Hnsw) -> bool:
        """Say whether the HNSW index is built with these parameters, as far as that is known."""
        return self._hnsw(hnsw) == hnsw

    def settings(self, index: Index) -> Index:
        """Return an index's section as it would be written for this generation, but for the distance.

        `auto` is a distance too; what it comes to is in `distance`.
        """
        return msgspec.structs.replace(
            index,
            embedder=self.embedder or index.embedder,
            vector_type=cast(VectorType, self.vector_type),
            hnsw=self._hnsw(index.hnsw),
        )

    def _hnsw(self, hnsw: Hnsw) -> Hnsw:
        """Return the parameters of its HNSW index; those that are not known are the given ones."""
        return msgspec.structs.replace(
            hnsw,
            m=self.m or hnsw.m,
            ef_construction=self.ef_construction or hnsw.ef_construction,
            quantise=self.quantise,
        )

    def spec(self, spec: IndexSpec) -> IndexSpec:
        """Return an index's spec with this generation in the place of its own."""
        return msgspec.structs.replace(
            spec,
            config=self.settings(spec.config),
            model=self.model,
            dimensions=self.dimensions,
            distance=cast(Distance, self.distance),
            generation=self.generation,
            others=(),
        )


def any_ends(generations: Iterable[Generation]) -> bool:
    """Say whether somebody asked for one of these to be dropped, and that is not done yet."""
    return any(one.state == "dropping" for one in generations)


class Generations:
    """The table `generations` of a schema. The caller's transaction commits, where there is one."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self._table = sql.Identifier(schema, TABLE)

    async def all(self, connection: Connection) -> dict[str, list[Generation]]:
        """Return the generations of every index by its name, in the order of their numbers.

        Nothing where the table is missing, or this role may not read it: a role that searches need not.
        """
        if not await self._present(connection):
            return {}
        cursor = await connection.execute(
            sql.SQL("SELECT to_jsonb(g) FROM {} AS g ORDER BY index_name, generation").format(self._table)
        )
        found: dict[str, list[Generation]] = {}
        for (row,) in await cursor.fetchall():
            one = msgspec.convert(row, Generation)
            found.setdefault(one.index_name, []).append(one)
        return found

    async def of(self, connection: Connection, index: str, *, lock: bool = False) -> list[Generation]:
        """Return the generations of an index, in the order of their numbers.

        :param lock: keep others from changing them until the caller's transaction ends.
        """
        if not await self._present(connection):
            return []
        cursor = await connection.execute(
            sql.SQL(
                "SELECT to_jsonb(g) FROM {} AS g WHERE index_name = %s ORDER BY generation"
                + (" FOR UPDATE" if lock else "")
            ).format(self._table),
            [index],
        )
        return [msgspec.convert(row[0], Generation) for row in await cursor.fetchall()]

    async def around(self, connection: Connection, index: str, *, lock: bool = False) -> list[Generation]:
        """Return the generations of an index, those of the chunks that stand beside it included, by their numbers."""
        found = await self.of(connection, index, lock=lock) + await self.of(connection, beside_name(index), lock=lock)
        return sorted(found, key=lambda one: one.generation)

    async def _present(self, connection: Connection) -> bool:
        row = await fetch_row(
            connection,
            "SELECT FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s AND pg_catalog.has_table_privilege(c.oid, 'SELECT')",
            [self._schema, TABLE],
        )
        return row is not None

    async def add(self, connection: Connection, one: Generation) -> None:
        """Add a generation."""
        facts = {
            name: value
            for name, value in msgspec.structs.asdict(one).items()
            if value is not None and name not in ("begun_at", "filled_at", "live_at")
        }
        await connection.execute(
            sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
                self._table,
                sql.SQL(", ").join(map(sql.Identifier, facts)),
                sql.SQL(", ").join([sql.Placeholder()] * len(facts)),
            ),
            list(facts.values()),
        )

    async def register(self, connection: Connection, spec: IndexSpec) -> None:
        """Note each generation of an index that is not there yet, and which embedder of the configuration makes it."""
        for one in spec.generations:
            await self.add(connection, Generation.of(one, "ready" if one is spec else "filling"))
            await connection.execute(
                sql.SQL(
                    "UPDATE {} SET embedder = %s, m = coalesce(m, %s), ef_construction = coalesce(ef_construction, %s)"
                    " WHERE index_name = %s AND generation = %s"
                ).format(self._table),
                [
                    *(one.config.embedder, one.config.hnsw.m, one.config.hnsw.ef_construction),
                    *(one.name, one.generation),
                ],
            )

    async def drop_asked(self, connection: Connection, index: str, generation: int) -> None:
        """Ask the holder of the pipeline's lock to drop a generation."""
        # `refuse` has to know whether it was ready: nothing has noted since when the first generation of an index is.
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'dropping', reason = NULL, refusal = NULL,"
                " ready_at = CASE WHEN state = 'ready' THEN coalesce(ready_at, clock_timestamp()) ELSE ready_at END"
                " WHERE index_name = %s AND generation = %s"
            ).format(self._table),
            [index, generation],
        )

    async def activation_asked(self, connection: Connection, index: str, generation: int) -> None:
        """Forget why a generation was not made live, or dropped, when that was last asked: it is asked again."""
        await connection.execute(
            sql.SQL("UPDATE {} SET refusal = NULL WHERE index_name = %s AND generation = %s").format(self._table),
            [index, generation],
        )

    async def refuse(self, connection: Connection, index: str, generation: int, why: str, *, drop: bool) -> bool:
        """Note why a generation is not dropped, so that it stays; or not made live, unless it is to be dropped by now.

        :param drop: true if a drop was tried, false if an activation was.
        :returns: whether that is still asked.
        """
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET refusal = %s, state = CASE WHEN state <> 'dropping' THEN state"
                " WHEN ready_at IS NULL THEN 'filling' ELSE 'ready' END"
                " WHERE index_name = %s AND generation = %s AND (state = 'dropping') = %s"
            ).format(self._table),
            [why, index, generation, drop],
        )
        return cursor.rowcount > 0

    async def limit(self, connection: Connection, index: str, generation: int, max_rows_per_s: int | None) -> None:
        """Set how many chunks a second a generation is filled with at most."""
        await connection.execute(
            sql.SQL("UPDATE {} SET max_rows_per_s = %s WHERE index_name = %s AND generation = %s").format(self._table),
            [max_rows_per_s, index, generation],
        )

    async def advance(self, connection: Connection, index: str, generation: int, cursor: int, chunks: int) -> bool:
        """Note that the fill of a generation is so far; returns whether that is wanted, and was not so before."""
        row = await connection.execute(
            sql.SQL(
                "UPDATE {} SET cursor = %s, queued = queued + %s, reason = NULL"
                " WHERE index_name = %s AND generation = %s AND state = 'filling' AND cursor < %s"
            ).format(self._table),
            [cursor, chunks, index, generation, cursor],
        )
        return row.rowcount > 0

    async def begin_again(self, connection: Connection, index: str, generation: int) -> None:
        """Start filling a generation from the beginning: chunks that have their vector are skipped."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET cursor = 0, queued = 0, state = 'filling', filled_at = NULL, ready_at = NULL"
                " WHERE index_name = %s AND generation = %s AND state <> 'dropping'"
            ).format(self._table),
            [index, generation],
        )

    async def stamp(self, connection: Connection, index: str, generation: int, column: Stamp) -> None:
        """Note that something was reached now; a generation that is ready says so in its state too."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET {} = clock_timestamp(),"
                " reason = NULL, refusal = CASE WHEN NOT %s THEN refusal END,"
                " state = CASE WHEN %s AND state = 'filling' THEN 'ready' ELSE state END"
                " WHERE index_name = %s AND generation = %s"
            ).format(self._table, sql.Identifier(column)),
            [column == "live_at", column == "ready_at", index, generation],
        )

    async def note_reason(self, connection: Connection, index: str, generation: int, reason: str) -> None:
        """Note why a generation cannot be filled or built now."""
        await connection.execute(
            sql.SQL("UPDATE {} SET reason = %s WHERE index_name = %s AND generation = %s").format(self._table),
            [reason, index, generation],
        )

    async def note_embedder(self, connection: Connection, index: str, generation: int, has_embedder: bool) -> None:
        """Note whether the worker has an embedder that makes the vectors of a generation."""
        await connection.execute(
            sql.SQL("UPDATE {} SET has_embedder = %s WHERE index_name = %s AND generation = %s").format(self._table),
            [has_embedder, index, generation],
        )

    async def remove(self, connection: Connection, index: str, generation: int) -> None:
        """Remove a generation's row."""
        await connection.execute(
            sql.SQL("DELETE FROM {} WHERE index_name = %s AND generation = %s").format(self._table),
            [index, generation],
        )


Stamp = Literal["filled_at", "ready_at", "live_at"]
"""The milestones of a generation."""
