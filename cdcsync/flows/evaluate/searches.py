"""Searches with one stored vector: by HNSW with each effort, and exactly, which shows what HNSW missed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.target.search import Effort, tune

MAX_EF_SEARCH = 1_000
"""pgvector's upper bound of hnsw.ef_search; a search cannot return more than that."""


class Answers(msgspec.Struct):
    """The hits with one ef_search, query after query."""

    recalls: list[float] = []
    milliseconds: list[float] = []
    by_hnsw: bool = False

    @property
    def recall(self) -> float:
        """The mean share of the nearest that was found."""
        return round(sum(self.recalls) / len(self.recalls), 6)


class Measuring:
    """The searches of some vectors of an index: of both tiers, or of the settled one."""

    def __init__(
        self, statement: sql.Composed, exact: sql.Composed, efforts: Sequence[Effort], hnsw: str | None, k: int
    ) -> None:
        """Begin.

        :param exact: the statement that compares all.
        :param efforts: how far to look, each with an `ef_search` of its own.
        :param hnsw: the name of the HNSW index, None if it is empty.
        """
        self.statement = statement
        self.exact = exact
        self.hnsw = hnsw
        self.k = k
        self.answers = {one: Answers() for one in efforts}
        self.exact_ms: list[float] = []


async def search_all_ways(
    connection: Connection, searched: Measuring, query: tuple[int, str], where: str | None
) -> None:
    """Search for what is near one stored vector, by each effort and exactly, and add what came of it."""
    own, vector = query
    wanted = searched.k + 1  # one of them may be the vector itself
    found = {}
    for effort, one in searched.answers.items():
        await tune(connection, effort.ef_search, filtered=where is not None)
        arguments: list[object] = [vector, effort.depth]
        if not searched.exact_ms:
            one.by_hnsw = await _reads_index(connection, searched.statement, arguments, searched.hnsw)
        rows, milliseconds = await _search(connection, searched.statement, arguments)
        # As the search function does, if it finds too few: look further, but not among the few rows of a condition, and
        # then compare all.
        if len(rows) < wanted < effort.depth and where is None:
            await tune(connection, MAX_EF_SEARCH, filtered=False)
            rows, more = await _search(connection, searched.statement, arguments)
            milliseconds += more
        if len(rows) < wanted < effort.depth:
            rows, more = await _search(connection, searched.exact, arguments)
            milliseconds += more
        found[effort] = rows, milliseconds
    # A session that has these off would take another way, which is not the usual exact one.
    await connection.execute("SET LOCAL enable_seqscan = on; SET LOCAL enable_sort = on")
    rows, milliseconds = await _search(connection, searched.exact, [vector, wanted])
    nearest = _distances(rows, own)[: searched.k]
    if not nearest:
        return
    searched.exact_ms.append(milliseconds)
    for effort, (rows, milliseconds) in found.items():
        hits = sum(distance <= nearest[-1] for distance in _distances(rows, own)[: searched.k])
        searched.answers[effort].recalls.append(hits / len(nearest))
        searched.answers[effort].milliseconds.append(milliseconds)


async def _search(
    connection: Connection, statement: sql.Composed, arguments: list[object]
) -> tuple[list[tuple[int, float]], float]:
    """Return what is found, and how many milliseconds that took."""
    cursor = psycopg.AsyncRawCursor(connection)
    started = perf_counter()
    await cursor.execute(statement, arguments, prepare=False)
    rows = await cursor.fetchall()
    return cast(list[tuple[int, float]], rows), (perf_counter() - started) * 1000


def _distances(rows: Sequence[tuple[int, float]], own: int) -> list[float]:
    """Return the distances of all but the query itself, and of what has one, the nearest first."""
    return sorted(distance for id_, distance in rows if id_ != own and not math.isnan(distance))


async def _reads_index(
    connection: Connection, statement: sql.Composed, arguments: list[object], index: str | None
) -> bool:
    """Say whether the planner takes the order from this index."""
    ((plan,),) = await fetch_texts(connection, sql.SQL("EXPLAIN (FORMAT JSON) ") + statement, arguments, prepare=False)
    nodes = _nodes(json.loads(cast(str, plan))[0]["Plan"])
    return index is not None and any("Order By" in node and node["Index Name"] == index for node in nodes)


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in _nodes(child))]
