"""Loading: documents that an index does not have are copied straight into its tables.

No stage, no look-ups, no backlog for what comes with its vector: two COPYs. It is what a first load consists of, so the
vectors go to the settled tier, whose HNSW index is built when the load ends.

Source: PostgreSQL, "COPY", File Formats, Text Format and Binary Format; pgvector's vector_recv and halfvec_recv.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
from psycopg import sql

from cdcsync.model.changeset import Document
from cdcsync.model.rows import Row
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import Names

BLOCK_BYTES = 256 * 1024
"""Rows are joined into blocks of about this size before they go to the driver."""

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


async def load(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    documents: Sequence[Document],
    vectors: Mapping[bytes, FloatVector],
) -> list[tuple[int, bytes]]:
    """Write chunks and those of their vectors that are here; the caller commits.

    :returns: number and hash of each chunk that has no vector yet.
    :raises psycopg.errors.UniqueViolation: the index has one of the documents.
    """
    names = Names(schema, spec.relations)
    hashes = [chunk.hash for document in documents for chunk in document.chunks]
    if not hashes:
        return []
    # Only the holder of the pipeline's lock inserts, but nothing here depends on the numbers having no gaps.
    row = await fetch_one(
        connection,
        sql.SQL("SELECT array_agg(nextval(pg_get_serial_sequence({}, 'chunk_id'))) FROM generate_series(1, %s)").format(
            sql.Literal(names.chunks.as_string(connection))
        ),
        [len(hashes)],
    )
    ids = cast(list[int], row[0])
    columns = ("chunk_id", *spec.shape.key, *spec.shape.carried, *CHUNK_COLUMNS)
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        names.chunks, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    async with connection.cursor() as writer, writer.copy(statement) as copy:
        for block in blocks(_chunk_lines(documents, iter(ids))):
            await copy.write(block)
    with_vector = [place for place, one in enumerate(hashes) if one in vectors]
    if with_vector:
        texts = [hashes[place] for place in with_vector]
        await copy_vectors(connection, schema, spec, [ids[place] for place in with_vector], texts, vectors)
    return [(id_, one) for id_, one in zip(ids, hashes, strict=True) if one not in vectors]


async def copy_vectors(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    ids: Sequence[int],
    hashes: Sequence[bytes],
    vectors: Mapping[bytes, FloatVector],
) -> None:
    """Copy vectors of these chunks to the settled tier of the spec's generation; the caller commits.

    :param hashes: those of the chunks' texts, in the order of `ids`.
    :param vectors: by hash.
    """
    statement = sql.SQL("COPY {} (chunk_id, content_hash, embedding) FROM STDIN (FORMAT binary)").format(
        Names(schema, spec.relations).settled(spec.generation)
    )
    block_rows = max(1, BLOCK_BYTES // (4 * spec.dimensions))
    async with connection.cursor() as writer, writer.copy(statement) as copy:
        await copy.write(_SIGNATURE)
        for start in range(0, len(ids), block_rows):
            block = hashes[start : start + block_rows]
            await copy.write(
                vector_rows(
                    ids[start : start + block_rows],
                    block,
                    np.stack([vectors[one] for one in block]),
                    halves=spec.config.vector_type == "halfvec",
                )
            )
        await copy.write(_TRAILER)


def vector_rows(ids: Sequence[int], hashes: Sequence[bytes], vectors: FloatVector, *, halves: bool) -> bytes:
    """Return rows of a vectors table in COPY's binary format, without signature and trailer.

    :param vectors: `float32[n, dim]`, in the order of `ids` and `hashes`.
    :param halves: whether the column is a halfvec.
    """
    count, dimensions = vectors.shape
    width, element = (2, ">f2") if halves else (4, ">f4")
    rows = np.empty(
        count,
        dtype=[
            ("fields", ">i2"),
            ("id_bytes", ">i4"),
            ("id", ">i8"),
            ("hash_bytes", ">i4"),
            ("hash", f"V{len(hashes[0])}"),
            ("embedding_bytes", ">i4"),
            ("dimensions", ">i2"),
            ("unused", ">i2"),
            ("embedding", element, (dimensions,)),
        ],
    )
    rows["fields"], rows["id_bytes"], rows["hash_bytes"] = 3, 8, len(hashes[0])
    rows["embedding_bytes"], rows["dimensions"], rows["unused"] = 4 + width * dimensions, dimensions, 0
    rows["id"] = ids
    rows["hash"] = np.frombuffer(b"".join(hashes), dtype=rows.dtype["hash"])
    rows["embedding"] = vectors
    return rows.tobytes()


def _chunk_lines(documents: Iterable[Document], ids: Iterator[int]) -> Iterator[str]:
    for document in documents:
        row = line((*document.key, *document.carried), "")
        total = len(document.chunks)
        tail = f"\\\\x{document.hash.hex()}\t{lsn_text(document.text_lsn)}\n"
        for chunk in document.chunks:
            text = copy_text(chunk.text)
            yield f"{next(ids)}\t{row}{chunk.number}\t{total}\t{text}\t\\\\x{chunk.hash.hex()}\t{tail}"


CHUNK_COLUMNS = ("chunk_no", "chunk_total", "content", "content_hash", "document_hash", "commit_lsn")
"""The columns of a chunk besides key and carried ones, as they are written."""


def copy_text(value: str) -> str:
    """Escape a value for COPY's text format."""
    if "\\" in value:
        value = value.replace("\\", "\\\\")
    if "\t" in value:
        value = value.replace("\t", "\\t")
    if "\n" in value:
        value = value.replace("\n", "\\n")
    if "\r" in value:
        value = value.replace("\r", "\\r")
    return value


def line(values: Row, rest: str) -> str:
    """Return values, each followed by a tab, and what comes after them."""
    return "".join(["\\N\t" if value is None else copy_text(cast(str, value)) + "\t" for value in values]) + rest


def fields(one: str) -> Row:
    """Return the values of a line as COPY's text format has them: what `line` and `copy_text` did, undone."""
    return tuple(None if value == "\\N" else _ESCAPED.sub(_character, value) for value in one[:-1].split("\t"))


_ESCAPED = re.compile(r"\\(.)")
_CHARACTERS = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


def _character(escaped: re.Match[str]) -> str:
    return _CHARACTERS[escaped[1]]


@lru_cache(maxsize=16)  # the rows of a transaction follow each other
def lsn_text(position: int) -> str:
    """Return a position as PostgreSQL writes it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def blocks(lines: Iterable[str]) -> Iterator[bytes]:
    """Join lines into blocks for the driver."""
    block: list[str] = []
    size = 0
    for one in lines:
        block.append(one)
        size += len(one)
        if size >= BLOCK_BYTES:
            yield "".join(block).encode()
            block, size = [], 0
    if block:
        yield "".join(block).encode()
