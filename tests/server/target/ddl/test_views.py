"""The view that is searched: its columns, its owner's grants, and the views that others build on it."""

from __future__ import annotations

import pytest
import structlog

from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import (
    create_vectors,
    create_view,
)
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    changes,
    document,
    make_spec,
    vector_text,
)
from tests.support.relations import catalog, create, rows

pytestmark = [pytest.mark.server, pytest.mark.anyio]


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


async def test_the_view_of_an_index_of_the_same_name_in_another_schema_is_refused(connection: Connection) -> None:
    await create(connection, make_spec())
    await connection.execute("CREATE SCHEMA other")
    for statement in (
        "CREATE TABLE other.articles_chunks AS SELECT * FROM cdcsync.articles_chunks",
        "DROP VIEW public.articles_index",
        "CREATE VIEW public.articles_index AS SELECT chunk_id FROM other.articles_chunks",
        "COMMENT ON VIEW public.articles_index IS 'cdcsync index articles: of another pipeline'",
    ):
        await connection.execute(statement.encode())
    try:
        with pytest.raises(SetupError, match="not the view of this index"):
            await create(connection, make_spec())
        assert await rows(connection, "SELECT chunk_id FROM public.articles_index") == []
    finally:
        await connection.execute("DROP SCHEMA other CASCADE")


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
