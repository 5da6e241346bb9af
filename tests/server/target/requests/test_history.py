"""Questions about requests: which one speaks for an index, and which loaded it."""

from __future__ import annotations

import pytest

from cdcsync.model.requests import Kind
from cdcsync.postgres.sessions import Connection
from tests.support.requests import HISTORY, REQUESTS, add, end

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
