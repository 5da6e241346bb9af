"""The target's relations: created once and for all, described, searchable, and nobody else's are touched."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import psycopg
import pytest
import structlog
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.lsn import Lsn
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.building import build_hnsw, build_search
from cdcsync.target.ddl.relations import (
    RESERVED,
    Names,
    create_index_relations,
    create_vectors,
    create_view,
    vector_schema,
)
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Lease, Pipelines
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    OpenIndex,
    changes,
    document,
    make_spec,
    register,
    until,
    until_blocked,
    vector_of,
    vector_text,
)

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target that has nothing of ours."""
    return await connect_target()


async def rows(connection: Connection, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    cursor = await connection.execute(statement.encode(), arguments or None)
    return await cursor.fetchall()


async def create(connection: Connection, *specs: IndexSpec, schema: str = SCHEMA) -> None:
    async with connection.transaction():
        await create_shared(connection, schema)
        for spec in specs:
            await create_index_relations(connection, schema, spec)


async def catalog(connection: Connection) -> list[tuple[Any, ...]]:
    """Return what there is in our schema and of our views, down to columns, indexes and comments."""
    return await rows(
        connection,
        """
        SELECT c.oid::regclass::text, c.relkind, obj_description(c.oid, 'pg_class'), c.reloptions,
               array(SELECT format('%s %s %s %s', attname, format_type(atttypid, atttypmod), attnotnull,
                                   col_description(attrelid, attnum))
                     FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               CASE c.relkind WHEN 'v' THEN pg_get_viewdef(c.oid) WHEN 'i' THEN pg_get_indexdef(c.oid) END
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'cdcsync' OR c.relkind = 'v' AND n.nspname = 'public'
        ORDER BY 1
        """,
    )


# -- creation --------------------------------------------------------------------------------------------------------


async def test_everything_can_be_created_again_and_is_as_it_was(connection: Connection) -> None:
    specs = [
        make_spec(indexed=("tenant",)),
        make_spec(name="notes", key={"a": "text", "b": "uuid"}, carried={}, search=None, vector_type="halfvec"),
    ]
    await create(connection, *specs)
    before = await catalog(connection)
    await create(connection, *specs)
    assert await catalog(connection) == before
    assert len(before) > 10


async def test_every_table_view_and_function_describes_itself(connection: Connection) -> None:
    await create(connection, make_spec())
    described = await rows(
        connection,
        """
        SELECT c.relname, obj_description(c.oid, 'pg_class') LIKE 'cdcsync%%'
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE (n.nspname = 'cdcsync' OR c.relname = 'articles_index') AND c.relkind IN ('r', 'p', 'v')
        UNION ALL
        SELECT p.proname, obj_description(p.oid, 'pg_proc') LIKE 'cdcsync%%'
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'cdcsync'
        """.replace("%%", "%"),
    )
    assert {"pipelines", "indexes", "backfills", "articles_chunks", "articles_backlog", "articles_vectors_1"} <= {
        name for name, _ in described
    }
    assert {"articles_index", "wait_for"} <= {name for name, _ in described}
    assert [name for name, ours in described if not ours] == []


async def test_nothing_is_left_when_creation_is_rolled_back(connection: Connection) -> None:
    async with connection.transaction(force_rollback=True):
        await create(connection, make_spec())
    assert await catalog(connection) == []


async def test_two_workers_may_create_at_the_same_time(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    others = [await connect_target() for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for other in others:
            tasks.start_soon(create, other, make_spec())
    assert len(await catalog(connection)) > 10


async def test_the_view_has_key_carried_columns_text_vector_and_staleness(connection: Connection) -> None:
    key = {"region": "character(2)", "id": "bigint"}
    await create(
        connection,
        make_spec(key=key, carried={"price": "numeric(10,2)"}),
        make_spec(name="notes", search=None, carried={}, vector_type="halfvec"),
    )
    columns = {row[0]: row[4] for row in await catalog(connection)}
    view, without_search = columns["public.articles_index"], columns["public.notes_index"]
    assert view == [
        "region character(2) f ",
        "id bigint f ",
        "price numeric(10,2) f ",
        "chunk_no integer f ",
        "content text f ",
        "search tsvector f ",
        "embedding public.vector(3) f ",
        "stale boolean f ",
    ]
    assert without_search == [
        "id bigint f ",
        "chunk_no integer f ",
        "content text f ",
        "embedding public.halfvec(3) f ",
        "stale boolean f ",
    ]


async def test_no_column_of_ours_is_free_for_a_key_or_carried_column(connection: Connection) -> None:
    await create(connection, make_spec(key={"mine": "bigint"}, carried={}))
    ours = await rows(
        connection,
        "SELECT DISTINCT attname FROM pg_attribute WHERE attnum > 0 AND attname <> 'mine' AND attrelid IN"
        " ('cdcsync.articles_chunks'::regclass, 'public.articles_index'::regclass)",
    )
    assert {name for (name,) in ours} == RESERVED


async def test_schemas_may_have_any_name(connection: Connection) -> None:
    schema = "Ünï 'quoted' \"x\" {y}"
    try:
        await create(connection, make_spec(), schema=schema)
        await Pipelines(schema, "slot").ensure(connection, "p")
        with pytest.raises(psycopg.errors.RaiseException, match="no index"):
            await connection.execute(sql.SQL("SELECT {}.wait_for('nosuch', '0/1')").format(sql.Identifier(schema)))
    finally:
        await connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


async def test_each_indexed_column_gets_a_b_tree_of_its_own(connection: Connection) -> None:
    """Also where their names are so long that PostgreSQL would cut the index's."""
    columns = {"a" * 62 + "1": "integer", "a" * 62 + "2": "text", "ü" * 31: "integer"}
    await create(connection, make_spec(carried=columns, indexed=tuple(columns)))
    await create(connection, make_spec(carried=columns, indexed=tuple(columns)))
    found = await rows(
        connection,
        "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indexrelid"
        " WHERE i.indrelid = 'cdcsync.articles_chunks'::regclass AND NOT i.indisunique AND i.indnatts = 1"
        " AND a.attname <> 'search' ORDER BY 1",
    )
    assert sorted(name for (name,) in found) == sorted(columns)


async def test_a_chunk_of_any_length_can_be_stored_and_its_beginning_is_searched(open_index: OpenIndex) -> None:
    """The server makes no tsvector of more than a megabyte, and the strategy `none` cuts nothing."""
    index = await open_index()
    text = "first " + " ".join(f"word{number:x}" for number in range(300_000)) + " last"
    await index.apply(changes(document("1", text)))
    assert await index.rows("SELECT length(content), search @@ 'first', search @@ 'word7f' FROM {chunks}") == [
        (len(text), True, True)
    ]


async def test_without_pgvector_the_fix_is_named(server_without_pgvector: Connection) -> None:
    with pytest.raises(SetupError, match="not installed") as missing:
        await vector_schema(server_without_pgvector)
    assert missing.value.hint == "CREATE EXTENSION vector"


@pytest.fixture
async def server_without_pgvector(database: Database) -> AsyncIterator[Connection]:
    database.execute("DROP EXTENSION vector")
    connection = await connect(database.dsn, "target")
    yield connection
    await connection.close()


# -- what exists already ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE public.articles_index (id int)",
        "CREATE VIEW public.articles_index AS SELECT 1 AS id",
        "CREATE MATERIALIZED VIEW public.articles_index AS SELECT 1 AS id",
        "CREATE SEQUENCE public.articles_index",
    ],
)
async def test_a_foreign_relation_of_the_views_name_is_refused_and_nothing_is_created(
    connection: Connection, statement: str
) -> None:
    kind = statement.split(" public.")[0].removeprefix("CREATE ")
    await connection.execute(statement.encode())
    try:
        with pytest.raises(SetupError, match="not the view of this index") as refused:
            await create(connection, make_spec())
        assert refused.value.where == "public.articles_index"
        assert refused.value.hint
        assert [row[0] for row in await catalog(connection) if row[0] != "public.articles_index"] == []
    finally:
        await connection.execute(f"DROP {kind} public.articles_index".encode())


async def test_the_view_of_another_index_is_refused(connection: Connection) -> None:
    await create(connection, make_spec())
    with pytest.raises(SetupError, match="not the view of this index"):
        await create(connection, make_spec(name="notes", view="public.articles_index"))
    assert await rows(connection, "SELECT to_regclass('cdcsync.notes_chunks')") == [(None,)]


async def test_an_index_that_exists_with_another_key_is_refused(connection: Connection) -> None:
    await create(connection, make_spec())
    for key in ({"other": "bigint"}, {"id": "bigint", "tenant": "integer"}, {"tenant": "integer"}):
        carried = {"tenant": "integer"} if "tenant" not in key else {}
        with pytest.raises(SetupError, match="exists with the key") as refused:
            await create(connection, make_spec(key=key, carried=carried))
        assert refused.value.where == "index articles"
        assert refused.value.hint
    assert await rows(connection, "SELECT id, tenant FROM public.articles_index") == []


async def test_a_carried_column_that_is_added_extends_table_and_view_and_keeps_the_rows(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    wider = make_spec(carried={"author": "text", "tenant": "integer"}, search=None)
    await create(index.connection, wider)
    assert await index.rows(
        "SELECT id, author, tenant, chunk_no, content, embedding::text, stale FROM public.articles_index"
    ) == [(1, None, 1, 0, "a", vector_text("a"), False)]


async def test_a_carried_column_that_is_left_out_goes_from_the_view_and_stays_in_the_table(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await create(index.connection, make_spec(carried={}, search=None))
    assert await index.rows("SELECT id, content FROM public.articles_index") == [(1, "a")]
    assert "tenant" not in str(await rows(index.connection, "SELECT pg_get_viewdef('public.articles_index'::regclass)"))
    assert await index.rows("SELECT tenant FROM {chunks}") == [(1,)]


async def test_keyword_search_can_be_turned_on_later(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "running bears"), inline=["running bears"]))
    await create(index.connection, make_spec())
    assert await index.rows(
        "SELECT search @@ to_tsquery('pg_catalog.english', 'run & bear') FROM public.articles_index"
    ) == [(True,)]


async def test_whoever_may_read_the_view_still_may_when_its_columns_change(index: LiveIndex) -> None:
    await index.connection.execute("DROP ROLE IF EXISTS cdcsync_test_reader; CREATE ROLE cdcsync_test_reader")
    try:
        await index.connection.execute("GRANT SELECT ON public.articles_index TO cdcsync_test_reader")
        await index.connection.execute("GRANT SELECT (id) ON public.articles_index TO PUBLIC")
        await create(index.connection, make_spec(carried={"author": "text", "tenant": "integer"}))
        assert await index.rows(
            "SELECT has_table_privilege('cdcsync_test_reader', 'public.articles_index', 'SELECT'),"
            " has_table_privilege('cdcsync_test_reader', 'public.articles_index', 'UPDATE')"
        ) == [(True, False)]
    finally:
        await index.connection.execute("DROP OWNED BY cdcsync_test_reader; DROP ROLE cdcsync_test_reader")


async def test_whoever_may_read_the_view_of_chunks_still_may_when_a_column_has_another_type(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.connection.execute("GRANT SELECT ON public.articles_index_chunks TO PUBLIC")
    await create(index.connection, make_spec(carried={"tenant": "bigint"}, search=None))
    assert await index.rows(
        "SELECT id, pg_typeof(tenant)::text,"
        " has_table_privilege('pg_monitor', 'public.articles_index_chunks', 'SELECT') FROM public.articles_index_chunks"
    ) == [(1, "bigint", True)]


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(make_spec(generation=2, search=None), id="other-vectors"),
        pytest.param(make_spec(), id="keyword-search"),
        pytest.param(make_spec(carried={"author": "text", "tenant": "integer"}, search=None), id="a-column-more"),
        pytest.param(make_spec(carried={}, search=None), id="a-column-less"),
        pytest.param(make_spec(carried={"tenant": "bigint"}, search=None), id="another-type"),
    ],
)
async def test_options_and_grants_of_columns_stay_whatever_becomes_of_the_views(
    index: LiveIndex, changed: IndexSpec
) -> None:
    options = ["security_barrier=true"]
    if index.connection.info.server_version >= 150000:
        options.append("security_invoker=true")
    for view in ("articles_index", "articles_index_chunks"):
        await index.connection.execute(f"ALTER VIEW public.{view} SET ({', '.join(options)})".encode())
        await index.connection.execute(f"GRANT SELECT (id, tenant) ON public.{view} TO PUBLIC".encode())
    await create(index.connection, changed)
    for view in ("articles_index", "articles_index_chunks"):
        assert await rows(
            index.connection,
            "SELECT reloptions, array(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0"
            " AND has_column_privilege('pg_monitor', c.oid, attnum, 'SELECT'))"
            " FROM pg_class c WHERE c.oid = %s::regclass",
            f"public.{view}",
        ) == [(options, ["id", *(["tenant"] if "tenant" in changed.shape.carried else [])])]


async def test_a_view_that_others_are_built_on_follows_by_columns_at_its_end_and_nulls(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.connection.execute("CREATE VIEW cdcsync.mine AS SELECT id, tenant FROM public.articles_index")
    columns = (
        "SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = 'public.articles_index'::regclass"
        " AND attnum > 0 ORDER BY attnum)"
    )
    before = (await index.rows(columns))[0][0]

    wider = make_spec(carried={"author": "text", "tenant": "integer"}, search=None)
    for _ in range(2):
        await create(index.connection, wider)
        assert (await index.rows(columns))[0][0] == [*before, "author"]
    assert await index.rows("SELECT * FROM cdcsync.mine") == [(1, 1)]
    # A column that the index no longer carries is not kept up, and must not look as if it were.
    for _ in range(2):
        await create(index.connection, make_spec(carried={"author": "text"}, search=None))
        assert await index.rows("SELECT * FROM cdcsync.mine") == [(1, None)]
    await create(index.connection, wider)
    assert await index.rows("SELECT * FROM cdcsync.mine") == [(1, 1)]
    # Once nothing is built on it, it is as a new one would be.
    await index.connection.execute("DROP VIEW cdcsync.mine")
    await create(index.connection, wider)
    assert (await index.rows(columns))[0][0] == ["id", "author", *before[1:]]


@pytest.mark.parametrize(
    ("type_", "value", "shown"),
    [
        ("bigint", "7", 7),
        pytest.param("bigint", str(2**40), None, id="a value that the old type cannot have"),
        ("text", "7", 7),
        pytest.param("text", "seven", None, id="a text that is no number"),
    ],
)
async def test_a_column_whose_type_changes_keeps_its_type_in_views_that_others_are_built_on(
    index: LiveIndex, type_: str, value: str, shown: int | None
) -> None:
    if index.connection.info.server_version < 160000:
        shown = None  # no server before 16 can say whether a text is a value of a type
    views = ("articles_index", "articles_index_chunks")
    for view in views:
        await index.connection.execute(f"CREATE VIEW cdcsync.on_{view} AS SELECT tenant FROM public.{view}".encode())
    other = make_spec(carried={"tenant": type_}, search=None)
    with structlog.testing.capture_logs() as logged:
        await create(index.connection, other)
    assert [one["event"] for one in logged] == ["view_keeps_types"] * 2
    await create(index.connection, other)
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.connection.execute("UPDATE cdcsync.articles_chunks SET tenant = %s", [value])

    for view in views:
        assert await rows(index.connection, f"SELECT tenant, pg_typeof(tenant)::text FROM cdcsync.on_{view}") == [
            (shown, "integer")
        ]
    assert await rows(index.connection, "SELECT tenant::text FROM cdcsync.articles_chunks") == [(value,)]
    # Once nothing is built on them, they are as new ones would be.
    for view in views:
        await index.connection.execute(f"DROP VIEW cdcsync.on_{view}".encode())
    await create(index.connection, other)
    for view in views:
        assert await rows(index.connection, f"SELECT pg_typeof(tenant)::text FROM public.{view}") == [(type_,)]


@pytest.mark.parametrize(
    "built",
    [
        "FUNCTION cdcsync.mine() RETURNS SETOF public.{view} LANGUAGE sql AS 'SELECT * FROM public.{view}'",
        "FUNCTION cdcsync.mine(hits public.{view}[]) RETURNS int LANGUAGE sql AS 'SELECT cardinality(hits)'",
        "TABLE cdcsync.mine (hit public.{view})",
        "MATERIALIZED VIEW cdcsync.mine AS SELECT a FROM public.{view} AS a",
    ],
)
@pytest.mark.parametrize("view", ["articles_index", "articles_index_chunks"])
async def test_a_view_whose_rows_are_the_type_of_something_is_kept_too(index: LiveIndex, built: str, view: str) -> None:
    await index.connection.execute(f"CREATE {built.format(view=view)}".encode())
    before = await index.rows("SELECT %s::regclass::oid::int8", f"public.{view}")
    wider = make_spec(carried={"tenant": "bigint", "author": "text"}, search=None)

    await create(index.connection, wider)

    assert await index.rows("SELECT %s::regclass::oid::int8", f"public.{view}") == before
    assert await index.rows(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass"
        " AND attname IN ('tenant', 'author') ORDER BY attnum",
        f"public.{view}",
    ) == [("tenant", "integer"), ("author", "text")]
    await index.apply(changes(document("1", "a"), inline=["a"]))
    assert await index.rows(f"SELECT id, tenant FROM public.{view}") == [(1, 1)]


async def test_the_view_can_be_swapped_to_vectors_of_another_width(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    wider = make_spec(generation=2, dimensions=5, vector_type="halfvec", search=None)
    async with index.connection.transaction():
        await create_vectors(index.connection, SCHEMA, wider)
        await create_view(index.connection, SCHEMA, wider)
    assert await index.rows("SELECT FROM public.articles_index") == []
    assert await index.rows(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = 'public.articles_index'::regclass AND attname = 'embedding'"
    ) == [("public.halfvec(5)",)]

    await create_view(index.connection, SCHEMA, index.spec)
    assert await index.rows("SELECT embedding::text FROM public.articles_index") == [(vector_text("a"),)]


async def test_vectors_of_another_width_that_another_index_left_are_refused(index: LiveIndex) -> None:
    with pytest.raises(SetupError, match=r"vectors are of type vector\(3\), not vector\(5\)") as refused:
        await create_vectors(index.connection, SCHEMA, make_spec(dimensions=5))

    assert refused.value.where == '"cdcsync"."articles_vectors_1"'
    assert "drop it" in str(refused.value.hint)


async def test_a_worker_that_starts_again_waits_for_no_reader_and_stops_none(
    index: LiveIndex, connection: Connection
) -> None:
    """Nothing is new, so nothing needs a lock that a search in a long transaction could be in the way of."""
    async with connection.transaction():
        await connection.execute("SELECT FROM public.articles_index")
        await index.connection.execute("SET lock_timeout = '500ms'")
        await create(index.connection, index.spec)


# -- the vector index ------------------------------------------------------------------------------------------------


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


# -- wait_for --------------------------------------------------------------------------------------------------------


async def followed(connection: Connection, checkpoint: Lsn | None) -> tuple[Pipelines, Lease]:
    """Set up the index `articles` and its pipeline."""
    pipelines = Pipelines(SCHEMA, "slot")
    spec = make_spec(search=None)
    await create(connection, spec)
    await pipelines.ensure(connection, "p")
    await register(connection, spec, slot="slot")
    lease = await pipelines.take_over(connection, "me")
    if checkpoint is not None:
        lease = await pipelines.begin_at(connection, lease, checkpoint, "system", 1)
    return pipelines, lease


async def test_waiting_for_what_is_reached_returns_at_once(connection: Connection) -> None:
    await followed(connection, Lsn.parse("1/10"))
    for position in ("1/10", "1/F", "0/FFFFFFFF", "0/0"):
        assert await rows(connection, "SELECT cdcsync.wait_for('articles', %s)", position) == [(True,)]


@pytest.mark.parametrize("checkpoint", [None, Lsn(0x10)])
async def test_waiting_in_vain_returns_false(connection: Connection, checkpoint: Lsn | None) -> None:
    await followed(connection, checkpoint)
    for timeout in (timedelta(), timedelta(milliseconds=20), timedelta(seconds=-1)):
        found = await rows(connection, "SELECT cdcsync.wait_for('articles', '0/11', %s)", timeout)
        assert found == [(False,)]


async def test_waiting_ends_when_the_checkpoint_gets_there(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    pipelines, lease = await followed(connection, Lsn(0x10))
    waiting = await connect_target()
    answers = []

    async def wait() -> None:
        async with waiting.transaction():
            answers.extend(await rows(waiting, "SELECT cdcsync.wait_for('articles', '0/30', '60 s')"))

    async def sleeps() -> bool:
        return (True,) in await rows(
            connection,
            "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s",
            waiting.info.backend_pid,
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await until(sleeps)
        lease = await pipelines.commit(connection, lease, Lsn(0x20))
        await until(sleeps)
        assert answers == []
        await pipelines.commit(connection, lease, Lsn(0x30))
    assert answers == [(True,)]


async def test_waiting_for_an_unknown_index_is_an_error_that_says_where_to_look(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    with pytest.raises(psycopg.errors.RaiseException, match="there is no index 'nosuch'") as refused:
        await connection.execute("SELECT cdcsync.wait_for('nosuch', '0/1')")
    assert "indexes" in (refused.value.diag.message_hint or "")


async def test_waiting_for_a_paused_or_an_unfollowed_index_is_an_error_with_the_reason(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'its key is gone'")
    with pytest.raises(psycopg.errors.RaiseException, match="the index 'articles' is paused") as refused:
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")
    assert refused.value.diag.message_detail == "its key is gone"
    await connection.execute("UPDATE cdcsync.indexes SET state = 'live', unfollowed_at = now()")
    with pytest.raises(psycopg.errors.RaiseException, match="'articles' is no longer followed") as refused:
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")
    assert "drop" in (refused.value.diag.message_hint or "")


@pytest.mark.parametrize(
    ("kind", "state", "there"),
    [
        ("initial", "requested", False),
        ("initial", "running", False),
        ("resync", "paused", False),
        ("initial", "done", True),
        ("replay", "running", True),
    ],
)
async def test_an_index_that_is_loading_is_not_there_yet(
    connection: Connection, kind: str, state: str, there: bool
) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('articles', %s, %s)", [kind, state]
    )
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/1', '10 ms')") == [(there,)]


async def test_vectors_are_waited_for_on_request_up_to_the_same_position(connection: Connection) -> None:
    await followed(connection, Lsn(0x100))
    wait = "SELECT cdcsync.wait_for('articles', '0/50', timeout => '10 ms', vectors => true)"
    assert await rows(connection, wait) == [(True,)]
    for lsn, attempts in (("0/60", 0), ("0/40", 8), ("0/40", 0)):
        assert await rows(connection, wait) == [(True,)]
        (chunk,) = (
            await rows(
                connection,
                "INSERT INTO cdcsync.articles_chunks (id, tenant, chunk_no, chunk_total, content, content_hash,"
                " document_hash, commit_lsn) SELECT count(*), 1, 0, 1, 'x', '\\x00', '\\x00', %s"
                " FROM cdcsync.articles_chunks RETURNING chunk_id",
                lsn,
            )
        )[0]
        await connection.execute(
            "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane, attempts)"
            " VALUES (1, %s, '\\x00', 0, %s)",
            [chunk, attempts],
        )
    assert await rows(connection, wait) == [(False,)]
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/50')") == [(True,)]


async def test_other_roles_and_row_level_security_get_a_true_answer(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await followed(connection, Lsn(0x10))
    for table in ("indexes", "pipelines", "backfills"):
        await connection.execute(f"ALTER TABLE cdcsync.{table} ENABLE ROW LEVEL SECURITY".encode())
    other = await connect_target()
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    await connection.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdcsync TO {role}".encode())
    try:
        await other.execute(f"SET ROLE {role}".encode())
        assert await rows(other, "SELECT cdcsync.wait_for('articles', '0/1')") == [(True,)]
        assert await rows(other, "SELECT cdcsync.wait_for('articles', '0/11', '0')") == [(False,)]
    finally:
        await other.close()
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


async def test_a_function_of_an_older_version_is_replaced_and_keeps_who_may_call_it(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    await connection.execute(f"CREATE ROLE {role}".encode())
    try:
        await connection.execute("DROP FUNCTION cdcsync.wait_for(text, pg_lsn, interval, boolean)")
        await connection.execute(
            "CREATE FUNCTION cdcsync.wait_for(a text, b pg_lsn, c interval DEFAULT '1 s') RETURNS boolean"
            " LANGUAGE sql AS 'SELECT true'"
        )
        await connection.execute("REVOKE ALL ON FUNCTION cdcsync.wait_for FROM PUBLIC")
        await connection.execute(f"GRANT EXECUTE ON FUNCTION cdcsync.wait_for TO {role}".encode())
        for _ in range(2):
            await create_shared(connection, SCHEMA)
            assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/1')") == [(True,)]
            assert await rows(
                connection,
                "SELECT array_agg(a.grantee::regrole::text ORDER BY 1) @> %s, bool_or(a.grantee = 0)"
                " FROM pg_proc p, aclexplode(p.proacl) a WHERE p.proname = 'wait_for'",
                [role],
            ) == [(True, False)]
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_waiting_where_every_query_sees_the_same_moment_is_refused(connection: Connection, level: str) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute(f"SET default_transaction_isolation = '{level}'".encode())
    with pytest.raises(psycopg.errors.RaiseException, match="READ COMMITTED"):
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")


async def test_waiting_without_a_position_or_a_limit_does_not_wait_for_ever(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute("SET statement_timeout = '20s'")
    for arguments in ("'articles', NULL", "'articles', '0/11', NULL", "NULL, '0/11'"):
        assert await rows(connection, f"SELECT cdcsync.wait_for({arguments})") == [(None,)]


def test_names_of_an_index_are_its_own() -> None:
    names = Names("s", "articles")
    assert names.hnsw_name(3) == "articles_vectors_3_hnsw"
    assert names.vectors(3) != names.vectors(2)
    assert vector_of("a").shape == (3,)
