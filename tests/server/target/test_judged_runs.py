"""Stored runs by judged collections."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from psycopg import conninfo

import cdcsync.target.judged_runs as module
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target import judged_runs
from cdcsync.target.judged_runs import Figure, ModeRun, Run, Weighed
from tests.support import relations
from tests.support.indexes import SCHEMA
from tests.support.kills import Killed, kill_at
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


def run(index: str = "articles", collection: str = "cisi", mean: float = 0.4, minute: int = 0) -> Run:
    figure = Figure(mean, mean - 0.1, mean + 0.1)
    mode = ModeRun({"nDCG@10": figure, "R@100": figure}, None, 1.0, 2.0, {"nDCG@10": {"q1": mean}})
    return Run(
        index=index,
        generation=1,
        collection=collection,
        queries=1,
        measures=["nDCG@10", "R@100"],
        settings={"model": "m"},
        modes={"text": mode, "hybrid": mode},
        weights=[Weighed(0.5, {"nDCG@10": figure})],
        evaluated_at=NOW + timedelta(minutes=minute),
    )


@pytest.fixture
async def registered(connection: Connection) -> Connection:
    """A session on a target that has two indexes."""
    return await relations.registered(connection, "articles", "notes")


async def last(
    connection: Connection, generation: int = 1, *, measure: str = "nDCG@10", queries: Sequence[str] = ("q1", "q9")
) -> Run | None:
    """Return the last run by a collection that has these questions."""
    return await judged_runs.last(connection, SCHEMA, "articles", "cisi", generation, measure=measure, queries=queries)


async def test_a_run_comes_back_as_it_was_stored_by_its_number_or_as_the_last(registered: Connection) -> None:
    numbers = [await judged_runs.store(registered, SCHEMA, run(mean=mean)) for mean in (0.3, 0.4)]
    await judged_runs.store(registered, SCHEMA, run(collection="other"))
    first, second = (number for number, problem in numbers if problem is None)
    assert first is not None
    assert second is not None
    assert await last(registered) == run(mean=0.4)
    assert await judged_runs.read(registered, SCHEMA, "articles", "cisi", first) == run(mean=0.3)
    assert await judged_runs.read(registered, SCHEMA, "notes", "cisi", second) is None
    assert run().own_mode == "hybrid"


async def test_the_last_run_is_one_that_passed_of_a_generation_that_searches_use(
    registered: Connection,
) -> None:
    failed = msgspec.structs.replace(run(mean=0.1), passed=False)
    candidate = msgspec.structs.replace(run(mean=0.9), generation=2)
    for one in (run(mean=0.4), failed, candidate):
        await judged_runs.store(registered, SCHEMA, one)
    assert await last(registered, 1) == run(mean=0.4)
    assert await last(registered, 2) == candidate  # once searches use it


async def test_the_last_run_is_one_of_the_same_measure_and_of_questions_in_common(registered: Connection) -> None:
    for one in (run(mean=0.4), run(mean=0.5)):
        await judged_runs.store(registered, SCHEMA, one)
    of_others = ModeRun({}, None, 1.0, 2.0, {"P@5": {"q1": 0.1}, "nDCG@10": {"q2": 0.1}})
    await judged_runs.store(registered, SCHEMA, msgspec.structs.replace(run(), modes={"vector": of_others}))
    assert await last(registered) == run(mean=0.5)
    assert await last(registered, measure="RR") is None
    assert await last(registered, queries=["q3"]) is None


async def test_the_newest_runs_of_each_index_stay(registered: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    await judged_runs.store(registered, SCHEMA, run("notes"))
    for minute in range(4):
        await judged_runs.store(registered, SCHEMA, run(minute=minute))
    charts = await judged_runs.outcomes(registered, SCHEMA, ["articles", "notes"])
    assert {name: len(outcomes) for name, outcomes in charts.items()} == {"articles": 2, "notes": 1}
    assert [one.evaluated_at for one in charts["articles"]] == [NOW + timedelta(minutes=at) for at in (2, 3)]


async def test_a_chart_has_the_means_of_the_measure_that_decides_the_oldest_first(registered: Connection) -> None:
    for mean in (0.1, 0.2, 0.3):
        await judged_runs.store(registered, SCHEMA, run(mean=mean))
    (charted,) = (await judged_runs.outcomes(registered, SCHEMA, ["articles"], most=2)).values()
    assert [one.means for one in charted] == [{"text": 0.2, "hybrid": 0.2}, {"text": 0.3, "hybrid": 0.3}]
    assert {(one.measure, one.collection) for one in charted} == {("nDCG@10", "cisi")}


async def test_where_nothing_can_be_written_the_reason_is_told(registered: Connection, target: Database) -> None:
    reading = conninfo.make_conninfo(target.dsn, options="-c default_transaction_read_only=on")
    async with await connect(reading, "target") as session:
        assert await judged_runs.store(session, SCHEMA, run()) == (None, "this server or session only reads")
    await registered.execute("DROP TABLE cdcsync.judged_runs")
    number, problem = await judged_runs.store(registered, SCHEMA, run())
    assert number is None
    assert "a worker of this version creates it" in str(problem)
    assert await last(registered) is None
    assert await judged_runs.read(registered, SCHEMA, "articles", "cisi", 1) is None


@pytest.mark.parametrize("point", ["judged run written", "judged run committed"])
async def test_a_kill_leaves_a_whole_run_or_none_and_no_run_too_many(
    registered: Connection, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr(judged_runs, "KEPT", 1)
    await judged_runs.store(registered, SCHEMA, run(mean=0.3))
    kill_at(monkeypatch, judged_runs, point)

    with pytest.raises(Killed):
        await judged_runs.store(registered, SCHEMA, run(mean=0.4))

    assert await last(registered) == run(mean=0.4 if point == "judged run committed" else 0.3)
    cursor = await registered.execute("SELECT count(*) FROM cdcsync.judged_runs")
    assert await cursor.fetchall() == [(1,)]
