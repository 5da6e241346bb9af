"""A comparison, step by step: rows, then keys that may be orphans, then the chunks themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

import cdcsync.flows.audit.comparison as module
from cdcsync.errors import SetupError
from cdcsync.flows.audit.comparison import (
    REPEATED,
    START,
    UNDECIDED,
    Step,
    compare_step,
    compared,
    done,
    looked_at_later,
)
from cdcsync.model.rows import Key
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.tables import SourceTable
from cdcsync.target.audits import Place
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.requests.history import History
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec, register, until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SPEC = make_spec(search=None)


class Sides:
    """A table of rows 1 to 5, and an index that has them, by two connections."""

    def __init__(self, source: Connection, index: LiveIndex, database: Database) -> None:
        self.source = source
        self.index = index
        self.database = database

    async def steps(self, limit: int) -> list[Step]:
        """Compare everything, so many at a time."""
        found = []
        place: Place | None = START
        while place is not None:
            found.append(await compare_step(self.source, self.index.connection, SCHEMA, SPEC, place, limit))
            place = found[-1].following
        return found


@pytest.fixture
async def sides(database: Database) -> AsyncIterator[Sides]:
    database.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, body text)")
    database.execute("INSERT INTO articles SELECT i, 1, 'text ' || i FROM generate_series(1, 5) i")
    async with live_index(database, SPEC) as index, await connect(database.dsn, "source") as source:
        rows = (await SourceTable.of(SPEC).page(source, None, 10)).rows
        made = [(row[0], SPEC.render(row)) for row in rows]
        documents = [document(str(key), rendered.text) for key, rendered in made]
        await index.apply(changes(*documents))
        await index.embed()
        for key, rendered in made:
            await index.rows(
                "UPDATE {chunks} SET document_hash = %s WHERE id = %s::bigint RETURNING id", rendered.hash, key
            )
        await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
        await register(index.connection, SPEC, slot="s")
        yield Sides(source, index, database)


def suspects(steps: list[Step]) -> list[Key]:
    return [key for step in steps for key in step.suspects]


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
async def test_an_index_that_equals_its_source_gives_no_suspects_however_small_the_steps(
    sides: Sides, limit: int
) -> None:
    steps = await sides.steps(limit)
    assert suspects(steps) == []
    assert [step.faults for step in steps if step.faults] == []
    assert sum(step.documents for step in steps) == 5
    assert sum(step.looked for step in steps) == 15
    assert sum(step.waiting for step in steps) == 0


async def test_rows_that_differ_and_documents_without_a_row_are_suspects(sides: Sides) -> None:
    sides.database.execute("UPDATE articles SET body = 'another' WHERE id = 2")
    sides.database.execute("DELETE FROM articles WHERE id = 4")
    sides.database.execute("INSERT INTO articles VALUES (9, 1, 'new')")
    assert suspects(await sides.steps(2)) == [("2",), ("9",), ("4",)]


async def test_what_is_wrong_in_the_index_alone_is_a_fault(sides: Sides) -> None:
    sides.database.execute("UPDATE cdcsync.articles_chunks SET content = 'forged' WHERE id = 3")
    faults = [step.faults for step in await sides.steps(2) if step.faults]
    assert faults == [{"damaged": [("3",)]}]


async def test_a_key_of_several_rows_is_a_fault(sides: Sides) -> None:
    sides.database.execute("ALTER TABLE articles DROP CONSTRAINT articles_pkey")
    sides.database.execute("INSERT INTO articles VALUES (5, 1, 'text 5')")
    assert {REPEATED: [("5",)]} in [step.faults for step in await sides.steps(100)]


async def test_suspects_are_compared_by_a_request_and_nothing_is_asked_for_without_any(sides: Sides) -> None:
    target, queue = sides.index.connection, Queue(SCHEMA)
    assert await compared(target, SCHEMA, SPEC, []) == {}
    assert await History(SCHEMA).present(target, ["articles"]) == []
    async with anyio.create_task_group() as tasks, await connect(sides.database.dsn, "target") as worker:

        async def serve() -> None:
            request = await until(lambda: queue.next_open(worker, ["articles"]))
            assert request is not None
            assert (request.kind, await queue.keys(worker, request, 0, 10)) == ("verify", [("2",), ("4",)])
            await queue.start(worker, request, 2)
            found = [(("2",), "stale"), (("4",), "missing")]
            await queue.note(worker, request, found, cursor=None, rows_done=2, done=True)  # type: ignore[arg-type]

        tasks.start_soon(serve)
        assert await compared(target, SCHEMA, SPEC, [("2",), ("4",), ("2",)]) == {
            "stale": [("2",)],
            "missing": [("4",)],
        }


@pytest.mark.parametrize("judged_at", [2, 9])
async def test_an_undecided_document_is_looked_at_again_a_few_times(
    sides: Sides, monkeypatch: pytest.MonkeyPatch, judged_at: int
) -> None:
    looks = 0

    async def answer(*_: object) -> dict[str, list[Key]]:
        nonlocal looks
        looks += 1
        return {"stale": [("2",)]} if looks == judged_at else {UNDECIDED: [("2",)]}

    monkeypatch.setattr(module, "compared", answer)
    monkeypatch.setattr(module, "LATER_S", 0.0)
    found = await looked_at_later(sides.index.connection, SCHEMA, SPEC, [("2",)])
    assert (looks, found) == ((2, {"stale": [("2",)]}) if judged_at == 2 else (3, {UNDECIDED: [("2",)]}))


async def test_a_comparison_that_is_cancelled_or_whose_index_goes_is_an_error(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.0)
    target, requests = sides.index.connection, Requests(SCHEMA)
    async with target.transaction():
        id_ = await requests.add(target, "articles", "verify", rewrite=False, filter_=None, keys=[("1",)])
    await requests.action(target, "articles", "cancel", id_=id_)
    with pytest.raises(SetupError, match=f"request {id_} cancelled: by request"):
        await done(target, History(SCHEMA), id_, SPEC)
    await target.execute("DELETE FROM cdcsync.indexes")
    with pytest.raises(SetupError, match=f"request {id_} went with its index"):
        await done(target, History(SCHEMA), id_, SPEC)
