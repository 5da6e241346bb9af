"""Asking for backfills: what is stored, what a new request replaces, and that the worker hears of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.model.requests import Request
from cdcsync.postgres.sessions import Connection
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests
from tests.support.indexes import SCHEMA
from tests.support.requests import HISTORY, QUEUE, REQUESTS, add, end, next_one

pytestmark = [pytest.mark.server, pytest.mark.anyio, pytest.mark.usefixtures("articles_and_notes")]


async def test_a_request_holds_what_was_asked_for(connection: Connection) -> None:
    id_ = await REQUESTS.add(connection, "articles", "replay", rewrite=True, filter_="tenant = 7")
    assert await next_one(connection) == Request(
        id=id_,
        index="articles",
        kind="replay",
        rewrite=True,
        filter="tenant = 7",
        state="requested",
        phase="rows",
        cursor=None,
        rows_done=0,
        rows_total=None,
        started_at=None,
    )


@pytest.mark.parametrize("schema", [SCHEMA, "a" * 63, "Ünï code ☃"])
async def test_the_worker_is_woken_when_the_request_commits(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]], schema: str
) -> None:
    """Whatever the schema is called: the server refuses channels with names of more than 63 bytes."""
    requests, queue = Requests(schema), Queue(schema)
    listening = await connect_target()
    await listening.execute(f'LISTEN "{queue.channel}"')
    if schema != SCHEMA:
        await connection.execute(f'ALTER SCHEMA cdcsync RENAME TO "{schema}"')
    try:
        async with connection.transaction():
            await requests.add(connection, "notes", "resync", rewrite=False, filter_=None)
        notices = [notice async for notice in listening.notifies(timeout=30, stop_after=1)]
    finally:
        if schema != SCHEMA:
            await connection.execute(f'ALTER SCHEMA "{schema}" RENAME TO cdcsync')
    assert [(notice.channel, notice.payload) for notice in notices] == [(queue.channel, "notes")]


async def open_ones(connection: Connection) -> list[tuple[object, ...]]:
    cursor = await connection.execute(
        "SELECT id, kind, rewrite, cursor FROM cdcsync.backfills WHERE index_name = 'articles'"
        " AND state IN ('requested', 'running', 'paused') ORDER BY id"
    )
    return await cursor.fetchall()


@pytest.mark.parametrize("state", ["requested", "running", "paused"])
async def test_a_reload_takes_the_place_of_the_loads_that_are_open(connection: Connection, state: str) -> None:
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await end(connection, load, state)
    replay, other = (
        await add(connection),
        await REQUESTS.add(connection, "notes", "initial", rewrite=False, filter_=None),
    )
    async with connection.transaction():
        await REQUESTS.reload(connection, "articles", rewrite=False)
        newest = await REQUESTS.reload(connection, "articles", rewrite=False)

    assert await open_ones(connection) == [(replay, "replay", False, None), (newest, "resync", False, None)]
    assert [one.id for one in [await next_one(connection, "notes")] if one is not None] == [other]


@pytest.mark.parametrize("state", ["running", "failed", "cancelled", "done"])
async def test_a_reload_chunks_again_where_the_load_before_it_did_not_get_through(
    connection: Connection, state: str
) -> None:
    load = await REQUESTS.add(connection, "articles", "resync", rewrite=True, filter_=None)
    await end(connection, load, state)
    async with connection.transaction():
        again = await REQUESTS.reload(connection, "articles", rewrite=False)
    assert await open_ones(connection) == [(again, "resync", state != "done", None)]


async def test_a_reload_is_as_slow_as_the_load_that_it_replaces_which_names_it(connection: Connection) -> None:
    load = await REQUESTS.add(connection, "articles", "resync", rewrite=False, filter_=None, max_rows_per_s=50)
    async with connection.transaction():
        again = await REQUESTS.reload(connection, "articles", rewrite=False)

    before, after = await HISTORY.one(connection, load), await HISTORY.one(connection, again)
    assert before is not None
    assert after is not None
    assert (before.state, before.error) == ("cancelled", f"replaced by request {again}")
    assert (after.max_rows_per_s, after.error) == (50, None)


async def test_a_replay_that_the_configuration_asks_for_cannot_be_cancelled_and_is_replaced_by_the_next(
    connection: Connection,
) -> None:
    async with connection.transaction():
        first = await REQUESTS.follow_configuration(connection, "articles", rewrite=True)
    of_an_operator, elsewhere = await add(connection), await add(connection, "notes")
    async with connection.transaction():
        partitions = await REQUESTS.add(
            connection, "articles", "replay", rewrite=False, filter_=None, phase="orphans", owed=True
        )
        second = await REQUESTS.follow_configuration(connection, "articles", rewrite=False)

    before, after = await HISTORY.one(connection, first), await HISTORY.one(connection, second)
    assert before is not None
    assert after is not None
    assert (before.state, before.error) == ("cancelled", f"replaced by request {second}")
    assert (after.kind, after.rewrite) == ("replay", True)
    assert await REQUESTS.owed(connection, "articles") == [partitions, second]
    assert await REQUESTS.action(connection, "articles", "cancel") == [of_an_operator]
    assert await REQUESTS.action(connection, "articles", "pause") == [partitions, second]

    async with connection.transaction():
        short = await REQUESTS.add(connection, "notes", "verify", rewrite=False, filter_=None, keys=[("1",)])
    assert await REQUESTS.action(connection, "notes", "pause") == [elsewhere]
    assert await REQUESTS.action(connection, "notes", "cancel") == [elsewhere, short]


async def test_a_command_asks_for_a_request_of_a_worker_of_the_version_before(connection: Connection) -> None:
    await connection.execute("ALTER TABLE cdcsync.backfills DROP COLUMN up_to")

    async with connection.transaction():
        id_ = await REQUESTS.add(connection, "articles", "verify", rewrite=False, filter_=None, keys=[("1",)])

    request = await HISTORY.one(connection, id_)
    assert request is not None
    assert (request.kind, request.keyed, await QUEUE.keys(connection, request, 0, 5)) == ("verify", True, [("1",)])


async def test_a_comparison_that_was_paused_and_resumed_does_not_see_what_changes_from_then_on(
    connection: Connection,
) -> None:
    await REQUESTS.compare(connection, "articles")
    await REQUESTS.compare(connection, "articles")
    assert len(await open_ones(connection)) == 1
    request = await QUEUE.oldest_comparison(connection, ["articles"])
    assert request is not None
    await QUEUE.start(connection, request, None)
    await REQUESTS.action(connection, "articles", "pause")
    await REQUESTS.action(connection, "articles", "resume")
    await REQUESTS.compare(connection, "articles")
    assert len(await open_ones(connection)) == 2
