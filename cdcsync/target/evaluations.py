"""The stored outcome of evaluations: what recall searches of an index had, by how far they looked.

One row for each index, generation, k and ef_search: the last measurement. It is a note for people and for the status;
nothing goes by it, so it needs no fence.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec
import psycopg
from psycopg import sql

from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point

TABLE = "evaluations"

USUAL_K = 10
"""The k of evaluations by default. Status and metrics use it: evaluations with another k cannot be compared."""


class Measured(msgspec.Struct, frozen=True):
    """Recall and latency of searches with one `ef_search`.

    :ivar recall: the mean share, 0 to 1, of the k nearest that were found.
    :ivar usual: whether it is as far as the search function looks.
    :ivar by_hnsw: whether HNSW was searched; if every vector was compared, nothing can be missed.
    :ivar mean_ms: milliseconds of a search, as this client sees it.
    :ivar settled_recall: the recall among settled vectors alone, which is what the graph is worth: fresh vectors are
        compared exactly. None while there are none.
    :ivar settled_mean_ms: milliseconds of a search of settled vectors alone.
    """

    ef_search: int
    recall: float
    usual: bool
    by_hnsw: bool
    mean_ms: float
    p95_ms: float
    settled_recall: float | None = None
    settled_mean_ms: float | None = None


class Evaluation(msgspec.Struct, frozen=True):
    """One evaluation of an index: `queries` of its vectors, the `k` nearest of each.

    :ivar undirected: the vectors that no search by vector finds: by cosine, those of zeros.
    """

    index: str
    generation: int
    k: int
    queries: int
    exact_mean_ms: float
    exact_p95_ms: float
    measured: list[Measured]
    evaluated_at: datetime
    undirected: int = 0


class Recall(msgspec.Struct, frozen=True):
    """The last recall that was measured for the usual k, as far as the search function looks."""

    recall: float
    k: int
    ef_search: int
    queries: int
    by_hnsw: bool
    evaluated_at: datetime


async def store(connection: Connection, schema: str, found: Evaluation) -> str | None:
    """Store an evaluation in place of the last one; returns why that could not be, else None."""
    statement = sql.SQL(
        "INSERT INTO {} AS e (index_name, generation, k, ef_search, usual, by_hnsw, queries, recall, mean_ms, p95_ms,"
        " exact_mean_ms, exact_p95_ms, evaluated_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (index_name, generation, k, ef_search) DO UPDATE SET usual = excluded.usual,"
        " by_hnsw = excluded.by_hnsw, queries = excluded.queries, recall = excluded.recall, mean_ms = excluded.mean_ms,"
        " p95_ms = excluded.p95_ms, exact_mean_ms = excluded.exact_mean_ms, exact_p95_ms = excluded.exact_p95_ms,"
        " evaluated_at = excluded.evaluated_at"
    ).format(sql.Identifier(schema, TABLE))
    try:
        async with connection.transaction():
            for one in found.measured:
                await connection.execute(
                    statement,
                    [
                        *(found.index, found.generation, found.k, one.ef_search, one.usual, one.by_hnsw),
                        *(found.queries, one.recall, one.mean_ms, one.p95_ms),
                        *(found.exact_mean_ms, found.exact_p95_ms, found.evaluated_at),
                    ],
                )
            crash_point("evaluation written")
        crash_point("evaluation committed")
    except psycopg.errors.InsufficientPrivilege:
        return f"this role may not write {schema}.{TABLE}"
    except psycopg.errors.ReadOnlySqlTransaction:
        return "this server or session only reads"
    except psycopg.errors.UndefinedTable:
        return f"there is no table {schema}.{TABLE} yet: a worker of this version creates it when it starts"
    return None


async def forget(connection: Connection, schema: str, index: str, generation: int) -> None:
    """Remove what was measured of a generation. The caller's transaction commits."""
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE index_name = %s AND generation = %s").format(sql.Identifier(schema, TABLE)),
        [index, generation],
    )


async def latest(connection: Connection, schema: str, generations: Mapping[str, int]) -> dict[str, Recall]:
    """Return the last recall of each index that has one of the generation given for it; the table must be there."""
    cursor = await connection.execute(
        sql.SQL(
            "SELECT DISTINCT ON (e.index_name) e.index_name, e.recall, e.k, e.ef_search, e.queries, e.by_hnsw,"
            " e.evaluated_at FROM {} AS e JOIN unnest(%s::text[], %s::int[]) AS i (name, generation)"
            " ON i.name = e.index_name AND i.generation = e.generation"
            " WHERE e.usual AND e.k = %s ORDER BY e.index_name, e.evaluated_at DESC"
        ).format(sql.Identifier(schema, TABLE)),
        [list(generations), list(generations.values()), USUAL_K],
    )
    return {name: Recall(*row) for name, *row in await cursor.fetchall()}
