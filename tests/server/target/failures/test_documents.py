"""The list of rows that no document could be made of: as true as the chunks, bounded, and free where it is empty."""

from __future__ import annotations

import random
import string
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import cdcsync.target.failures.documents as module
from cdcsync.errors import LeaseLost
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import ChangeSet
from cdcsync.model.rows import Key
from cdcsync.target.failures.documents import Listed, failed_among
from cdcsync.target.failures.listing import Failures
from cdcsync.target.keys import page_of_keys
from cdcsync.target.requests.history import History
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests
from tests.support.failures import ARTICLES, NOTES, Target, failing
from tests.support.indexes import SCHEMA, changes, document, kept

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.server, pytest.mark.anyio]


def good(*keys: str | Key, **settings: Any) -> ChangeSet:
    return changes(*(document(key, "text", carried=()) for key in keys), **settings)


# -- what is listed --------------------------------------------------------------------------------------------------


async def test_a_row_that_fails_is_listed_with_its_reason_and_its_place(indexes: Target) -> None:
    await indexes.apply(articles=failing("1", "2", lsn=0x1_0000_0010, besides=good("3")))

    assert await indexes.listed() == {
        ("1",): ("it fails", 1, "1/10"),
        ("2",): ("it fails", 1, "1/10"),
    }
    assert await failed_among(indexes.connection, SCHEMA, "articles", [("1",), ("3",)]) == {("1",)}


async def test_a_later_failure_counts_and_one_that_is_delivered_again_does_not(indexes: Target) -> None:
    for _ in range(3):
        await indexes.apply(articles=failing("1"))
    assert await indexes.listed() == {("1",): ("it fails", 1, "0/10")}

    await indexes.apply(articles=failing("1", lsn=0x20, error="otherwise"))

    assert await indexes.listed() == {("1",): ("otherwise", 2, "0/20")}


async def test_a_long_reason_is_cut(indexes: Target) -> None:
    await indexes.apply(articles=failing("1", error="e" * 10_000))
    ((error, _, _),) = (await indexes.listed()).values()
    assert error == "e" * module.ERROR_CHARACTERS


async def test_a_key_that_is_too_long_for_the_list_is_counted_and_pauses_nothing(indexes: Target) -> None:
    # A number, which is half as long in an index of numbers; a random one, as text would be compressed otherwise.
    long = "9" + "".join(random.Random(5).choices(string.digits, k=4_000))
    await indexes.apply(articles=failing("1", long))
    assert await indexes.counted() == Listed(1, 1)


async def test_indexes_list_their_own_rows_by_any_key(indexes: Target) -> None:
    odd = ('a "quoted", {braced}\\', "7")
    await indexes.apply(articles=failing("7"), notes=failing(odd, ("b", "7")))
    assert (await indexes.listed()).keys() == {("7",)}
    assert (await indexes.listed("notes")).keys() == {odd, ("b", "7")}

    await indexes.apply(articles=changes(truncated=True), notes=good(odd))

    assert await indexes.listed() == {}
    assert (await indexes.listed("notes")).keys() == {("b", "7")}


@pytest.mark.parametrize(
    "after",
    [
        good("1"),
        changes(kept("1")),
        changes(deleted=["1"]),
        changes(absent=["1"]),
        changes(truncated=True),
        good("3", deleted=["1"]),
    ],
    ids=["made", "unchanged", "deleted", "absent", "truncated", "moved"],
)
async def test_a_row_is_struck_off_once_it_is_made_or_gone(indexes: Target, after: ChangeSet) -> None:
    await indexes.apply(articles=failing("1", "2"))
    await indexes.apply(articles=after)
    assert (await indexes.listed()).keys() == (set() if after.truncated else {("2",)})


async def test_a_moved_row_that_fails_is_listed_under_its_new_key(indexes: Target) -> None:
    await indexes.apply(articles=failing("1"))
    await indexes.apply(articles=failing("2", lsn=0x20, besides=changes(deleted=["1"])))
    assert (await indexes.listed()).keys() == {("2",)}


async def test_a_row_that_fails_after_a_truncation_in_the_same_batch_is_listed(indexes: Target) -> None:
    await indexes.apply(articles=failing("1"))
    await indexes.apply(articles=failing("2", besides=changes(truncated=True)))
    assert (await indexes.listed()).keys() == {("2",)}


async def test_a_key_that_is_written_otherwise_is_another(indexes: Target) -> None:
    await indexes.apply(articles=failing("1.0"))
    await indexes.apply(articles=changes(absent=["1.00"]))
    assert (await indexes.listed()).keys() == {("1.0",)}
    await indexes.apply(articles=good("1.00", deleted=["1.0"]))
    assert await indexes.listed() == {}


# -- with the batch, or not at all -----------------------------------------------------------------------------------


async def test_nothing_is_listed_or_struck_off_by_a_batch_that_is_not_committed(
    open_listing: Callable[[], Awaitable[Target]],
) -> None:
    first = await open_listing()
    await first.apply(articles=failing("1"))
    await first.connection.execute("UPDATE cdcsync.pipelines SET fence = fence + 1")
    for batch in (failing("2"), good("1"), changes(truncated=True)):
        with pytest.raises(LeaseLost):
            await first.apply(articles=batch)
    assert (await first.listed()).keys() == {("1",)}

    await first.session.aclose()
    second = await open_listing()
    await second.apply(articles=good("1"))

    assert await second.listed() == {}


async def test_what_a_rolled_back_batch_would_have_struck_off_is_struck_off_by_the_next(indexes: Target) -> None:
    await indexes.apply(articles=failing("1"))
    await indexes.connection.execute("UPDATE cdcsync.pipelines SET fence = fence + 1")
    with pytest.raises(LeaseLost):
        await indexes.apply(articles=good("1"))
    await indexes.connection.execute("UPDATE cdcsync.pipelines SET fence = fence - 1")

    await indexes.apply(articles=good("1"))

    assert await indexes.listed() == {}


async def test_the_list_costs_no_statement_while_it_is_empty(indexes: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    execute = psycopg.AsyncCursor.execute

    async def recorded(self: Any, query: Any, *arguments: Any, **settings: Any) -> Any:
        sent.append(query if isinstance(query, str) else getattr(query, "as_string", lambda _: str(query))(None))
        return await execute(self, query, *arguments, **settings)

    async def asked(batch: ChangeSet) -> int:
        sent.clear()
        await indexes.apply(articles=batch)
        assert sent
        return sum("failed_documents" in statement for statement in sent)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", recorded)
    assert await asked(good("1")) == 1  # nobody knows yet
    assert await asked(good("2", deleted=["1"])) == 0
    assert await asked(changes(truncated=True)) == 0
    assert await asked(failing("3")) == 1
    assert await asked(good("4")) == 1
    assert await asked(good("3")) == 1
    assert await asked(good("5")) == 1  # it was the last one
    assert await asked(good("6")) == 0


# -- how much is listed ----------------------------------------------------------------------------------------------


@pytest.fixture
async def narrow(open_listing: Callable[[], Awaitable[Target]], monkeypatch: pytest.MonkeyPatch) -> Target:
    """Indexes that list three rows."""
    monkeypatch.setattr(module, "MOST", 3)
    return await open_listing()


async def request(target: Target, **settings: Any) -> int:
    """Ask for a backfill and note that it is being served."""
    requests, connection = Requests(SCHEMA), target.connection
    arguments = {"rewrite": False, "filter_": None, **settings}
    async with connection.transaction():
        id_ = await requests.add(connection, "articles", arguments.pop("kind", "replay"), **arguments)
    one = await History(SCHEMA).one(connection, id_)
    assert one is not None
    await Queue(SCHEMA).start(connection, one, None)
    return id_


async def test_more_rows_than_there_is_room_for_are_counted_and_not_listed(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"12345"))
    assert await narrow.counted() == Listed(3, 2)

    await narrow.apply(articles=failing(*"12345", lsn=0x20, error="again"))

    assert await narrow.counted() == Listed(3, 4)
    found = await narrow.listed()
    assert sorted(found.values()) == [("again", 2, "0/20")] * 3 + [(module.NO_ROOM, 4, "0/20")]
    assert tuple(key for key in found if not key) == ((),)


async def test_room_that_comes_free_is_used_and_the_list_stays_incomplete(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"1234"))
    listed = [key for key in await narrow.listed() if key]
    await narrow.apply(articles=changes(deleted=listed))
    assert await narrow.counted() == Listed(0, 1)

    await narrow.apply(articles=failing(*"567", lsn=0x20))

    assert await narrow.counted() == Listed(3, 1)


async def test_a_truncation_makes_the_list_whole(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"1234"))
    await narrow.apply(articles=changes(truncated=True))
    assert await narrow.counted() == Listed()


async def test_a_reading_of_the_whole_table_in_which_all_have_room_makes_the_list_whole(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"1234"))
    id_ = await request(narrow)
    await narrow.apply(PageEnd(id_, "rows", ("2",), 2, False), articles=good("1", "2"))
    assert await narrow.counted() == Listed(1, 1)

    await narrow.apply(PageEnd(id_, "rows", ("4",), 4, True), articles=failing("3", "4", lsn=0x30))

    assert await narrow.counted() == Listed(2, 0)


async def test_a_resync_ends_with_its_orphans_and_begins_with_an_empty_list(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"1234"))
    async with narrow.connection.transaction():
        id_ = await Requests(SCHEMA).reload(narrow.connection, "articles", rewrite=False)
    assert await narrow.counted() == Listed()
    one = await History(SCHEMA).one(narrow.connection, id_)
    assert one is not None
    await narrow.apply(articles=failing(*"1234"))
    await Queue(SCHEMA).start(narrow.connection, one, None)

    await narrow.apply(PageEnd(id_, "orphans", None, 4, True))

    assert await narrow.counted() == Listed(3, 0)


@pytest.mark.parametrize(
    "settings",
    [{"keys": [("1",)]}, {"filter_": "id > 3"}, {"phase": "orphans"}, {"late": True}],
    ids=["of some keys", "of some rows", "of none", "that met more than there is room for"],
)
async def test_any_other_reading_leaves_it_incomplete(narrow: Target, settings: dict[str, Any]) -> None:
    late = settings.pop("late", False)
    await narrow.apply(articles=failing(*"1234"))
    id_ = await request(narrow, **settings)
    if late:
        await narrow.apply(articles=failing("5", lsn=0x20))

    await narrow.apply(PageEnd(id_, settings.get("phase", "rows"), None, 1, True))

    assert (await narrow.counted()).unlisted == (2 if late else 1)


# -- what commands ask -----------------------------------------------------------------------------------------------


async def test_the_keys_of_an_index_are_those_of_documents_and_of_failures_in_order(indexes: Target) -> None:
    await indexes.apply(articles=failing("2", "10", besides=good("1", "3", "11")), notes=failing(("b", "1")))

    async def pages(limit: int) -> list[Key]:
        found: list[Key] = []
        while page := await page_of_keys(indexes.connection, SCHEMA, ARTICLES, found[-1] if found else None, limit):
            found += page
        return found

    for limit in (1, 2, 100):
        assert await pages(limit) == [("1",), ("2",), ("3",), ("10",), ("11",)]
    assert await page_of_keys(indexes.connection, SCHEMA, NOTES, None, 5) == [("b", "1")]


async def test_a_target_of_before_the_list_has_no_failed_documents(indexes: Target) -> None:
    await indexes.connection.execute("DROP TABLE cdcsync.failed_documents")
    failures = Failures(indexes.connection, SCHEMA, ARTICLES)

    assert await failures.some(10) == []
    assert await failures.listed() == Listed()
    assert await failures.discard() == 0
    assert await failed_among(indexes.connection, SCHEMA, "articles", [("1",)]) == set()


async def test_the_list_goes_with_its_index(indexes: Target) -> None:
    await indexes.apply(articles=failing("1"), notes=failing(("b", "1")))
    await indexes.connection.execute("DELETE FROM cdcsync.indexes WHERE name = 'articles'")
    assert await indexes.listed() == {}
    assert (await indexes.listed("notes")).keys() == {("b", "1")}


async def test_the_list_says_of_itself_what_it_is(indexes: Target) -> None:
    cursor = await indexes.connection.execute(
        "SELECT attname, obj_description(attrelid, 'pg_class') LIKE 'cdcsync: %%',"
        " col_description(attrelid, attnum) IS NOT NULL FROM pg_attribute"
        " WHERE attrelid = 'cdcsync.failed_documents'::regclass AND attname = ANY(%s)",
        [["error", "attempts", "commit_lsn"]],
    )
    found: Sequence[tuple[Any, ...]] = await cursor.fetchall()
    assert len(found) == 3
    assert all(ours and described for _, ours, described in found)
