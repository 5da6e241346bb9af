"""Questions about requests: which one speaks for an index, and which loaded it."""

from __future__ import annotations

import random

import pytest

from cdcsync.model.requests import Kind
from cdcsync.postgres.sessions import Connection
from tests.support.requests import HISTORY, REQUESTS, add, end, fill, reading_few

pytestmark = [pytest.mark.server, pytest.mark.anyio, pytest.mark.usefixtures("articles_and_notes")]

LOADS: tuple[tuple[str, Kind], ...] = (("articles", "initial"), ("articles", "resync"), ("notes", "initial"))


async def test_an_index_is_spoken_for_by_the_request_that_is_served_or_else_by_the_next_or_the_last(
    connection: Connection,
) -> None:
    async def present() -> list[int]:
        return [request.id for request in await HISTORY.present(connection, ["articles"])]

    assert await present() == []
    first, second, third = await add(connection), await add(connection), await add(connection)
    await add(connection, "notes")
    await end(connection, second, "running")
    assert await present() == [second]
    for ended, expected in ((second, first), (first, third), (third, third)):
        await end(connection, ended, "done")
        assert await present() == [expected]
    await end(connection, first, "paused")
    assert await present() == [first]


async def test_the_last_load_of_an_index_is_no_replay_and_is_found_after_it_ended(connection: Connection) -> None:
    loads = [await REQUESTS.add(connection, index, kind, rewrite=False, filter_=None) for index, kind in LOADS]
    await end(connection, loads[1], "done")
    await add(connection)

    load = await HISTORY.last_load(connection, "articles")
    all_of_them = await HISTORY.last_loads(connection)

    assert load is not None
    assert (load.id, load.read_all) == (loads[1], True)
    assert {name: one.id for name, one in all_of_them.items()} == {"articles": loads[1], "notes": loads[2]}


async def test_what_speaks_for_an_index_is_the_same_whatever_requests_there_are(connection: Connection) -> None:
    states = ("requested", "running", "paused", "done", "failed", "cancelled")
    for seed in range(40):
        chosen = random.Random(seed)
        async with connection.transaction(force_rollback=True):
            for _ in range(chosen.randrange(12)):
                kind: Kind = chosen.choice(("initial", "resync", "replay", "related"))
                id_ = await REQUESTS.add(
                    connection, chosen.choice(("articles", "notes")), kind, rewrite=False, filter_=None
                )
                await end(connection, id_, chosen.choice(states[chosen.choice((0, 3)) :]))
            cursor = await connection.execute(
                "SELECT DISTINCT ON (index_name) id FROM cdcsync.backfills ORDER BY index_name,"
                " array_position(ARRAY['running', 'requested', 'paused'], state),"
                " CASE WHEN state IN ('running', 'requested', 'paused') THEN id ELSE -id END"
            )
            expected = [id_ for (id_,) in await cursor.fetchall()]
            present = await HISTORY.present(connection, ["notes", "articles", "notes", "nosuch"])
            assert [one.id for one in present] == expected
            cursor = await connection.execute(
                "SELECT index_name, max(id) FROM cdcsync.backfills WHERE kind IN ('initial', 'resync') GROUP BY 1"
            )
            loads = await HISTORY.last_loads(connection)
            assert {name: one.id for name, one in loads.items()} == dict(await cursor.fetchall())


async def test_ended_requests_are_not_read_again_to_learn_what_speaks_for_an_index(connection: Connection) -> None:
    await fill(connection)
    async with reading_few(connection):
        present = await HISTORY.present(connection, ["articles", "notes"])
    assert [(one.index, one.kind) for one in present] == [("articles", "related"), ("notes", "initial")]
    async with reading_few(connection):
        loads = [await HISTORY.last_load(connection, index) for index in ("articles", "notes")]
    async with reading_few(connection):
        assert list((await HISTORY.last_loads(connection)).values()) == loads
    assert [load.kind for load in loads if load is not None] == ["initial", "initial"]
