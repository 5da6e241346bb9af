"""The settle flow: what moves when, and what makes it wait."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import msgspec
import psycopg
import pytest
import structlog

from cdcsync.config.sections import Worker
from cdcsync.flows import settle
from cdcsync.flows.settle import Settle
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.pipelines import Pipelines
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, register, until

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

EAGER = Worker(settle_after_s=0, settle_share=1)

LOOKS = 3
"""So many looks without a move are taken for a flow that waits."""


class Flow:
    """A settle flow over some indexes, which can be told other settings and another lag while it runs."""

    def __init__(self, dsn: str, indexes: list[LiveIndex]) -> None:
        self.worker = EAGER
        self.metrics = Metrics()
        self.lag = Lag(time.time, anyio.current_time)
        self.lag.begin(Lsn(0), 60)
        self.lag.note(None, caught_up=True)
        specs = [index.spec for index in indexes]
        self.settle = Settle(dsn, SCHEMA, specs, lambda: self.worker, self.metrics, self.lag)
        self.looks = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        turn = self.settle._turn

        async def counted(spec: object) -> bool:
            self.looks += 1
            return await turn(spec)  # type: ignore[arg-type]

        self.settle._turn = counted  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.settle.run)
            yield
            tasks.cancel_scope.cancel()

    async def looks_in_vain(self) -> None:
        """Return when the flow has looked some times more."""
        seen = self.looks

        async def looked() -> bool:
            return self.looks >= seen + LOOKS

        await until(looked)


async def tiers(index: LiveIndex) -> dict[str, int]:
    return dict(await index.rows("SELECT tier, count(*)::int FROM {vectors} GROUP BY 1"))


def settled(index: LiveIndex, count: int) -> Callable[[], Awaitable[bool]]:
    async def done() -> bool:
        return await tiers(index) == {"settled": count}

    return done


async def fill(index: LiveIndex, count: int) -> None:
    texts = [f"text {number}" for number in range(count)]
    await index.apply(changes(*[document(str(at), text) for at, text in enumerate(texts)], inline=texts))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once."""
    monkeypatch.setattr(settle, "LOOK_S", 0.01)
    monkeypatch.setattr(settle, "NOTE_S", 0.0)


@pytest.fixture
async def built(open_index: OpenIndex, quick: None) -> LiveIndex:
    """A live index of 100 vectors, all fresh."""
    index = await open_index(search=None)
    await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
    await register(index.connection, index.spec, slot="s")
    await build_hnsw(index.connection, SCHEMA, index.spec)
    await fill(index, 100)
    return index


async def test_what_has_rested_settles_and_the_figures_say_so(built: LiveIndex, target: Database) -> None:
    flow = Flow(target.dsn, [built])
    async with flow.running():
        await until(settled(built, 100))
        await flow.looks_in_vain()

    assert await built.faults() == []
    assert flow.metrics.settled.labels("articles")._value.get() == 100
    assert flow.metrics.fresh.labels("articles")._value.get() == 0
    assert await built.rows("SELECT index_name, generation, scan_ms FROM cdcsync.tiers") == [("articles", 1, 0.0)]


@pytest.mark.parametrize("reason", ["it has not rested", "settling is paused", "the stream is late", "no HNSW index"])
async def test_nothing_moves_until_the_reason_to_wait_is_gone(built: LiveIndex, target: Database, reason: str) -> None:
    flow = Flow(target.dsn, [built])
    match reason:
        case "it has not rested":
            flow.worker = msgspec.structs.replace(EAGER, settle_after_s=3_600)
        case "settling is paused":
            flow.worker = msgspec.structs.replace(EAGER, settle_connections=0)
        case "the stream is late":
            flow.lag.note(time.time() - 60, caught_up=False)
        case _:
            await built.connection.execute("DROP INDEX cdcsync.articles_vectors_1_hnsw")
    async with flow.running():
        await flow.looks_in_vain()
        assert await tiers(built) == {"fresh": 100}

        flow.worker = EAGER
        flow.lag.note(None, caught_up=True)
        if reason == "no HNSW index":
            await build_hnsw(built.connection, SCHEMA, built.spec)
        await until(settled(built, 100))


async def test_beyond_the_budget_nothing_rests_and_a_late_stream_does_not_count(
    built: LiveIndex, target: Database
) -> None:
    built.spec = msgspec.structs.replace(
        built.spec, config=msgspec.structs.replace(built.spec.config, fresh_scan_budget_ms=0.0)
    )
    flow = Flow(target.dsn, [built])
    flow.worker = msgspec.structs.replace(EAGER, settle_after_s=3_600)
    flow.lag.note(time.time() - 60, caught_up=False)

    async with flow.running():
        await until(settled(built, 100))


@pytest.fixture
def rebuilt(built: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors each rebuild moved, of an index that is beyond its budget and rebuilt with few vectors."""
    monkeypatch.setattr(settle, "REBUILD_ROWS", 50)
    found: list[int] = []
    run = Rebuild.run

    async def counted(rebuild: Rebuild) -> int:
        found.append(await run(rebuild))
        return found[-1]

    monkeypatch.setattr(Rebuild, "run", counted)
    built.spec = msgspec.structs.replace(
        built.spec, config=msgspec.structs.replace(built.spec.config, fresh_scan_budget_ms=0.0)
    )
    return found


@pytest.mark.parametrize("stream", ["caught up", "far behind, then caught up", "far behind for long"])
async def test_so_much_that_inserting_it_takes_longer_is_built_anew(
    built: LiveIndex, target: Database, rebuilt: list[int], monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    async def done() -> bool:
        return bool(rebuilt)

    flow = Flow(target.dsn, [built])
    if stream != "caught up":
        flow.lag.note(time.time() - 60, caught_up=False)
    async with flow.running():
        if stream == "far behind, then caught up":
            await flow.looks_in_vain()
            assert await tiers(built) == {"fresh": 100}
            flow.lag.note(None, caught_up=True)
        elif stream == "far behind for long":
            await flow.looks_in_vain()
            monkeypatch.setattr(settle, "REBUILD_WAITS_S", 0.0)
        await until(done)

    assert rebuilt == [100]
    assert await tiers(built) == {"settled": 100}
    assert await built.faults() == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [(psycopg.errors.ProgramLimitExceeded, ["tidying_failed"]), (psycopg.errors.DiskFull, ["settling_waits"])],
)
async def test_vectors_move_where_fresh_cannot_be_tidied_and_the_log_says_so(
    built: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch, kind: type[psycopg.Error], told: list[str]
) -> None:
    async def fail(connection: Connection, schema: str, spec: IndexSpec) -> None:
        raise kind("too little")

    monkeypatch.setattr(settle, "tidy", fail)
    flow = Flow(target.dsn, [built])
    flow.worker = msgspec.structs.replace(EAGER, settle_connections=0)
    with structlog.testing.capture_logs() as events:
        async with flow.running():
            await flow.looks_in_vain()
            flow.worker = EAGER
            await until(settled(built, 100))
    warned = [event for event in events if event["log_level"] == "warning"]
    assert [event["event"] for event in warned] == told
    assert "too little" in warned[0]["error"]


async def test_an_index_whose_tables_are_gone_does_not_keep_another_from_settling(
    built: LiveIndex, open_index: OpenIndex, target: Database
) -> None:
    other = await open_index(name="gone", search=None)
    await other.connection.execute("DROP VIEW public.gone_index; DROP TABLE cdcsync.gone_vectors_1")
    flow = Flow(target.dsn, [other, built])
    async with flow.running():
        await until(settled(built, 100))


@pytest.mark.parametrize("share", [1e-9, 1e9], ids=["looked at", "tidied"])
async def test_an_index_whose_vectors_are_locked_does_not_keep_another_from_settling(
    built: LiveIndex, open_index: OpenIndex, target: Database, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """They are met locked by a look at the tiers if fresh was tidied just now, and else by tidying it."""
    monkeypatch.setattr(settle, "TIDY_SHARE", share)
    monkeypatch.setattr(settle, "SHARED_LOCK_WAIT_MS", 200)
    locked = await open_index(name="aaa", search=None)
    await register(locked.connection, locked.spec, slot="s")
    await build_hnsw(locked.connection, SCHEMA, locked.spec)
    await fill(locked, 10)
    flow = Flow(target.dsn, [locked, built])
    flow.worker = msgspec.structs.replace(EAGER, settle_connections=0)
    with structlog.testing.capture_logs() as events:
        async with flow.running():
            await flow.looks_in_vain()
            async with locked.connection.transaction():
                await locked.connection.execute("LOCK TABLE cdcsync.aaa_vectors_1 IN ACCESS EXCLUSIVE MODE")
                flow.worker = EAGER
                await until(settled(built, 100))
            await until(settled(locked, 10))
    warned = [(event["event"], event["index"]) for event in events if event["log_level"] == "warning"]
    assert set(warned) == {("settling_failed", "aaa")}


async def test_settling_goes_on_after_its_sessions_were_ended(built: LiveIndex, target: Database) -> None:
    flow = Flow(target.dsn, [built])
    flow.worker = msgspec.structs.replace(EAGER, settle_connections=0)
    async with flow.running():
        await flow.looks_in_vain()
        await built.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'cdcsync settle'"
        )
        flow.worker = EAGER
        await until(settled(built, 100))


async def test_a_start_drops_what_a_killed_rebuild_left(built: LiveIndex, target: Database) -> None:
    """Its triggers would note every change for nobody, and its settled tier would stay without autovacuum."""
    left = "SELECT count(*)::int FROM pg_trigger WHERE tgname = 'cdcsync_rebuild'"
    async with await connect(target.dsn, "target") as connection:
        await Rebuild(connection, SCHEMA, built.spec).record()
    assert await built.rows(left) == [(2,)]
    async with Flow(target.dsn, [built]).running():
        await until(settled(built, 100))
    assert await built.rows(left) == [(0,)]
