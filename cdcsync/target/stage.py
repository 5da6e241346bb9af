"""The stage: the temporary table through which the changed rows of a batch come to one index.

Rows come as text, so that values pass through as the source rendered them; the column `op` says what apply does with
each. Beside the stage are `ready`, the vectors that come with the batch, and two tables of chunks, which apply's
statements hand on to each other: `gone`, those that were deleted, and `put`, those that were written.

A few rows are inserted by the statement that empties the tables, with the vectors: the server is waited for once. More
are copied, which costs three waits and less for each row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import IntEnum
from typing import LiteralString

from pgvector import Vector
from psycopg import sql

from cdcsync.model.changeset import ChangeSet
from cdcsync.model.rows import Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.loading import blocks, copy_text, fields, line, lsn_text

STAGED_ROWS = 1_000
"""The temporary tables are emptied by DELETE, and by TRUNCATE once about so many rows went through them. TRUNCATE, and
`ON COMMIT DELETE ROWS` with it, costs milliseconds of file operations, which at light load is more than all else."""

OWN: dict[str, LiteralString] = {
    "op": "0::smallint",
    "chunk_no": "chunk_no",
    "chunk_total": "0",
    "content": "content",
    "content_hash": "content_hash",
    "document_hash": "document_hash",
    "commit_lsn": "commit_lsn",
    "lane": "0::smallint",
    "applied_at": "applied_at",
}
"""The columns of the stage after those for key and carried columns, and values of their types in the chunks table."""

_COPIED = [name for name in OWN if name != "applied_at"]

FEW_ROWS = 16
"""Up to so many rows an apply spends most of its time on the way to the server and back."""


def few(changes: ChangeSet) -> bool:
    """Say whether a batch changes few rows."""
    return changes.staged is None and 0 < changes.rows <= FEW_ROWS


class Op(IntEnum):
    """The action of apply on a row of the stage."""

    KEEP = 0
    """Bring the carried columns up to date: the document has not changed."""
    PUT = 1
    """Write a chunk, and delete the chunks beyond the document's last."""
    REPLACE = 4
    """The same for a chunk of a document that the index holds."""
    DELETE = 2
    DELETE_AS_WRITTEN = 3
    """Delete only what the index writes in just this way: see `ChangeSet.absent`."""


class Stage:
    """The temporary tables of one connection, as one index uses them; indexes with the same types share a stage.

    :ivar keys: the stage's columns for those of the key, in their order; `carried` are those for the carried ones.
    """

    gone = sql.Identifier("pg_temp", "gone")
    put = sql.Identifier("pg_temp", "put")
    ready = sql.Identifier("pg_temp", "ready")

    def __init__(self, connection: Connection, spec: IndexSpec) -> None:
        types = "\0".join((str(len(spec.key_types)), *spec.key_types, *spec.carried_types))
        self._connection = connection
        self._spec = spec
        self._name = f"stage_{hashlib.sha256(types.encode()).hexdigest()[:16]}"
        self.table = sql.Identifier("pg_temp", self._name)
        self.keys = [sql.Identifier(f"k{at}") for at in range(len(spec.shape.key))]
        self.carried = [sql.Identifier(f"c{at}") for at in range(len(spec.shape.carried))]
        self._no_carried: Row = (None,) * len(self.carried)
        columns = [*self.keys, *self.carried, *map(sql.Identifier, _COPIED)]
        parts = {
            "stage": self.table,
            "gone": self.gone,
            "put": self.put,
            "ready": self.ready,
            "columns": sql.SQL(", ").join(columns),
        }

        def composed(statement: LiteralString) -> bytes:
            return sql.SQL(statement).format(**parts).as_bytes(connection)

        self._copying = composed("COPY {stage} ({columns}) FROM STDIN")
        self._truncating = composed("TRUNCATE {stage}, {gone}, {put}, {ready}")
        self._deleting = composed(
            "WITH s AS (DELETE FROM {stage}), g AS (DELETE FROM {gone}), p AS (DELETE FROM {put}),"
            " r AS (DELETE FROM {ready})"
        )
        self._readying = composed("INSERT INTO {ready} SELECT * FROM unnest(%s::bytea[], %b)")
        self._inserting = composed(" INSERT INTO {stage} ({columns}) VALUES ")
        self._row = b"(" + b", ".join([b"%s"] * len(columns)) + b")"
        self._used = 0
        """Rows that went through the tables since they were last truncated."""

    async def create(self, chunks: sql.Identifier, extension: sql.Identifier) -> None:
        """Create the tables that are missing; once per connection.

        :param chunks: the index's table, whose types the stage takes.
        :param extension: the schema of pgvector.
        """
        shape = self._spec.shape
        columns = [
            sql.SQL("{} AS {}").format(sql.Identifier(column), place)
            for column, place in zip((*shape.key, *shape.carried), self.keys + self.carried, strict=True)
        ]
        columns += [sql.SQL(value + " AS {}").format(sql.Identifier(name)) for name, value in OWN.items()]
        await self._connection.execute(
            sql.SQL("CREATE TEMP TABLE IF NOT EXISTS {} AS SELECT {} FROM {} WITH NO DATA").format(
                sql.Identifier(self._name), sql.SQL(", ").join(columns), chunks
            )
        )
        for name in ("gone", "put"):
            await self._connection.execute(
                sql.SQL("CREATE TEMP TABLE IF NOT EXISTS {} (chunk_id bigint, content_hash bytea)").format(
                    sql.Identifier(name)
                )
            )
        await self._connection.execute(
            sql.SQL("CREATE TEMP TABLE IF NOT EXISTS ready (content_hash bytea, embedding {}.vector)").format(extension)
        )

    async def fill(self, changes: ChangeSet) -> None:
        """Bring the changes to the tables, with nothing of the apply before."""
        vectors = [list(changes.vectors), list(map(Vector, changes.vectors.values()))] if changes.vectors else []
        if few(changes) and not self._full:
            rows = [fields(one) for one in self._lines(changes)]
            readying = b", v AS (" + self._readying + b")" if vectors else b""
            await self._connection.execute(
                self._deleting + readying + self._inserting + b", ".join([self._row] * len(rows)),
                [*vectors, *(value for row in rows for value in row)],
            )
            return
        await self.empty()
        async with self._connection.cursor() as cursor, cursor.copy(self._copying) as copy:
            for block in changes.staged or self.blocks(changes):
                await copy.write(block)
        if vectors:
            await self._connection.execute(self._readying, vectors)

    async def empty(self) -> None:
        """Empty the tables of what the apply before left there."""
        await self._connection.execute(self._truncating if self._full else self._deleting + b" SELECT")
        if self._full:
            self._used = 0

    @property
    def _full(self) -> bool:
        return self._used > STAGED_ROWS

    def used(self, rows: int) -> None:
        """Note that so many rows went through the tables."""
        self._used += rows

    def blocks(self, changes: ChangeSet) -> Iterator[bytes]:
        """Return blocks of what is copied to the stage."""
        return blocks(self._lines(changes))

    def _lines(self, changes: ChangeSet) -> Iterator[str]:
        gone = [(key, Op.DELETE) for key in changes.deleted]
        gone += [(key, Op.DELETE_AS_WRITTEN) for key in changes.absent]
        gone += [(document.key, Op.DELETE) for document in changes.documents if not document.chunks]
        for key, op in gone:
            yield line((*key, *self._no_carried), f"{op}\t0\t0\t\\N\t\\N\t\\N\t\\N\t0\n")
        for kept in changes.kept:
            yield line((*kept.key, *kept.carried), f"{Op.KEEP}\t0\t0\t\\N\t\\N\t\\N\t\\N\t0\n")
        for document in changes.documents:
            op = Op.REPLACE if document.existed else Op.PUT
            row = line((*document.key, *document.carried), f"{op}\t")
            total = len(document.chunks)
            tail = f"\\\\x{document.hash.hex()}\t{lsn_text(document.text_lsn)}\t{document.lane}\n"
            for chunk in document.chunks:
                text = copy_text(chunk.text)
                yield f"{row}{chunk.number}\t{total}\t{text}\t\\\\x{chunk.hash.hex()}\t{tail}"
