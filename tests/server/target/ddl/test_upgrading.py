"""An index of an earlier version, with one table of vectors, becomes one of two tiers where it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import psycopg
import pytest

from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl import upgrading
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.upgrading import upgrade_vectors
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, until_blocked, vector_text
from tests.support.kills import Killed, kill_at, points
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]

ONE_TABLE = """
DROP VIEW public.articles_index;
DROP TABLE cdcsync.articles_vectors_1;
CREATE TABLE cdcsync.articles_vectors_1 (
    chunk_id bigint PRIMARY KEY, content_hash bytea NOT NULL, embedding public.vector(3) NOT NULL);
CREATE INDEX articles_vectors_1_hash ON cdcsync.articles_vectors_1 (content_hash);
CREATE INDEX articles_vectors_1_hnsw ON cdcsync.articles_vectors_1 USING hnsw (embedding public.vector_cosine_ops);
COMMENT ON TABLE cdcsync.articles_vectors_1 IS 'cdcsync index articles: vectors by three-numbers';
CREATE VIEW public.articles_index AS SELECT c.id, c.tenant, c.chunk_no, c.content, v.embedding,
    v.content_hash <> c.content_hash AS stale
    FROM cdcsync.articles_chunks AS c JOIN cdcsync.articles_vectors_1 AS v USING (chunk_id);
COMMENT ON VIEW public.articles_index IS 'cdcsync index articles: public.articles with its vectors';
INSERT INTO cdcsync.articles_vectors_1
    SELECT chunk_id, content_hash, format('[%s,%s,%s]', 1 + get_byte(content_hash, 0), 1 + get_byte(content_hash, 1),
        1 + get_byte(content_hash, 2))::public.vector FROM cdcsync.articles_chunks;
TRUNCATE cdcsync.articles_backlog;
"""
"""What an earlier version made of an index that is here already."""

SEARCH = (
    "SELECT id FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>) '[1,200,3]'::public.vector LIMIT 10"
)


async def earlier(open_index: OpenIndex, rows: int = 50) -> LiveIndex:
    index = await open_index(search=None)
    await index.apply(changes(*[document(str(at), f"text {at}") for at in range(rows)]))
    await index.connection.execute(ONE_TABLE.encode())
    return index


async def upgrade(connection: Connection, index: LiveIndex) -> bool:
    done = await upgrade_vectors(connection, SCHEMA, index.spec)
    async with connection.transaction():
        await create_index_relations(connection, SCHEMA, index.spec)
    return done


async def catalog(index: LiveIndex) -> list[tuple[object, ...]]:
    """Return the tables of vectors and their indexes, columns, options, comments and partition bounds."""
    return await index.rows(
        """
        SELECT c.oid::regclass::text, c.relkind, obj_description(c.oid, 'pg_class'), c.reloptions,
               pg_get_expr(c.relpartbound, c.oid), CASE c.relkind WHEN 'i' THEN pg_get_indexdef(c.oid) END,
               array(SELECT format('%s %s %s %s', attname, format_type(atttypid, atttypmod), attnotnull,
                                   pg_get_expr(d.adbin, d.adrelid) LIKE '%settled%')
                     FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                     WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               array(SELECT conname::text FROM pg_constraint WHERE conrelid = c.oid AND contype <> 'n' ORDER BY 1)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'cdcsync' AND c.relname LIKE 'articles_vectors%' ORDER BY 1
        """
    )


async def test_an_index_of_an_earlier_version_keeps_its_vectors_and_its_hnsw_index(open_index: OpenIndex) -> None:
    index = await earlier(open_index)
    before = await index.rows("SELECT chunk_id, content_hash, embedding::text FROM {vectors} ORDER BY 1")
    hnsw = "SELECT relfilenode FROM pg_class WHERE oid = 'cdcsync.articles_vectors_1_hnsw'::regclass"
    built = await index.rows(hnsw)

    assert await upgrade(index.connection, index)

    assert await index.rows("SELECT chunk_id, content_hash, embedding::text FROM {vectors} ORDER BY 1") == before
    assert await index.rows("SELECT DISTINCT tier FROM {vectors}") == [("settled",)]
    assert await index.rows(hnsw) == built
    assert len(await index.rows(SEARCH)) == 10
    assert not await upgrade(index.connection, index)
    await index.apply(changes(document("1", "new", existed=True), inline=["new"]))
    assert await index.rows("SELECT tier FROM {vectors} v JOIN {chunks} c USING (chunk_id) WHERE c.id = 1") == [
        ("fresh",)
    ]
    assert await index.rows("SELECT embedding::text FROM public.articles_index WHERE id = 1") == [(vector_text("new"),)]
    assert await index.faults() == []


async def test_an_upgraded_index_is_as_one_that_is_made_now(open_index: OpenIndex) -> None:
    index = await open_index(search=None)
    await index.connection.execute(
        "CREATE INDEX articles_vectors_1_hnsw ON cdcsync.articles_vectors_1_settled"
        " USING hnsw (embedding public.vector_cosine_ops)"
    )
    made = await catalog(index)
    await index.connection.execute(ONE_TABLE.encode())

    await upgrade(index.connection, index)

    assert await catalog(index) == made


@pytest.mark.parametrize("point", points(upgrading))
async def test_wherever_an_upgrade_is_killed_searches_find_all_and_the_next_start_finishes_it(
    open_index: OpenIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    index = await earlier(open_index)

    kill_at(monkeypatch, upgrading, point)
    session = await connect_target()
    with pytest.raises(Killed):
        await upgrade(session, index)
    await session.close()
    assert len(await index.rows(SEARCH)) == 10

    kill_at(monkeypatch, upgrading, None)
    left = await upgrade(index.connection, index)

    assert left is (point != "tiers committed")
    assert await index.rows("SELECT count(*), min(tier) FROM {vectors}") == [(50, "settled")]


async def test_roles_that_could_read_the_table_of_vectors_still_can(open_index: OpenIndex) -> None:
    index = await earlier(open_index)
    await index.connection.execute(
        "GRANT SELECT ON cdcsync.articles_vectors_1 TO PUBLIC; GRANT SELECT ON public.articles_index TO PUBLIC"
    )

    await upgrade(index.connection, index)

    assert await index.rows(
        "SELECT has_table_privilege('pg_monitor', 'cdcsync.articles_vectors_1', 'SELECT'),"
        " has_table_privilege('pg_monitor', 'public.articles_index', 'SELECT')"
    ) == [(True, True)]


async def test_searches_that_run_are_waited_for_briefly_and_none_waits_long_behind(
    open_index: OpenIndex, connect_target: ConnectTarget
) -> None:
    """A reader stays in its transaction: the upgrade gives up its place in the queue, and later searches pass."""
    index = await earlier(open_index)
    reader, searcher, upgrader = await connect_target(), await connect_target(), await connect_target()
    async with anyio.create_task_group() as tasks, reader.transaction():
        await reader.execute(SEARCH)
        tasks.start_soon(upgrade, upgrader, index)
        await until_blocked(searcher, upgrader)
        for _ in range(20):
            cursor = await searcher.execute(SEARCH)
            assert len(await cursor.fetchall()) == 10

    assert len(await index.rows(SEARCH)) == 10
    assert await index.rows(
        "SELECT relkind::text FROM pg_class WHERE oid = 'cdcsync.articles_vectors_1'::regclass"
    ) == [("p",)]


async def test_searches_go_on_through_the_exchange(open_index: OpenIndex, connect_target: ConnectTarget) -> None:
    index = await earlier(open_index, rows=2_000)
    searchers = [await connect_target() for _ in range(3)]
    upgrader = await connect_target()
    searches = 0
    done = anyio.Event()

    async def search(connection: Connection, statement: str) -> None:
        nonlocal searches
        while not done.is_set():
            cursor = await connection.execute(statement.encode())
            assert len(await cursor.fetchall()) == 10
            searches += 1

    direct = SEARCH.replace("id FROM public.articles_index", "chunk_id FROM cdcsync.articles_vectors_1")
    async with anyio.create_task_group() as tasks:
        for connection, statement in zip(searchers, (SEARCH, SEARCH, direct), strict=True):
            tasks.start_soon(search, connection, statement)
        await upgrade(upgrader, index)
        done.set()

    assert searches


async def test_each_step_gives_up_while_somebody_holds_the_vectors_and_is_done_once_they_are_free(
    open_index: OpenIndex, target: Database
) -> None:
    index = await earlier(open_index)
    vectors = index.names.vectors(1)
    holder = index.connection
    async with await connect(target.dsn, "target") as connection:
        for step, mode in (
            (upgrading._add_columns, "SHARE UPDATE EXCLUSIVE"),
            (upgrading._prove, "SHARE UPDATE EXCLUSIVE"),
            (None, "ACCESS SHARE"),  # a search
        ):
            async with holder.transaction():
                await holder.execute(f"LOCK TABLE cdcsync.articles_vectors_1 IN {mode} MODE".encode())
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    await upgrade_vectors(connection, SCHEMA, index.spec, 1)
            if step is not None:
                await step(connection, vectors)
        assert await upgrade(connection, index)
