"""Apply: what one index takes from a batch, written in the caller's target transaction.

The changed rows go to a temporary table, the stage. Some set-based statements bring chunks, vectors and backlog to the
new state. The order matters:

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

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import psycopg
from psycopg import sql

from cdcsync.model.changeset import BACKFILL, Applied, ChangeSet
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names, vector_schema
from cdcsync.target.loading import CHUNK_COLUMNS, blocks, load
from cdcsync.target.look_ups import LookUps
from cdcsync.target.stage import FEW_ROWS, Op, Stage, few
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
    REUSE,
    REUSE_OWN,
    SINCE,
    STORE,
    SUPERSEDE,
    UNPLANNED,
    UPDATE_KEPT,
)
from cdcsync.target.vectors import converted, register_vectors, within_reach

TRUNCATE_LOCKS_MS = 500
"""Readers that take longer are not waited for, as searches queue up behind who waits for an exclusive lock; less than
PostgreSQL's default `deadlock_timeout`, 1 s."""

_NUMBERS = itertools.count()
"""The numbers of prepared statements."""


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
        self._prepared: dict[tuple[str, int], bytes] = {}
        """What runs those that the server has prepared."""
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
        await self._stage.create(self._names.chunks, extension)

    async def apply(self, changes: ChangeSet) -> Applied:
        """Write the changes inside the caller's transaction; the caller commits."""
        self._reuse = await self._reuse_now() if changes.documents else REUSE
        if changes.new and not self._spec.others and (loaded := await self._load(changes)) is not None:
            return loaded
        await self._stage.fill(changes)
        if changes.truncated:
            await self._truncate()
        deleted = await self._clear(changes.cleared) if changes.cleared else 0
        rows = await (self._write_few if few(changes) else self._write)(changes, cleared=deleted > 0)
        deleted += rows[DELETE_SURPLUS]
        if rows[self._reuse]:
            await self._run(SUPERSEDE)
        beside = 0
        if changes.documents:
            for other in self._spec.others:
                of_other = await self._run_all(self._giving(other, changes))
                if of_other[self._reuse]:
                    await self._run(SUPERSEDE, of=other)
                beside += of_other[QUEUE]
        if deleted:
            await self._run_all([(drop, one) for one in self._spec.generations for drop in (DROP_FRESH, DROP_SETTLED)])
        self._stage.used(changes.rows + deleted)
        chunks = sum(len(document.chunks) for document in changes.documents)
        return Applied(chunks, deleted, rows[self._reuse], rows[STORE], rows[QUEUE], beside)

    async def _write(self, changes: ChangeSet, *, cleared: bool) -> Counter[str]:
        """Bring the chunks to the new state, and see that each has a vector of the live generation or waits for it.

        :param cleared: whether chunks have been deleted already.
        :returns: how many rows each statement wrote.
        """
        rows = await self._run_all(self._putting(changes))
        if rows[REPLACE] < _replaced(changes):
            # A document has more chunks than before.
            await self._run(PUT_MORE)
        if changes.documents or cleared or rows[DELETE_SURPLUS]:
            rows += await self._run_all([*self._clearing(), *self._giving(self._spec, changes)])
        return rows

    async def _write_few(self, changes: ChangeSet, *, cleared: bool) -> Counter[str]:
        """Do the same for few rows: with plans that the server has, and one answer to wait for."""
        statements = self._putting(changes)
        if _replaced(changes):
            statements.append((PUT_MORE, self._spec))
        if changes.documents or cleared or (DELETE_SURPLUS, self._spec) in statements:
            statements += [*self._clearing(), *self._giving(self._spec, changes)]
        return await self._run_all(statements, prepared=True)

    def _putting(self, changes: ChangeSet) -> list[tuple[str, IndexSpec]]:
        """Return what brings the chunks to the new state, but for those that documents have more than before."""
        chunks = sum(len(document.chunks) for document in changes.documents)
        replaced = _replaced(changes)
        deletes = changes.deleted or changes.absent or changes.new or any(one.existed for one in changes.documents)
        return [
            *(self._hashing(SINCE, self._spec, chunks) if chunks else ()),
            *([(DELETE_SURPLUS, self._spec)] if deletes else ()),
            *([(UPDATE_KEPT, self._spec)] if changes.kept else ()),
            *([(REPLACE, self._spec)] if replaced else ()),
            *([(PUT_NEW, self._spec)] if replaced < chunks else ()),
        ]

    def _clearing(self) -> list[tuple[str, IndexSpec]]:
        """Return what comes before any vector is touched."""
        return [(LOCK, self._spec), (CLEAR_BACKLOG, self._spec), *((LOCK_TIERS, one) for one in self._spec.others)]

    def _giving(self, one: IndexSpec, changes: ChangeSet) -> list[tuple[str, IndexSpec]]:
        """Return what sees that all chunks that were put have a vector of one generation, or wait for it."""
        if not changes.documents:
            return []
        # The vectors that came along are of the live generation's model, and such as it can store.
        along = bool(changes.vectors) and self._same_model(one)
        # At light load every vector came along, and there is nothing to look for.
        looks = not (along and one.vector_type == self._spec.vector_type) or not all(
            chunk.hash in changes.vectors for document in changes.documents for chunk in document.chunks
        )
        return [
            *([(self._reuse, one)] if looks else ()),
            *((*self._hashing(STORE, one, len(changes.vectors)), (SUPERSEDE, one)) if along else ()),
            *(self._hashing(QUEUE, one, changes.rows) if looks else ()),
        ]

    def _hashing(self, statement: str, of: IndexSpec, rows: int) -> list[tuple[str, IndexSpec]]:
        """Return a statement that joins temporary tables, with leave to hash them unless the rows are few."""
        return [(HASHING, of), (statement, of), (NOT_HASHING, of)] if rows > FEW_ROWS else [(statement, of)]

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
                    await self._stage.empty()
                    statement = sql.SQL("COPY {} (chunk_id, content_hash) FROM STDIN").format(self._stage.put)
                    async with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                        for block in blocks(f"{id_}\t\\\\x{one.hex()}\n" for id_, one in left):
                            await copy.write(block)
                    reused = await self._run(self._reuse)
                    queued = await self._run(QUEUE_LOADED)
        except psycopg.errors.UniqueViolation:
            return None
        chunks = sum(len(document.chunks) for document in changes.documents)
        # Not only those that went through the stage: plans that were made while the index was small are outdated.
        self._stage.used(chunks)
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

    async def _run(self, statement: str, *, of: IndexSpec | None = None) -> int:
        """Run a statement; `of` is the generation that it is about, the live one if it is not given."""
        return (await self._connection.execute(self._composed_of(statement, of or self._spec))).rowcount

    async def _run_all(self, statements: Sequence[tuple[str, IndexSpec]], *, prepared: bool = False) -> Counter[str]:
        """Run statements, each with the generation that it is about; returns how many rows each of them wrote.

        They are sent together: each sees what those before it did, and none waits until this process gets round to
        sending it, which prepares the next batch meanwhile.

        :param prepared: whether the server keeps their plans, which are such as few rows need.
        """
        rows = Counter[str]()
        if statements:
            if prepared:
                await self._prepare(statements)
            sent = self._prepared if prepared else {}
            cursor = await self._connection.execute(
                b"; ".join(sent.get((one, of.generation)) or self._composed_of(one, of) for one, of in statements)
            )
            for statement, _ in statements:
                rows[statement] += cursor.rowcount
                cursor.nextset()
        return rows

    async def _prepare(self, statements: Sequence[tuple[str, IndexSpec]]) -> None:
        """Have the server prepare those of these statements that it has not prepared yet.

        A plan is made anew once the stage's tables are truncated, so it never gets far behind the tables' sizes.
        """
        planned = {(one, of.generation) for one, of in statements if one not in UNPLANNED}
        if planned <= self._prepared.keys():
            return
        for one, of in statements:
            if one in UNPLANNED:
                await self._run(one, of=of)  # to prepare a statement locks its tables too, so the order of locks holds
            elif (one, of.generation) not in self._prepared:
                name = b"cdcsync_%d" % next(_NUMBERS)
                await self._connection.execute(b"PREPARE " + name + b" AS " + self._composed_of(one, of))
                self._prepared[one, of.generation] = b"EXECUTE " + name

    def _composed_of(self, statement: str, of: IndexSpec) -> bytes:
        composed = self._composed.get((statement, of.generation))
        if composed is None:
            composed = sql.SQL(statement).format(**self._parts[of.generation]).as_bytes(self._connection)
            self._composed[statement, of.generation] = composed
        return composed

    def _of_generation(self, one: IndexSpec, extension: sql.Identifier) -> dict[str, sql.Composable]:
        """Return what stands for the names of a generation's tables."""
        alike = self._spec.alike(one)
        ready, fits = converted("r", self._spec, one, extension)
        return {
            "vectors": self._names.vectors(one.generation),
            **self._names.tiers(one.generation),
            "generation": sql.Literal(one.generation),
            "ready_vector": ready,
            "ready_fits": fits,
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
            "ready": self._stage.ready,
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


def _replaced(changes: ChangeSet) -> int:
    """Return how many chunks are written of documents that the index holds."""
    return sum(len(document.chunks) for document in changes.documents if document.existed)
