"""The list of failures: shown by key, and given up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

import cdcsync.target.failures.documents as module
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import MAX_ATTEMPTS
from cdcsync.target.failures.documents import Listed, forget_failed
from cdcsync.target.failures.listing import Failures
from tests.support.failures import ARTICLES, NOTES, Target, failing
from tests.support.indexes import SCHEMA, changes, document, live_index, make_spec, until_blocked
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def narrow(open_listing: Callable[[], Awaitable[Target]], monkeypatch: pytest.MonkeyPatch) -> Target:
    """Indexes that list three rows."""
    monkeypatch.setattr(module, "MOST", 3)
    return await open_listing()


async def test_failures_show_rows_by_their_key_and_give_them_up(narrow: Target) -> None:
    await narrow.apply(articles=failing(*"1234"), notes=failing(("b", "1")))
    failures = Failures(narrow.connection, SCHEMA, NOTES)

    (one,) = await failures.some(10)

    assert (one.kind, one.key, one.chunk_no, one.error) == ("document", {"region": "b", "id": "1"}, None, "it fails")
    assert (one.attempts, one.next_attempt_at) == (1, None)
    assert await Failures(narrow.connection, SCHEMA, ARTICLES).discard() == 3
    assert await narrow.counted() == Listed()
    assert await failures.listed() == Listed(1, 0)


async def test_rows_that_a_worker_is_writing_are_not_given_up_and_not_waited_for(
    indexes: Target, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await indexes.apply(articles=failing("1", "2"))
    worker = await connect_target()
    async with worker.transaction():
        await worker.execute("UPDATE cdcsync.failed_documents SET attempts = 2 WHERE key = '{1}'")
        assert await forget_failed(indexes.connection, SCHEMA, "articles") == 1
    assert (await indexes.listed()).keys() == {("1",)}


async def test_texts_that_a_worker_is_replacing_or_storing_are_neither_retried_nor_given_up_nor_waited_for(
    indexes: Target, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await indexes.apply(articles=changes(document("1", "one", carried=()), document("2", "two", carried=())))
    failed = f"UPDATE cdcsync.articles_backlog SET attempts = {MAX_ATTEMPTS}, error = 'it fails' WHERE attempts = 0"
    await indexes.connection.execute(failed)
    failures = Failures(indexes.connection, SCHEMA, ARTICLES)
    worker = await connect_target()
    async with worker.transaction():
        await worker.execute("SELECT FROM cdcsync.articles_backlog ORDER BY chunk_id LIMIT 1 FOR UPDATE")
        assert await failures.retry_texts() == 1
        await indexes.connection.execute(failed)
        assert await failures.discard() == 1
    assert await failures.discard() == 1


async def test_a_row_that_is_being_given_up_is_listed_anew_when_it_fails_again(
    indexes: Target, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await indexes.apply(articles=failing("1", "2"))
    operator = await connect_target()
    async with anyio.create_task_group() as tasks, operator.transaction():
        await forget_failed(operator, SCHEMA, "articles")
        tasks.start_soon(lambda: indexes.apply(articles=failing("1", lsn=0x20)))
        await until_blocked(indexes.connection, indexes.session.connection)
    assert await indexes.listed() == {("1",): ("it fails", 1, "0/20")}


async def test_texts_that_fail_are_shown_by_a_key_whose_column_has_any_name(database: Database) -> None:
    spec = make_spec(key={"Key %s": "text"})
    async with live_index(database, spec) as index:
        await index.apply(changes(document("100 %", "text")))
        await index.rows("UPDATE {backlog} SET error = 'refused', attempts = 1 RETURNING 1")

        assert [one.key for one in await Failures(index.connection, SCHEMA, spec).some(10)] == [{"Key %s": "100 %"}]
