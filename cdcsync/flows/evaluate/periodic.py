"""The worker's own measurements of recall, from time to time."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff
from cdcsync.errors import CdcsyncError
from cdcsync.flows.evaluate.recall import Budget, evaluate
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS, away
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.target import evaluations
from cdcsync.target.ddl.relations import Names
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec

log = structlog.get_logger()

UNHURRIED = Budget(statement_s=30.0, most_s=60.0, share=0.2)
"""For the worker: it has time, and an exact search reads the whole table. Where one takes longer than that, an operator
evaluates when the target is idle."""


async def evaluate_for_ever(dsn: str, schema: str, specs: Sequence[IndexSpec], *, every_s: float) -> None:
    """Evaluate each live index once in `every_s` seconds, one after the other, and store the outcome; until cancelled.

    The status and the metrics show what is stored.
    """
    async with Session(dsn, "target", application_name="cdcsync evaluate", lock_wait_ms=SHARED_LOCK_WAIT_MS) as target:
        backoff = Backoff(first=1.0, most=every_s)
        await anyio.sleep(every_s)
        while True:
            async with backoff:
                for spec in specs:
                    connection = await target.connection()
                    try:
                        await _evaluate_live(connection, schema, spec)
                    except CdcsyncError as error:
                        log.warning("evaluation_failed", index=spec.name, error=str(error), fix=error.hint)
                        if away(error, "target"):
                            raise
                backoff.succeeded()
                await anyio.sleep(every_s)


async def _evaluate_live(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Evaluate an index that is live and has vectors, as it is stored now."""
    with speaking_of("target", where=f"index {spec.name}", index=spec.name):
        entry = await Registry(schema).find(connection, spec.name)
        if entry is None or entry.state != "live":
            return
        vectors = Names(schema, spec.relations).vectors(entry.generation)
        if not await fetch_value(connection, sql.SQL("SELECT EXISTS (SELECT FROM {} OFFSET 1)").format(vectors)):
            return
        found = await evaluate(
            connection, schema, await stored_spec(connection, schema, spec.name, spec.config), budget=UNHURRIED
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
