"""The indexes for keyword and vector search: built once, beside writers, whatever an interrupted build left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import msgspec
import psycopg
import pytest
import structlog

from cdcsync.errors import TargetUnavailable
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.building import build_hnsw, build_search
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    OpenIndex,
    changes,
    document,
    until,
    until_blocked,
    vector_text,
)
from tests.support.relations import rows

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def fill(index: LiveIndex, count: int = 3_000) -> None:
    texts = [f"text {number}" for number in range(count)]
    await index.apply(changes(*[document(str(at), text) for at, text in enumerate(texts)], inline=texts))


async def test_the_index_for_keyword_search_is_built_once_and_at_the_end(open_index: OpenIndex) -> None:
    index = await open_index()
    await fill(index)
    named = "SELECT pg_get_indexdef(to_regclass('cdcsync.articles_chunks_search'))"
    workers = await rows(index.connection, "SHOW max_parallel_maintenance_workers")
    assert await rows(index.connection, named) == [(None,)]

    hnsw = msgspec.structs.replace(index.spec.config.hnsw, build_workers=1)
    spec = msgspec.structs.replace(index.spec, config=msgspec.structs.replace(index.spec.config, hnsw=hnsw))
    assert await build_search(index.connection, SCHEMA, spec)
    assert not await build_search(index.connection, SCHEMA, spec)

    assert "USING gin (search)" in (await rows(index.connection, named))[0][0]
    assert await rows(index.connection, "SHOW max_parallel_maintenance_workers") == workers
    without = msgspec.structs.replace(spec, config=msgspec.structs.replace(spec.config, search=None))
    assert not await build_search(index.connection, SCHEMA, without)


async def test_the_hnsw_index_is_built_once_with_its_parameters(open_index: OpenIndex) -> None:
    index = await open_index()
    spec = index.spec
    hnsw = msgspec.structs.replace(spec.config.hnsw, m=8, ef_construction=32, build_memory="16MB")
    spec = msgspec.structs.replace(spec, config=msgspec.structs.replace(spec.config, hnsw=hnsw))
    before = await rows(index.connection, "SHOW maintenance_work_mem")

    assert await build_hnsw(index.connection, SCHEMA, spec)
    assert not await build_hnsw(index.connection, SCHEMA, spec)

    ((definition,),) = await rows(
        index.connection, "SELECT pg_get_indexdef('cdcsync.articles_vectors_1_hnsw'::regclass)"
    )
    assert "(m='8', ef_construction='32')" in definition
    assert await rows(index.connection, "SHOW maintenance_work_mem") == before


async def test_a_build_that_finds_too_little_shared_memory_is_done_by_one_process(
    index: LiveIndex, connection: Connection
) -> None:
    """Parallel workers share a graph of the size of maintenance_work_mem: no machine has so much."""
    await fill(index, 10)
    await connection.execute("SET min_parallel_table_scan_size = 0")
    hnsw = msgspec.structs.replace(index.spec.config.hnsw, build_memory="2000GB", build_workers=2)
    spec = msgspec.structs.replace(index.spec, config=msgspec.structs.replace(index.spec.config, hnsw=hnsw))

    with structlog.testing.capture_logs() as events:
        assert await build_hnsw(connection, SCHEMA, spec)

    (frugal,) = [event for event in events if event["event"] == "index_build_frugal"]
    assert "shared memory" in frugal["error"]
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('cdcsync.articles_vectors_1_hnsw')"
    assert await rows(connection, valid) == [(True,)]


async def test_an_index_that_an_interrupted_build_left_behind_is_replaced(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """CREATE INDEX CONCURRENTLY waits for older transactions; cancelled there, it leaves an invalid index."""
    await fill(index, 10)
    old, building = await connect_target(), await connect_target()
    failed = []

    async def build() -> None:
        try:
            await build_hnsw(building, SCHEMA, index.spec)
        except psycopg.errors.QueryCanceled:
            failed.append(True)

    async def cancelled() -> bool:
        return bool(failed)

    async with anyio.create_task_group() as tasks, old.transaction():
        await old.execute("UPDATE cdcsync.articles_vectors_1 SET chunk_id = chunk_id")
        tasks.start_soon(build)
        await until_blocked(connection, building)
        await connection.execute("SELECT pg_cancel_backend(%s)", [building.info.backend_pid])
        await until(cancelled)
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('cdcsync.articles_vectors_1_hnsw')"
    assert await rows(connection, valid) == [(False,)]

    assert await build_hnsw(building, SCHEMA, index.spec)
    assert await rows(connection, valid) == [(True,)]
    assert await rows(building, "SHOW maintenance_work_mem") == await rows(connection, "SHOW maintenance_work_mem")


async def test_a_session_that_writes_all_the_time_in_short_transactions_keeps_no_index_from_being_built(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await fill(index, 10)
    writing, building = await connect_target(), await connect_target()
    written: list[int] = []

    async def write() -> None:
        while True:
            async with writing.transaction():
                await writing.execute("UPDATE cdcsync.articles_vectors_1_settled SET stored_at = now()")
                await anyio.sleep(0.3)
            written.append(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        await until(partial(_any, written))
        assert await build_hnsw(building, SCHEMA, index.spec, patience_s=10.0)
        tasks.cancel_scope.cancel()


async def _any(of: list[int]) -> bool:
    return bool(of)


async def test_a_build_of_another_session_is_no_obstacle_to_be_ended(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await fill(index, 10)
    old, other, building = await connect_target(), await connect_target(), await connect_target()
    async with anyio.create_task_group() as tasks, old.transaction():
        await old.execute("UPDATE cdcsync.articles_vectors_1 SET chunk_id = chunk_id")
        tasks.start_soon(build_hnsw, other, SCHEMA, index.spec)
        await until_blocked(connection, other)
        with pytest.raises(TargetUnavailable, match=f"pid {other.info.backend_pid} builds an index") as caught:
            await build_hnsw(building, SCHEMA, index.spec, patience_s=0.2)
        assert "terminate" not in (caught.value.hint or "")


async def test_a_build_that_a_killed_worker_left_running_is_waited_for_and_taken(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await fill(index, 10)
    old, left_behind, building = await connect_target(), await connect_target(), await connect_target()
    built: list[bool] = []

    async def build_again() -> None:
        built.append(await build_hnsw(building, SCHEMA, index.spec))

    async def looked() -> bool:
        return any(event["event"] == "index_build_waits" for event in events)

    oid = "SELECT to_regclass('cdcsync.articles_vectors_1_hnsw')::oid::int8"
    with structlog.testing.capture_logs() as events:
        async with anyio.create_task_group() as tasks, old.transaction():
            await old.execute("UPDATE cdcsync.articles_vectors_1 SET chunk_id = chunk_id")
            tasks.start_soon(build_hnsw, left_behind, SCHEMA, index.spec)
            await until_blocked(connection, left_behind)
            ((first,),) = await rows(connection, oid)
            tasks.start_soon(build_again)
            await until(looked)
            assert await rows(connection, oid) == [(first,)]

    assert built == [False]
    assert await rows(connection, oid) == [(first,)]
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('cdcsync.articles_vectors_1_hnsw')"
    assert await rows(connection, valid) == [(True,)]


async def test_an_index_that_is_there_is_not_kept_waiting_for_one_that_a_user_builds(
    open_index: OpenIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    index = await open_index()
    assert await build_search(connection, SCHEMA, index.spec)
    old, user = await connect_target(), await connect_target()
    async with anyio.create_task_group() as tasks, old.transaction():
        await old.execute("LOCK TABLE cdcsync.articles_chunks IN ROW EXCLUSIVE MODE")
        tasks.start_soon(user.execute, "CREATE INDEX CONCURRENTLY ON cdcsync.articles_chunks (content_hash)")
        await until_blocked(connection, user)
        with anyio.fail_after(60):
            assert not await build_search(connection, SCHEMA, index.spec)


async def test_two_builds_that_wait_for_the_table_at_once_come_to_one_index(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """Each saw no other; the server ends one of them as a deadlock, or it finds the name taken."""
    await fill(index, 10)
    old, first, second = await connect_target(), await connect_target(), await connect_target()
    built: list[bool] = []

    async def build(session: Connection) -> None:
        built.append(await build_hnsw(session, SCHEMA, index.spec))

    async with anyio.create_task_group() as tasks, old.transaction():
        await old.execute("LOCK TABLE cdcsync.articles_vectors_1 IN SHARE UPDATE EXCLUSIVE MODE")
        for session in (first, second):
            tasks.start_soon(build, session)
            await until_blocked(connection, session)

    assert sorted(built) == [False, True]
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('cdcsync.articles_vectors_1_hnsw')"
    assert await rows(connection, valid) == [(True,)]


async def test_a_name_that_another_relation_has_is_an_error_and_not_waited_for(index: LiveIndex) -> None:
    await index.connection.execute("CREATE TABLE cdcsync.articles_vectors_1_hnsw ()")
    with pytest.raises(psycopg.errors.DuplicateTable):
        await build_hnsw(index.connection, SCHEMA, index.spec)


async def test_writers_go_on_while_the_index_is_built(
    index: LiveIndex, connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await fill(index, 10)
    old, building = await connect_target(), await connect_target()
    async with anyio.create_task_group() as tasks, old.transaction():
        await old.execute("UPDATE cdcsync.articles_vectors_1 SET chunk_id = chunk_id")
        tasks.start_soon(build_hnsw, building, SCHEMA, index.spec)
        await until_blocked(connection, building)
        await index.connection.execute("SET lock_timeout = '500ms'")
        await index.apply(changes(document("100", "new"), inline=["new"]))
    assert await rows(connection, "SELECT embedding::text FROM public.articles_index WHERE id = 100") == [
        (vector_text("new"),)
    ]
