"""Which relations of an index are missing, and whether its table has to be read again for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import LiteralString

import anyio
import msgspec
import psycopg
import psycopg.sql
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SetupError
from cdcsync.target.ddl.building import build_hnsw, build_search
from cdcsync.target.ddl.missing import Missing, Unsafe, missing_relations, unsafe_tables
from cdcsync.target.ddl.tiers import create_vectors
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, live_index, make_spec
from tests.support.roles import Roles, grant
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

INTERRUPTED: LiteralString = (
    "UPDATE pg_inherits SET inhdetachpending = true WHERE inhrelid = 'cdcsync.articles_vectors_1_fresh'::regclass"
)

DROPPED: dict[LiteralString, Missing] = {
    "DROP TABLE cdcsync.articles_chunks CASCADE": Missing(
        ("articles_chunks",),
        (
            "articles_chunks_by_tenant",
            "articles_chunks_search",
            "public.articles_index",
            "public.articles_index_chunks",
        ),
    ),
    "DROP TABLE cdcsync.articles_backlog": Missing(("articles_backlog",)),
    "DROP TABLE cdcsync.articles_vectors_1 CASCADE": Missing(
        ("articles_vectors_1",), ("articles_vectors_1_hnsw", "articles_vectors_1_fresh_near", "public.articles_index")
    ),
    "DROP TABLE cdcsync.articles_vectors_1_settled": Missing(
        ("articles_vectors_1_settled",), ("articles_vectors_1_hnsw",)
    ),
    "DROP TABLE cdcsync.articles_vectors_1_fresh": Missing(
        ("articles_vectors_1_fresh",), ("articles_vectors_1_fresh_near",)
    ),
    "ALTER TABLE cdcsync.articles_vectors_1 DETACH PARTITION cdcsync.articles_vectors_1_settled": Missing(
        built=("articles_vectors_1_settled as a partition",)
    ),
    "ALTER TABLE cdcsync.articles_vectors_1 DETACH PARTITION cdcsync.articles_vectors_1_fresh": Missing(
        built=("articles_vectors_1_fresh as a partition",)
    ),
    INTERRUPTED: Missing(built=("articles_vectors_1_fresh as a partition",)),
    "ALTER TABLE cdcsync.articles_vectors_1_settled SET UNLOGGED": Missing(
        unsafe=Unsafe(unlogged=("articles_vectors_1_settled",))
    ),
    "DROP INDEX cdcsync.articles_vectors_1_hnsw": Missing(built=("articles_vectors_1_hnsw",)),
    "DROP INDEX cdcsync.articles_vectors_1_fresh_near": Missing(built=("articles_vectors_1_fresh_near",)),
    "DROP INDEX cdcsync.articles_chunks_search": Missing(built=("articles_chunks_search",)),
    "DROP INDEX cdcsync.articles_chunks_by_tenant": Missing(built=("articles_chunks_by_tenant",)),
    "DROP VIEW public.articles_index": Missing(built=("public.articles_index",)),
    "DROP VIEW public.articles_index_chunks": Missing(built=("public.articles_index_chunks",)),
    "DROP TABLE cdcsync.articles_words": Missing(built=("cdcsync.articles_words",)),
    "DROP FUNCTION cdcsync.articles_search": Missing(built=("articles_search",)),
    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'cdcsync.articles_vectors_1_hnsw'::regclass": Missing(
        built=("articles_vectors_1_hnsw",)
    ),
}


@pytest.fixture
async def loaded(open_index: OpenIndex) -> LiveIndex:
    """An index with all relations that an index can have."""
    index = await open_index(indexed=("tenant",))
    await build_search(index.connection, SCHEMA, index.spec)
    await build_hnsw(index.connection, SCHEMA, index.spec)
    return index


async def test_of_a_whole_index_nothing_is_missing(loaded: LiveIndex) -> None:
    missing = await missing_relations(loaded.connection, SCHEMA, loaded.spec)
    assert missing == Missing()
    assert not missing


@pytest.mark.proof_from(6)
@pytest.mark.parametrize("statement", DROPPED)
async def test_what_was_dropped_or_is_invalid_is_named(loaded: LiveIndex, statement: str) -> None:
    await loaded.connection.execute(statement.encode())
    missing = await missing_relations(loaded.connection, SCHEMA, loaded.spec)
    expected = DROPPED[statement]
    assert missing.tables == expected.tables
    assert set(expected.built) <= set(missing.built)
    assert bool(missing.tables) or missing == expected
    assert str(missing).startswith("unlogged in the target: " if missing.unsafe else "missing in the target: ")


async def test_a_view_is_looked_for_under_the_name_that_it_has(loaded: LiveIndex) -> None:
    elsewhere = QualifiedName("public", "not_yet")
    missing = await missing_relations(loaded.connection, SCHEMA, loaded.spec, view=elsewhere)
    assert missing == Missing(built=("public.not_yet", "public.not_yet_chunks"))


async def test_a_detachment_that_was_interrupted_is_ended_and_undone(loaded: LiveIndex) -> None:
    await loaded.apply(changes(document("1", "a"), inline=["a"]))
    await loaded.connection.execute(INTERRUPTED)
    async with loaded.connection.transaction():
        await create_vectors(loaded.connection, SCHEMA, loaded.spec)
    assert not await missing_relations(loaded.connection, SCHEMA, loaded.spec)
    assert await loaded.rows("SELECT tier FROM {vectors}") == [("fresh",)]


async def test_a_detachment_that_would_wait_for_a_transaction_names_it(
    loaded: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.ddl.tiers.OPEN_FOR_S", 0.1)
    await loaded.connection.execute(INTERRUPTED)
    with psycopg.connect(target.dsn, application_name="report") as older:
        older.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        older.execute("SELECT 1")
        await anyio.sleep(0.2)
        with pytest.raises(SetupError) as caught:
            async with loaded.connection.transaction():
                await create_vectors(loaded.connection, SCHEMA, loaded.spec)
        assert f"pid {older.info.backend_pid} (report, role " in caught.value.message
        assert caught.value.hint is not None
        assert caught.value.hint.endswith(f"SELECT pg_terminate_backend({older.info.backend_pid})")
    async with loaded.connection.transaction():
        await create_vectors(loaded.connection, SCHEMA, loaded.spec)
    assert not await missing_relations(loaded.connection, SCHEMA, loaded.spec)


async def test_a_worker_that_may_not_know_how_long_a_transaction_has_been_open_does_not_wait_for_it_either(
    roles: Roles, make_database: Callable[[], Database]
) -> None:
    database, role = make_database(), roles.name("target")
    grant(database, target_role=role)
    worker = msgspec.structs.replace(database, dsn=roles.dsn(database, role))
    async with live_index(worker, make_spec()) as loaded:
        database.execute(INTERRUPTED)
        with psycopg.connect(database.dsn, application_name="report") as older:
            older.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            older.execute("SELECT 1")
            with pytest.raises(SetupError, match=rf"pid {older.info.backend_pid} \(report, role \S+\)$"):
                async with loaded.connection.transaction():
                    await create_vectors(loaded.connection, SCHEMA, loaded.spec)
        async with loaded.connection.transaction():
            await create_vectors(loaded.connection, SCHEMA, loaded.spec)
        assert (
            "articles_vectors_1_fresh as a partition"
            not in (await missing_relations(loaded.connection, SCHEMA, loaded.spec)).built
        )


async def test_triggers_and_rules_that_may_have_other_rows_written_are_named_and_no_others(loaded: LiveIndex) -> None:
    await loaded.connection.execute(
        "CREATE FUNCTION public.nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"
    )
    made = "CREATE TRIGGER {} {} ON cdcsync.articles_{} {} EXECUTE FUNCTION public.nothing()"
    for name, when, table, each in (
        ("after", "AFTER UPDATE", "chunks", "FOR EACH ROW"),
        ("once", "BEFORE UPDATE", "chunks", "FOR EACH STATEMENT"),
        ("disabled", "BEFORE UPDATE", "chunks", "FOR EACH ROW"),
        ("The last", "BEFORE DELETE", "backlog", "FOR EACH ROW"),
        ("of_tiers", "BEFORE INSERT", "vectors_1", "FOR EACH ROW"),
    ):
        name = psycopg.sql.Identifier(name).as_string()
        await loaded.connection.execute(made.format(name, when, table, each).encode())
    await loaded.connection.execute(
        "ALTER TABLE cdcsync.articles_chunks DISABLE TRIGGER disabled;"
        " CREATE RULE aside AS ON UPDATE TO cdcsync.articles_chunks DO INSTEAD NOTHING"
    )

    missing = await missing_relations(loaded.connection, SCHEMA, loaded.spec)

    tiers = ("articles_vectors_1", "articles_vectors_1_fresh", "articles_vectors_1_settled")
    assert missing.unsafe.altered == (
        ("articles_backlog", 'TRIGGER "The last"'),
        ("articles_chunks", "RULE aside"),
        *((tier, "TRIGGER of_tiers") for tier in tiers),
    )
    with pytest.raises(SetupError) as caught:
        missing.refuse_unsafe(SCHEMA)
    assert caught.value.hint is not None
    await loaded.connection.execute(caught.value.hint.encode())
    assert not await unsafe_tables(loaded.connection, SCHEMA, "articles")


def test_the_remedy_for_an_unlogged_table_names_it_as_sql_does() -> None:
    with pytest.raises(SetupError) as caught:
        Missing(unsafe=Unsafe(unlogged=("articles~2_chunks",))).refuse_unsafe("Search")
    assert caught.value.hint == 'ALTER TABLE "Search"."articles~2_chunks" SET LOGGED'
