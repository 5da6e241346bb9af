"""Other chunks for indexes of every kind at once: of related or many tables, under a condition, by several keys.

All of them migrate beside one another and beside an index that does not, while rows of all tables change and searches
go on by SQL, by the view, by Python and by the tool server. The worker is killed in the middle of the load and of the
exchange.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import psycopg
import pytest

import cdcsync
from cdcsync.config import Serve
from cdcsync.serve.messages import SearchRequest
from cdcsync.serve.service import Caller, Service
from tests.support.configs import Section, configuration
from tests.support.migrations import migrate
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TABLES = (
    "CREATE SCHEMA t_a",
    "CREATE SCHEMA t_b",
    *(f"CREATE TABLE t_{one}.pages (id int PRIMARY KEY, title text)" for one in "ab"),
    *(f"INSERT INTO t_{one}.pages SELECT i, 'page {one} ' || i FROM generate_series(1, 20) i" for one in "ab"),
    "CREATE TABLE customers (id int PRIMARY KEY, name text)",
    "INSERT INTO customers SELECT i, 'customer ' || i FROM generate_series(1, 4) i",
    "CREATE TABLE tickets (id int PRIMARY KEY, subject text, customer_id int, open bool)",
    "INSERT INTO tickets SELECT i, 'ticket ' || i, 1 + i % 4, i % 3 > 0 FROM generate_series(1, 40) i",
    "CREATE TABLE comments (id int PRIMARY KEY, ticket_id int, body text)",
    "ALTER TABLE comments REPLICA IDENTITY FULL",
    "INSERT INTO comments SELECT i, 1 + i % 40, 'comment ' || i FROM generate_series(1, 80) i",
    "CREATE TABLE tags (a int, b text, title text, kind int, PRIMARY KEY (a, b))",
    "INSERT INTO tags SELECT i, 'b' || i % 3, 'tag ' || i, i % 5 FROM generate_series(1, 30) i",
    "CREATE TABLE notes (id int PRIMARY KEY, title text)",
    "INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 10) i",
)

CUSTOMER = {"table": "customers", "on": {"id": "customer_id"}, "text": "{name}"}
COMMENTS = {"table": "comments", "on": {"ticket_id": "id"}, "text": "{body}", "order_by": "id", "separator": "; "}

BEFORE: Mapping[str, Section] = {
    "tickets": {
        "text": "old: {subject} of {customer}",
        "where": "open",
        "columns": ["customer.name"],
        "related": {"customer": CUSTOMER},
    },
    "pages": {"table": None, "tables": ["t_*.pages"], "text": "old: {title}"},
    "tags": {"text": "old: {title}", "columns": ["kind"]},
    "notes": {},
}
AFTER: Mapping[str, Section] = {
    "tickets": {
        "text": "new: {subject} of {customer} with {comments}",
        "where": "id % 7 > 0",
        "columns": ["customer.name"],
        "related": {"customer": CUSTOMER, "comments": COMMENTS},
    },
    "pages": {"table": None, "tables": ["t_*.pages"], "text": "new: {title}"},
    "tags": {"text": "new: {title}", "columns": ["kind"]},
    "notes": {},
}
MIGRATING = ("tickets", "pages", "tags")

_NAME = "(SELECT name FROM customers WHERE id = t.customer_id)"
_BODIES = "(SELECT string_agg(body, '; ' ORDER BY id) FROM comments WHERE ticket_id = t.id)"
_PAGES = " UNION ALL ".join(f"SELECT 't_{one}.pages/' || id, title FROM t_{one}.pages" for one in "abc")
EXPECTED = {
    ("tickets", 1): f"SELECT id::text, concat('old: ', subject, ' of ', {_NAME}) FROM tickets t WHERE open",
    ("tickets", 2): f"SELECT id::text, trim(concat('new: ', subject, ' of ', {_NAME}, ' with ', {_BODIES}))"
    " FROM tickets t WHERE id % 7 > 0",
    ("tags", 1): "SELECT a || '/' || b, 'old: ' || title FROM tags WHERE b <> 'w'",
    ("tags", 2): "SELECT a || '/' || b, 'new: ' || title FROM tags WHERE b <> 'w'",
    ("pages", 1): f"SELECT key, 'old: ' || title FROM ({_PAGES}) AS p (key, title)",
    ("pages", 2): f"SELECT key, 'new: ' || title FROM ({_PAGES}) AS p (key, title)",
}
KEYS = {"tickets": "id::text", "tags": "a || '/' || b", "pages": "source_table || '/' || id"}
WHERE = {"tickets": "true", "tags": "b <> 'w'", "pages": "true"}
"""Which chunks are compared: not those of rows that somebody writes all the time."""
WORD = {"tickets": "ticket", "tags": "tag", "pages": "page"}


def of_every_kind(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    pipeline = make_pipeline(configuration(database.dsn, indexes=BEFORE))
    pipeline.hurry = {"cdcsync.flows.watch.WATCH_S": 0.3}
    for statement in TABLES:
        pipeline.source.execute(statement)
    pipeline.start()
    pipeline.live()
    # A table of the family that comes later; the publication of the worker has it from then on.
    pipeline.source.execute("CREATE SCHEMA t_c")
    pipeline.source.execute("CREATE TABLE t_c.pages (id int PRIMARY KEY, title text)")
    pipeline.source.execute("INSERT INTO t_c.pages VALUES (1, 'page c 1')")
    return pipeline


def change(pipeline: Pipeline, number: int) -> None:
    """Change rows of every table, such that each index has documents that come, change and go."""
    for statement in (
        f"UPDATE tickets SET subject = subject || ', {number}', open = NOT open WHERE id % 5 = {number % 5}",
        f"UPDATE customers SET name = 'customer {number}' WHERE id = {1 + number % 4}",
        f"DELETE FROM comments WHERE id % 40 = {number}",
        f"UPDATE comments SET ticket_id = 1 + (ticket_id + 7) % 40 WHERE id % 9 = {number % 9}",
        f"INSERT INTO tickets VALUES ({100 + number}, 'ticket of step {number}', 1, true)",
        f"UPDATE t_{'abc'[number % 3]}.pages SET title = 'page at {number}' WHERE id % 4 = 1",
        f"UPDATE tags SET title = 'tag at {number}', kind = {number} WHERE a % 6 = {number % 6}",
        f"UPDATE tags SET b = 'moved{number}' WHERE a = {1 + number}",
    ):
        pipeline.source.execute(statement)


def equal(pipeline: Pipeline, *generations: int) -> None:
    """Wait until the chunks of these generations are what the rows of their tables come to, each with its vector."""

    def differing() -> list[str]:
        found = []
        for index in MIGRATING:
            for one in generations:
                stem = index if one == 1 else f"{index}~{one}"
                chunks = pipeline.target.execute(
                    f'SELECT {KEYS[index]}, content FROM cdcsync."{stem}_chunks" WHERE {WHERE[index]}'
                ).fetchall()
                if dict(chunks) != dict(pipeline.source.execute(EXPECTED[index, one]).fetchall()):
                    found.append(stem)
                lacking = pipeline.target.execute(
                    f'SELECT count(*) FROM cdcsync."{stem}_chunks" AS c WHERE {WHERE[index]} AND 1 <> (SELECT'
                    f' count(*) FROM cdcsync."{stem}_vectors_{one}" AS v WHERE v.chunk_id = c.chunk_id'
                    " AND v.content_hash = c.content_hash)"
                ).fetchone()
                if lacking != (0,):
                    found.append(f"vectors of {stem}")
        return found

    until(lambda: not differing(), lambda: f"equal chunks: {differing()}; {pipeline.tail()}")


def of_each(pipeline: Pipeline, action: str, *options: str) -> list[dict[str, Any]]:
    """Take a step of the migration of each index, all at the same time."""
    with ThreadPoolExecutor(len(MIGRATING)) as pool:
        steps = [pool.submit(migrate, pipeline, action, *options, index=index) for index in MIGRATING]
        return [step.result() for step in steps]


def killed_and_begun_again(pipeline: Pipeline) -> None:
    process = pipeline.processes[-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    pipeline.start()


def activated_beside_a_kill(pipeline: Pipeline) -> None:
    """Activate all, and kill the worker as soon as the first has been exchanged."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(of_each, pipeline, "activate")
        exchanged = "SELECT count(*) > 0 FROM cdcsync.indexes WHERE generation = 2 AND name NOT LIKE '%~other'"
        until(lambda: pipeline.target.execute(exchanged).fetchone() == (True,), pipeline.tail)
        killed_and_begun_again(pipeline)
        assert [one["live"] for one in asked.result()] == [2, 2, 2]


def whole_way(pipeline: Pipeline) -> None:
    """Migrate all, and back, and forth again, while rows change; then drop the chunks of before."""
    change(pipeline, 1)
    equal(pipeline, 1)
    pipeline.configure(configuration(pipeline.config.source.dsn, indexes=AFTER))
    assert [one["generation"] for one in of_each(pipeline, "start")] == [2, 2, 2]
    killed_and_begun_again(pipeline)
    change(pipeline, 2)
    filled = (
        "SELECT count(*) FROM cdcsync.indexes AS i JOIN cdcsync.generations AS g ON g.index_name = i.name"
        " WHERE i.name LIKE '%~other' AND i.state = 'live' AND g.state = 'ready'"
    )
    until(lambda: pipeline.target.execute(filled).fetchone() == (3,), pipeline.tail)
    equal(pipeline, 1, 2)
    activated_beside_a_kill(pipeline)
    change(pipeline, 3)
    equal(pipeline, 1, 2)
    assert [one["live"] for one in of_each(pipeline, "rollback")] == [1, 1, 1]
    change(pipeline, 4)
    equal(pipeline, 1, 2)
    assert [one["live"] for one in of_each(pipeline, "activate")] == [2, 2, 2]
    assert [one["dropped"] for one in of_each(pipeline, "drop", "--yes")] == [1, 1, 1]
    change(pipeline, 5)
    equal(pipeline, 2)


class Users:
    """Those who search all the time, and write and wait for what they wrote."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.over = False
        self.answers: Counter[tuple[str, str, str]] = Counter()
        """By who asked, of which index, and by the template of the chunks."""

    def check(self, who: str, index: str, contents: list[str]) -> None:
        kinds = {content.partition(":")[0] for content in contents}
        assert len(kinds) == 1, (who, index, contents)
        self.answers[who, index, kinds.pop()] += 1

    async def by_sql(self) -> None:
        dsn = self.pipeline.config.target.dsn
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not self.over:
                for index in MIGRATING:
                    searched = f"SELECT content FROM cdcsync.{index}_search(%s, k => 20, mode => 'text')"
                    for who, statement in (
                        ("function", searched),
                        ("view", f"SELECT content FROM {index}_index_chunks"),
                    ):
                        given = [WORD[index]] if who == "function" else None
                        cursor = await connection.execute(statement.encode(), given)
                        self.check(who, index, [content for (content,) in await cursor.fetchall()])
                await anyio.sleep(0.05)

    async def by_python(self) -> None:
        served = msgspec.structs.replace(self.pipeline.config, serve=Serve(anonymous=True, requests_per_s=1000))
        async with cdcsync.Index.open(self.pipeline.config, "tickets") as tickets, aclosing(Service(served)) as service:
            while not self.over:
                hits = await tickets.search("ticket", k=5)
                self.check("python", "tickets", [hit.content for hit in hits])
                for index in MIGRATING:
                    answer = await service.search(Caller(), index, SearchRequest(WORD[index], k=5))
                    self.check("serve", index, [hit.content for hit in answer.hits])
                await anyio.sleep(0.05)

    async def who_write(self) -> None:
        """Write a row, wait for the index to have it, and find it: whatever is exchanged meanwhile."""
        dsn, number = self.pipeline.config.target.dsn, 0
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            while not self.over:
                number += 1
                await connection.execute("INSERT INTO tags VALUES (%s, 'w', 'tag of a writer', 0)", [1000 + number])
                cursor = await connection.execute("SELECT pg_current_wal_insert_lsn()::text")
                (lsn,) = await cursor.fetchone() or ("",)
                cursor = await connection.execute("SELECT cdcsync.wait_for('tags', %s::pg_lsn, '60 s')", [lsn])
                assert await cursor.fetchone() == (True,)
                cursor = await connection.execute("SELECT FROM tags_index_chunks WHERE a = %s", [1000 + number])
                assert cursor.rowcount == 1
                await anyio.sleep(0.2)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for user in (self.by_sql, self.by_python, self.who_write):
                tasks.start_soon(user)
            yield
            self.over = True


@pytest.mark.proof
@pytest.mark.timeout(300)
async def test_indexes_of_every_kind_migrate_to_other_chunks_at_once_and_nobody_notices(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = await anyio.to_thread.run_sync(of_every_kind, database, make_pipeline)
    users = Users(pipeline)
    async with users.at_work():
        await anyio.to_thread.run_sync(partial(whole_way, pipeline))
    for index in MIGRATING:
        for who in ("function", "view", "serve"):
            assert users.answers[who, index, "old"], (who, index)
            assert users.answers[who, index, "new"], (who, index)
    await anyio.to_thread.run_sync(pipeline.in_step, "notes")
