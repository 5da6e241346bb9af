"""Tidying: what is removed from the fresh tier, who is not waited for, and words that wait to be entered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.target import tidying
from cdcsync.target.ddl.building import build_hnsw, build_search
from cdcsync.target.tidying import enter_words, tidy
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document
from tests.support.kills import Killed, kill_at, points

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]

NEAR = "cdcsync.articles_vectors_1_fresh_near"


async def churned(index: LiveIndex, *, live: int, dead: int) -> None:
    """Leave so many live rows in the fresh tier, and about so many dead ones."""
    await index.connection.execute("ALTER TABLE cdcsync.articles_vectors_1_fresh SET (autovacuum_enabled = off)")
    texts = [f"text {at}" for at in range(live)]
    await index.apply(changes(*[document(str(at), text) for at, text in enumerate(texts)], inline=texts))
    for _ in range(dead // live):
        await index.connection.execute(
            "UPDATE cdcsync.articles_vectors_1_fresh SET content_hash = sha256(content_hash)"
        )
    await index.connection.execute("SELECT pg_stat_force_next_flush()")


async def counted(index: LiveIndex) -> tuple[int, int]:
    """Return the dead rows of the fresh tier and the pages of its list."""
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    ((dead, pages),) = await index.rows(
        "SELECT pg_stat_get_dead_tuples('cdcsync.articles_vectors_1_fresh'::regclass)::int,"
        f" (pg_relation_size('{NEAR}') / 8192)::int"
    )
    return dead, pages


async def test_what_is_dead_is_removed_once_it_is_much(index: LiveIndex) -> None:
    await churned(index, live=300, dead=900)
    before, _ = await counted(index)
    await tidy(index.connection, SCHEMA, index.spec)
    assert (await counted(index))[0] == before > 500  # so little is not worth it

    await churned(index, live=300, dead=900)
    await tidy(index.connection, SCHEMA, index.spec)
    assert (await counted(index))[0] == 0


async def test_a_list_of_empty_pages_is_built_anew_and_finds_what_it_found(
    index: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.tidying.SPARE_PAGES", 10)
    await churned(index, live=300, dead=9_000)
    await build_hnsw(index.connection, SCHEMA, index.spec)
    query = (
        "SELECT chunk_id FROM {vectors} ORDER BY embedding OPERATOR(public.<=>)"
        " (SELECT embedding FROM {vectors} ORDER BY chunk_id LIMIT 1), chunk_id LIMIT 20"
    )
    _, pages = await counted(index)
    found = await index.rows(query)

    await tidy(index.connection, SCHEMA, index.spec)

    assert (await counted(index))[1] < pages / 4
    assert await index.rows(query) == found


@pytest.mark.parametrize("list_rows", [500, 5_000], ids=["too many rows", "full pages"])
async def test_a_list_is_not_built_anew_because_the_server_s_statistics_have_begun_anew(
    index: LiveIndex, monkeypatch: pytest.MonkeyPatch, list_rows: int
) -> None:
    monkeypatch.setattr("cdcsync.target.tidying.LIST_ROWS", list_rows)
    monkeypatch.setattr("cdcsync.target.tidying.SPARE_PAGES", 0)
    await churned(index, live=1_000, dead=0)
    await index.connection.execute(f"REINDEX INDEX {NEAR}")
    file = f"SELECT pg_relation_filenode('{NEAR}')"
    before = await index.rows(file)

    await index.connection.execute("SELECT pg_stat_reset()")
    await tidy(index.connection, SCHEMA, index.spec)

    assert await index.rows(file) == before


async def test_a_search_that_runs_for_long_is_not_waited_for_and_not_disturbed(
    index: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.tidying.SPARE_PAGES", 10)
    monkeypatch.setattr("cdcsync.target.tidying.BRIEFLY", "SET LOCAL lock_timeout = '10ms'")
    await churned(index, live=300, dead=9_000)
    searcher = await connect_target()
    async with searcher.transaction():
        await searcher.execute("SELECT count(*) FROM cdcsync.articles_vectors_1")
        _, pages = await counted(index)
        await tidy(index.connection, SCHEMA, index.spec)
        assert (await counted(index))[1] == pages
        await searcher.execute("SELECT count(*) FROM cdcsync.articles_vectors_1")
    await tidy(index.connection, SCHEMA, index.spec)
    assert (await counted(index))[1] < pages / 4


async def test_a_list_is_built_anew_where_its_sample_needs_more_memory_than_the_server_gives(
    open_index: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.target.tidying.SPARE_PAGES", -10)
    index = await open_index(search=None, dimensions=2000)
    await index.apply(changes(document("1", "text", "another", "a third")))
    await index.connection.execute(
        "SET maintenance_work_mem = '1MB'; INSERT INTO cdcsync.articles_vectors_1_fresh"
        " SELECT chunk_id, content_hash, array_fill(1, ARRAY[2000])::public.vector FROM cdcsync.articles_chunks"
    )
    file = f"SELECT pg_relation_filenode('{NEAR}')"
    before = await index.rows(file)

    await tidy(index.connection, SCHEMA, index.spec)

    assert await index.rows(file) != before


@pytest.mark.parametrize("point", [point for point in points(tidying) if point.startswith("fresh")])
async def test_wherever_tidying_is_killed_the_vectors_are_there_and_the_next_look_finishes_it(
    index: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr("cdcsync.target.tidying.SPARE_PAGES", 10)
    await churned(index, live=300, dead=9_000)
    found = await index.rows("SELECT chunk_id, embedding::text FROM {vectors} ORDER BY 1")
    _, pages = await counted(index)

    kill_at(monkeypatch, tidying, point)
    session = await connect_target()
    with pytest.raises(Killed):
        await tidy(session, SCHEMA, index.spec)
    await session.close()
    assert await index.rows("SELECT chunk_id, embedding::text FROM {vectors} ORDER BY 1") == found

    kill_at(monkeypatch, tidying, None)
    await tidy(index.connection, SCHEMA, index.spec)
    dead, left = await counted(index)
    assert dead == 0
    assert left < pages / 4
    assert await index.rows("SELECT chunk_id, embedding::text FROM {vectors} ORDER BY 1") == found


async def pending(index: LiveIndex) -> int:
    """Return how many rows' words wait in the list of the index for keyword search."""
    await index.connection.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple SCHEMA public")
    ((rows,),) = await index.rows(
        "SELECT pending_tuples::int FROM public.pgstatginindex('cdcsync.articles_chunks_search'::regclass)"
    )
    return int(rows)


async def test_words_of_changed_chunks_are_entered_into_their_index(open_index: OpenIndex) -> None:
    index = await open_index()
    await build_search(index.connection, SCHEMA, index.spec)
    texts = [f"text {at}" for at in range(20)]
    await index.apply(changes(*[document(str(at), text) for at, text in enumerate(texts)], inline=texts))
    assert await pending(index) == 20
    await enter_words(index.connection, SCHEMA, index.spec)
    assert await pending(index) == 0


@pytest.mark.parametrize("point", [point for point in points(tidying) if "words" in point])
async def test_words_are_entered_after_a_kill(
    open_index: OpenIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    index = await open_index()
    await build_search(index.connection, SCHEMA, index.spec)
    await index.apply(changes(document("1", "text"), inline=["text"]))
    kill_at(monkeypatch, tidying, point)
    session = await connect_target()
    with pytest.raises(Killed):
        await enter_words(session, SCHEMA, index.spec)
    await session.close()

    kill_at(monkeypatch, tidying, None)
    await enter_words(index.connection, SCHEMA, index.spec)
    assert await pending(index) == 0


async def test_an_index_of_words_that_is_another_role_s_or_not_there_is_left_alone(open_index: OpenIndex) -> None:
    index = await open_index()
    await build_search(index.connection, SCHEMA, index.spec)
    await index.apply(changes(document("1", "text"), inline=["text"]))
    await index.connection.execute("CREATE ROLE stranger; GRANT USAGE ON SCHEMA cdcsync TO stranger; SET ROLE stranger")
    try:
        await enter_words(index.connection, SCHEMA, index.spec)
    finally:
        await index.connection.execute("RESET ROLE; DROP OWNED BY stranger; DROP ROLE stranger")
    assert await pending(index) == 1
    await index.connection.execute("DROP INDEX cdcsync.articles_chunks_search")
    await enter_words(index.connection, SCHEMA, index.spec)
