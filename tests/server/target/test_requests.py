"""Backfill requests: which is served next, what is known of it, and that the worker hears of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.model.changeset import Rebuild
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.requests import MOST_REBUILDS, Kind, Request, Requests
from tests.support.indexes import SCHEMA, make_spec, register

pytestmark = [pytest.mark.server, pytest.mark.anyio]

REQUESTS = Requests(SCHEMA)
KINDS: tuple[Kind, ...] = ("initial", "replay", "resync", "verify")


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target that has the indexes `articles` and `notes`."""
    connection = await connect_target()
    await create_shared(connection, SCHEMA)
    await connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('s', 'p')")
    for name in ("articles", "notes"):
        await register(connection, make_spec(name=name), slot="s")
    return connection


async def add(connection: Connection, index: str = "articles") -> int:
    return await REQUESTS.add(connection, index, "replay", rewrite=False, filter_=None)


async def next_one(connection: Connection, *indexes: str) -> Request | None:
    return await REQUESTS.oldest_open(connection, list(indexes or ("articles", "notes")))


async def end(connection: Connection, request: int, state: str) -> None:
    await connection.execute("UPDATE cdcsync.backfills SET state = %s WHERE id = %s", [state, request])


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
    await REQUESTS.start(connection, asked, 100)
    await connection.execute('UPDATE cdcsync.backfills SET cursor = \'{"a,b","2"}\', rows_done = 7')

    begun = await next_one(connection)
    assert begun is not None
    assert (begun.state, begun.cursor, begun.rows_done, begun.rows_total) == ("running", ("a,b", "2"), 7, 100)
    assert begun.started_at is not None

    # Beginning again, after a restart, changes neither the start nor the total.
    await REQUESTS.start(connection, begun, 200)
    assert await next_one(connection) == begun


async def test_a_request_cancelled_before_it_begins_stays_cancelled(connection: Connection) -> None:
    await add(connection)
    request = await next_one(connection)
    assert request is not None
    await end(connection, request.id, "cancelled")
    assert not await REQUESTS.start(connection, request, 1)
    assert await REQUESTS.state(connection, request) == "cancelled"


async def test_a_request_that_failed_says_why_and_is_not_served_again(connection: Connection) -> None:
    await add(connection)
    request = await next_one(connection)
    assert request is not None
    await REQUESTS.fail(connection, request, "column gone")
    assert await next_one(connection) is None
    cursor = await connection.execute("SELECT state, error, finished_at IS NOT NULL FROM cdcsync.backfills")
    assert await cursor.fetchall() == [("failed", "column gone", True)]


async def test_the_state_of_a_request_that_is_gone_is_none(connection: Connection) -> None:
    await add(connection)
    request = await next_one(connection)
    assert request is not None
    assert await REQUESTS.state(connection, request) == "requested"
    await connection.execute("DELETE FROM cdcsync.backfills")
    assert await REQUESTS.state(connection, request) is None


async def test_the_latest_request_is_an_open_one_if_there_is_any(connection: Connection) -> None:
    assert await REQUESTS.latest(connection, "articles") is None
    first, second, third = await add(connection), await add(connection), await add(connection)
    await add(connection, "notes")
    for ended, expected in ((third, second), (second, first), (first, third)):
        await end(connection, ended, "done")
        latest = await REQUESTS.latest(connection, "articles")
        assert latest is not None
        assert latest.id == expected
    await end(connection, first, "paused")
    latest = await REQUESTS.latest(connection, "articles")
    assert latest is not None
    assert latest.id == first


@pytest.mark.parametrize("schema", [SCHEMA, "a" * 63, "Ünï code ☃"])
async def test_the_worker_is_woken_when_the_request_commits(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]], schema: str
) -> None:
    """Whatever the schema is called: the server refuses channels with names of more than 63 bytes."""
    requests = Requests(schema)
    listening = await connect_target()
    await listening.execute(f'LISTEN "{requests.channel}"')
    if schema != SCHEMA:
        await connection.execute(f'ALTER SCHEMA cdcsync RENAME TO "{schema}"')
    try:
        async with connection.transaction():
            await requests.add(connection, "notes", "resync", rewrite=False, filter_=None)
        notices = [notice async for notice in listening.notifies(timeout=30, stop_after=1)]
    finally:
        if schema != SCHEMA:
            await connection.execute(f'ALTER SCHEMA "{schema}" RENAME TO cdcsync')
    assert [(notice.channel, notice.payload) for notice in notices] == [(requests.channel, "notes")]


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
        await REQUESTS.prune(connection)
        found = []
        for table, column in (("backfill_keys", "backfill_id"), ("differences", "backfill_id"), ("backfills", "id")):
            cursor = await connection.execute(f"SELECT DISTINCT {column} FROM cdcsync.{table} ORDER BY 1".encode())
            found.append([row[0] for row in await cursor.fetchall()])
        return found[0], found[1], found[2]

    everything = sorted([*ids.values(), open_one])
    assert await left("1 second") == ([open_one], everything, everything)
    assert await left("1 day") == ([open_one], [open_one], everything)
    assert await left("8 days") == ([open_one], [open_one], sorted([ids["initial"], ids["resync"], open_one]))


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

    before, after = await REQUESTS.one(connection, load), await REQUESTS.one(connection, again)
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

    before, after = await REQUESTS.one(connection, first), await REQUESTS.one(connection, second)
    assert before is not None
    assert after is not None
    assert (before.state, before.error) == ("cancelled", f"replaced by request {second}")
    assert (after.kind, after.rewrite) == ("replay", True)
    assert await REQUESTS.owed(connection, "articles") == [partitions, second]
    assert await REQUESTS.action(connection, "articles", "cancel") == [of_an_operator]
    assert await REQUESTS.action(connection, "articles", "pause") == [partitions, second]
    assert await REQUESTS.action(connection, "notes", "cancel") == [elsewhere]


async def test_a_comparison_waits_for_the_load_of_its_index_and_is_asked_for_once(connection: Connection) -> None:
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    for index in ("articles", "articles", "notes"):
        await REQUESTS.compare(connection, index)

    other = await REQUESTS.oldest_comparison(connection, ["articles", "notes"])
    await end(connection, load, "done")
    mine = await REQUESTS.oldest_comparison(connection, ["articles"])

    assert other is not None
    assert mine is not None
    assert (other.index, mine.index) == ("notes", "articles")
    cursor = await connection.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'compare'")
    assert await cursor.fetchone() == (2,)

    await REQUESTS.start(connection, mine, None)
    await REQUESTS.compare(connection, "articles")
    cursor = await connection.execute("SELECT count(*) FROM cdcsync.backfills WHERE kind = 'compare'")
    assert await cursor.fetchone() == (3,), "one that has begun does not see what is done now"


async def test_a_rebuild_that_chunks_again_still_does_in_the_place_of_many(connection: Connection) -> None:
    """One request takes the place of those that wait once they are too many."""
    for at in range(MOST_REBUILDS):
        wanted = Rebuild("comments", f"t.id = {at}", rewrite=at == 3)
        await REQUESTS.rebuild(connection, "articles", wanted)
    first = await REQUESTS.oldest_open(connection, ["articles"])
    assert first is not None
    assert not first.rewrite

    await REQUESTS.rebuild(connection, "articles", Rebuild(None, None, (("1",),)))

    whole = await REQUESTS.oldest_open(connection, ["articles"])
    assert whole is not None
    assert (whole.kind, whole.filter, whole.keyed, whole.rewrite) == ("related", None, False, True)


async def test_a_rebuild_asks_for_what_the_request_that_is_served_has_read_already(connection: Connection) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")

    async def bounds() -> list[tuple[str, list[str] | None]]:
        cursor = await connection.execute("SELECT state, up_to FROM cdcsync.backfills ORDER BY id")
        return await cursor.fetchall()

    async def served_to(key: list[str] | None) -> None:
        await connection.execute("UPDATE cdcsync.backfills SET state = 'running', cursor = %s WHERE id = 1", [key])

    await REQUESTS.rebuild(connection, "articles", wanted)
    await served_to(None)
    await REQUESTS.rebuild(connection, "articles", wanted)
    assert await bounds() == [("running", None)]

    for key in (["5"], ["8"]):
        await served_to(key)
        await REQUESTS.rebuild(connection, "articles", wanted)
        assert await bounds() == [("running", None), ("requested", key)]
    await REQUESTS.rebuild(connection, "articles", Rebuild("customer", "t.customer_id = 2"))
    assert (await bounds())[2:] == [("requested", None)]

    # What was read while it was served is not read again, and so has to be asked for once it is through.
    await end(connection, 1, "done")
    await REQUESTS.rebuild(connection, "articles", wanted)
    assert await bounds() == [("done", None), ("requested", None), ("requested", None)]


async def test_a_rebuild_does_not_rely_on_a_request_that_reads_a_part(connection: Connection) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")
    await REQUESTS.add(connection, "articles", "related", rewrite=False, filter_=wanted.condition, up_to=("9",))
    served = await next_one(connection)
    assert served is not None
    assert (served.up_to, served.read_all) == (("9",), False)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', cursor = '{5}'")

    await REQUESTS.rebuild(connection, "articles", wanted)

    cursor = await connection.execute("SELECT up_to FROM cdcsync.backfills ORDER BY id")
    assert await cursor.fetchall() == [(["9"],), (None,)]


@pytest.mark.parametrize("served", ["done", "running"])
async def test_a_request_that_is_to_read_more_than_when_it_was_looked_at_is_not_begun_as_it_was(
    connection: Connection, served: str
) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")
    await REQUESTS.rebuild(connection, "articles", wanted)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', cursor = '{5}'")
    await REQUESTS.rebuild(connection, "articles", wanted)
    await end(connection, 1, "done")
    looked_at = await next_one(connection)
    assert looked_at is not None
    assert (looked_at.id, looked_at.up_to) == (2, ("5",))

    # It waits meanwhile for its rows to be counted, and a change comes that relies on it.
    await connection.execute("UPDATE cdcsync.backfills SET state = %s, cursor = '{8}' WHERE id = 1", [served])
    await REQUESTS.rebuild(connection, "articles", wanted)
    assert not await REQUESTS.start(connection, looked_at, 5)
    await end(connection, 1, "done")

    now = await next_one(connection)
    assert now is not None
    assert (now.id, now.state, now.up_to) == (2, "requested", None if served == "done" else ("8",))
    assert await REQUESTS.start(connection, now, 8)
    assert await REQUESTS.state(connection, now) == "running"


async def test_a_command_asks_for_a_request_of_a_worker_of_the_version_before(connection: Connection) -> None:
    await connection.execute("ALTER TABLE cdcsync.backfills DROP COLUMN up_to")

    async with connection.transaction():
        id_ = await REQUESTS.add(connection, "articles", "verify", rewrite=False, filter_=None, keys=[("1",)])

    request = await REQUESTS.one(connection, id_)
    assert request is not None
    assert (request.kind, request.keyed, await REQUESTS.keys(connection, request, 0, 5)) == ("verify", True, [("1",)])
