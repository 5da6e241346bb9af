"""The build flow: builds what searches need as soon as an index's first load lets it, and declares the index live.

Words need no vectors: keyword search is built and counted once every text is there. HNSW is built once every text has
its vector, which may be hours later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import anyio
import structlog
from psycopg import sql
from psycopg.pq import TransactionStatus

from cdcsync.backoff import Backoff
from cdcsync.errors import TargetUnavailable
from cdcsync.model.pauses import LOAD_CANCELLED, Pause
from cdcsync.model.requests import Request
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.building import HELD_S, build_hnsw, build_search
from cdcsync.target.ddl.relations import MAX_ATTEMPTS, Names
from cdcsync.target.generations import Generations
from cdcsync.target.keys import delete_vectors_without_chunks
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.search import count_words
from cdcsync.target.settling import Settling

log = structlog.get_logger()

POLL_S = 0.5
"""How often a building index is looked at: one small query."""


MOVED_AT_ONCE = 2_000
"""Vectors moved in one transaction before HNSW is built: some tens of milliseconds."""


async def build_until_live(dsn: str, schema: str, specs: Sequence[IndexSpec]) -> None:
    """Return when every index is live; an index whose load is still going is left building.

    Vectors without HNSW are searched exactly meanwhile; building it once at the end is several times faster than
    growing it.
    """
    left = list(specs)
    causes: dict[str, str | None] = {}
    backoff = Backoff(lambda failure: log.warning("build_waits", error=str(failure.error), fix=failure.error.hint))
    async with Session(
        dsn, "target", application_name="cdcsync build", lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
    ) as session:
        while left:
            async with backoff:
                await _advance_all(await session.connection(), schema, left, causes)
                backoff.succeeded()
                await anyio.sleep(POLL_S)


async def _advance_all(
    connection: Connection, schema: str, left: list[IndexSpec], causes: dict[str, str | None]
) -> None:
    """Build the indexes whose loads have drained, and take those off the list for which nothing is left to do.

    One that the target lacks memory or disk for, or whose tables somebody holds, waits with the cause in its entry, and
    the others are built.

    :param causes: why indexes wait, by index, as it was noted last.
    :raises TargetUnavailable: one waits, or the target is away.
    """
    lacking: list[TargetUnavailable] = []
    for spec in list(left):
        cause: str | None = None
        try:
            with speaking_of("target", where=f"index {spec.name}", index=spec.name):
                if await _advance(connection, schema, spec):
                    left.remove(spec)
        except TargetUnavailable as error:
            if connection.info.transaction_status != TransactionStatus.IDLE:
                raise
            lacking.append(error)
            cause = error.with_fix
        if cause != causes.get(spec.name):
            with speaking_of("target"):
                await Registry(schema).note_wait(connection, spec.name, cause)
            crash_point("cause of a wait noted")
            causes[spec.name] = cause
    if lacking:
        raise lacking[0]


def pause_after(load: Request) -> Pause | None:
    """Return why an index is paused after a load that ended without success; None if it has not."""
    if load.state == "cancelled":
        return Pause(LOAD_CANCELLED, "start the worker again to load it")
    if load.state == "failed":
        because = f": {load.error}" if load.error else ""
        return Pause(f"its load failed{because}", "correct that; the worker tries again by itself, less and less often")
    return None


async def settle_all(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Move every vector to where HNSW is about to be built: while it is not there, that is quick.

    It goes through the vectors once. A vector that cannot move now stays fresh, and so does a vector that is stored
    meanwhile for a chunk that was passed: searches find it there, and the settle flow moves it once HNSW is built.
    """
    settling = Settling(connection, schema, spec)
    last: int | None = 0
    while last is not None:
        chunks, last = await settling.page(last, MOVED_AT_ONCE)
        if chunks:
            await settling.settle(chunks)


async def _advance(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Build what the load of one index lets be built; returns whether nothing is left to do for it."""
    names, registry = Names(schema, spec.relations), Registry(schema)
    entry = await registry.find(connection, spec.name)
    if entry is None or entry.state != "building":
        return True
    load = await History(schema).last_load(connection, spec.name)
    if load is not None and (pause := pause_after(load)) is not None:
        await registry.pause(connection, spec.name, pause)
        crash_point("ended load noted")
        log.error("load_ended", index=spec.name, state=load.state)
        return True
    if load is None or load.state != "done" or await History(schema).doubted(connection, load):
        return False
    if await build_search(connection, schema, spec, patience_s=HELD_S):
        await count_words(connection, schema, spec)
    if await _loading(connection, names, spec):
        return False
    # Left by chunks that had to go whose texts might have come again.
    await delete_vectors_without_chunks(connection, schema, spec)
    await settle_all(connection, schema, spec)
    log.info("hnsw_building", index=spec.name)
    await build_hnsw(connection, schema, spec, patience_s=HELD_S)
    await connection.execute(sql.SQL("ANALYZE {}").format(names.chunks))
    await connection.execute(sql.SQL("ANALYZE {}").format(names.vectors(spec.generation)))
    async with connection.transaction():
        # A graph may take hours, in which somebody may have asked for another load.
        await registry.find(connection, spec.name, lock=True)
        now = await History(schema).last_load(connection, spec.name)
        if now is None or (now.id, now.state) != (load.id, load.state):
            return False
        if spec.hidden:
            await Generations(schema).stamp(connection, spec.name, spec.generation, "ready_at")
        await registry.declare_live(connection, spec.name)
        crash_point("index to be live")
    crash_point("index declared live")
    log.info("index_live", index=spec.name)
    return True


async def _loading(connection: Connection, names: Names, spec: IndexSpec) -> bool:
    """Say whether texts of a backfill still wait for their vectors."""
    statement = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE generation = {} AND lane > 0 AND attempts < {})")
    parts = names.backlog, sql.Literal(spec.generation), sql.Literal(MAX_ATTEMPTS)
    return cast(bool, await fetch_value(connection, statement.format(*parts)))
