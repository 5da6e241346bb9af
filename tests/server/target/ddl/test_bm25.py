"""Keyword search by pg_textsearch, on servers that have it, and by SQL wherever it is not there or not any more.

The extension is in no package that the tests install. `CDCSYNC_TEST_DSN` names a server that has loaded it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from psycopg import sql

from cdcsync.target.ddl.bm25 import bm25_option
from cdcsync.target.ddl.building import build_search, keep_bm25
from cdcsync.target.search import Hit, Plan, count_words, search
from tests.support.configs import configuration
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec
from tests.support.searching import SHELF
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

LOADED = """
SELECT current_setting('pg_textsearch.default_limit', true) IS NOT NULL
       AND EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_textsearch')
"""


@pytest.fixture
def extended(database: Database) -> Database:
    """A database with the extension, in a schema of its own."""
    if database.execute(LOADED) == [(False,)]:
        pytest.skip("this server has no pg_textsearch in its shared_preload_libraries")
    database.execute("CREATE SCHEMA ranking")
    database.execute("CREATE EXTENSION pg_textsearch SCHEMA ranking")
    return database


async def filled(index: LiveIndex, *texts: str) -> None:
    """Put documents into an index, by ids from 1, with the index for keyword search and the words counted."""
    await index.apply(
        changes(*(document(str(id_), text, carried=(str(id_ % 5),)) for id_, text in enumerate(texts, 1)))
    )
    await build_search(index.connection, SCHEMA, index.spec)
    await count_words(index.connection, SCHEMA, index.spec)
    await index.connection.execute("ANALYZE")


@pytest.fixture
async def ranked(extended: Database) -> AsyncIterator[LiveIndex]:
    async with live_index(extended, make_spec()) as index:
        await filled(index, *SHELF)
        assert await keep_bm25(index.connection, SCHEMA, index.spec)
        yield index


async def found(index: LiveIndex, query: str, **more: Any) -> list[Hit]:
    return await search(index.connection, SCHEMA, index.spec, text=query, vector=None, mode="text", **more)


async def plan(index: LiveIndex, query: str) -> str:
    plans: list[Plan] = []
    await index.connection.execute("SET enable_seqscan = off")
    await found(index, query, plans=plans)
    return "\n".join(line for one in plans for line in one.lines)


async def test_a_server_without_the_extension_has_nothing_to_keep(database: Database) -> None:
    async with live_index(database, make_spec()) as index:
        await filled(index, *SHELF)
        assert not await keep_bm25(index.connection, SCHEMA, index.spec)
        assert await bm25_option(index.connection, SCHEMA, index.spec) is None
        assert "articles_chunks_bm25" not in await plan(index, "hums")
        assert [hit.key["id"] for hit in await found(index, "hums")] == [3]


async def test_a_reader_who_may_not_use_the_extensions_schema_is_ranked_for_by_sql(database: Database) -> None:
    """The extension is not needed: an index and a setting look like those that it would have."""
    reader = sql.Identifier(f"{database.name}_reader")
    async with live_index(database, make_spec()) as index:
        await filled(index, *SHELF)
        for statement in (
            "CREATE SCHEMA ranking",
            "CREATE OPERATOR CLASS ranking.text_bm25_ops FOR TYPE text USING btree AS OPERATOR 1 <, OPERATOR 2 <=,"
            " OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 bttextcmp(text, text)",
            "CREATE INDEX articles_chunks_bm25 ON cdcsync.articles_chunks (content ranking.text_bm25_ops)",
            "UPDATE pg_class SET reloptions = ARRAY['text_config=pg_catalog.english']"
            " WHERE relname = 'articles_chunks_bm25'",
            "CREATE ROLE {reader}; GRANT USAGE ON SCHEMA cdcsync TO {reader}",
            "GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {reader}",
        ):
            await index.connection.execute(sql.SQL(statement).format(reader=reader))
        try:
            await index.connection.execute(sql.SQL("SET ROLE {}").format(reader))
            await index.connection.execute("SET pg_textsearch.default_limit = 1000")
            assert [hit.key["id"] for hit in await found(index, "hums")] == [3]
        finally:
            await index.connection.execute("RESET ROLE")
            await index.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(reader))


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("what does E-716 mean?", [1, 3]),
        ("password", [4, 5, 2]),
        ('"password policy"', [4]),
        ('"policy password"', []),
        ('printer "reset a forgotten"', [2]),
        ("password -policy", [2]),
        ("-policy", []),
        ("the of and", []),
        ("hums", [3]),
        ("it's a printer's", [3, 1, 2]),
        ("\\ ' : & | ! ( ) <-> printer:*", [3, 1, 2]),
    ],
)
async def test_phrases_and_exclusions_are_conditions_on_what_the_extension_ranks(
    ranked: LiveIndex, query: str, ids: list[int]
) -> None:
    hits = await found(ranked, query)
    assert sorted(hit.key["id"] for hit in hits) == sorted(ids)
    assert ids == [] or hits[0].key["id"] == ids[0]
    assert [hit.text_rank for hit in hits] == list(range(1, len(ids) + 1))
    scores = [hit.text_score or 0 for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)


async def test_its_index_is_asked_and_a_pasted_text_is_ranked_by_sql(ranked: LiveIndex) -> None:
    assert "articles_chunks_bm25" in await plan(ranked, "password")
    pasted = "hums " + " ".join(f"word{n}" for n in range(100))
    assert "articles_chunks_bm25" not in await plan(ranked, pasted)
    assert [hit.key["id"] for hit in await found(ranked, pasted)] == [3]


async def test_filters_pages_and_chunks_hold_whoever_ranks(extended: Database) -> None:
    async with live_index(extended, make_spec()) as index:
        await filled(index, *(f"common word{n}" for n in range(300)))
        await keep_bm25(index.connection, SCHEMA, index.spec)
        ask = partial(found, index, "common")
        pages = [hit.key["id"] for skip in range(0, 60, 20) for hit in await ask(k=20, skip=skip)]
        assert len(set(pages)) == 60
        assert len(await ask(k=200)) == 200
        of_tenant = await ask(k=70, filter={"tenant": 3})
        assert len(of_tenant) == 60
        assert {hit.carried["tenant"] for hit in of_tenant} == {3}
        assert len(await ask(k=70, where="tenant = 3")) == 60
        # A change is ranked at once.
        await index.apply(changes(document("9000", "common zebra", carried=("1",))))
        assert [hit.key["id"] for hit in await found(index, "zebra")] == [9000]


async def test_the_configuration_and_the_extension_decide_who_ranks(ranked: LiveIndex, extended: Database) -> None:
    connection = ranked.connection
    assert not await keep_bm25(connection, SCHEMA, ranked.spec)  # it is there

    plain = make_spec(search="simple")
    assert await keep_bm25(connection, SCHEMA, plain)
    assert await bm25_option(connection, SCHEMA, plain) == "text_config=pg_catalog.simple"
    # The function is that of another configuration, whose words the index does not have.
    assert "articles_chunks_bm25" not in await plan(ranked, "password")

    assert await keep_bm25(connection, SCHEMA, ranked.spec)
    assert await keep_bm25(connection, SCHEMA, make_spec(ranking="sql"))
    assert await bm25_option(connection, SCHEMA, ranked.spec) is None
    assert [hit.key["id"] for hit in await found(ranked, "hums")] == [3]

    assert await keep_bm25(connection, SCHEMA, ranked.spec)
    extended.execute("DROP EXTENSION pg_textsearch CASCADE")
    assert [hit.key["id"] for hit in await found(ranked, "hums")] == [3]
    assert not await keep_bm25(connection, SCHEMA, ranked.spec)


async def test_a_reader_searches_by_the_extension(ranked: LiveIndex, extended: Database) -> None:
    role = sql.Identifier(f"reader_{extended.name}")
    extended.execute(sql.SQL("CREATE ROLE {}").format(role))
    try:
        for grant in (
            "USAGE ON SCHEMA cdcsync",
            "USAGE ON SCHEMA ranking",
            "SELECT ON cdcsync.articles_chunks, cdcsync.articles_words, cdcsync.articles_vectors_1",
        ):
            extended.execute(sql.SQL("GRANT " + grant + " TO {}").format(role))
        with extended.connect() as reader:
            reader.execute(sql.SQL("SET ROLE {}").format(role))
            assert reader.execute("SELECT id FROM cdcsync.articles_search('hums')").fetchall() == [(3,)]
    finally:
        extended.execute(sql.SQL("DROP OWNED BY {}").format(role))
        extended.execute(sql.SQL("DROP ROLE {}").format(role))


def test_a_worker_builds_the_index_once_the_extension_is_there(
    extended: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    extended.execute("CREATE TABLE articles (id int PRIMARY KEY, body text)")
    extended.execute("INSERT INTO articles SELECT i, 'text ' || i FROM generate_series(1, 30) AS i")
    pipeline = make_pipeline(configuration(extended.dsn, indexes={"articles": {"text": "{body}"}}))
    process = pipeline.start()
    pipeline.live()
    pipeline.stop(process)
    pipeline.start()
    until(
        lambda: extended.execute("SELECT to_regclass('cdcsync.articles_chunks_bm25') IS NOT NULL") == [(True,)],
        "an index of pg_textsearch",
    )
    assert pipeline.event("words_ranked")["by"] == "pg_textsearch"
    assert extended.execute("SELECT id FROM cdcsync.articles_search('17')") == [(17,)]
