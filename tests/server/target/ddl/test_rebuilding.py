"""The settled tier is built anew beside the one that is searched: nothing is lost, doubled or hidden meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import anyio
import msgspec
import pytest
import structlog

from cdcsync.errors import SetupError
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl import rebuilding
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.ddl.generations import create_generations, drop_relations
from cdcsync.target.ddl.rebuilding import Emptied, Rebuild
from cdcsync.target.keys import discard_vectors
from cdcsync.target.settling import Settling
from tests.support.exchanges import ConnectTarget, read_after_exchange
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, live_index, make_spec, until
from tests.support.kills import Killed, kill_at, points
from tests.support.roles import Roles, grant
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TIERS = "SELECT c.content, v.tier FROM {vectors} v JOIN {chunks} c USING (chunk_id) ORDER BY c.id"
SEARCH = (
    "SELECT id FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>) '[1,200,3]'::public.vector LIMIT 4"
)


class Interrupted(Rebuild):
    """A rebuild with something happening between its copy and its indexes."""

    meanwhile: Callable[[], Awaitable[Any]] | None = None

    async def _build(self) -> None:
        if self.meanwhile is not None:
            await self.meanwhile()
        await super()._build()


@pytest.fixture
async def both(open_index: OpenIndex) -> LiveIndex:
    return await in_both_tiers(open_index, search=None)


async def in_both_tiers(open_index: OpenIndex, *, search: str | None) -> LiveIndex:
    """Return an index whose documents 1 to 4 are settled, and 5 to 8 are fresh."""
    index = await open_index(search=search)
    first, second = "1234", "5678"
    await index.apply(
        changes(*[document(key, f"text {key}") for key in first], inline=[f"text {key}" for key in first])
    )
    settling = Settling(index.connection, SCHEMA, index.spec)
    await settling.settle(await settling.rested(10, rest_s=0))
    await build_hnsw(index.connection, SCHEMA, index.spec)
    await index.apply(
        changes(*[document(key, f"text {key}") for key in second], inline=[f"text {key}" for key in second])
    )
    return index


async def relations(index: LiveIndex) -> list[tuple[Any, ...]]:
    return await index.rows(
        "SELECT c.oid::regclass::text, ARRAY(SELECT unnest(c.reloptions) ORDER BY 1),"
        " (SELECT reloptions FROM pg_class t WHERE t.oid = c.reltoastrelid), obj_description(c.oid, 'pg_class'),"
        " ARRAY(SELECT (attname, atttypid, atttypmod, attnotnull, attstorage, attcompression)::text"
        " FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0),"
        " pg_get_expr(c.relpartbound, c.oid), CASE c.relkind WHEN 'i' THEN pg_get_indexdef(c.oid) END"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'cdcsync' AND c.relname LIKE 'articles%' ORDER BY 1"
    )


async def test_everything_is_settled_afterwards_in_tables_that_are_as_before(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    await both.connection.execute("GRANT SELECT ON cdcsync.articles_vectors_1_settled TO PUBLIC")
    await both.connection.execute("GRANT UPDATE (tier) ON cdcsync.articles_vectors_1_settled TO PUBLIC")
    await both.connection.execute(
        "ALTER TABLE cdcsync.articles_vectors_1_settled SET (autovacuum_vacuum_scale_factor = 0.4,"
        " autovacuum_enabled = on, parallel_workers = 2, toast.autovacuum_vacuum_threshold = 7),"
        " ALTER embedding SET STORAGE PLAIN, ALTER content_hash SET COMPRESSION pglz"
    )
    before, made = await relations(both), await both.embedded()

    assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 4

    assert await both.rows(TIERS) == [(f"text {key}", "settled") for key in range(1, 9)]
    assert await both.embedded() == made
    assert await relations(both) == before
    assert await both.rows(
        "SELECT has_table_privilege('pg_monitor', 'cdcsync.articles_vectors_1_settled', 'SELECT'),"
        " has_column_privilege('pg_monitor', 'cdcsync.articles_vectors_1_settled', 'tier', 'UPDATE'), count(*)"
        " FROM pg_trigger WHERE tgname = 'cdcsync_rebuild'"
    ) == [(True, True, 0)]
    assert await both.rows("SELECT FROM pg_proc p WHERE proname LIKE 'articles_vectors%'") == []
    assert await both.faults() == []


async def test_a_rebuild_that_would_lose_columns_of_an_operator_is_refused(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    await both.connection.execute("ALTER TABLE cdcsync.articles_vectors_1 ADD COLUMN note text")
    with pytest.raises(SetupError, match=r"columns of your own \(note\)"):
        await Rebuild(await connect_target(), SCHEMA, both.spec).run()
    assert [tier for _, tier in await both.rows(TIERS)] == ["settled"] * 4 + ["fresh"] * 4


BUILT = {
    "a view": (
        "CREATE VIEW cdcsync.mine AS SELECT chunk_id FROM cdcsync.articles_vectors_1_settled",
        "DROP VIEW cdcsync.mine",
    ),
    "a view that groups by the key": (
        "CREATE MATERIALIZED VIEW cdcsync.mine AS"
        " SELECT chunk_id, stored_at FROM cdcsync.articles_vectors_1_settled GROUP BY chunk_id",
        "DROP MATERIALIZED VIEW cdcsync.mine",
    ),
    "a function with a body of SQL": (
        "CREATE FUNCTION cdcsync.mine() RETURNS bigint BEGIN ATOMIC"
        " SELECT count(*) FROM cdcsync.articles_vectors_1_settled; END",
        "DROP FUNCTION cdcsync.mine()",
    ),
    "a function of its rows": (
        "CREATE FUNCTION cdcsync.mine(cdcsync.articles_vectors_1_settled) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION cdcsync.mine(cdcsync.articles_vectors_1_settled)",
    ),
    "a foreign key": (
        "CREATE TABLE cdcsync.mine"
        " (chunk_id bigint CONSTRAINT of_a_vector REFERENCES cdcsync.articles_vectors_1_settled)",
        "ALTER TABLE cdcsync.mine DROP CONSTRAINT of_a_vector",
    ),
    "a column": (
        "CREATE TABLE cdcsync.mine (vector cdcsync.articles_vectors_1_settled)",
        "ALTER TABLE cdcsync.mine DROP COLUMN vector",
    ),
}


@pytest.mark.parametrize("what", BUILT)
async def test_a_rebuild_of_what_something_is_built_on_is_refused_before_it_copies(
    both: LiveIndex, connect_target: ConnectTarget, what: str
) -> None:
    build, remedy = BUILT[what]
    await both.connection.execute(build.encode())
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)
    copied: list[bool] = []

    async def note() -> None:
        copied.append(True)

    rebuild.meanwhile = note
    with pytest.raises(SetupError) as caught:
        await rebuild.run()
    assert f" dropped: {remedy}. " in (caught.value.hint or "")
    assert not copied

    await both.connection.execute(remedy.encode())
    assert await rebuild.run() == 4


async def test_what_is_built_on_both_tiers_or_dropped_with_one_is_in_no_rebuild_s_way(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    await both.connection.execute(
        "CREATE VIEW cdcsync.mine AS SELECT * FROM cdcsync.articles_vectors_1;"
        " CREATE STATISTICS cdcsync.mine ON chunk_id, stored_at FROM cdcsync.articles_vectors_1_settled;"
        " CREATE PUBLICATION mine FOR TABLE cdcsync.articles_vectors_1_settled (chunk_id) WHERE (chunk_id > 0)"
    )
    try:
        assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 4
    finally:
        await both.connection.execute("DROP PUBLICATION mine")
    assert await both.rows("SELECT count(*)::int FROM cdcsync.mine") == [(8,)]


async def test_an_operator_s_indexes_are_built_on_the_copy_and_keep_their_names(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    await both.connection.execute(
        'CREATE INDEX mine ON cdcsync.articles_vectors_1 (stored_at DESC, lower(tier) COLLATE "C")'
        " WHERE chunk_id > 0;"
        ' CREATE UNIQUE INDEX "a USING b" ON cdcsync.articles_vectors_1 (tier, chunk_id) INCLUDE (stored_at);'
        " ALTER TABLE cdcsync.articles_vectors_1 ADD CONSTRAINT once UNIQUE (chunk_id, tier);"
        " CREATE INDEX of_settled ON cdcsync.articles_vectors_1_settled USING hash (chunk_id)"
    )
    before = await relations(both)
    own = (
        "SELECT i.indexrelid::regclass::text, pg_relation_filenode(i.indexrelid)::int8, h.inhparent::regclass::text"
        " FROM pg_index i LEFT JOIN pg_inherits h ON h.inhrelid = i.indexrelid"
        " WHERE i.indrelid = to_regclass(%s) AND i.indexrelid::regclass::text NOT LIKE '%%_hnsw'"
    )
    built: list[tuple[Any, ...]] = []

    class Watched(Rebuild):
        async def switch(self) -> int:
            built.extend(await both.rows(own, "cdcsync.articles_vectors_1_new"))
            return await super().switch()

    await Watched(await connect_target(), SCHEMA, both.spec).run()

    assert await relations(both) == before
    exchanged = await both.rows(own, "cdcsync.articles_vectors_1_settled")
    assert sorted(file for _, file, _ in exchanged) == sorted(file for _, file, _ in built)
    assert {parent for _, _, parent in exchanged} == {None, "cdcsync.mine", 'cdcsync."a USING b"', "cdcsync.once"}
    await Rebuild(await connect_target(), SCHEMA, both.spec).run()
    assert await relations(both) == before


@pytest.mark.parametrize(
    ("create", "drop"),
    [
        (
            "CREATE UNIQUE INDEX mine ON cdcsync.articles_vectors_1_settled (content_hash)",
            "DROP INDEX cdcsync.mine",
        ),
        (
            "ALTER TABLE cdcsync.articles_vectors_1 ADD CONSTRAINT mine UNIQUE (tier, content_hash)",
            "ALTER TABLE cdcsync.articles_vectors_1 DROP CONSTRAINT mine",
        ),
    ],
    ids=["index of the tier", "constraint of both"],
)
async def test_an_operator_s_index_that_cannot_be_built_on_the_copy_is_told_before_hnsw_is_built(
    both: LiveIndex, connect_target: ConnectTarget, create: str, drop: str
) -> None:
    await both.apply(changes(document("9", "text 1"), inline=["text 1"]))  # each tier has this text, and the copy both
    await both.connection.execute(create.encode())
    before = await relations(both)

    with pytest.raises(SetupError, match="cannot be built") as refused:
        await Rebuild(await connect_target(), SCHEMA, both.spec).run()

    assert refused.value.hint == f"vectors are inserted one by one until it is dropped: {drop}"
    await Rebuild(await connect_target(), SCHEMA, both.spec).clear()
    assert await relations(both) == before
    await both.connection.execute(drop.encode())
    assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 5


async def test_a_rebuild_that_finds_too_little_shared_memory_is_done_by_one_process(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    """Parallel workers share a graph of the size of maintenance_work_mem: no machine has so much."""
    hnsw = msgspec.structs.replace(both.spec.config.hnsw, build_memory="2000GB", build_workers=2)
    spec = msgspec.structs.replace(both.spec, config=msgspec.structs.replace(both.spec.config, hnsw=hnsw))
    connection = await connect_target()
    await connection.execute("SET min_parallel_table_scan_size = 0")

    with structlog.testing.capture_logs() as events:
        assert await Rebuild(connection, SCHEMA, spec).run() == 4

    (frugal,) = [event for event in events if event["event"] == "index_build_frugal"]
    assert "shared memory" in frugal["error"]


async def test_a_rebuild_that_was_given_up_leaves_storage_parameters_as_they_were(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    await both.connection.execute(
        "ALTER TABLE cdcsync.articles_vectors_1_settled SET (autovacuum_enabled = false, fillfactor = 80)"
    )
    before = await relations(both)
    rebuild = Rebuild(await connect_target(), SCHEMA, both.spec)
    await rebuild.record()
    assert await relations(both) != before
    await rebuild.clear()
    assert await relations(both) == before


async def make_again(index: LiveIndex) -> None:
    async with index.connection.transaction():
        await discard_vectors(index.connection, SCHEMA, index.spec, [("1",), ("5",)])


CHANGES: dict[str, tuple[Callable[[LiveIndex], Coroutine[Any, Any, Any]], dict[str, tuple[str, str] | None]]] = {
    "a settled vector is replaced": (
        lambda index: index.apply(changes(document("1", "new", existed=True), inline=["new"])),
        {"1": ("new", "fresh")},
    ),
    "a fresh vector is replaced": (
        lambda index: index.apply(changes(document("5", "new", existed=True), inline=["new"])),
        {"5": ("new", "fresh")},
    ),
    "both are deleted": (lambda index: index.apply(changes(deleted=["1", "5"])), {"1": None, "5": None}),
    "one comes": (
        lambda index: index.apply(changes(document("9", "new"), inline=["new"])),
        {"9": ("new", "fresh")},
    ),
    "vectors are to be made again": (
        make_again,
        {"5": ("text 5", "fresh")},
    ),
    "a move of a worker that was killed comes through": (
        lambda index: Settling(index.connection, SCHEMA, index.spec).settle(list(range(1, 9))),
        {},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_changes_meanwhile_is_what_it_became(
    both: LiveIndex, connect_target: ConnectTarget, change: str
) -> None:
    apply, differences = CHANGES[change]
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)
    rebuild.meanwhile = lambda: apply(both)

    await rebuild.run()

    expected = {str(key): (f"text {key}", "settled") for key in range(1, 9)} | differences
    assert await both.rows(TIERS) == [found for _, found in sorted(expected.items()) if found is not None]
    while await both.embed():
        pass
    assert await both.faults() == []


async def test_a_rebuild_of_an_index_that_is_emptied_is_worth_nothing(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)
    rebuild.meanwhile = lambda: both.apply(changes(document("9", "new"), truncated=True, inline=["new"]))

    with pytest.raises(Emptied):
        await rebuild.run()

    assert await both.rows(TIERS) == [("new", "fresh")]
    assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 1
    assert await both.rows(TIERS) == [("new", "settled")]


async def test_a_publication_of_all_tables_of_the_target_is_in_nobodys_way(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)
    rebuild.meanwhile = lambda: both.apply(changes(document("1", "new", existed=True), deleted=["5"], inline=["new"]))
    await both.connection.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    try:
        assert await rebuild.run() == 3
        unnamed = await both.rows(
            "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'cdcsync' AND c.relkind = 'r' AND c.relpersistence = 'p' AND c.relreplident <> 'f'"
            " AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"
        )
        assert unnamed == []
    finally:
        await both.connection.execute("DROP PUBLICATION everything")
    assert await both.faults() == []


async def test_a_rebuild_that_was_killed_is_dropped_by_the_next_one(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    killed = Interrupted(await connect_target(), SCHEMA, both.spec)

    async def die() -> None:
        raise KeyboardInterrupt

    killed.meanwhile = die
    with pytest.raises(KeyboardInterrupt):
        await killed.run()
    await both.apply(changes(document("1", "new", existed=True), deleted=["5"], inline=["new"]))
    assert await both.faults() == []

    assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 4

    assert await both.rows("SELECT count(*), min(tier) FROM {vectors}") == [(7, "settled")]
    assert await both.faults() == []


@pytest.mark.parametrize("point", points(rebuilding))
async def test_wherever_a_rebuild_is_killed_each_vector_is_in_one_tier_and_the_next_one_succeeds(
    both: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    before, made = await relations(both), await both.embedded()
    left = await connect_target()
    await Rebuild(left, SCHEMA, both.spec).record()  # so that there is something to drop at the start
    await left.close()

    kill_at(monkeypatch, rebuilding, point)
    session = await connect_target()
    with pytest.raises(Killed):
        await Rebuild(session, SCHEMA, both.spec).run()
    await session.close()
    assert await both.embedded() == made
    assert await both.faults() == []

    kill_at(monkeypatch, rebuilding, None)
    await Rebuild(await connect_target(), SCHEMA, both.spec).run()
    assert [tier for _, tier in await both.rows(TIERS)] == ["settled"] * 8
    assert await both.embedded() == made
    assert await relations(both) == before


async def test_searches_and_changes_go_on_while_it_is_built_and_exchanged(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    searchers = [await connect_target() for _ in range(2)]
    connection = await connect_target()
    done = anyio.Event()

    async def search(searcher: Connection) -> None:
        while not done.is_set():
            assert len(await (await searcher.execute(SEARCH.encode())).fetchall()) == 4

    async def change() -> None:
        number = 0
        while not done.is_set():
            number += 1
            await both.apply(changes(document("2", f"text {number}", existed=True), inline=[f"text {number}"]))

    async with anyio.create_task_group() as tasks:
        for searcher in searchers:
            tasks.start_soon(search, searcher)
        tasks.start_soon(change)
        for _ in range(3):
            await Rebuild(connection, SCHEMA, both.spec).run()
        done.set()

    assert await both.rows("SELECT count(*) FROM {vectors}") == [(8,)]
    assert await both.faults() == []


VECTOR = "[1,200,3]"
CALL = "SELECT id FROM cdcsync.articles_search({})"
SEARCHES = {
    "of the view": SEARCH,
    "by vector": CALL.format(f"NULL, '{VECTOR}', 4, mode => 'vector'"),
    "by words": CALL.format("'text', k => 8, mode => 'text'"),
    "for all": CALL.format(f"NULL, '{VECTOR}', 1000, mode => 'vector'"),
    "for chunks": CALL.format(f"NULL, '{VECTOR}', 8, mode => 'vector', per_document => false"),
    "for a later page": CALL.format(f"NULL, '{VECTOR}', 3, mode => 'vector', skip => 4"),
    "with a filter": CALL.format(f"""NULL, '{VECTOR}', 8, '{{"id": {{"ne": 6}}}}'"""),
    "by both": CALL.format(f"'text', '{VECTOR}', 8"),
}


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("how", SEARCHES)
async def test_a_search_that_waited_for_the_exchange_finds_what_later_ones_find(
    open_index: OpenIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    index = await in_both_tiers(open_index, search="english")

    async def search(connection: Connection) -> list[tuple[Any, ...]]:
        return await (await connection.execute(SEARCHES[how].encode())).fetchall()

    rebuild = Rebuild(await connect_target(), SCHEMA, index.spec)
    found = await read_after_exchange(monkeypatch, connect_target, rebuild, search)

    assert found
    assert found == await search(index.connection)


class Counted(Rebuild):
    """A rebuild that counts how often it tries the exchange."""

    switched = 0

    async def switch(self) -> int:
        self.switched += 1
        return await super().switch()


class Late(Rebuild):
    """A rebuild that learns of a change during the exchange, which is not to be seen by who waits for it."""

    change: Callable[[], Awaitable[Any]]

    async def switch(self) -> int:
        await self.change()
        return await super().switch()


async def test_a_search_that_waited_for_the_exchange_shows_the_vector_of_the_text(
    both: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = Late(await connect_target(), SCHEMA, both.spec)
    rebuild.change = lambda: both.apply(changes(document("1", "new", existed=True), inline=["new"]))

    async def search(connection: Connection) -> list[tuple[Any, ...]]:
        statement = f"SELECT content, distance, stale FROM cdcsync.articles_search(NULL, '{VECTOR}', 8)"
        return sorted(await (await connection.execute(statement.encode())).fetchall())

    found = await read_after_exchange(monkeypatch, connect_target, rebuild, search)

    assert found == await search(both.connection)
    assert found[0][0] == "new"


FOUND = f"SELECT id, distance IS NOT NULL FROM cdcsync.articles_search(NULL, '{VECTOR}', 8) ORDER BY 1"


async def keep_snapshot(reader: Connection) -> None:
    """Begin a transaction that keeps its snapshot, and has not used any of our tables."""
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await reader.execute("SELECT 1")


@pytest.fixture
async def worked(roles: Roles, make_database: Callable[[], Database]) -> AsyncIterator[tuple[LiveIndex, Database]]:
    """The index of `both` as a worker has it whose role roles.sql made, and its database as the worker connects."""
    database = make_database()
    role = roles.name("target")
    grant(database, target_role=role)
    database = msgspec.structs.replace(database, dsn=roles.dsn(database, role))
    async with contextlib.AsyncExitStack() as stack:

        async def opened(**settings: Any) -> LiveIndex:
            return await stack.enter_async_context(live_index(database, make_spec(**settings)))

        yield await in_both_tiers(opened, search=None), database


async def test_an_exchange_of_the_workers_role_waits_for_a_snapshot_of_another_role_and_says_whose(
    worked: tuple[LiveIndex, Database],
) -> None:
    both, database = worked
    expected = await both.rows(FOUND)

    async def waited() -> bool:
        return len([event for event in events if event["event"] == "lock_waits"]) >= 3

    with structlog.testing.capture_logs() as events, database.connect() as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        pid = reader.info.backend_pid
        async with await connect(database.dsn, "target") as connection, anyio.create_task_group() as tasks:
            tasks.start_soon(Rebuild(connection, SCHEMA, both.spec).run)
            await until(waited)
            assert reader.execute(FOUND).fetchall() == expected
            reader.execute("ROLLBACK")
    said = next(event["error"] for event in events if event["event"] == "lock_waits")
    assert said.startswith(f"the transaction of pid {pid} (role ")
    assert said.endswith(f"SELECT pg_terminate_backend({pid})")
    assert [tier for _, tier in await both.rows(TIERS)] == ["settled"] * 8


async def test_an_exchange_is_made_in_the_end_beside_a_snapshot_from_before_the_copy(
    both: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "SNAPSHOT_ATTEMPTS", 2)
    reader = await connect_target()
    await keep_snapshot(reader)
    expected = await both.rows(FOUND)
    with structlog.testing.capture_logs() as events, anyio.fail_after(60):
        assert await Rebuild(await connect_target(), SCHEMA, both.spec).run() == 4
    (overtaken,) = [event for event in events if event["event"] == "snapshots_overtaken"]
    assert overtaken["log_level"] == "warning"
    assert overtaken["index"] == "articles"
    assert f"pid {reader.info.backend_pid} (" in overtaken["transactions"][0]
    assert [event["attempt"] for event in events if event["event"] == "lock_waits"] == [1, 2]
    assert [tier for _, tier in await both.rows(TIERS)] == ["settled"] * 8
    assert await both.rows(FOUND) == expected


async def test_an_exchange_waits_for_a_snapshot_from_before_the_copy_which_would_find_nothing(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    reader = await connect_target()
    await keep_snapshot(reader)
    expected = await both.rows(FOUND)
    rebuild = Counted(await connect_target(), SCHEMA, both.spec)

    async def waited() -> bool:
        return len([event for event in events if event["event"] == "lock_waits"]) >= 3

    with structlog.testing.capture_logs() as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rebuild.run)
            await until(waited)
            assert rebuild.switched == 0
            assert await (await reader.execute(FOUND.encode())).fetchall() == expected
            await reader.execute("ROLLBACK")
    assert await both.rows(FOUND) == expected
    assert [tier for _, tier in await both.rows(TIERS)] == ["settled"] * 8


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("change", CHANGES)
async def test_an_exchange_does_not_wait_for_a_snapshot_that_has_the_copy_and_finds_everything(
    both: LiveIndex, connect_target: ConnectTarget, change: str
) -> None:
    readers, writer = [await connect_target() for _ in range(2)], await connect_target()
    expected: list[list[tuple[Any, ...]]] = []
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)

    async def change_between_snapshots() -> None:
        for reader in readers:
            expected.append(await both.rows(FOUND))
            await keep_snapshot(reader)
            if reader is readers[0]:
                await CHANGES[change][0](both)

    rebuild.meanwhile = change_between_snapshots
    async with writer.transaction():
        await writer.execute("SELECT pg_current_xact_id()")  # older than the copy, and still open
        with anyio.fail_after(60):
            await rebuild.run()
    assert [await (await reader.execute(FOUND.encode())).fetchall() for reader in readers] == expected


async def test_writers_do_not_wait_again_and_again_for_an_exchange_beside_a_long_reader(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    reader = await connect_target()
    rebuild = Counted(await connect_target(), SCHEMA, both.spec)

    async def waited() -> bool:
        return len([event for event in events if event["event"] == "lock_waits"]) >= 4

    async def followed() -> bool:
        return await both.rows("SELECT FROM cdcsync.articles_vectors_1_new_changed") == []

    with structlog.testing.capture_logs() as events:
        async with anyio.create_task_group() as tasks, reader.transaction():
            await reader.execute("SELECT count(*) FROM cdcsync.articles_vectors_1")
            tasks.start_soon(rebuild.run)
            await until(waited)
            assert rebuild.switched == 1
            await both.apply(changes(document("1", "new", existed=True), inline=["new"]))
            await until(followed)
    assert rebuild.switched == 2
    assert await both.rows("SELECT tier, count(*)::int FROM {vectors} GROUP BY 1 ORDER BY 1") == [
        ("fresh", 1),
        ("settled", 7),
    ]


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "tiers dropped by hand"])
async def test_a_generation_that_is_dropped_leaves_nothing_of_its_rebuild(
    both: LiveIndex, connect_target: ConnectTarget, broken: bool
) -> None:
    other = msgspec.structs.replace(both.spec, generation=2)
    await create_generations(both.connection, SCHEMA, msgspec.structs.replace(both.spec, others=(other,)))
    for spec in (both.spec, other):
        await Rebuild(await connect_target(), SCHEMA, spec).record()
    if broken:
        await both.connection.execute("DROP TABLE cdcsync.articles_vectors_2")

    await drop_relations(both.connection, SCHEMA, both.spec, 2)

    assert (
        await both.rows(
            "SELECT relname::text FROM pg_class WHERE relname LIKE 'articles_vectors_2%'"
            " UNION ALL SELECT proname FROM pg_proc WHERE proname LIKE 'articles_vectors_2%'"
        )
        == []
    )
    # That of the other generation goes on.
    await both.apply(changes(deleted=["1"]))
    assert len(await both.rows("SELECT FROM cdcsync.articles_vectors_1_new_changed")) == 1


async def test_a_tier_that_an_operator_guards_is_not_replaced_by_one_that_is_open(
    both: LiveIndex, connect_target: ConnectTarget
) -> None:
    settled = "cdcsync.articles_vectors_1_settled"
    rebuild = Interrupted(await connect_target(), SCHEMA, both.spec)

    async def guard() -> None:
        await both.connection.execute(
            f"GRANT SELECT ON {settled} TO PUBLIC; ALTER TABLE {settled} ENABLE ROW LEVEL SECURITY".encode()
        )

    rebuild.meanwhile = guard
    for one in (rebuild, Rebuild(await connect_target(), SCHEMA, both.spec)):
        with pytest.raises(SetupError, match="row-level security of your own"):
            await one.run()
        assert await both.rows("SELECT relrowsecurity FROM pg_class WHERE oid = %s::regclass", settled) == [(True,)]
    assert await both.rows("SELECT tier, count(*)::int FROM cdcsync.articles_vectors_1 GROUP BY 1 ORDER BY 1") == [
        ("fresh", 4),
        ("settled", 4),
    ]
