"""What a batch costs: its statements read about as many rows as it has, however many the tables hold.

Statistics of a table that fills and empties like a queue are wrong most of the time. Here they say that each table is
empty or almost empty, which is when PostgreSQL would rather read all of an index than look up each row of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any

import msgspec
import pytest

from cdcsync.documents.templates import hash_text, sql_hash
from cdcsync.model.changeset import BACKFILL
from cdcsync.postgres.sessions import Connection
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, kept, vector_of

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ROWS = 30_000
"""Chunks that wait in the backlog; a third of them has a fresh vector of an older text, and a third a settled one."""

BATCHES = (20, 400)

EACH = 8
"""So many rows of a table may be read for each row of a batch: several statements look at each table."""

FILL = f"""
    INSERT INTO cdcsync.articles_chunks
        (id, tenant, chunk_no, chunk_total, content, content_hash, document_hash, commit_lsn)
    SELECT n, 1, 0, 1, 'text ' || n, {sql_hash("'text ' || n")}, {sql_hash("'text ' || n")}, '0/10'
    FROM generate_series($1::int, $2) AS n;
    INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane)
    SELECT 1, chunk_id, content_hash, 0 FROM cdcsync.articles_chunks WHERE id BETWEEN $1 AND $2;
    INSERT INTO cdcsync.articles_vectors_1_fresh (chunk_id, content_hash, embedding)
    SELECT chunk_id, 'older', '[1,2,3]' FROM cdcsync.articles_chunks WHERE id BETWEEN $1 AND $2 AND id % 3 = 0;
    INSERT INTO cdcsync.articles_vectors_1_settled (chunk_id, content_hash, embedding)
    SELECT chunk_id, 'older', '[1,2,3]' FROM cdcsync.articles_chunks WHERE id BETWEEN $1 AND $2 AND id % 3 = 1
"""

TABLES = [f"cdcsync.articles_{one}" for one in ("chunks", "backlog", "vectors_1_fresh", "vectors_1_settled")]


@pytest.fixture(params=["chunk_id % 100 > 0", "chunk_id < (SELECT max(chunk_id) FROM {table})"], ids=["few", "one"])
async def many(index: LiveIndex, request: pytest.FixtureRequest) -> LiveIndex:
    """An index with many rows in each table, and statistics of when most of its rows, or all but the last, had gone."""

    async def fill(first: int, last: int) -> None:
        for statement in FILL.split(";"):
            await index.connection.execute(statement.replace("$1", str(first)).replace("$2", str(last)).encode())

    await fill(1, ROWS // 10)
    for table in TABLES:
        await index.connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        # The last row keeps the pages before it, which VACUUM would give back.
        gone = request.param.format(table=table)
        await index.connection.execute(f"DELETE FROM {table} WHERE {gone}".encode())
        await index.connection.execute(f"VACUUM ANALYZE {table}".encode())
    await fill(ROWS // 10 + 1, ROWS)
    return index


def of(size: int) -> range:
    """Return as many keys, from all over the table: chunks with a fresh vector, with a settled one, and with none."""
    keys = range(ROWS // 6, ROWS, ROWS * 4 // 5 // size + 1)[:size]
    assert len(keys) == size
    assert {key % 3 for key in keys} == {0, 1, 2}
    return keys


async def store(index: LiveIndex, size: int) -> None:
    await index.backlog.store({hash_text(f"text {key}"): vector_of(str(key)) for key in of(size)})


async def postpone(index: LiveIndex, size: int) -> None:
    await index.backlog.postpone([hash_text(f"text {key}") for key in of(size)], "no", delay_s=1.0)


async def ask_who_waits(index: LiveIndex, size: int) -> None:
    assert len(await index.backlog.still_waiting([hash_text(f"text {key}") for key in of(size)])) == size


async def look_up(index: LiveIndex, size: int) -> None:
    assert len(await index.writer.stored_hashes([(str(key),) for key in of(size)])) == size


async def insert(index: LiveIndex, size: int) -> None:
    await index.writer.apply(changes(*(document(str(ROWS + n), f"new {n}") for n in range(1, size + 1))))


async def replace(index: LiveIndex, size: int) -> None:
    await index.writer.apply(changes(*(document(str(key), f"new {key}", existed=True) for key in of(size))))


async def replace_with_vectors(index: LiveIndex, size: int) -> None:
    texts = [f"new {key}" for key in of(size)]
    written = [document(str(key), text, existed=True) for key, text in zip(of(size), texts, strict=True)]
    await index.writer.apply(changes(*written, inline=texts))


async def lengthen(index: LiveIndex, size: int) -> None:
    written = [document(str(key), f"text {key}", f"more {key}", existed=True) for key in of(size)]
    await index.writer.apply(changes(*written))


async def load(index: LiveIndex, size: int) -> None:
    page = changes(*(document(str(ROWS + n), f"new {n}", lane=BACKFILL) for n in range(1, size + 1)))
    await index.writer.apply(msgspec.structs.replace(page, new=True))


async def ask_what_has_a_vector(index: LiveIndex, size: int) -> None:
    assert await index.writer.known_vectors([hash_text(f"text {key}") for key in of(size)]) == set()


async def carry(index: LiveIndex, size: int) -> None:
    await index.writer.apply(changes(*(kept(str(key), "7") for key in of(size))))


async def delete(index: LiveIndex, size: int) -> None:
    await index.writer.apply(changes(deleted=[str(key) for key in of(size)]))


async def settle(index: LiveIndex, size: int) -> None:
    settling = Settling(index.embedding, SCHEMA, index.spec)
    fresh = [row[0] for row in await index.rows("SELECT chunk_id FROM {vectors} WHERE tier = 'fresh' LIMIT %s", size)]
    await settling.settle(fresh)


async def look_at_a_page(index: LiveIndex, size: int) -> None:
    await Settling(index.embedding, SCHEMA, index.spec).page(ROWS // 2, size)


OPERATIONS: list[Callable[[LiveIndex, int], Awaitable[Any]]] = [
    store,
    postpone,
    ask_who_waits,
    look_up,
    insert,
    replace,
    replace_with_vectors,
    lengthen,
    load,
    ask_what_has_a_vector,
    carry,
    delete,
    settle,
    look_at_a_page,
]


async def reads(*connections: Connection) -> Counter[str]:
    """Return how many rows these sessions have read, by table, of which the server has not taken note yet."""
    found: Counter[str] = Counter()
    for connection in connections:
        cursor = await connection.execute(
            "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables"
            " WHERE schemaname = 'cdcsync' AND relname LIKE 'articles%'"
        )
        found.update(dict(await cursor.fetchall()))
    return found


async def test_a_batch_reads_about_as_many_rows_as_it_has(many: LiveIndex) -> None:
    too_many: dict[tuple[str, int, str], int] = {}
    everything: Counter[str] = Counter()
    for operation, size in product(OPERATIONS, BATCHES):
        async with (
            many.connection.transaction(force_rollback=True),
            many.embedding.transaction(force_rollback=True),
        ):
            before = await reads(many.connection, many.embedding)
            await operation(many, size)
            found = await reads(many.connection, many.embedding) - before
        everything += found
        too_many |= {(operation.__name__, size, table): rows for table, rows in found.items() if rows > EACH * size}
    assert too_many == {}
    assert set(everything) == {table.removeprefix("cdcsync.") for table in TABLES}
