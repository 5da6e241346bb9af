"""Words are counted by a worker once enough of an index has changed, and not before."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import structlog

import cdcsync.flows.words as module
from cdcsync.flows.words import count_words_for_ever, enter_words_for_ever
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.building import build_search
from cdcsync.target.tidying import enter_words
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@asynccontextmanager
async def counting(target: Database, *indexes: LiveIndex) -> AsyncIterator[Sequence[MutableMapping[str, Any]]]:
    """Count words beside the block; yields what is logged."""
    with structlog.testing.capture_logs() as logged:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_words_for_ever, target.dsn, SCHEMA, [one.spec for one in indexes])
            yield logged
            tasks.cancel_scope.cancel()


async def counted(index: LiveIndex) -> int | None:
    rows = await index.rows(f"SELECT chunks FROM cdcsync.{index.spec.name}_words WHERE lexeme = ''")
    return rows[0][0] if rows else None


async def written(index: LiveIndex, first: int, count: int) -> None:
    """Write documents, and have the server's statistics know of them at once."""
    await index.apply(changes(*(document(str(at), f"text number {at}") for at in range(first, first + count))))
    await index.connection.execute("SELECT pg_stat_force_next_flush()")


@pytest.fixture
async def filled(open_index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> LiveIndex:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(module, "SHARE", 1.0)
    index = await open_index()
    await written(index, 0, 100)
    return index


@pytest.mark.parametrize("anew", [False, True], ids=["statistics go on", "statistics begin anew"])
async def test_an_index_is_counted_at_first_and_again_when_a_tenth_of_it_was_written(
    filled: LiveIndex, target: Database, anew: bool
) -> None:
    async def is_(chunks: int) -> bool:
        return await counted(filled) == chunks

    async with counting(target, filled):
        await until(lambda: is_(100))
        if anew:
            await filled.connection.execute("SELECT pg_stat_reset()")
        await written(filled, 100, 20)
        await until(lambda: is_(120))


async def test_what_a_worker_before_it_counted_is_not_counted_again(
    filled: LiveIndex, target: Database, open_index: OpenIndex
) -> None:
    notes = await open_index(name="notes")
    async with counting(target, filled):
        await until(partial(counted, filled))
    await written(notes, 0, 100)
    async with counting(target, filled, notes) as logged:

        async def told() -> list[str]:
            return [one["index"] for one in logged if one["event"] == "words_counted"]

        await until(told)  # of the notes, which are looked at after the other
    assert await told() == ["notes"]


@pytest.mark.parametrize("how", ["a table is gone", "locked"])
async def test_an_index_whose_words_cannot_be_counted_keeps_no_other_from_it(
    filled: LiveIndex, target: Database, open_index: OpenIndex, how: str
) -> None:
    notes = await open_index(name="notes")
    await written(notes, 0, 100)
    async with contextlib.AsyncExitStack() as stack:
        if how == "locked":
            await stack.enter_async_context(filled.connection.transaction())
            await filled.connection.execute("LOCK TABLE cdcsync.articles_chunks IN ACCESS EXCLUSIVE MODE")
        else:
            await filled.connection.execute("ALTER TABLE cdcsync.articles_words RENAME TO elsewhere")
        logged = await stack.enter_async_context(counting(target, filled, notes))
        await until(partial(counted, notes))
    assert {one["index"] for one in logged if one["event"] == "words_not_counted"} == {"articles"}


async def test_an_index_without_keyword_search_has_no_words_to_count(target: Database, open_index: OpenIndex) -> None:
    index = await open_index(search=None)
    with anyio.fail_after(60):
        await count_words_for_ever(target.dsn, SCHEMA, [index.spec])


async def test_words_of_changed_chunks_are_entered_beside_an_index_that_cannot_be(
    filled: LiveIndex, open_index: OpenIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENTER_EVERY_S", 0.01)
    stuck = await open_index(name="stuck")
    for one in (stuck, filled):
        await build_search(one.connection, SCHEMA, one.spec)
    entered = anyio.Event()

    async def enter(connection: Connection, schema: str, spec: IndexSpec) -> None:
        if spec.name == "stuck":
            await connection.execute("SELECT 1 / 0")
        await enter_words(connection, schema, spec)
        entered.set()

    monkeypatch.setattr(module, "enter_words", enter)
    await filled.connection.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple SCHEMA public")
    await written(filled, 100, 20)
    pending = "SELECT pending_tuples::int FROM public.pgstatginindex('cdcsync.articles_chunks_search'::regclass)"
    assert await filled.rows(pending) == [(20,)]

    with structlog.testing.capture_logs() as logged:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(enter_words_for_ever, target.dsn, SCHEMA, [stuck.spec, filled.spec])
            await entered.wait()
            tasks.cancel_scope.cancel()

    assert await filled.rows(pending) == [(0,)]
    assert {(one["event"], one["index"]) for one in logged} == {("words_not_entered", "stuck")}
