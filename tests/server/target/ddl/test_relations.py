"""The target's relations: created once and for all, described, searchable, and nobody else's are touched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.relations import (
    RESERVED,
    create_vectors,
    vector_schema,
)
from cdcsync.target.pipelines import Pipelines
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    OpenIndex,
    changes,
    document,
    make_spec,
)
from tests.support.relations import catalog, create, rows

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


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


async def test_the_backlog_of_an_earlier_version_gets_the_index_without_failed_texts_once_nobody_is_in_the_way(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await create(connection, make_spec())
    before = await catalog(connection)
    await connection.execute("DROP INDEX cdcsync.articles_backlog_due")
    await connection.execute(
        "CREATE INDEX articles_backlog_lane ON cdcsync.articles_backlog (generation, lane, chunk_id)"
    )
    earlier = await catalog(connection)
    reader = await connect_target()
    async with reader.transaction():
        await reader.execute("SELECT FROM cdcsync.articles_backlog")
        async with connection.transaction():
            await connection.execute(BRIEFLY)
            await create(connection, make_spec())
        assert sorted(await catalog(connection), key=str) == sorted(
            [*before, *(one for one in earlier if one not in before)], key=str
        )
    await create(connection, make_spec())
    assert await catalog(connection) == before


async def test_texts_that_wait_since_an_earlier_version_may_be_of_any_age_and_later_ones_keep_their_position(
    index: LiveIndex,
) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
    await index.connection.execute("COMMENT ON COLUMN cdcsync.articles_chunks.commit_lsn IS NULL")
    await create(index.connection, index.spec)
    await index.apply(changes(document("3", "c")))
    await create(index.connection, index.spec)
    positions = "SELECT content, commit_lsn::text FROM {chunks} ORDER BY 1"
    assert await index.rows(positions) == [("a", "0/10"), ("b", "0/0"), ("c", "0/10")]


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


async def test_an_index_that_exists_with_another_key_is_refused(connection: Connection) -> None:
    await create(connection, make_spec())
    for key in ({"other": "bigint"}, {"id": "bigint", "tenant": "integer"}, {"tenant": "integer"}):
        carried = {"tenant": "integer"} if "tenant" not in key else {}
        with pytest.raises(SetupError, match="exists with the key") as refused:
            await create(connection, make_spec(key=key, carried=carried))
        assert refused.value.where == "index articles"
        assert refused.value.hint
    assert await rows(connection, "SELECT id, tenant FROM public.articles_index") == []


async def test_keyword_search_can_be_turned_on_later(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "running bears"), inline=["running bears"]))
    await create(index.connection, make_spec())
    assert await index.rows(
        "SELECT search @@ to_tsquery('pg_catalog.english', 'run & bear') FROM public.articles_index"
    ) == [(True,)]


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
