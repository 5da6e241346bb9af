"""The build flow: builds what searches need as soon as an index's first load lets it, and declares the index live.

Words need no vectors: keyword search is built and counted once every text is there. HNSW is built once every text has
its vector, which may be hours later, and may take hours itself: a worker's `Builds` outlive its pipelines, each of
which lasts until a table changes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import cast

import anyio
import anyio.abc
import psycopg
import structlog
from psycopg import sql
from psycopg.pq import TransactionStatus

from cdcsync.backoff import Backoff
from cdcsync.errors import CdcsyncError, LeaseLost, TargetRewound, TargetUnavailable
from cdcsync.model.pauses import LOAD_CANCELLED, Pause
from cdcsync.model.requests import Request
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.interrupts import interrupted_by
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, Session, connect
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


class _Build:
    """The build of one index that is under way."""

    def __init__(self, spec: IndexSpec) -> None:
        self.spec = spec
        self.pid: int | None = None
        """The process of its session on the server, once it has one."""
        self.ending = anyio.Event()
        self.over = anyio.Event()
        self.outcome: bool | Exception = False
        """Whether there was something to build, or why it is not built."""


class Builds:
    """The builds of search indexes that a worker has under way, each in a task and a session that outlive a pipeline.

    A pipeline ends whenever a table of any of its indexes changes. If a build ended with it, it would begin again from
    nothing, and where tables change more often than it takes, it would never be through. The next pipeline waits for
    the build that is under way, unless that is in its way: see `keep`. All of them end with the worker. One of each
    kind is under way at a time: each takes the memory and the processes that the configuration gives to a build.

    The session of a build keeps the mark of the fence under which it was admitted. Its own worker, which raises the
    fence with each pipeline, spares it (`pids`); another worker that takes over ends it. The session only builds.
    """

    def __init__(self, dsn: str, schema: str, tasks: anyio.abc.TaskGroup) -> None:
        """Begin with none.

        :param tasks: the worker's.
        """
        self._dsn = dsn
        self._schema = schema
        self._tasks = tasks
        self._under_way: dict[tuple[str, str, int], _Build] = {}

    @property
    def pids(self) -> list[int]:
        """The processes of their sessions on the server."""
        return [one.pid for one in self._under_way.values() if one.pid is not None]

    async def search(self, spec: IndexSpec) -> bool:
        """Build an index's keyword search as `build_search` does, or wait for the build that is under way.

        If the caller is cancelled, the build continues.

        :raises CdcsyncError, psycopg.Error: as `build_search`, and if no session can be opened.
        """
        return await self._through("search", build_search, spec)

    async def hnsw(self, spec: IndexSpec) -> bool:
        """Build a generation's HNSW index as `build_hnsw` does, or wait for the build that is under way; see `search`.

        :raises CdcsyncError, psycopg.Error: as `search`.
        """
        return await self._through("hnsw", build_hnsw, spec)

    async def keep(self, specs: Iterable[IndexSpec]) -> None:
        """End the builds that are not for any of these indexes, or whose tables have to change for them.

        A change of a table would wait until nobody builds an index on it.
        """
        wanted = {(one.name, one.generation): _tables(one) for spec in specs for one in spec.generations}
        await self._end(lambda one: wanted.get((one.name, one.generation)) != _tables(one))

    async def release(self, index: str) -> None:
        """End the builds of an index, whose tables are about to be dropped or renamed."""
        await self._end(lambda one: one.name == index)

    async def _end(self, which: Callable[[IndexSpec], bool]) -> None:
        for build in [one for one in self._under_way.values() if which(one.spec)]:
            build.ending.set()
            await build.over.wait()

    async def _through(self, kind: str, work: Callable[..., Awaitable[bool]], spec: IndexSpec) -> bool:
        place = kind, spec.name, spec.generation
        while (build := self._under_way.get(place)) is None and (
            others := [one for of, one in self._under_way.items() if of[0] == kind]
        ):
            await others[0].over.wait()
        joined = build is not None
        if build is None:
            build = self._under_way[place] = _Build(spec)
            self._tasks.start_soon(self._run, place, build, work)
        await build.over.wait()
        if joined and isinstance(build.outcome, LeaseLost | TargetRewound):
            return await self._through(kind, work, spec)  # an earlier pipeline's lease, under which it began
        if isinstance(build.outcome, Exception):
            raise build.outcome
        return build.outcome

    async def _run(self, place: tuple[str, str, int], build: _Build, work: Callable[..., Awaitable[bool]]) -> None:
        try:
            async with await connect(
                self._dsn, "target", application_name="cdcsync build", lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
            ) as connection:
                build.pid = None if connection.backend is None else connection.backend.pid
                async with interrupted_by(build.ending, connection):
                    build.outcome = await work(connection, self._schema, build.spec, patience_s=HELD_S)
        except (CdcsyncError, psycopg.Error) as error:
            build.outcome = error  # raised to the flows that wait for it
        finally:
            del self._under_way[place]
            build.over.set()


def _tables(spec: IndexSpec) -> tuple[object, ...]:
    """Return what the tables of a generation are made by: where it is the same, none of them has to change."""
    made = spec.config, spec.shape, spec.key_types, spec.carried_types
    return (*made, spec.relations, spec.model, spec.dimensions, spec.distance)


async def build_until_live(dsn: str, schema: str, specs: Sequence[IndexSpec], builds: Builds) -> None:
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
                await _advance_all(await session.connection(), schema, left, causes, builds)
                backoff.succeeded()
                await anyio.sleep(POLL_S)


async def _advance_all(
    connection: Connection, schema: str, left: list[IndexSpec], causes: dict[str, str | None], builds: Builds
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
                if await _advance(connection, schema, spec, builds):
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


async def _advance(connection: Connection, schema: str, spec: IndexSpec, builds: Builds) -> bool:
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
    if await builds.search(spec):
        await count_words(connection, schema, spec)
    if await _loading(connection, names, spec):
        return False
    # Left by chunks that had to go whose texts might have come again.
    await delete_vectors_without_chunks(connection, schema, spec)
    await settle_all(connection, schema, spec)
    log.info("hnsw_building", index=spec.name)
    await builds.hnsw(spec)
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
