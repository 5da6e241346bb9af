"""Apply: what one index takes from a batch, written in the caller's target transaction.

The changed rows are copied to a temporary table, the stage. A few set-based statements then bring chunks, vectors and
backlog to the new state. The order matters:

1. texts that a document had already keep the position and the time that they have, wherever in it they are now: they
   may wait for a vector since then (`wait_for`). This is before anything of the document is deleted or written;
2. chunks that go are deleted, and remembered in `gone`; before the upserts, because two texts can be the same key
   to the server (1.0 and 1.00 as numeric) and the deletion is always of the older one;
3. documents that did not change get their carried columns, and their key as it is written now (a separate UPDATE,
   which can stay HOT);
4. chunks that are there already are updated, the others upserted, and both remembered in `put`. To upsert all would be
   right too, but PostgreSQL computes the text search vector of a proposed row before it sees that the row exists, and
   then again for the update: half of the time of the whole apply;
5. the backlog of both is cleared *before* any vector is touched: the embed loop locks a chunk's backlog row before
   its vector, and skips what is locked, so the two never wait for each other in a circle; from here on the rules of
   `ddl/tiers` hold;
6. vectors of equal texts are taken over while those of `gone` still exist: a moved key costs no embedding;
7. vectors computed already are stored, and what has none goes to the backlog; what has a fresh vector now loses its
   settled one;
8. vectors of `gone` are deleted.

Where the index has another generation of vectors, which a migration fills or has left, 6 to 8 are done for it too.

Every statement can be repeated with the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

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
from cdcsync.target.statements import (
    CLEAR_BACKLOG,
    DELETE_SURPLUS,
    DROP_FRESH,
    DROP_SETTLED,
    HASHING,
    LOCK,
    LOCK_TIERS,
    NOT_HASHING,
    PUT_MORE,
    PUT_NEW,
    QUEUE,
    QUEUE_LOADED,
    REPLACE,
    REPLACED,
    REUSE,
    REUSE_OWN,
    SINCE,
    SUPERSEDE,
    UPDATE_KEPT,
)
from cdcsync.target.vectors import converted, register_vectors, wire_form, within_reach

TRUNCATE_LOCKS_MS = 500
"""Readers that take longer are not waited for, as searches queue up behind who waits for an exclusive lock; less than
PostgreSQL's default `deadlock_timeout`, 1 s."""

HASHED_VECTORS = 200
"""Fewer vectors of a batch are found for its chunks without the two statements that allow to hash them."""


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
        self._reuse: str = REUSE
        """What takes vectors over in the batch that is being written."""

    async def open(self) -> None:
        """Create the stage; once per connection."""
        await super().open()
        extension = sql.Identifier(await vector_schema(self._connection))
        await register_vectors(self._connection)
        common = self._compose()
        self._parts = {one.generation: common | self._of_generation(one, extension) for one in self._spec.generations}
        await self._stage.create(self._names.chunks)

    async def apply(self, changes: ChangeSet) -> Applied:
        """Write the changes inside the caller's transaction; the caller commits."""
        await self._stage.empty()
        others = self._spec.others
        self._reuse = await self._reuse_now() if changes.documents else REUSE
        if changes.new and not others and (loaded := await self._load(changes)) is not None:
            return loaded
        if changes.truncated:
            await self._truncate()
        deleted = await self._clear(changes.cleared) if changes.cleared else 0
        await self._stage.copy(changes)
        chunks = sum(len(document.chunks) for document in changes.documents)
        deleted += await self._write(changes, chunks)
        reused = inline = queued = beside = 0
        if changes.documents or deleted:
            first = [(LOCK, self._spec), (CLEAR_BACKLOG, self._spec), *((LOCK_TIERS, other) for other in others)]
            if changes.documents:
                reused, inline, queued = await self._give_vectors(self._spec, changes, chunks, first)
                for other in others:
                    beside += (await self._give_vectors(other, changes, chunks))[2]
            else:
                await self._run_all(first)
        if deleted:
            await self._run_all([(drop, one) for one in self._spec.generations for drop in (DROP_FRESH, DROP_SETTLED)])
        self._stage.used(len(changes.deleted) + len(changes.absent) + len(changes.kept) + chunks + deleted)
        return Applied(chunks, deleted, reused, inline, queued, beside)

    async def _write(self, changes: ChangeSet, chunks: int) -> int:
        """Bring the chunks to the new state; `chunks` is how many are written. Returns how many were deleted."""
        expected = sum(len(document.chunks) for document in changes.documents if document.existed)
        replaced = any(document.existed for document in changes.documents)
        wanted = {
            HASHING: chunks > 0,
            SINCE: chunks > 0,
            NOT_HASHING: chunks > 0,
            DELETE_SURPLUS: changes.deleted or changes.absent or changes.new or replaced,
            UPDATE_KEPT: changes.kept,
            REPLACE: expected > 0,
            PUT_NEW: expected < chunks,
        }
        rows = await self._run_all([(statement, self._spec) for statement, is_wanted in wanted.items() if is_wanted])
        if rows[REPLACE] < expected:
            # A document has more chunks than before.
            await self._run(PUT_MORE)
        return rows[DELETE_SURPLUS]

    async def _give_vectors(
        self, one: IndexSpec, changes: ChangeSet, chunks: int, first: Sequence[tuple[str, IndexSpec]] = ()
    ) -> tuple[int, int, int]:
        """See that all chunks that were put have a vector of one generation, or wait for it.

        :param first: statements to be run before.
        :returns: how many took that of an equal text, how many came along, and how many wait.
        """
        # The vectors that came along are of the live generation's model, and such as it can store.
        along = changes.vectors if one is self._spec else one.usable(changes.vectors) if self._same_model(one) else {}
        # At light load every vector came along, and there is nothing to look for.
        looks = not all(chunk.hash in along for document in changes.documents for chunk in document.chunks)
        queuing = (HASHING, QUEUE, NOT_HASHING)
        wanted = [*([self._reuse] if looks else []), *(queuing if looks and not along else [])]
        rows = await self._run_all([*first, *((statement, one) for statement in wanted)])
        inline = await self._store(one, along) if along else 0
        reused = rows[self._reuse]
        if reused or inline:
            await self._run(SUPERSEDE, of=one)
        if along and inline < chunks:
            rows += await self._run_all([(statement, one) for statement in queuing])
        return reused, inline, rows[QUEUE]

    def _same_model(self, one: IndexSpec) -> bool:
        return (one.model, one.dimensions) == (self._spec.model, self._spec.dimensions)

    async def _reuse_now(self) -> str:
        """Return the statement that takes vectors over from where they can be read now."""
        alike = self._spec.alike(self._spec)
        reachable = await within_reach(self._connection, self._schema, self._spec, alike)
        return REUSE if len(reachable) == len(alike) else REUSE_OWN

    async def _load(self, changes: ChangeSet) -> Applied | None:
        """Write documents that the index does not have; None when it has one of them, with nothing written."""
        reused = queued = 0
        try:
            async with self._connection.transaction():
                await self._run(LOCK)
                left = await load(self._connection, self._schema, self._spec, changes.documents, changes.vectors)
                if left:
                    statement = sql.SQL("COPY {} (chunk_id, content_hash) FROM STDIN").format(self._stage.put)
                    async with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                        for block in blocks(f"{id_}\t\\\\x{one.hex()}\n" for id_, one in left):
                            await copy.write(block)
                    reused = await self._run(self._reuse)
                    queued = await self._run(QUEUE_LOADED)
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

    async def _store(self, one: IndexSpec, vectors: Mapping[bytes, FloatVector]) -> int:
        """Store vectors that came with the batch."""
        many = len(vectors) > HASHED_VECTORS
        if many:
            await self._run(HASHING)
        stored = await self._run(
            "INSERT INTO {fresh} (chunk_id, content_hash, embedding)"
            " SELECT p.chunk_id, p.content_hash, i.embedding FROM {put} AS p"
            " JOIN unnest(%s::bytea[], %b) AS i(content_hash, embedding) USING (content_hash)"
            " ON CONFLICT (chunk_id) DO UPDATE SET " + REPLACED,
            [list(vectors), list(map(wire_form(one), vectors.values()))],
            of=one,
        )
        if many:
            await self._run(NOT_HASHING)
        return stored

    async def _run(
        self, statement: str, arguments: Sequence[object] | None = None, *, of: IndexSpec | None = None
    ) -> int:
        """Run a statement; `of` is the generation that it is about, the live one if it is not given."""
        return (await self._connection.execute(self._composed_of(statement, of or self._spec), arguments)).rowcount

    async def _run_all(self, statements: Sequence[tuple[str, IndexSpec]]) -> Counter[str]:
        """Run statements, each with the generation that it is about; returns how many rows each of them wrote.

        They are sent together: each sees what those before it did, and none waits until this process gets round to
        sending it, which prepares the next batch meanwhile.
        """
        rows = Counter[str]()
        if statements:
            cursor = await self._connection.execute(b"; ".join(self._composed_of(*one) for one in statements))
            for statement, _ in statements:
                rows[statement] += cursor.rowcount
                cursor.nextset()
        return rows

    def _composed_of(self, statement: str, of: IndexSpec) -> bytes:
        composed = self._composed.get((statement, of.generation))
        if composed is None:
            composed = sql.SQL(statement).format(**self._parts[of.generation]).as_bytes(self._connection)
            self._composed[statement, of.generation] = composed
        return composed

    def _of_generation(self, one: IndexSpec, extension: sql.Identifier) -> dict[str, sql.Composable]:
        """Return what stands for the names of a generation's tables."""
        alike = self._spec.alike(one)
        return {
            "vectors": self._names.vectors(one.generation),
            **self._names.tiers(one.generation),
            "generation": sql.Literal(one.generation),
            "alike": sql.SQL("").join(self._of_alike(one, other, extension) for other in alike),
            "siblings": sql.SQL("").join(
                self._of_alike(one, other, extension) for other in alike if other.name == self._spec.name
            ),
        }

    def _of_alike(self, one: IndexSpec, other: IndexSpec, extension: sql.Identifier) -> sql.Composable:
        """Return what has vectors of equal texts come from another generation, too."""
        vector, fits = converted("a", other, one, extension)
        return sql.SQL(" UNION ALL SELECT {} FROM {} AS a WHERE a.content_hash = p.content_hash AND {}").format(
            vector, Names(self._schema, other.relations).vectors(other.generation), fits
        )

    def _compose(self) -> dict[str, sql.Composable]:
        """Return what stands for the names in braces in all statements."""
        tables = {
            f"{tier}_{one.generation}": table
            for one in self._spec.generations
            for tier, table in self._names.tiers(one.generation).items()
        }
        comma, both = sql.SQL(", "), sql.SQL(" AND ")
        chunk_columns = [sql.Identifier(name) for name in CHUNK_COLUMNS]
        targets = [*self._keys, *self._carried, *chunk_columns]
        position = sql.Identifier("commit_lsn")
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
            "keys": comma.join(self._keys),
            "own_key": comma.join(sql.SQL("c.{}").format(key) for key in self._keys),
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
            "updates": comma.join(
                sql.SQL("{} = excluded.{}").format(column, column) for column in targets if column != position
            ),
            "replacements": comma.join(
                sql.SQL("{} = s.{}").format(column, slot)
                for column, slot in [*pairs, *((column, column) for column in chunk_columns if column != position)]
            ),
            "assignments": comma.join(sql.SQL("{} = s.{}").format(column, slot) for column, slot in pairs),
            # Compared as images: some types (json, xml, point) have no equality, and 1.0 must be able to become 1.00.
            "differs": sql.SQL("ROW({})::record OPERATOR(pg_catalog.*<>) ROW({})::record").format(
                comma.join(sql.SQL("c.{}").format(column) for column, _ in pairs),
                comma.join(sql.SQL("s.{}").format(slot) for _, slot in pairs),
            ),
        }
