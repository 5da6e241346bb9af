"""Evaluate: how much of what an exact search finds do searches by HNSW find?

    sample of stored vectors ─► each one: by HNSW, for every ef_search ─┐
                                          exactly, without the index   ─┴─► recall ─► stored, status, metrics

Stored vectors stand for queries: they lie where the index has something to find, and need neither a model nor labelled
questions. So this measures the index, not the model. A part of them are those that changed last: around them are the
entries of the graph whose rows are gone, which is what lowers recall. A vector's own chunk is left out of both answers,
as it would be found for nothing. Both read both tiers, as every search does. Only a settled vector can be missed, so if
there are fresh ones too, the settled tier is measured again by itself. Distances are compared and not ids: what is as
near as the last of the k nearest is a hit, whichever of the equals an exact search happens to return.

Unless told how far, a search looks as the search function does: `usual_effort` is that function's own figure, and what
finds too few vectors is searched exactly in the end. With an `ef_search`, it looks as a query of the view does in a
session that has set it.

All answers to one query are of one snapshot, and nothing is written but the outcome.

Source: pgvector's README (HNSW query options; monitoring recall); PostgreSQL, "Query Planning", enable_indexscan.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import cast

import anyio
import msgspec
import psycopg
from psycopg import sql

from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.evaluate.sampling import sample_vectors
from cdcsync.flows.evaluate.searches import MAX_EF_SEARCH, Measuring, search_all_ways
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_one, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import Names, vector_schema
from cdcsync.target.evaluations import USUAL_K, Evaluation, Measured
from cdcsync.target.registry import Registry
from cdcsync.target.search import Effort, check_condition, nearest_statement, refusal, usual_effort
from cdcsync.target.snapshots import hold_snapshot

QUERIES = 100
"""With k = 10, a thousand neighbours: the mean is good to about a hundredth."""

MAX_K = MAX_EF_SEARCH - 1
"""The query's own chunk takes a place."""


class Budget(msgspec.Struct, frozen=True):
    """The most that an evaluation may cost the target.

    :ivar statement_s: seconds that one search may take; 0 for any time.
    :ivar most_s: no search is begun after so many seconds of searching.
    :ivar share: the share of the time that searches run; the rest is left to others.
    """

    statement_s: float = 0.0
    most_s: float = math.inf
    share: float = 1.0


UNBOUNDED = Budget()
"""For an operator, who can see how long it takes."""


async def evaluate(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    *,
    queries: int = QUERIES,
    k: int = USUAL_K,
    ef_search: Sequence[int] = (),
    where: str | None = None,
    budget: Budget = UNBOUNDED,
) -> Evaluation:
    """Measure an index's recall and the time that searches take; reads only.

    :param connection: a session on the target, in autocommit.
    :param spec: the index as it is stored, see `stored_spec`.
    :param queries: how many stored vectors are searched with; all, where there are no more.
    :param ef_search: how far HNSW looks, one measurement for each; without any, as far as searches do.
    :param where: an SQL condition on key and carried columns of what is found, as a search has it.
    :raises UsageError: `queries`, `k`, `ef_search` or `where` cannot be used.
    :raises SetupError: there is nothing to evaluate yet, or a search took longer than it may.
    :raises TargetUnavailable: the target does not answer now.
    """
    _check(queries, k, ef_search)
    await check_condition(connection, schema, spec, where)
    names = Names(schema, spec.relations)
    with speaking_of("target", where=f"index {spec.name}"):
        await _refuse_without_hnsw(connection, schema, spec)
        extension = await vector_schema(connection)
        sample = await sample_vectors(connection, names, extension, spec, queries)
        if not sample:
            raise SetupError(
                "the index has no vectors to search with",
                where=f"index {spec.name}",
                hint="`cdcsync status` tells what it waits for",
            )
        async with _snapshot(connection, schema, spec, None, budget):
            undirected = await _undirected(connection, names, extension, spec)
        usual = await usual_effort(connection, spec, k + 1)
        efforts = [Effort(ef, usual.depth if ef == usual.ef_search else k + 1) for ef in dict.fromkeys(ef_search)]
        fresh, settled = await _tiers_filled(connection, names, spec)
        hnsw = names.hnsw_name(spec.generation) if settled else None
        both, graph = (
            Measuring(
                nearest_statement(schema, extension, spec, where, settled=alone),
                nearest_statement(schema, extension, spec, where, settled=alone, exact=True),
                *(efforts or [usual], hnsw, k),
            )
            for alone in (False, True)
        )
        if not (fresh and settled):
            graph = both
        spent = 0.0
        for own, vector in sample:
            if spent > budget.most_s:
                break
            started = perf_counter()
            for searched in dict.fromkeys((both, graph)):
                async with _snapshot(connection, schema, spec, where, budget):
                    await search_all_ways(connection, searched, (own, vector), where)
            took = perf_counter() - started
            spent += took
            await anyio.sleep(took * (1 / budget.share - 1))
    if not both.exact_ms:
        if where is None:
            raise SetupError(
                "the index has too few vectors: each is compared with the others",
                where=f"index {spec.name}",
                hint="evaluate it again when it has more rows",
            )
        raise UsageError("the condition leaves nothing to find", where=f"--where {where}", hint="check its values")
    return Evaluation(
        index=spec.name,
        generation=spec.generation,
        k=k,
        queries=len(both.exact_ms),
        exact_mean_ms=_mean(both.exact_ms),
        exact_p95_ms=_p95(both.exact_ms),
        measured=[
            Measured(
                ef_search=effort.ef_search,
                recall=one.recall,
                usual=effort == usual,
                by_hnsw=one.by_hnsw,
                mean_ms=_mean(one.milliseconds),
                p95_ms=_p95(one.milliseconds),
                settled_recall=graph.answers[effort].recall if settled and graph.exact_ms else None,
                settled_mean_ms=_mean(graph.answers[effort].milliseconds) if settled and graph.exact_ms else None,
            )
            for effort, one in both.answers.items()
        ],
        evaluated_at=datetime.now(UTC),
        undirected=undirected,
    )


def _check(queries: int, k: int, ef_search: Sequence[int]) -> None:
    for value, most, option in (
        (queries, 100_000, "--queries"),
        (k, MAX_K, "-k"),
        *((one, MAX_EF_SEARCH, "--ef-search") for one in ef_search),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"{value} is out of range", where=option, hint=f"give 1 to {most:,}")


async def _refuse_without_hnsw(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Refuse an index that is searched without HNSW yet: there is nothing to compare.

    :raises SetupError: it is.
    """
    entry = await Registry(schema).find(connection, spec.name)
    state = entry.state if entry is not None else "gone"
    built = await fetch_value(
        connection,
        "SELECT EXISTS (SELECT FROM pg_index AS x JOIN pg_class AS c ON c.oid = x.indexrelid"
        " JOIN pg_am AS a ON a.oid = c.relam"
        " WHERE a.amname = 'hnsw' AND x.indisvalid AND x.indrelid = to_regclass(%s))",
        [Names(schema, spec.relations).settled(spec.generation).as_string(connection)],
    )
    if built:
        return
    building = state == "building"
    raise SetupError(
        "it is still being built: HNSW comes last" if building else f"it has no HNSW index, and is {state}",
        where=f"index {spec.name}",
        hint="`cdcsync status` shows how far it is" if building else "`cdcsync status` tells what is wrong",
    )


@asynccontextmanager
async def _snapshot(
    connection: Connection, schema: str, spec: IndexSpec, where: str | None, budget: Budget
) -> AsyncIterator[None]:
    """Run the block under one snapshot that can only read.

    :raises SetupError: a search took longer than it may.
    :raises UsageError: the server refuses the condition.
    """
    try:
        async with connection.transaction():
            if budget.statement_s:
                milliseconds = max(1, round(budget.statement_s * 1000))
                await connection.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(milliseconds)))
                # One process, however large the table is.
                await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
            names = Names(schema, spec.relations)
            await hold_snapshot(connection, names.chunks, names.vectors(spec.generation))
            yield
    except psycopg.Error as error:
        if not budget.statement_s or not isinstance(error, psycopg.errors.QueryCanceled):
            raise refusal(error, spec, where) from error
        raise SetupError(
            f"a search took longer than {budget.statement_s:g} s",
            where=f"index {spec.name}",
            hint=f"`cdcsync evaluate {spec.name}` takes the time it needs: run it when the target is idle",
        ) from error


async def _tiers_filled(connection: Connection, names: Names, spec: IndexSpec) -> tuple[bool, bool]:
    """Say whether there are fresh vectors, and settled ones."""
    statement = sql.SQL("SELECT EXISTS (SELECT FROM {}), EXISTS (SELECT FROM {})")
    return cast(
        tuple[bool, bool], await fetch_one(connection, statement.format(*names.tiers(spec.generation).values()))
    )


async def _undirected(connection: Connection, names: Names, extension: str, spec: IndexSpec) -> int:
    """Return how many vectors have no distance from anything; reads all of them, as an exact search does."""
    if spec.distance != "cosine":
        return 0
    statement = sql.SQL(
        "SELECT count(*) FROM {} AS v WHERE v.embedding OPERATOR({}.<=>) v.embedding = 'NaN'::float8"
    ).format(names.vectors(spec.generation), sql.Identifier(extension))
    return cast(int, await fetch_value(connection, statement))


def _mean(milliseconds: Sequence[float]) -> float:
    return round(sum(milliseconds) / len(milliseconds), 3)


def _p95(milliseconds: Sequence[float]) -> float:
    """Return the least figure that 95 of 100 do not exceed."""
    return round(sorted(milliseconds)[math.ceil(0.95 * len(milliseconds)) - 1], 3)
