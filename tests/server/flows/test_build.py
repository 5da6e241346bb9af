"""What an index needs to be read before it is live: once, whatever happens meanwhile."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, LiteralString

import anyio
import msgspec
import psycopg
import pytest
from psycopg import sql

import tests.support.indexes as support
from cdcsync.config import QualifiedName, parse
from cdcsync.errors import TablesChanged
from cdcsync.flows import build
from cdcsync.flows.build import Builds, _advance, build_until_live, settle_all
from cdcsync.flows.setup.differences import ask_for
from cdcsync.flows.setup.indexes import pause_indexes, set_up_indexes
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import read_catalog
from cdcsync.source.fingerprints import Difference
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests
from tests.support.configs import Section, configuration
from tests.support.disks import LACKS_MEMORY
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, register
from tests.support.migrations import BOTH, asks_for, loaded, migrate, of_the_old_model, ready
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

REQUESTS = Requests(SCHEMA)

CONFIG = """
[source]
dsn = "postgresql://source"
[target]
dsn = "postgresql://target"
[embedders.fake]
type = "hash"
[indexes.articles]
table = "public.articles"
view = "public.articles_index"
text = "{body}"
embedder = "fake"
"""


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session that sees what is committed."""
    return await connect_target()


@pytest.fixture
async def builds(target: Database) -> AsyncIterator[Builds]:
    """What a worker builds over sessions of their own."""
    async with anyio.create_task_group() as tasks:
        yield Builds(target.dsn, SCHEMA, tasks)
        tasks.cancel_scope.cancel()


@pytest.fixture
async def building(open_index: OpenIndex, connection: Connection) -> LiveIndex:
    """An index that is being loaded, of a table with two partitions."""
    index = await open_index(search=None)
    await connection.execute("DROP TABLE IF EXISTS public.parted")
    await connection.execute("CREATE TABLE public.parted (id bigint PRIMARY KEY) PARTITION BY LIST (id)")
    for key in (1, 2):
        await connection.execute(f"CREATE TABLE public.part_{key} PARTITION OF public.parted FOR VALUES IN ({key})")
    cursor = await connection.execute("SELECT 'public.parted'::regclass::oid::int8")
    row = await cursor.fetchone()
    assert row is not None
    index.spec = msgspec.structs.replace(index.spec, table_oid=row[0])
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    await register(connection, index.spec, slot="s", state="building")
    return index


async def state(connection: Connection) -> str:
    cursor = await connection.execute("SELECT state FROM cdcsync.indexes WHERE name = 'articles'")
    row = await cursor.fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize(("load", "then"), [("paused", "building"), ("failed", "paused"), ("done", "live")])
async def test_a_partition_that_goes_does_not_hide_a_load_that_did_not_get_through(
    building: LiveIndex, connection: Connection, load: str, then: str, builds: Builds
) -> None:
    request = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await ask_for(connection, SCHEMA, "articles", Difference(left=True))
    await connection.execute("UPDATE cdcsync.backfills SET state = %s WHERE id = %s", [load, request])
    orphans = await Queue(SCHEMA).next_open(connection, ["articles"])
    assert orphans is not None
    assert (orphans.phase, orphans.filter) == ("orphans", None)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'done' WHERE id = %s", [orphans.id])

    assert await _advance(connection, SCHEMA, building.spec, builds) == (then != "building")

    assert await state(connection) == then


async def test_an_index_that_is_paused_again_and_again_is_read_once(
    open_index: OpenIndex, connection: Connection
) -> None:
    index, config = await open_index(search=None), parse(CONFIG, {}, where="here")
    await Pipelines(SCHEMA, "cdcsync").ensure(connection, "p")
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS public.articles (id bigint PRIMARY KEY, tenant int, body text)"
    )
    catalog = await read_catalog(connection, "p", [index.spec.shape.table])
    await set_up_indexes(connection, config, [index.spec], catalog)
    await pause_indexes(connection, config, {"articles": Pause("nothing of it has been read")})
    await set_up_indexes(connection, config, [index.spec], catalog)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', cursor = ARRAY['7']")
    for _ in range(3):
        await pause_indexes(connection, config, {"articles": Pause("a type changed")})
        await set_up_indexes(connection, config, [index.spec], catalog)
    await connection.execute("DROP TABLE public.articles")

    cursor = await connection.execute("SELECT kind, state FROM cdcsync.backfills ORDER BY id")
    assert await cursor.fetchall() == [
        ("initial", "cancelled"),
        ("resync", "cancelled"),
        ("resync", "cancelled"),
        ("resync", "requested"),
    ]
    assert await state(connection) == "building"


@pytest.mark.parametrize(
    ("asked", "state_of_it", "then"),
    [
        ("before", "requested", "building"),
        ("before", "running", "building"),
        ("before", "done", "live"),
        ("before", "failed", "live"),
        ("after", "requested", "live"),
    ],
)
async def test_an_index_is_live_once_what_its_load_may_have_read_too_early_is_compared(
    building: LiveIndex, connection: Connection, asked: str, state_of_it: str, then: str, builds: Builds
) -> None:
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'running', started_at = now() WHERE id = %s", [load])
    await ask_for(connection, SCHEMA, "articles", Difference(compare="it was rewritten"))
    moment = "clock_timestamp()" if asked == "before" else "requested_at - interval '1 second'"
    await connection.execute(
        f"UPDATE cdcsync.backfills SET state = 'done', finished_at = {moment} WHERE id = %s".encode(), [load]
    )
    await connection.execute("UPDATE cdcsync.backfills SET state = %s WHERE kind = 'compare'", [state_of_it])
    if asked == "after":
        await connection.execute(
            "UPDATE cdcsync.backfills SET finished_at = requested_at - interval '1 s' WHERE id = %s", [load]
        )
        await connection.execute("UPDATE cdcsync.backfills SET requested_at = clock_timestamp() WHERE kind = 'compare'")

    await _advance(connection, SCHEMA, building.spec, builds)

    assert await state(connection) == then


async def test_words_are_found_by_their_index_while_vectors_of_the_load_are_still_made(
    open_index: OpenIndex, connection: Connection, builds: Builds
) -> None:
    index = await open_index()
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    await register(connection, index.spec, slot="s", state="building")
    await index.apply(changes(document("1", "a rare word"), document("2", "another word")))
    await connection.execute("UPDATE cdcsync.articles_backlog SET lane = 1")
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'done', finished_at = now() WHERE id = %s", [load])

    assert not await _advance(connection, SCHEMA, index.spec, builds)

    assert await state(connection) == "building"
    assert await index.rows("SELECT chunks FROM cdcsync.articles_words WHERE lexeme = ''") == [(2,)]
    (built,) = await index.rows("SELECT indexdef FROM pg_indexes WHERE indexname = 'articles_chunks_search'")
    assert built[0].endswith("USING gin (search)")

    await connection.execute("DELETE FROM cdcsync.articles_backlog")
    assert await _advance(connection, SCHEMA, index.spec, builds)
    assert await state(connection) == "live"


async def test_an_index_for_which_another_load_is_asked_while_it_is_built_is_not_live_yet(
    open_index: OpenIndex, connection: Connection, monkeypatch: pytest.MonkeyPatch, builds: Builds
) -> None:
    index = await open_index()
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    await register(connection, index.spec, slot="s", state="building")
    done = "UPDATE cdcsync.backfills SET state = 'done', finished_at = now()"
    await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await connection.execute(done)

    async def slowly(*arguments: Any, **options: Any) -> None:
        await build_hnsw(*arguments, **options)
        await REQUESTS.add(index.connection, "articles", "resync", rewrite=False, filter_=None)

    monkeypatch.setattr(build, "build_hnsw", slowly)
    assert not await _advance(connection, SCHEMA, index.spec, builds)
    assert await state(connection) == "building"

    monkeypatch.setattr(build, "build_hnsw", build_hnsw)
    await connection.execute(done)
    assert await _advance(connection, SCHEMA, index.spec, builds)
    assert await state(connection) == "live"


async def test_a_load_that_has_read_nothing_yet_needs_no_comparison(
    building: LiveIndex, connection: Connection
) -> None:
    load = await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)

    await ask_for(connection, SCHEMA, "articles", Difference(compare="it was rewritten"))

    cursor = await connection.execute("SELECT id FROM cdcsync.backfills")
    assert await cursor.fetchall() == [(load,)]


async def are(connection: Connection, *states: tuple[str, bool]) -> bool:
    """Say whether these are the states of the indexes, by name, and which of them have a cause why they wait."""
    cursor = await connection.execute("SELECT state, reason IS NOT NULL FROM cdcsync.indexes ORDER BY name")
    return await cursor.fetchall() == list(states)


HELD = [
    *((table, "ACCESS EXCLUSIVE") for table in ("chunks", "words", "backlog", "vectors_1", "vectors_1_settled")),
    *((table, "ROW EXCLUSIVE") for table in ("chunks", "vectors_1_settled")),
    ("chunks", "SHARE UPDATE EXCLUSIVE"),
]
"""Tables that another session holds, and how: who builds an index waits for those who write, too."""


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("table", "mode"), HELD)
async def test_an_index_whose_tables_are_held_waits_to_be_built_and_others_go_live(
    open_index: OpenIndex,
    connection: Connection,
    target: Database,
    table: str,
    mode: LiteralString,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdcsync.flows.build.HELD_S", 0.5)
    indexes = [await open_index(name=name) for name in ("articles", "notes")]
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    for index in indexes:
        await register(connection, index.spec, slot="s", state="building")
        await index.apply(changes(document("1", "a rare word"), inline=["a rare word"]))
        await REQUESTS.add(connection, index.spec.name, "initial", rewrite=False, filter_=None)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'done', finished_at = now()")

    async with anyio.create_task_group() as tasks:
        async with indexes[0].connection.transaction():
            held = sql.Identifier(SCHEMA, f"articles_{table}")
            await indexes[0].connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            await indexes[0].connection.execute(sql.SQL("LOCK TABLE {} IN " + mode + " MODE").format(held))
            builds = Builds(target.dsn, SCHEMA, tasks)
            tasks.start_soon(build_until_live, target.dsn, SCHEMA, [one.spec for one in indexes], builds)
            await support.until(partial(are, connection, ("building", True), ("live", False)))
        await support.until(partial(are, connection, ("live", False), ("live", False)))

    valid = "SELECT count(*) FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indisvalid AND relname = ANY(%s)"
    wanted = [f"{name}_{of}" for name in ("articles", "notes") for of in ("chunks_search", "vectors_1_hnsw")]
    assert await (await connection.execute(valid, [wanted])).fetchone() == (4,)


async def test_an_index_that_waits_for_its_vectors_only_says_no_more_that_it_waits_for_a_lock(
    open_index: OpenIndex, connection: Connection, target: Database
) -> None:
    index = await open_index(search=None)
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    await register(connection, index.spec, slot="s", state="building")
    await index.apply(changes(document("1", "a rare word")))
    await connection.execute("UPDATE cdcsync.articles_backlog SET lane = 1")
    await REQUESTS.add(connection, "articles", "initial", rewrite=False, filter_=None)
    await connection.execute("UPDATE cdcsync.backfills SET state = 'done', finished_at = now()")

    async with anyio.create_task_group() as tasks:
        async with index.connection.transaction():
            await index.connection.execute("LOCK TABLE cdcsync.articles_backlog IN ACCESS EXCLUSIVE MODE")
            tasks.start_soon(build_until_live, target.dsn, SCHEMA, [index.spec], Builds(target.dsn, SCHEMA, tasks))
            await support.until(partial(are, connection, ("building", True)))
        await support.until(partial(are, connection, ("building", False)))
        tasks.cancel_scope.cancel()


async def test_a_worker_builds_one_after_the_other(
    building: LiveIndex, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, let_go = list[str](), anyio.Event()

    async def held(_: Connection, schema: str, spec: IndexSpec, *, patience_s: float) -> bool:
        await let_go.wait()
        done.append(spec.name)
        return True

    monkeypatch.setattr(build, "build_hnsw", held)
    names = ["articles", "notes", "others"]
    async with anyio.create_task_group() as tasks:
        for name in [*names, "articles"]:
            tasks.start_soon(builds.hnsw, msgspec.structs.replace(building.spec, name=name))
        await anyio.wait_all_tasks_blocked()
        assert len(builds._under_way) == 1
        let_go.set()
    assert sorted(done) == names


# -- vectors move before HNSW is built ---------------------------------------------------------------------------------


async def rows_read(index: LiveIndex) -> int:
    """Return how many rows of fresh and of its indexes all statements have read so far."""
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    statement = (
        "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'articles_vectors_1_fresh'"
    )
    return int((await index.rows(statement))[0][0])


async def test_each_vector_is_looked_for_once_however_many_pages_it_takes_to_move_them(
    open_index: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MOVED_AT_ONCE", 50)
    # Wide rows: of a table of few pages the server reads all rather than use an index.
    index, vectors = await open_index(search=None, dimensions=500), 3_000
    await index.connection.execute(
        "INSERT INTO cdcsync.articles_vectors_1 (chunk_id, content_hash, embedding)"
        " SELECT n, int8send(n), array_fill(n, ARRAY[500])::public.vector FROM generate_series(1, %s) AS n",
        [vectors],
    )
    before = await rows_read(index)

    await settle_all(index.connection, SCHEMA, index.spec)

    assert await index.rows("SELECT tier, count(*) FROM {vectors} GROUP BY tier") == [("settled", vectors)]
    # To find it, to copy it, to compare it with the copy, to lock it, and to delete it.
    assert await rows_read(index) - before <= 5 * vectors


async def test_vectors_that_cannot_move_stay_fresh_and_hold_up_no_others(
    index: LiveIndex, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MOVED_AT_ONCE", 2)
    texts = [f"text {number}" for number in range(1, 8)]
    await index.apply(changes(*(document(str(at), text) for at, text in enumerate(texts, 1)), inline=texts))
    # Whole pages of vectors that are about to be replaced, or that another session holds.
    await index.apply(changes(*(document(str(at), "new", existed=True) for at in (1, 2))))
    async with connection.transaction():
        await connection.execute(
            "SELECT FROM cdcsync.articles_vectors_1_fresh AS v JOIN cdcsync.articles_chunks AS c USING (chunk_id)"
            " WHERE c.id IN (3, 4, 6) FOR UPDATE OF v"
        )
        await settle_all(index.connection, SCHEMA, index.spec)

    tiers = "SELECT v.tier, array_agg(c.id ORDER BY c.id) FROM {vectors} v JOIN {chunks} c USING (chunk_id) GROUP BY 1"
    assert dict(await index.rows(tiers)) == {"fresh": [1, 2, 3, 4, 6], "settled": [5, 7]}

    await index.embed()
    await settle_all(index.connection, SCHEMA, index.spec)
    assert dict(await index.rows(tiers)) == {"settled": [1, 2, 3, 4, 5, 6, 7]}
    assert await index.faults() == []


def problems(pipeline: Pipeline) -> str:
    return " ".join(json.loads(pipeline.get("/status")[1])["problems"])


@pytest.mark.proof
def test_an_index_that_cannot_be_built_says_why_everywhere_and_others_go_live(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    for name in ("articles", "notes"):
        database.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)")
        database.execute(f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 20) AS i")
    database.execute(LACKS_MEMORY)
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": {}, "notes": {}}))
    pipeline.start()
    until(lambda: "index articles waits to be built: out of memory" in problems(pipeline), pipeline.tail)

    until(lambda: any(one.get("index") == "notes" for one in logged(pipeline, "index_live")), pipeline.tail)
    why = "index articles waits to be built: out of memory; correct the function"  # which stands for the server here
    until(
        lambda: len(reasons := not_ready(pipeline)) == 1 and reasons[0].startswith(why),
        lambda: f"{not_ready(pipeline)}",
    )
    assert json.loads(pipeline.get("/status")[1])["headline"]["words"].startswith("waits to be built: out of memory")

    # Now there is memory, and a transaction that the build has to wait for.
    with psycopg.connect(database.dsn) as holding:
        holding.execute("LOCK TABLE cdcsync.articles_vectors_1_settled IN ROW EXCLUSIVE MODE")
        database.execute("DROP EVENT TRIGGER lacks_memory")
        held = f"waits to be built: cdcsync.articles_vectors_1_settled is locked by pid {holding.info.backend_pid} ("
        until(lambda: held in problems(pipeline), pipeline.tail)
    pipeline.live()
    until(lambda: not problems(pipeline), pipeline.tail)
    assert database.execute("SELECT reason FROM cdcsync.indexes") == [(None,), (None,)]


def not_ready(pipeline: Pipeline) -> list[str]:
    """Return why the worker is not ready, as of its last reading."""
    status, answer = pipeline.get("/readyz")
    assert status == 503
    return list(json.loads(answer)["reasons"])


def logged(pipeline: Pipeline, event: str) -> list[dict[str, Any]]:
    return [one for one in pipeline.events() if one.get("event") == event]


async def test_an_index_that_another_pipeline_has_begun_to_keep_is_not_taken_from_it(
    open_index: OpenIndex, connection: Connection
) -> None:
    index, config = await open_index(search=None), parse(CONFIG, {}, where="here")
    for slot in ("cdcsync", "another"):
        await Pipelines(SCHEMA, slot).ensure(connection, "p")
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS public.articles (id bigint PRIMARY KEY, tenant int, body text)"
    )
    catalog = await read_catalog(connection, "p", [index.spec.shape.table])
    # Both have examined it when there was none.
    other = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, slot="another"))
    await set_up_indexes(connection, other, [index.spec], catalog)
    with pytest.raises(TablesChanged, match="another pipeline"):
        await set_up_indexes(connection, config, [index.spec], catalog)
    entry = await Registry(SCHEMA).find(connection, "articles")
    await connection.execute("DROP TABLE public.articles")
    assert entry is not None
    assert entry.slot == "another"


# -- a build outlasts the pipeline that began it -----------------------------------------------------------------------

TENANTS: Section = {"table": None, "tables": ["t_*.pages"], "search": ""}
"""An index of many tables: each that appears ends the pipeline."""


def tenant(database: Database, number: int) -> None:
    """Create another of these tables."""
    database.execute(f"CREATE SCHEMA t_{number}")
    database.execute(f"CREATE TABLE t_{number}.pages (id int PRIMARY KEY, title text)")
    database.execute(f"INSERT INTO t_{number}.pages SELECT i, 'page ' || i FROM generate_series(1, 20) AS i")


@contextmanager
def an_older_snapshot(database: Database) -> Iterator[None]:
    """Have every build wait at its end, as one waits for a transaction that may still need what it has not indexed."""
    with psycopg.connect(database.dsn) as holding:
        holding.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holding.execute("SELECT")
        yield


BUILDS = (
    "SELECT pid, index_relid::int8, index_relid::regclass::text FROM pg_stat_progress_create_index"
    " WHERE datname = current_database() AND phase = 'waiting for old snapshots'"
)
"""The processes that build indexes and wait at the end, and the indexes' OIDs and names."""


def build_of(pipeline: Pipeline, index: str) -> tuple[int, int] | None:
    """Return the process that builds an index and waits at the end, and the index's OID; None if none does."""
    builds = pipeline.target.execute(BUILDS).fetchall()
    return next(((pid, oid) for pid, oid, name in builds if name == f"cdcsync.{index}"), None)


def begun(pipeline: Pipeline, index: str) -> tuple[int, int]:
    """Wait until an index is built but for the end."""
    until(lambda: build_of(pipeline, index), lambda: f"{index} to be built; {pipeline.tail()}")
    build = build_of(pipeline, index)
    assert build is not None
    return build


def another_pipeline(pipeline: Pipeline, database: Database) -> None:
    """Have a table appear, and wait for the pipeline that follows it, until that waits for the build."""
    before = pipeline.times("hnsw_building")
    tenant(database, 2)
    until(lambda: pipeline.times("hnsw_building") > before, pipeline.tail)


def valid(pipeline: Pipeline, oid: int) -> bool:
    return pipeline.target.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = %s", [oid]).fetchone() == (True,)


@pytest.mark.parametrize("of", ["another index", "the same index"])
def test_a_first_build_goes_on_while_a_table_has_the_pipeline_made_anew(
    of: str, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'article ' || i FROM generate_series(1, 20) AS i")
    tenant(database, 1)
    indexes: dict[str, Section] = {"articles": {"search": ""}, "pages": TENANTS}
    if of == "the same index":
        del indexes["articles"]
    pipeline = make_pipeline(configuration(database.dsn, indexes=indexes))
    pipeline.hurry["cdcsync.flows.watch.WATCH_S"] = 0.5
    hnsw = f"{next(iter(indexes))}_vectors_1_hnsw"
    with an_older_snapshot(database):
        pipeline.start()
        pid, oid = begun(pipeline, hnsw)

        another_pipeline(pipeline, database)

        assert build_of(pipeline, hnsw) == (pid, oid)
    pipeline.live()
    assert valid(pipeline, oid)
    pipeline.in_step(*indexes)


def changed(spec: IndexSpec) -> list[IndexSpec]:
    """Return an index whose tables have to change."""
    return [msgspec.structs.replace(spec, carried_types=("text",))]


def with_another_table(spec: IndexSpec) -> list[IndexSpec]:
    """Return an index that is of one more table, by which ours stay as they are."""
    return [msgspec.structs.replace(spec, members={QualifiedName("t_2", "pages"): None})]


def without(spec: IndexSpec) -> list[IndexSpec]:
    """Return the other indexes."""
    return [msgspec.structs.replace(spec, name="notes")]


@pytest.mark.parametrize(
    ("now", "goes_on"), [(with_another_table, True), (changed, False), (without, False)], ids=["", "changed", "without"]
)
async def test_a_build_ends_when_its_tables_have_to_change_and_begins_again_when_it_is_asked_for(
    index: LiveIndex,
    connection: Connection,
    connect_target: Callable[[], Awaitable[Connection]],
    builds: Builds,
    now: Callable[[IndexSpec], list[IndexSpec]],
    goes_on: bool,
) -> None:
    holding = await connect_target()
    await holding.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT")

    async def at_its_end() -> bool:
        cursor = await connection.execute(BUILDS)
        return [pid for pid, _, _ in await cursor.fetchall()] == builds.pids != []

    built: list[bool] = []

    async def build_it() -> None:
        built.append(await builds.hnsw(index.spec))

    async with anyio.create_task_group() as first:
        first.start_soon(build_it)
        await support.until(at_its_end)
        before = builds.pids
        first.cancel_scope.cancel()

    await builds.keep(now(index.spec))

    assert builds.pids == (before if goes_on else [])
    async with anyio.create_task_group() as second:
        second.start_soon(build_it)
        await support.until(at_its_end)
        assert (builds.pids == before) == goes_on
        await holding.execute("COMMIT")
    assert built == [True]
    assert builds.pids == []


def filling(make_pipeline: Callable[[str], Pipeline], database: Database) -> Pipeline:
    """Return a pipeline whose worker fills a second generation of an index; it has another index of many tables."""
    tenant(database, 1)
    pages = {**TENANTS, "embedder": "old"}
    pipeline = make_pipeline(
        configuration(database.dsn, embedders=BOTH, indexes={"articles": {"embedder": "old"}, "pages": pages})
    )
    loaded(pipeline, "articles", rows=20)
    asks_for(
        pipeline,
        configuration(database.dsn, embedders=BOTH, indexes={"articles": {"embedder": "new"}, "pages": pages}),
    )
    return pipeline


def test_a_migrations_build_goes_on_while_another_index_has_the_pipeline_made_anew(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filling(make_pipeline, database)
    with an_older_snapshot(database):
        migrate(pipeline, "start")
        pid, oid = begun(pipeline, "articles_vectors_2_hnsw")

        another_pipeline(pipeline, database)

        assert build_of(pipeline, "articles_vectors_2_hnsw") == (pid, oid)
    ready(pipeline, 2)
    assert valid(pipeline, oid)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("chunks", ["", "of other chunks"])
def test_a_generation_whose_build_is_under_way_can_be_dropped(
    chunks: str, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    if chunks:
        pipeline = make_pipeline(configuration(database.dsn))
        loaded(pipeline, "articles", rows=20)
        pipeline.configure(configuration(database.dsn, indexes={"articles": {"text": "about: {title}"}}))
    else:
        pipeline = of_the_old_model(make_pipeline, database)
    with an_older_snapshot(database):
        migrate(pipeline, "start")
        until(lambda: database.execute(BUILDS), lambda: f"a build; {pipeline.tail()}")
        ((_, oid, _),) = database.execute(BUILDS)

        assert migrate(pipeline, "drop", "--yes")["dropped"] == 2

        assert database.execute("SELECT FROM pg_class WHERE oid = %s", [oid]) == []
    assert pipeline.times("overtaken_sessions_ended") == 0


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_ends_with_its_worker_and_the_next_one_begins_again(
    number: int, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'article ' || i FROM generate_series(1, 20) AS i")
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": {"search": ""}}))
    with an_older_snapshot(database):
        worker = pipeline.start()
        pid, _ = begun(pipeline, "articles_vectors_1_hnsw")

        assert pipeline.stop(worker, number) == (0 if number == signal.SIGTERM else -number)

        until(lambda: not database.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]), "the build to end")
        pipeline.start()
        begun(pipeline, "articles_vectors_1_hnsw")
    pipeline.live()
    pipeline.in_step()
