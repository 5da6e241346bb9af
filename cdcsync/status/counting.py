"""How much is in an index's tables, at a bounded price: the status page asks every second."""

from __future__ import annotations

from typing import LiteralString, NamedTuple, cast

import msgspec
from psycopg import sql

from cdcsync.postgres.estimates import estimate_rows, planned_rows
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import DISCARDED_ATTEMPTS, MAX_ATTEMPTS, Names

COUNT_UP_TO = 200_000
"""Rows that are counted one by one, in some tens of milliseconds. Of larger tables the planner's estimate is taken."""

FRESH_UP_TO = 20_000
"""Fresh vectors that are counted one by one. A page may hold a single wide vector, so these are 160 MB at most. Only
during a load there are many more: each of them adds to every search."""

ROW_BYTES = 28
"""The least that a row takes: its header and its line pointer. A table of so many pages has no more rows than that."""


_STATES = {"most": sql.Literal(MAX_ATTEMPTS), "discarded": sql.Literal(DISCARDED_ATTEMPTS)}

_COUNTED: LiteralString = (
    "count(*) FILTER (WHERE attempts < {most}), count(*) FILTER (WHERE attempts < {most} AND lane = 0),"
    " count(*) FILTER (WHERE attempts >= {most} AND attempts < {discarded}),"
    " count(*) FILTER (WHERE attempts >= {discarded})"
)
"""The figures of `_Backlog`, of rows of the backlog."""


class Counts(msgspec.Struct, frozen=True):
    """An index's figures; `estimated` when not all are exact. `documents` is None when chunks are estimated.

    :ivar fresh: those of `vectors` that are in the fresh tier.
    """

    documents: int | None
    chunks: int
    vectors: int
    fresh: int
    backlog: int
    backlog_live: int
    failed: int
    discarded: int
    estimated: bool


class _Backlog(NamedTuple):
    """Chunks that wait, those of the live lane among them; texts that failed; those that were discarded then."""

    waiting: int
    live: int
    failed: int
    discarded: int


async def count_index(target: Connection, names: Names, generation: int, *, filled: bool = False) -> Counts:
    """Count an index's chunks, the vectors of a generation and the chunks that wait for one.

    :param filled: whether a chunk that is not in the backlog has a vector, as is so unless the generation is being
        filled: then an estimate of vectors that is too low does not look as if some were missing.
    """
    settled = names.settled(generation)
    if await _small(target, names.chunks, settled, names.backlog):
        return await _count_small(target, names, generation)
    documents: int | None = None
    chunks, exact_chunks = await _rows(target, names.chunks)
    if exact_chunks:
        query = sql.SQL("SELECT count(*), count(*) FILTER (WHERE chunk_no = 0) FROM {}").format(names.chunks)
        chunks, documents = await _numbers(target, query)
    vectors, exact_vectors = await _rows(target, settled)
    if exact_vectors:
        (vectors,) = await _numbers(target, sql.SQL("SELECT count(*) FROM {}").format(settled))
    fresh, exact_fresh = await _count_fresh(target, names.fresh(generation), most=chunks - vectors)
    backlog, exact_backlog = await _count_backlog(target, names, generation)
    exact = exact_chunks and exact_vectors and exact_fresh and exact_backlog
    vectors += fresh
    if filled and exact_backlog and not exact:
        vectors = max(vectors, chunks - backlog.waiting - backlog.failed - backlog.discarded)
    return Counts(documents, chunks, vectors, fresh, *backlog, estimated=not exact)


async def _small(target: Connection, *tables: sql.Identifier) -> bool:
    """Say whether these tables have so few pages that their rows must be few enough to be counted."""
    (largest,) = await _numbers(
        target,
        sql.SQL("SELECT greatest({})").format(
            sql.SQL(", ").join(
                sql.SQL("pg_relation_size({}::regclass)").format(sql.Literal(table.as_string(target)))
                for table in tables
            )
        ),
    )
    return largest <= COUNT_UP_TO * ROW_BYTES


async def _count_small(target: Connection, names: Names, generation: int) -> Counts:
    """Count a small index in one statement: a worker may have many of them."""
    chunks, documents, settled, fresh, *backlog = await _numbers(
        target,
        sql.SQL(
            "SELECT c.*, v.*, f.*, b.* FROM"
            " (SELECT count(*), count(*) FILTER (WHERE chunk_no = 0) FROM {chunks}) AS c,"
            " (SELECT count(*) FROM {settled}) AS v, (SELECT count(*) FROM {fresh}) AS f,"
            " (SELECT " + _COUNTED + " FROM {backlog} WHERE generation = {generation}) AS b"
        ).format(
            chunks=names.chunks,
            **names.tiers(generation),
            backlog=names.backlog,
            generation=sql.Literal(generation),
            **_STATES,
        ),
    )
    return Counts(documents, chunks, settled + fresh, fresh, *_Backlog(*backlog), estimated=False)


async def _count_backlog(target: Connection, names: Names, generation: int) -> tuple[_Backlog, bool]:
    """Return how many chunks are in the backlog, and whether that is exact.

    During a first load the backlog is as large as the index, and afterwards it is full of dead rows, which spoils
    estimates: so it is counted up to the limit. Failures are few, and someone is called for each: they are always
    counted, and so are those that were discarded.
    """
    parts = {
        "backlog": names.backlog,
        "generation": sql.Literal(generation),
        "limit": sql.Literal(COUNT_UP_TO + 1),
        **_STATES,
    }
    up_to_the_limit = sql.SQL(
        "SELECT " + _COUNTED + " FROM"
        " (SELECT attempts, lane FROM {backlog} WHERE generation = {generation} LIMIT {limit}) AS b"
    ).format(**parts)
    counted = _Backlog(*await _numbers(target, up_to_the_limit))
    if counted.waiting + counted.failed + counted.discarded <= COUNT_UP_TO:
        return counted, True
    by_lane = sql.SQL(
        "SELECT (SELECT count(*) FROM (SELECT FROM {backlog} WHERE generation = {generation} AND lane = 0"
        " AND attempts < {most} LIMIT {limit}) AS b), f.* FROM (SELECT"
        " count(*) FILTER (WHERE attempts < {discarded}), count(*) FILTER (WHERE attempts >= {discarded})"
        " FROM {backlog} WHERE generation = {generation} AND attempts >= {most}) AS f"
    ).format(**parts)
    live, failed, discarded = await _numbers(target, by_lane)
    waiting = await planned_rows(target, names.backlog) - failed - discarded
    return _Backlog(max(counted.waiting, live, waiting), live, failed, discarded), False


async def _count_fresh(target: Connection, fresh: sql.Identifier, *, most: int) -> tuple[int, bool]:
    """Return how many vectors are fresh, and whether that is exact.

    They come and go, which spoils estimates: so they are counted up to the limit, as the backlog is.

    :param most: an estimate is no higher than this; there are so many chunks without a settled vector.
    """
    counted = await _up_to(target, fresh, FRESH_UP_TO)
    if counted <= FRESH_UP_TO:
        return counted, True
    about, _ = await estimate_rows(target, fresh)
    return max(counted, min(about, most)), False


async def _rows(target: Connection, table: sql.Identifier) -> tuple[int, bool]:
    """Return about how many rows a table has, and whether these are few enough to be counted."""
    about, analysed = await estimate_rows(target, table)
    if analysed:
        return about, about <= COUNT_UP_TO
    counted = await _up_to(target, table, COUNT_UP_TO)
    return max(about, counted), counted <= COUNT_UP_TO


async def _up_to(target: Connection, table: sql.Identifier, limit: int) -> int:
    """Return how many rows a table has; `limit + 1` if it has more than the limit."""
    statement = sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS t").format(table, sql.Literal(limit + 1))
    return (await _numbers(target, statement))[0]


async def _numbers(target: Connection, query: sql.Composed) -> tuple[int, ...]:
    # Planned each time: a plan made while a table was empty would be kept for ever.
    return cast(tuple[int, ...], await fetch_one(target, query, prepare=False))
