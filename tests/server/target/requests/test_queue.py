"""Requests as the worker serves them: which is next, how it begins and ends, and what is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.model.requests import Kind
from cdcsync.postgres.sessions import Connection
from tests.support.requests import HISTORY, QUEUE, REQUESTS, add, end, fill, next_one, reading_few

pytestmark = [pytest.mark.server, pytest.mark.anyio, pytest.mark.usefixtures("articles_and_notes")]

KINDS: tuple[Kind, ...] = ("initial", "replay", "resync", "verify")


async def test_requests_are_served_in_the_order_they_came_and_only_for_indexes_that_are_asked_about(
    connection: Connection,
) -> None:
    first, second, third = await add(connection), await add(connection, "notes"), await add(connection)
    served = []
    while (request := await next_one(connection)) is not None:
        served.append(request.id)
        await end(connection, request.id, "done")
    assert served == [first, second, third]

    again = await add(connection, "notes")
    assert await next_one(connection, "articles") is None
    assert (await next_one(connection, "notes") or request).id == again  # type: ignore[union-attr]


async def test_a_short_request_of_another_index_goes_before_one_that_reads_a_table(connection: Connection) -> None:
    async def ask(index: str, kind: Kind, **how: Any) -> int:
        async with connection.transaction():
            return await REQUESTS.add(connection, index, kind, rewrite=False, **{"filter_": None, **how})

    load = await ask("articles", "initial")
    behind_it = await ask("articles", "verify", keys=[("1",)])
    whole = await ask("notes", "replay", owed=True)
    assert (await next_one(connection) or 0).id == load  # type: ignore[union-attr]
    await end(connection, whole, "done")

    of_partitions = await ask("notes", "replay", filter_="id > 5", owed=True)
    assert (await next_one(connection) or 0).id == of_partitions  # type: ignore[union-attr]
    await end(connection, of_partitions, "done")
    documents = [
        await ask("notes", "related", filter_="id = 7"),
        await ask("notes", "replay", phase="orphans", owed=True),
        await ask("notes", "verify", keys=[("1",)]),
        await ask("notes", "replay", filter_="id > 5"),
    ]
    served = []
    while (request := await next_one(connection)) is not None:
        served.append(request.id)
        await end(connection, request.id, "done")
    assert served == [*documents[:3], load, behind_it, documents[3]]


@pytest.mark.parametrize("state", ["paused", "done", "failed", "cancelled"])
async def test_what_is_paused_or_has_ended_is_not_served(connection: Connection, state: str) -> None:
    first, second = await add(connection), await add(connection)
    await end(connection, first, state)
    request = await next_one(connection)
    assert request is not None
    assert request.id == second


async def test_a_request_that_was_begun_is_taken_up_where_it_was(connection: Connection) -> None:
    await add(connection)
    asked = await next_one(connection)
    assert asked is not None
    await QUEUE.start(connection, asked, 100)
    await connection.execute('UPDATE cdcsync.backfills SET cursor = \'{"a,b","2"}\', rows_done = 7')

    begun = await next_one(connection)
    assert begun is not None
    assert (begun.state, begun.cursor, begun.rows_done, begun.rows_total) == ("running", ("a,b", "2"), 7, 100)
    assert begun.started_at is not None

    # Beginning again, after a restart, changes neither the start nor the total.
    await QUEUE.start(connection, begun, 200)
    assert await next_one(connection) == begun


async def test_a_request_cancelled_before_it_begins_stays_cancelled(connection: Connection) -> None:
    await add(connection)
    request = await next_one(connection)
    assert request is not None
    await end(connection, request.id, "cancelled")
    assert not await QUEUE.start(connection, request, 1)
    assert (await HISTORY.one(connection, request.id) or request).state == "cancelled"


async def test_a_request_that_failed_says_why_and_is_not_served_again(connection: Connection) -> None:
    await add(connection)
    request = await next_one(connection)
    assert request is not None
    assert await QUEUE.fail(connection, request, "column gone")
    assert not await QUEUE.fail(connection, request, "column gone, again")
    assert await next_one(connection) is None
    cursor = await connection.execute("SELECT state, error, finished_at IS NOT NULL FROM cdcsync.backfills")
    assert await cursor.fetchall() == [("failed", "column gone", True)]


async def test_a_comparison_waits_for_the_load_of_its_index_and_is_asked_for_once(connection: Connection) -> None:
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    for index in ("articles", "articles", "notes"):
        await REQUESTS.compare(connection, index)

    other = await QUEUE.oldest_comparison(connection, ["articles", "notes"])
    await end(connection, load, "done")
    mine = await QUEUE.oldest_comparison(connection, ["articles"])

    assert other is not None
    assert mine is not None
    assert (other.index, mine.index) == ("notes", "articles")
    cursor = await connection.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'compare'")
    assert await cursor.fetchone() == (2,)

    await QUEUE.start(connection, mine, None)
    await REQUESTS.compare(connection, "articles")
    cursor = await connection.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'compare'")
    assert await cursor.fetchone() == (3,), "one that has begun does not see what is done now"


async def test_what_has_ended_is_forgotten_in_time_but_not_the_load_that_an_index_rests_on(
    connection: Connection,
) -> None:
    ids = {kind: await REQUESTS.add(connection, "articles", kind, rewrite=False, filter_=None) for kind in KINDS}
    open_one = await REQUESTS.add(connection, "articles", "verify", rewrite=False, filter_=None)
    await connection.execute("INSERT INTO cdcsync.backfill_keys SELECT id, 1, '{7}' FROM cdcsync.backfills")
    await connection.execute("INSERT INTO cdcsync.differences SELECT id, '{7}', 'stale' FROM cdcsync.backfills")

    async def left(age: str) -> tuple[list[int], list[int], list[int]]:
        await connection.execute(
            "UPDATE cdcsync.backfills SET state = 'done', finished_at = clock_timestamp() - %s::interval"
            " WHERE id = ANY(%s)",
            [age, list(ids.values())],
        )
        await QUEUE.prune(connection)
        found = []
        for table, column in (("backfill_keys", "backfill_id"), ("differences", "backfill_id"), ("backfills", "id")):
            cursor = await connection.execute(f"SELECT DISTINCT {column} FROM cdcsync.{table} ORDER BY 1".encode())
            found.append([row[0] for row in await cursor.fetchall()])
        return found[0], found[1], found[2]

    everything = sorted([*ids.values(), open_one])
    assert await left("1 second") == ([open_one], everything, everything)
    assert await left("1 day") == ([open_one], [open_one], everything)
    assert await left("8 days") == ([open_one], [open_one], sorted([ids["initial"], ids["resync"], open_one]))


async def test_pruning_reads_only_the_requests_that_have_keys_or_go(connection: Connection) -> None:
    await fill(connection)
    cursor = await connection.execute("SELECT max(id) FROM cdcsync.backfills")
    (ended,) = await cursor.fetchone() or (0,)
    async with connection.transaction():
        kept = await REQUESTS.add(connection, "notes", "verify", rewrite=False, filter_=None, keys=[("1",), ("2",)])
    await connection.execute(
        "INSERT INTO cdcsync.backfill_keys (backfill_id, place, key) SELECT %s, n, '{1}' FROM generate_series(1, 9) n",
        [ended],
    )
    await connection.execute("INSERT INTO cdcsync.differences VALUES (%s, '{1}', 'stale')", [ended])
    await connection.execute(
        "UPDATE cdcsync.backfills SET finished_at = now() - interval '8 days' WHERE id < (SELECT min(id) + 10"
        " FROM cdcsync.backfills)"
    )
    async with reading_few(connection):
        await QUEUE.prune(connection)
    for statement, expected in (
        ("SELECT DISTINCT backfill_id FROM cdcsync.backfill_keys", [(kept,)]),
        ("SELECT DISTINCT backfill_id FROM cdcsync.differences", []),
        ("SELECT count(*) FROM cdcsync.backfills", [(2 + 20_000 - 8 + 1,)]),
    ):
        assert await (await connection.execute(statement.encode())).fetchall() == expected


async def test_the_keys_of_a_request_go_once_it_has_ended(connection: Connection) -> None:
    async with connection.transaction():
        ids = [
            await REQUESTS.add(connection, "articles", "replay", rewrite=False, filter_=None, keys=[("1",)])
            for _ in range(2)
        ]
    first = await HISTORY.one(connection, ids[0])
    assert first is not None
    for state, left in (("paused", ids), ("done", ids[1:])):
        await end(connection, first.id, state)
        await QUEUE.forget_keys(connection, first)
        cursor = await connection.execute("SELECT backfill_id FROM cdcsync.backfill_keys ORDER BY 1")
        assert [id_ for (id_,) in await cursor.fetchall()] == left
