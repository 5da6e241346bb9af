"""Rebuilding documents for rows of related tables: how what many changes ask for comes together."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.model.changeset import Rebuild
from cdcsync.postgres.sessions import Connection
from cdcsync.target.requests.rebuilds import MOST_REBUILDS, Rebuilds
from tests.support.indexes import SCHEMA
from tests.support.requests import HISTORY, QUEUE, REQUESTS, end, next_one

pytestmark = [pytest.mark.server, pytest.mark.anyio, pytest.mark.usefixtures("articles_and_notes")]

REBUILDS = Rebuilds(SCHEMA)


async def test_a_rebuild_that_chunks_again_still_does_in_the_place_of_many(connection: Connection) -> None:
    """One request takes the place of those that wait once they are too many."""
    for at in range(MOST_REBUILDS):
        wanted = Rebuild("comments", f"t.id = {at}", rewrite=at == 3)
        await REBUILDS.ask(connection, "articles", wanted)
    first = await QUEUE.next_open(connection, ["articles"])
    assert first is not None
    assert not first.rewrite

    await REBUILDS.ask(connection, "articles", Rebuild(None, None, (("1",),)))

    whole = await QUEUE.next_open(connection, ["articles"])
    assert whole is not None
    assert (whole.kind, whole.filter, whole.keyed, whole.rewrite) == ("related", None, False, True)


async def test_a_rebuild_asks_for_what_the_request_that_is_served_has_read_already(connection: Connection) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")

    async def bounds() -> list[tuple[str, list[str] | None]]:
        cursor = await connection.execute("SELECT state, up_to FROM cdcsync.backfills ORDER BY id")
        return await cursor.fetchall()

    await REBUILDS.ask(connection, "articles", wanted)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running' WHERE id = 1")
    for key in ("5", "8"):
        await REBUILDS.ask(connection, "articles", msgspec.structs.replace(wanted, read=(1, (key,))))
        assert await bounds() == [("running", None), ("requested", [key])]
    await REBUILDS.ask(connection, "articles", Rebuild("customer", "t.customer_id = 2", read=(1, ("8",))))
    assert (await bounds())[2:] == [("requested", None)]
    # Nobody knows what a page sees that is being read.
    await REBUILDS.ask(connection, "articles", wanted)
    assert await bounds() == [("running", None), ("requested", None), ("requested", None)]

    # What was read while it was served is not read again, and so has to be asked for once it is through.
    await connection.execute("UPDATE cdcsync.backfills SET up_to = '{8}' WHERE id = 2")
    await end(connection, 1, "done")
    await REBUILDS.ask(connection, "articles", msgspec.structs.replace(wanted, read=(1, ("9",))))
    assert await bounds() == [("done", None), ("requested", None), ("requested", None)]


async def test_a_rebuild_does_not_rely_on_a_request_that_reads_a_part(connection: Connection) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")
    await REQUESTS.add(connection, "articles", "related", rewrite=False, filter_=wanted.condition, up_to=("9",))
    served = await next_one(connection)
    assert served is not None
    assert (served.up_to, served.read_all) == (("9",), False)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', cursor = '{5}'")

    await REBUILDS.ask(connection, "articles", msgspec.structs.replace(wanted, read=(1, ("5",))))

    cursor = await connection.execute("SELECT up_to FROM cdcsync.backfills ORDER BY id")
    assert await cursor.fetchall() == [(["9"],), (None,)]


@pytest.mark.parametrize("served", ["done", "running"])
async def test_a_request_that_is_to_read_more_than_when_it_was_looked_at_is_not_begun_as_it_was(
    connection: Connection, served: str
) -> None:
    wanted = Rebuild("customer", "t.customer_id = 1")
    await REBUILDS.ask(connection, "articles", wanted)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running'")
    await REBUILDS.ask(connection, "articles", msgspec.structs.replace(wanted, read=(1, ("5",))))
    await end(connection, 1, "done")
    looked_at = await next_one(connection)
    assert looked_at is not None
    assert (looked_at.id, looked_at.up_to) == (2, ("5",))

    # It waits meanwhile for its rows to be counted, and a change comes that relies on it.
    await connection.execute("UPDATE cdcsync.backfills SET state = %s WHERE id = 1", [served])
    await REBUILDS.ask(connection, "articles", msgspec.structs.replace(wanted, read=(1, ("8",))))
    assert not await QUEUE.start(connection, looked_at, 5)
    await end(connection, 1, "done")

    now = await next_one(connection)
    assert now is not None
    assert (now.id, now.state, now.up_to) == (2, "requested", None if served == "done" else ("8",))
    assert await QUEUE.start(connection, now, 8)
    begun = await HISTORY.one(connection, now.id)
    assert begun is not None
    assert begun.state == "running"


async def test_keys_come_together_in_a_request_that_has_not_begun(connection: Connection) -> None:
    async def wanted() -> list[tuple[int, list[str], int]]:
        cursor = await connection.execute(
            "SELECT b.id, array_agg(k.key[1] || '/' || k.key[2] ORDER BY k.place), b.rows_total FROM cdcsync.backfills"
            " AS b JOIN cdcsync.backfill_keys AS k ON k.backfill_id = b.id GROUP BY b.id ORDER BY b.id"
        )
        return await cursor.fetchall()

    odd = 'quote " brace { back \\ é'
    for keys in ((("1", "a"), ("2", "b")), (("2", "b"), ("3", odd)), (("1", "a"),)):
        await REBUILDS.ask(connection, "articles", Rebuild(None, None, keys))
    await REBUILDS.ask(connection, "notes", Rebuild(None, None, (("1", "a"),)))
    together = ["1/a", "2/b", f"3/{odd}"]
    assert await wanted() == [(1, together, 3), (2, ["1/a"], 1)]

    # One that chunks documents again, and one that has begun, are other requests.
    await REBUILDS.ask(connection, "articles", Rebuild(None, None, (("1", "a"),), rewrite=True))
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', started_at = now() WHERE id = 1")
    for key in ("8", "9"):
        await REBUILDS.ask(connection, "articles", Rebuild(None, None, ((key, "x"),)))
    assert await wanted() == [(1, together, 3), (2, ["1/a"], 1), (3, ["1/a"], 1), (4, ["8/x", "9/x"], 2)]


async def test_more_keys_than_a_request_takes_begin_another_one(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.requests.rebuilds.MOST_KEYS", 2)
    for key in ("1", "2", "3"):
        await REBUILDS.ask(connection, "articles", Rebuild(None, None, ((key,),)))
    cursor = await connection.execute("SELECT rows_total FROM cdcsync.backfills ORDER BY id")
    assert await cursor.fetchall() == [(2,), (1,)]
