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

import json
import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, cast

import anyio
import msgspec
import psycopg
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff
from cdcsync.errors import CdcsyncError, SetupError, Unavailable, UsageError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one, fetch_texts, fetch_value
from cdcsync.postgres.sessions import Connection, Session, speaking_of
from cdcsync.target import evaluations
from cdcsync.target.ddl.relations import OPERATORS, Names, vector_schema
from cdcsync.target.evaluations import USUAL_K, Evaluation, Measured
from cdcsync.target.registry import Registry
from cdcsync.target.search import Effort, check_where, nearest_statement, refusal, stored_spec, tune, usual_effort

log = structlog.get_logger()

QUERIES = 100
"""With k = 10, a thousand neighbours: the mean is good to about a hundredth."""

MAX_EF_SEARCH = 1_000
"""pgvector's upper bound of hnsw.ef_search; a search cannot return more than that."""

MAX_K = MAX_EF_SEARCH - 1
"""The query's own chunk takes a place."""

CHANGED = 4
"""One query of so many is among the vectors that changed last."""

LAST_BLOCKS = 16
"""The end of the settled tier that is looked at for what came there last: some hundred vectors."""

DRAWN = 4
"""So many ids are drawn for each query wanted: some meet the same vector, or a gap."""


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

UNHURRIED = Budget(statement_s=30.0, most_s=60.0, share=0.2)
"""For the worker: it has time, and an exact search reads the whole table. Where one takes longer than that, an operator
evaluates when the target is idle."""


class _Answers(msgspec.Struct):
    """The hits with one ef_search, query after query."""

    recalls: list[float] = []
    milliseconds: list[float] = []
    by_hnsw: bool = False

    @property
    def recall(self) -> float:
        """The mean share of the nearest that was found."""
        return round(sum(self.recalls) / len(self.recalls), 6)


class _Measuring:
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
        self.answers = {one: _Answers() for one in efforts}
        self.exact_ms: list[float] = []


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
    check_where(where)
    names = Names(schema, spec.name)
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
        async with _snapshot(connection, spec, None, budget):
            undirected = await _undirected(connection, names, extension, spec)
        usual = await usual_effort(connection, spec, k + 1)
        efforts = [Effort(ef, usual.depth if ef == usual.ef_search else k + 1) for ef in dict.fromkeys(ef_search)]
        fresh, settled = await _tiers_filled(connection, names, spec)
        hnsw = names.hnsw_name(spec.generation) if settled else None
        both, graph = (
            _Measuring(
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
                async with _snapshot(connection, spec, where, budget):
                    await _search_all_ways(connection, searched, (own, vector), where)
            took = perf_counter() - started
            spent += took
            await anyio.sleep(took * (1 / budget.share - 1))
    if not both.exact_ms:
        if where is None:
            raise SetupError(
                "the index has too few vectors: each is compared with the others",
                where=f"index {spec.name}",
                hint="evaluate it when more rows have come",
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
        [Names(schema, spec.name).settled(spec.generation).as_string(connection)],
    )
    if built:
        return
    building = state == "building"
    raise SetupError(
        "it is still being built: HNSW comes last" if building else f"it has no HNSW index, and is {state}",
        where=f"index {spec.name}",
        hint="`cdcsync status` shows how far it is" if building else "`cdcsync status` tells what is wrong",
    )


async def sample_vectors(
    connection: Connection, names: Names, extension: str, spec: IndexSpec, queries: int
) -> list[tuple[int, str]]:
    """Return ids and vectors: one in `CHANGED` of those that changed last, and others at random.

    The others are chosen through the primary key: a few pages are read, however large it is. A vector after a gap in
    the ids is a little more likely. One that is at no distance from anything (all zeros, by cosine) is in no HNSW
    index, and is not chosen.
    """
    cursor = await connection.execute(
        sql.SQL(
            "WITH ends AS (SELECT min(chunk_id) AS low, max(chunk_id) AS high FROM {vectors}),"
            " drawn AS MATERIALIZED (SELECT CASE WHEN high - low < {draws} THEN low + n - 1"
            " ELSE low + floor(random() * (high - low + 1))::bigint END AS id"
            " FROM ends, generate_series(1, {draws}) AS n WHERE low + n - 1 <= high),"
            " met AS MATERIALIZED (SELECT DISTINCT v.chunk_id FROM drawn CROSS JOIN LATERAL"
            " (SELECT chunk_id FROM {vectors} WHERE chunk_id >= id ORDER BY chunk_id LIMIT 1) AS v),"
            # What came last is in fresh, and at the end of the settled table.
            " late AS (SELECT chunk_id, stored_at FROM {fresh} UNION ALL SELECT chunk_id, stored_at FROM {settled}"
            " WHERE ctid >= ('(' || greatest(0, pg_relation_size({name}::regclass)"
            " / current_setting('block_size')::int - {blocks}) || ',1)')::tid),"
            " changed AS MATERIALIZED (SELECT chunk_id FROM late ORDER BY stored_at DESC LIMIT {queries} / {part})"
            " SELECT v.chunk_id, v.embedding::text FROM"
            " (SELECT chunk_id, false AS other FROM changed UNION SELECT chunk_id, true FROM met"
            " WHERE chunk_id NOT IN (SELECT chunk_id FROM changed)) AS chosen JOIN {vectors} AS v USING (chunk_id)"
            " WHERE v.embedding OPERATOR({extension}.{operator}) v.embedding <> 'NaN'::float8"
            " ORDER BY chosen.other, random() LIMIT {queries}"
        ).format(
            vectors=names.vectors(spec.generation),
            fresh=names.fresh(spec.generation),
            settled=names.settled(spec.generation),
            name=sql.Literal(names.settled(spec.generation).as_string(connection)),
            draws=sql.Literal(DRAWN * queries),
            queries=sql.Literal(queries),
            part=sql.Literal(CHANGED),
            blocks=sql.Literal(LAST_BLOCKS),
            extension=sql.Identifier(extension),
            operator=sql.SQL(OPERATORS[spec.distance]),
        )
    )
    sample = cast(list[tuple[int, str]], await cursor.fetchall())
    random.shuffle(sample)  # an evaluation may end before all of them were searched with
    return sample


@asynccontextmanager
async def _snapshot(connection: Connection, spec: IndexSpec, where: str | None, budget: Budget) -> AsyncIterator[None]:
    """Have everything inside see one moment, and read only.

    :raises SetupError: a search took longer than it may.
    :raises UsageError: the server refuses the condition.
    """
    try:
        async with connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            if budget.statement_s:
                milliseconds = max(1, round(budget.statement_s * 1000))
                await connection.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(milliseconds)))
                # One process, however large the table is.
                await connection.execute("SET LOCAL max_parallel_workers_per_gather = 0")
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


async def _search_all_ways(
    connection: Connection, searched: _Measuring, query: tuple[int, str], where: str | None
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


def _mean(milliseconds: Sequence[float]) -> float:
    return round(sum(milliseconds) / len(milliseconds), 3)


def _p95(milliseconds: Sequence[float]) -> float:
    """Return the least figure that 95 of 100 do not exceed."""
    return round(sorted(milliseconds)[math.ceil(0.95 * len(milliseconds)) - 1], 3)


async def evaluate_for_ever(
    dsn: str, schema: str, specs: Sequence[IndexSpec], *, every_s: float, budget: Budget = UNHURRIED
) -> None:
    """Evaluate each live index once in `every_s` seconds, one after the other, and store the outcome; until cancelled.

    The status and the metrics show what is stored.
    """
    async with Session(dsn, "target", application_name="cdcsync evaluate") as target:
        backoff = Backoff(first=1.0, most=every_s)
        await anyio.sleep(every_s)
        while True:
            async with backoff:
                for spec in specs:
                    try:
                        await _evaluate_live(await target.connection(), schema, spec, budget)
                    except CdcsyncError as error:
                        log.warning("evaluation_failed", index=spec.name, error=str(error), fix=error.hint)
                        if isinstance(error, Unavailable):
                            raise
                backoff.succeeded()
                await anyio.sleep(every_s)


async def _evaluate_live(connection: Connection, schema: str, spec: IndexSpec, budget: Budget) -> None:
    """Evaluate an index that is live and has vectors, as it is stored now."""
    with speaking_of("target", where=f"index {spec.name}"):
        entry = await Registry(schema).find(connection, spec.name)
        if entry is None or entry.state != "live":
            return
        vectors = Names(schema, spec.name).vectors(entry.generation)
        if not await fetch_value(connection, sql.SQL("SELECT EXISTS (SELECT FROM {} OFFSET 1)").format(vectors)):
            return
        found = await evaluate(
            connection, schema, await stored_spec(connection, schema, spec.name, spec.config), budget=budget
        )
        not_stored = await evaluations.store(connection, schema, found)
    (measured,) = found.measured
    log.info(
        "evaluated",
        index=spec.name,
        recall=measured.recall,
        k=found.k,
        ef_search=measured.ef_search,
        queries=found.queries,
        by_hnsw=measured.by_hnsw,
    )
    if not_stored is not None:
        log.warning("evaluation_not_stored", index=spec.name, reason=not_stored)
