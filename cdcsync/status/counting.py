"""How much is in an index's tables, at a bounded price: the status page asks every second.

Source: PostgreSQL, "Using EXPLAIN"; "Row Estimation Examples".
"""

from __future__ import annotations

from typing import cast

import msgspec
from psycopg import sql

from cdcsync.index.backlog import MAX_ATTEMPTS
from cdcsync.index.schema import Names
from cdcsync.postgres import Connection

COUNT_UP_TO = 200_000
"""Rows that are counted one by one, in some tens of milliseconds. Of larger tables the planner's estimate is taken."""


class Counts(msgspec.Struct, frozen=True):
    """An index's figures; `estimated` when not all are exact. `documents` is None when chunks are estimated."""

    documents: int | None
    chunks: int
    vectors: int
    backlog: int
    backlog_live: int
    failed: int
    estimated: bool


async def count_index(target: Connection, names: Names, generation: int) -> Counts:
    """Count an index's chunks, the vectors of a generation and the chunks that wait for one."""
    vectors_table = names.vectors(generation)
    chunks, vectors = await _estimate(target, names.chunks), await _estimate(target, vectors_table)
    documents: int | None = None
    if exact_chunks := chunks <= COUNT_UP_TO:
        query = sql.SQL("SELECT count(*), count(*) FILTER (WHERE chunk_no = 0) FROM {}").format(names.chunks)
        chunks, documents = await _numbers(target, query)
    if exact_vectors := vectors <= COUNT_UP_TO:
        (vectors,) = await _numbers(target, sql.SQL("SELECT count(*) FROM {}").format(vectors_table))
    backlog, backlog_live, failed = await _numbers(target, _waiting(names, generation))
    if not (exact_backlog := backlog <= COUNT_UP_TO):
        backlog = max(backlog, await _estimate(target, names.backlog) - failed)
    exact = exact_chunks and exact_vectors and exact_backlog
    return Counts(documents, chunks, vectors, backlog, backlog_live, failed, not exact)


def _waiting(names: Names, generation: int) -> sql.Composed:
    """Return the query for the chunks that wait, those of the live lane among them, and those that failed for good.

    During a first load the backlog is as large as the index, and afterwards it is full of dead rows, which spoils
    estimates: so it is counted up to the limit. Failures are few, and someone is called for each: they are always
    counted.
    """
    parts = {
        "backlog": names.backlog,
        "generation": sql.Literal(generation),
        "most": sql.Literal(MAX_ATTEMPTS),
        "limit": sql.Literal(COUNT_UP_TO + 1),
    }
    up_to = "(SELECT count(*) FROM (SELECT FROM {backlog} WHERE generation = {generation} AND attempts < {most}"
    return sql.SQL(
        f"SELECT {up_to} LIMIT {{limit}}) AS b), {up_to} AND lane = 0 LIMIT {{limit}}) AS b),"
        " (SELECT count(*) FROM {backlog} WHERE generation = {generation} AND attempts >= {most})"
    ).format(**parts)


async def _estimate(target: Connection, table: sql.Identifier) -> int:
    """Return how many rows the planner expects: its statistics, scaled by the table's present size."""
    cursor = await target.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(table), prepare=False)
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0][0]["Plan"]["Plan Rows"])


async def _numbers(target: Connection, query: sql.Composed) -> tuple[int, ...]:
    # Planned each time: a plan made while a table was empty would be kept for ever.
    cursor = await target.execute(query, prepare=False)
    return cast(tuple[int, ...], await cursor.fetchone())
