"""Apply: what one index takes from a batch, written in the caller's target transaction.

The changed rows are copied to a temporary table, the stage. A few set-based statements then bring chunks, vectors and
backlog to the new state. The order matters:

1. chunks that go are deleted, and remembered in `gone`; before the upserts, because two texts can be the same key
   to the server (1.0 and 1.00 as numeric) and the deletion is always of the older one;
2. documents that did not change get their carried columns, and their key as it is written now (a separate UPDATE,
   which can stay HOT);
3. chunks that are there already are updated, the others upserted, and both remembered in `put`. To upsert all would be
   right too, but PostgreSQL computes the text search vector of a proposed row before it sees that the row exists, and
   then again for the update: half of the time of the whole apply;
4. the backlog of both is cleared *before* any vector is touched: the embed loop locks a chunk's backlog row before
   its vector, and skips what is locked, so the two never wait for each other in a circle; from here on the rules of
   `ddl/tiers` hold;
5. vectors of equal texts are taken over while those of `gone` still exist: a moved key costs no embedding;
6. vectors computed already are stored, and what has none goes to the backlog; what has a fresh vector now loses its
   settled one;
7. vectors of `gone` are deleted.

Where the index has another generation of vectors, which a migration fills or has left, 5 to 7 are done for it too.

Every statement can be repeated with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import LiteralString

import psycopg
from psycopg import sql

from cdcsync.model.changeset import BACKFILL, Applied, ChangeSet
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names, vector_schema
from cdcsync.target.loading import CHUNK_COLUMNS, blocks, load
from cdcsync.target.look_ups import LookUps
from cdcsync.target.stage import Op, Stage
from cdcsync.target.vectors import converted, register_vectors, wire_form

TRUNCATE_LOCKS_MS = 500
"""Readers that take longer are not waited for, as searches queue up behind who waits for an exclusive lock; less than
PostgreSQL's default `deadlock_timeout`, 1 s."""


REPLACED: LiteralString = (
    "content_hash = excluded.content_hash, embedding = excluded.embedding, stored_at = excluded.stored_at"
)
SUPERSEDE: LiteralString = (
    "DELETE FROM {settled} AS v USING {put} AS p JOIN {fresh} AS f USING (chunk_id) WHERE v.chunk_id = p.chunk_id"
)


class IndexWriter(LookUps):
    """Writes one index over one connection; `open` prepares the connection's temporary tables."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        super().__init__(connection, schema, spec)
        self._schema = schema
        self._stage = Stage(connection, spec)
        self._carried = [sql.Identifier(name) for name in spec.shape.carried]
        self._slots = self._stage.carried
        self._composed: dict[tuple[str, int], bytes] = {}
        """The statements as they are sent, by their templates and the generation that they are about."""
        self._parts: dict[int, dict[str, sql.Composable]] = {}
        """By generation, the values of the names in braces in the statements."""

    async def open(self) -> None:
        """Create the stage; once per connection."""
        await super().open()
        extension = await vector_schema(self._connection)
        await register_vectors(self._connection)
        common = self._compose(extension)
        self._parts = {
            one.generation: common | self._of_generation(one, sql.Identifier(extension))
            for one in self._spec.generations
        }
        await self._stage.create(self._names.chunks)

    async def apply(self, changes: ChangeSet) -> Applied:
        """Write the changes inside the caller's transaction; the caller commits."""
        await self._stage.empty(changes)
        others = self._spec.others
        if changes.new and not others and (loaded := await self._load(changes)) is not None:
            return loaded
        if changes.truncated:
            await self._truncate()
        deleted = await self._clear(changes.cleared) if changes.cleared else 0
        await self._stage.copy(changes)
        chunks = sum(len(document.chunks) for document in changes.documents)
        replaced = any(document.existed for document in changes.documents)
        if changes.deleted or changes.absent or changes.new or replaced:
            deleted += await self._delete_surplus()
        if changes.kept:
            await self._update_kept()
        reused = inline = queued = beside = 0
        if changes.documents:
            await self._write(changes, chunks)
        if changes.documents or deleted:
            await self._run(
                "LOCK TABLE {backlog}, {fresh}, {settled} IN ROW EXCLUSIVE MODE; DELETE FROM {backlog} AS b USING"
                " (SELECT chunk_id FROM {gone} UNION ALL SELECT chunk_id FROM {put}) AS t WHERE b.chunk_id = t.chunk_id"
            )
            for other in others:
                await self._run("LOCK TABLE {fresh}, {settled} IN ROW EXCLUSIVE MODE", of=other)
        if changes.documents:
            reused, inline, queued = await self._give_vectors(self._spec, changes, chunks)
            for other in others:
                beside += (await self._give_vectors(other, changes, chunks))[2]
        if deleted:
            for one in self._spec.generations:
                for tier in ("fresh", "settled"):
                    await self._run(
                        "DELETE FROM {" + tier + "} AS v USING {gone} AS t WHERE v.chunk_id = t.chunk_id", of=one
                    )
        self._stage.used(len(changes.deleted) + len(changes.absent) + len(changes.kept) + chunks + deleted)
        return Applied(chunks, deleted, reused, inline, queued, beside)

    async def _give_vectors(self, one: IndexSpec, changes: ChangeSet, chunks: int) -> tuple[int, int, int]:
        """See that all chunks that were put have a vector of one generation, or wait for it.

        :returns: how many took that of an equal text, how many came along, and how many wait.
        """
        # The vectors that came along are of the live generation's model.
        along = changes.vectors if one.model == self._spec.model else {}
        reused = inline = queued = 0
        # At light load every vector came along, and there is nothing to look for.
        if not all(chunk.hash in along for document in changes.documents for chunk in document.chunks):
            reused = await self._reuse(one)
        if along:
            inline = await self._store(one, along)
        if reused or inline:
            await self._run(SUPERSEDE, of=one)
        if inline < chunks:
            queued = await self._queue(one)
        return reused, inline, queued

    async def _load(self, changes: ChangeSet) -> Applied | None:
        """Write documents that the index does not have; None when it has one of them, with nothing written."""
        reused = queued = 0
        try:
            async with self._connection.transaction():
                await self._run("LOCK TABLE {backlog}, {fresh}, {settled} IN ROW EXCLUSIVE MODE")
                left = await load(self._connection, self._schema, self._spec, changes.documents, changes.vectors)
                if left:
                    statement = sql.SQL("COPY {} (chunk_id, content_hash) FROM STDIN").format(self._stage.put)
                    async with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                        for block in blocks(f"{id_}\t\\\\x{one.hex()}\n" for id_, one in left):
                            await copy.write(block)
                    reused = await self._reuse(self._spec)
                    queued = await self._run(
                        "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
                        " SELECT {generation}, p.chunk_id, p.content_hash, {backfill} FROM {put} AS p"
                        " WHERE NOT EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id = p.chunk_id)"
                    )
        except psycopg.errors.UniqueViolation:
            return None
        chunks = sum(len(document.chunks) for document in changes.documents)
        self._stage.used(len(left))
        return Applied(chunks, 0, reused, chunks - len(left), queued)

    def stage(self, changes: ChangeSet) -> Iterator[bytes]:
        """Return blocks of what is copied to the stage, to be written down ahead as `ChangeSet.staged`."""
        return self._stage.blocks(changes)

    async def _truncate(self) -> None:
        """Empty the index: quickly if nobody is in the way, else row by row.

        A reader may hold one of the tables and wait for another: this gives up before the server looks for such a
        circle and fails somebody's search to break it. So all locks together have to come in time, which a
        `lock_timeout` would give to each of them.
        """
        try:
            async with self._connection.transaction():
                await self._connection.execute(f"SET LOCAL statement_timeout = {TRUNCATE_LOCKS_MS}")
                tables = "{backlog}, {chunks}" + "".join(
                    f", {{fresh_{one.generation}}}, {{settled_{one.generation}}}" for one in self._spec.generations
                )
                await self._run("LOCK TABLE " + tables + " IN ACCESS EXCLUSIVE MODE")
                await self._connection.execute("SET LOCAL statement_timeout = 0")
                await self._run("TRUNCATE " + tables)
        except (psycopg.errors.QueryCanceled, psycopg.errors.DeadlockDetected):
            await self._run("DELETE FROM {backlog}")
            for one in self._spec.generations:
                await self._run("DELETE FROM {fresh}", of=one)
                await self._run("DELETE FROM {settled}", of=one)
            await self._run("DELETE FROM {chunks}")

    async def _clear(self, tables: Sequence[str]) -> int:
        """Delete the chunks of all rows of some of many source tables."""
        statement = sql.SQL(
            "WITH gone AS (DELETE FROM {} WHERE {}::text = ANY(%s) RETURNING chunk_id)"
            " INSERT INTO {} (chunk_id) SELECT chunk_id FROM gone"
        ).format(self._names.chunks, self._keys[0], self._stage.gone)
        return (await self._connection.execute(statement, [list(tables)])).rowcount

    async def _delete_surplus(self) -> int:
        """Delete the chunks of deleted and absent keys, and of documents that have fewer chunks now."""
        return await self._run(
            "WITH gone AS (DELETE FROM {chunks} AS c USING {stage} AS s"
            " WHERE {same_key} AND (s.op = {delete} OR s.op = {delete_as_written} AND {as_written}"
            " OR s.op IN ({put_op}, {replace}) AND s.chunk_no = 0)"
            " AND c.chunk_no >= s.chunk_total RETURNING c.chunk_id)"
            " INSERT INTO {gone} (chunk_id) SELECT chunk_id FROM gone"
        )

    async def _update_kept(self) -> int:
        return await self._run(
            "UPDATE {chunks} AS c SET {assignments}, commit_lsn = s.commit_lsn, applied_at = now()"
            " FROM {stage} AS s WHERE s.op = {keep} AND {same_key} AND {differs}"
        )

    async def _write(self, changes: ChangeSet, chunks: int) -> None:
        """Write the chunks of documents; `chunks` is how many they are."""
        expected = sum(len(document.chunks) for document in changes.documents if document.existed)
        replaced = await self._replace() if expected else 0
        if replaced < expected:
            # A document has more chunks than before.
            await self._upsert(
                "s.op = {put_op} OR s.op = {replace}"
                " AND NOT EXISTS (SELECT FROM {chunks} AS c WHERE {same_key} AND c.chunk_no = s.chunk_no)"
            )
        elif expected < chunks:
            await self._upsert("s.op = {put_op}")

    async def _replace(self) -> int:
        return await self._run(
            "WITH put AS (UPDATE {chunks} AS c SET {replacements}, applied_at = now() FROM {stage} AS s"
            " WHERE s.op = {replace} AND {same_key} AND c.chunk_no = s.chunk_no RETURNING c.chunk_id, c.content_hash)"
            " INSERT INTO {put} SELECT chunk_id, content_hash FROM put"
        )

    async def _upsert(self, which: str) -> int:
        return await self._run(
            "WITH put AS (INSERT INTO {chunks} ({targets}) SELECT {sources} FROM {stage} AS s WHERE "
            + which
            + " ON CONFLICT ({keys}, chunk_no) DO UPDATE SET {updates}, applied_at = now()"
            " RETURNING chunk_id, content_hash)"
            " INSERT INTO {put} SELECT chunk_id, content_hash FROM put"
        )

    async def _reuse(self, one: IndexSpec) -> int:
        """Give each chunk without a current vector that of an equal text, in whichever generation one is stored."""
        return await self._run(
            "INSERT INTO {fresh} AS mine (chunk_id, content_hash, embedding)"
            " SELECT p.chunk_id, p.content_hash, equal.embedding FROM {put} AS p CROSS JOIN LATERAL"
            " (SELECT v.embedding FROM {vectors} AS v WHERE v.content_hash = p.content_hash{alike} LIMIT 1) AS equal"
            " WHERE NOT EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id = p.chunk_id"
            " AND v.content_hash = p.content_hash)"
            " ON CONFLICT (chunk_id) DO UPDATE SET " + REPLACED,
            of=one,
        )

    async def _store(self, one: IndexSpec, vectors: Mapping[bytes, FloatVector]) -> int:
        """Store vectors that came with the batch."""
        return await self._run(
            "INSERT INTO {fresh} (chunk_id, content_hash, embedding)"
            " SELECT p.chunk_id, p.content_hash, i.embedding::{vector_schema}." + one.vector_type + " FROM {put} AS p"
            " JOIN unnest(%s::bytea[], %b) AS i(content_hash, embedding) USING (content_hash)"
            " ON CONFLICT (chunk_id) DO UPDATE SET " + REPLACED,
            [list(vectors), list(map(wire_form(one), vectors.values()))],
            of=one,
        )

    async def _queue(self, one: IndexSpec) -> int:
        """Put each chunk that still has no current vector into the backlog."""
        return await self._run(
            "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
            " SELECT {generation}, p.chunk_id, p.content_hash, s.lane FROM {put} AS p"
            " JOIN (SELECT content_hash, min(lane) AS lane FROM {stage} WHERE op IN ({put_op}, {replace})"
            " GROUP BY content_hash) AS s USING (content_hash)"
            " WHERE NOT EXISTS (SELECT FROM {vectors} AS v"
            " WHERE v.chunk_id = p.chunk_id AND v.content_hash = p.content_hash)",
            of=one,
        )

    async def _run(
        self, statement: str, arguments: Sequence[object] | None = None, *, of: IndexSpec | None = None
    ) -> int:
        """Run a statement; `of` is the generation that it is about, the live one if it is not given."""
        generation = (of or self._spec).generation
        composed = self._composed.get((statement, generation))
        if composed is None:
            composed = sql.SQL(statement).format(**self._parts[generation]).as_bytes(self._connection)
            self._composed[statement, generation] = composed
        cursor = await self._connection.execute(composed, arguments)
        return cursor.rowcount

    def _of_generation(self, one: IndexSpec, extension: sql.Identifier) -> dict[str, sql.Composable]:
        """Return what stands for the names of a generation's tables."""
        return {
            "vectors": self._names.vectors(one.generation),
            **self._names.tiers(one.generation),
            "generation": sql.Literal(one.generation),
            "alike": sql.SQL("").join(self._of_alike(one, other, extension) for other in self._spec.alike(one)),
        }

    def _of_alike(self, one: IndexSpec, other: IndexSpec, extension: sql.Identifier) -> sql.Composable:
        """Return what has vectors of equal texts come from another generation, too."""
        vector, fits = converted("a", other, one, extension)
        return sql.SQL(" UNION ALL SELECT {} FROM {} AS a WHERE a.content_hash = p.content_hash AND {}").format(
            vector, Names(self._schema, other.relations).vectors(other.generation), fits
        )

    def _compose(self, vector_schema: str) -> dict[str, sql.Composable]:
        """Return what stands for the names in braces in all statements."""
        tables = {
            f"{tier}_{one.generation}": table
            for one in self._spec.generations
            for tier, table in self._names.tiers(one.generation).items()
        }
        comma, both = sql.SQL(", "), sql.SQL(" AND ")
        chunk_columns = [sql.Identifier(name) for name in CHUNK_COLUMNS]
        targets = [*self._keys, *self._carried, *chunk_columns]
        # The key of a document that did not change too: 1.0 may be 1.00 now.
        pairs = list(zip(self._keys + self._carried, self._places + self._slots, strict=True))
        return {
            "chunks": self._names.chunks,
            "backlog": self._names.backlog,
            **tables,
            "stage": self._stage.table,
            "gone": self._stage.gone,
            "put": self._stage.put,
            "backfill": sql.Literal(BACKFILL),
            "keep": sql.Literal(int(Op.KEEP)),
            "put_op": sql.Literal(int(Op.PUT)),
            "replace": sql.Literal(int(Op.REPLACE)),
            "delete": sql.Literal(int(Op.DELETE)),
            "delete_as_written": sql.Literal(int(Op.DELETE_AS_WRITTEN)),
            "vector_schema": sql.Identifier(vector_schema),
            "keys": comma.join(self._keys),
            "same_key": both.join(
                sql.SQL("c.{} {} s.{}").format(key, equal, place)
                for key, equal, place in zip(self._keys, self._equal, self._places, strict=True)
            ),
            "as_written": both.join(
                # By the types' output functions: a cast to text may be a function of the type's owner.
                sql.SQL('concat(c.{}) COLLATE "C" = concat(s.{}) COLLATE "C"').format(key, place)
                for key, place in zip(self._keys, self._places, strict=True)
            ),
            "targets": comma.join(targets),
            "sources": comma.join([*self._places, *self._slots, *chunk_columns]),
            "updates": comma.join(sql.SQL("{} = excluded.{}").format(column, column) for column in targets),
            "replacements": comma.join(
                sql.SQL("{} = s.{}").format(column, slot)
                for column, slot in [*pairs, *zip(chunk_columns, chunk_columns, strict=True)]
            ),
            "assignments": comma.join(sql.SQL("{} = s.{}").format(column, slot) for column, slot in pairs),
            # Compared as images: some types (json, xml, point) have no equality, and 1.0 must be able to become 1.00.
            "differs": sql.SQL("ROW({})::record OPERATOR(pg_catalog.*<>) ROW({})::record").format(
                comma.join(sql.SQL("c.{}").format(column) for column, _ in pairs),
                comma.join(sql.SQL("s.{}").format(slot) for _, slot in pairs),
            ),
        }
