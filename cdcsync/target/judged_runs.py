"""Stored evaluations by judged collections: what each mode of search reached, run after run.

Every run is a row, so that a later run can be compared with it question by question; the newest `KEPT` of each index
stay. They are notes for people, gates and charts; nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, LiteralString

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point

TABLE = "judged_runs"

KEPT = 100
"""Runs of an index that are kept: with a run for each change of a model or template, years. A run is some 20 kB."""

JudgedMode = Literal["text", "vector", "hybrid", "reranked"]

MODES: tuple[JudgedMode, ...] = ("text", "vector", "hybrid", "reranked")
"""From the simplest search to the most elaborate one; an index's own search is the last of them that it has."""


class Figure(msgspec.Struct, frozen=True):
    """A mean over questions, with its interval of 95 % confidence; `low` and `high` are None for too few questions."""

    mean: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class ModeRun(msgspec.Struct, frozen=True):
    """How one mode of search did.

    :ivar figures: by measure.
    :ivar over_vector: the difference to vector search, by measure; None for that itself and where there is none.
    :ivar mean_ms: milliseconds of a search, without the embedding of the question, as the client sees it.
    :ivar scores: by measure, each question's.
    """

    figures: dict[str, Figure]
    over_vector: dict[str, Figure] | None
    mean_ms: float
    p95_ms: float
    scores: dict[str, dict[str, float]]


class Weighed(msgspec.Struct, frozen=True):
    """The result of hybrid search with one weight of the words; the vectors' weight is the rest to 1."""

    weight: float
    figures: dict[str, Figure]


class Run(msgspec.Struct, frozen=True):
    """One evaluation by a judged collection.

    :ivar collection: its name.
    :ivar measures: what was measured; the first one decides.
    :ivar settings: the settings of the index that may explain a difference to another run.
    :ivar weights: hybrid search by weight of the words, where that was asked for.
    :ivar passed: whether it was as good as was asked for; a later run is not compared with one that was not.
    """

    index: str
    generation: int
    collection: str
    queries: int
    measures: list[str]
    settings: dict[str, Any]
    modes: dict[JudgedMode, ModeRun]
    weights: list[Weighed]
    evaluated_at: datetime
    passed: bool = True

    @property
    def own_mode(self) -> JudgedMode:
        """The search that the index gives unless told otherwise."""
        return [mode for mode in MODES if mode in self.modes][-1]


class Outcome(msgspec.Struct, frozen=True):
    """A run on a chart: the means of the deciding measure, by mode."""

    id: int
    collection: str
    measure: str
    means: dict[str, float]
    evaluated_at: datetime


async def store(connection: Connection, schema: str, run: Run) -> tuple[int | None, str | None]:
    """Store a run; returns its number, or why it could not be stored."""
    table = sql.Identifier(schema, TABLE)
    try:
        async with connection.transaction():
            cursor = await connection.execute(
                sql.SQL(
                    "INSERT INTO {} (index_name, generation, collection, evaluated_at, run)"
                    " VALUES (%s, %s, %s, %s, %s) RETURNING id"
                ).format(table),
                [run.index, run.generation, run.collection, run.evaluated_at, Jsonb(msgspec.to_builtins(run))],
            )
            row = await cursor.fetchone()
            assert row is not None
            await connection.execute(
                sql.SQL(
                    "DELETE FROM {0} WHERE index_name = %s AND id NOT IN"
                    " (SELECT id FROM {0} WHERE index_name = %s ORDER BY id DESC LIMIT %s)"
                ).format(table),
                [run.index, run.index, KEPT],
            )
            crash_point("judged run written")
        crash_point("judged run committed")
        return row[0], None
    except psycopg.errors.InsufficientPrivilege:
        return None, f"this role may not write {schema}.{TABLE}"
    except psycopg.errors.ReadOnlySqlTransaction:
        return None, "this server or session only reads"
    except psycopg.errors.UndefinedTable:
        return None, f"there is no table {schema}.{TABLE} yet: a worker of this version creates it when it starts"


async def read(connection: Connection, schema: str, index: str, collection: str, id_: int) -> Run | None:
    """Return the run of an index by a collection that has this number."""
    return await _one(connection, schema, index, collection, "id = %(id)s", {"id": id_})


async def last(
    connection: Connection,
    schema: str,
    index: str,
    collection: str,
    generation: int,
    *,
    measure: str,
    queries: Iterable[str],
) -> Run | None:
    """Return the last run of an index by a collection that passed and can be compared with.

    :param generation: the live one: the run is none of a newer generation, which a migration is filling or left.
    :param measure: what it measured, of one of `queries` at least.
    """
    return await _one(
        connection,
        schema,
        index,
        collection,
        "generation <= %(generation)s AND coalesce((run ->> 'passed')::boolean, true) AND EXISTS ("
        "SELECT FROM jsonb_each(run -> 'modes') AS m WHERE m.value -> 'scores' -> %(measure)s::text ?| %(queries)s)",
        {"generation": generation, "measure": measure, "queries": list(queries)},
    )


async def _one(
    connection: Connection,
    schema: str,
    index: str,
    collection: str,
    condition: LiteralString,
    arguments: Mapping[str, Any],
) -> Run | None:
    """Return the newest run of an index by a collection that meets a condition."""
    try:
        cursor = await connection.execute(
            sql.SQL(
                "SELECT run FROM {} WHERE index_name = %(index)s AND collection = %(collection)s AND "
                + condition
                + " ORDER BY id DESC LIMIT 1"
            ).format(sql.Identifier(schema, TABLE)),
            {"index": index, "collection": collection, **arguments},
        )
    except psycopg.errors.UndefinedTable:
        return None
    row = await cursor.fetchone()
    return None if row is None else msgspec.convert(row[0], Run)


async def outcomes(
    connection: Connection, schema: str, indexes: Sequence[str], *, most: int = 20
) -> dict[str, list[Outcome]]:
    """Return the last runs of each index, the oldest first, as far as charts show them; the table must be there."""
    cursor = await connection.execute(
        sql.SQL(
            "SELECT index_name, id, collection, run #>> '{{measures,0}}',"
            " (SELECT jsonb_object_agg(m.key, m.value -> 'figures' -> (run #>> '{{measures,0}}') -> 'mean')"
            " FROM jsonb_each(run -> 'modes') AS m), evaluated_at"
            " FROM (SELECT r.*, row_number() OVER (PARTITION BY index_name ORDER BY id DESC) AS place FROM {} AS r"
            " WHERE index_name = ANY(%s)) AS r WHERE place <= %s ORDER BY id"
        ).format(sql.Identifier(schema, TABLE)),
        [list(indexes), most],
    )
    found: dict[str, list[Outcome]] = {}
    for name, *row in await cursor.fetchall():
        found.setdefault(name, []).append(Outcome(*row))
    return found
