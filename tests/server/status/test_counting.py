"""How many rows a status counts, and which it estimates."""

from __future__ import annotations

import pytest
from psycopg import sql

from cdcsync.status import counting
from cdcsync.status.model import IndexStatus
from cdcsync.target.ddl.relations import MAX_ATTEMPTS
from tests.support.statuses import Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def fill(pipeline: Pipeline, chunks: int, *, after: int = 0) -> None:
    """Store documents of two chunks."""
    await pipeline.target.execute(
        "INSERT INTO cdcsync.articles_chunks (id, chunk_no, content, content_hash, document_hash, commit_lsn)"
        " SELECT n / 2, n %% 2, 'text', int8send(n), 'd', '0/1' FROM generate_series(%s::int, %s - 1) AS n",
        [after, after + chunks],
    )


async def queue(pipeline: Pipeline, chunks: int, *, lane: int = 0, attempts: int = 0) -> None:
    """Put so many chunks, which there need not be, at the end of the backlog."""
    await pipeline.target.execute(
        "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane, attempts)"
        " SELECT 1, (SELECT count(*) FROM cdcsync.articles_backlog) + n, int8send(n), %s, %s"
        " FROM generate_series(1, %s) AS n",
        [lane, attempts, chunks],
    )


async def test_small_tables_are_counted(stopped: Pipeline) -> None:
    await fill(stopped, 6)
    await stopped.target.execute(
        "INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, '[1,2,3]'::public.vector"
        " FROM cdcsync.articles_chunks LIMIT 2"
    )
    await queue(stopped, 3, lane=0)
    await queue(stopped, 2, lane=1)
    await queue(stopped, 1, lane=0, attempts=MAX_ATTEMPTS)
    await stopped.target.execute("INSERT INTO cdcsync.articles_backlog VALUES (2, 1, 'other generation', 0)")
    status = await stopped.status()
    index = status.indexes["articles"]
    assert (index.documents, index.chunks, index.vectors) == (3, 6, 2)
    assert (index.backlog, index.backlog_live, index.failed) == (5, 3, 1)
    assert not index.estimated
    assert problem(status, "index articles: 1 chunk has no vector, see `cdcsync failures articles list`")


async def test_what_fresh_vectors_cost_a_search_is_told_for_as_long_as_it_is_known(stopped: Pipeline) -> None:
    await fill(stopped, 6)
    await stopped.target.execute(
        "INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, '[1,2,3]'::public.vector"
        " FROM cdcsync.articles_chunks LIMIT 2"
    )
    await stopped.target.execute("INSERT INTO cdcsync.tiers VALUES ('articles', 1, 1.5, 120, now())")
    index = (await stopped.status()).indexes["articles"]
    assert (index.vectors, index.fresh, index.fresh_scan_ms, index.settle_rate) == (2, 2, 1.5, 120.0)

    for of_another_time in ("-2 minutes", "2 minutes"):  # from before the clock went back
        await stopped.target.execute("UPDATE cdcsync.tiers SET measured_at = now() + %s::interval", [of_another_time])
        index = (await stopped.status()).indexes["articles"]
        assert (index.fresh, index.fresh_scan_ms, index.settle_rate) == (2, 0.0, 0.0), of_another_time


async def test_large_tables_are_estimated(stopped: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 20)
    await fill(stopped, 60)
    await queue(stopped, 30, lane=1)
    await queue(stopped, 4, lane=1, attempts=MAX_ATTEMPTS)
    for table in ("chunks", "backlog"):
        await stopped.target.execute(sql.SQL("ANALYZE {}").format(sql.Identifier("cdcsync", f"articles_{table}")))
    index = (await stopped.status()).indexes["articles"]
    assert (index.documents, index.chunks) == (None, 60)
    assert (index.backlog, index.backlog_live, index.failed) == (30, 0, 4)
    assert index.estimated


@pytest.mark.parametrize("analysed", [True, False])
async def test_fresh_vectors_of_a_load_are_counted_up_to_a_limit_and_estimated_beyond_it(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch, analysed: bool
) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 20)
    monkeypatch.setattr(counting, "FRESH_UP_TO", 100)
    await stopped.target.execute("ALTER TABLE cdcsync.articles_vectors_1_fresh SET (autovacuum_enabled = off)")
    await fill(stopped, 2_000)
    await queue(stopped, 1_000)
    await stopped.target.execute("ANALYZE cdcsync.articles_chunks")

    async def store(chunks: int) -> IndexStatus:
        await stopped.target.execute(
            "INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, '[1,2,3]'::public.vector"
            " FROM cdcsync.articles_chunks WHERE NOT chunk_id IN (SELECT chunk_id FROM cdcsync.articles_vectors_1)"
            " LIMIT %s",
            [chunks],
        )
        if analysed:
            await stopped.target.execute("ANALYZE cdcsync.articles_vectors_1_fresh")
        return (await stopped.status()).indexes["articles"]

    counted = await store(100)
    assert (counted.vectors, counted.fresh) == (100, 100)

    estimated = await store(900)
    assert estimated.estimated
    assert estimated.vectors == estimated.fresh
    assert 900 <= estimated.fresh <= 1_100

    monkeypatch.setattr(counting, "FRESH_UP_TO", 1_000)
    assert (await stopped.status()).indexes["articles"].fresh == 1_000


async def test_an_estimate_of_vectors_that_is_too_low_does_not_say_that_some_are_missing(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "ROW_BYTES", 0)
    monkeypatch.setattr(counting, "FRESH_UP_TO", 100)
    fresh = "cdcsync.articles_vectors_1_fresh"
    await stopped.target.execute(f"ALTER TABLE {fresh} SET (autovacuum_enabled = off)")
    await fill(stopped, 2_000)
    every = (
        "INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, '[1,2,3]'::public.vector"
        " FROM cdcsync.articles_chunks ON CONFLICT DO NOTHING"
    )
    await stopped.target.execute(every)
    # The statistics are of pages that are nearly empty, which fill up again.
    await stopped.target.execute(f"DELETE FROM {fresh} WHERE chunk_id % 20 > 0")
    await stopped.target.execute(f"VACUUM ANALYZE {fresh}")
    await stopped.target.execute(every)

    index = (await stopped.status()).indexes["articles"]
    assert (index.chunks, index.vectors, index.backlog, index.estimated) == (2_000, 2_000, 0, True)
    assert index.fresh < 1_000

    await queue(stopped, 10)
    assert (await stopped.status()).indexes["articles"].vectors == 1_990


async def test_what_was_never_analysed_is_counted_however_large_the_planner_takes_it_for(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 50)
    await stopped.target.execute("ALTER TABLE cdcsync.articles_chunks SET (autovacuum_enabled = off)")
    await fill(stopped, 40)
    few = (await stopped.status()).indexes["articles"]
    await fill(stopped, 20, after=40)
    many = (await stopped.status()).indexes["articles"]
    assert (few.chunks, few.documents, few.estimated) == (40, 20, False)
    assert many.chunks > 50
    assert (many.documents, many.estimated) == (None, True)


async def test_an_emptied_backlog_is_empty_whatever_the_planner_believes(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 2_000)
    await queue(stopped, 5_000)
    await stopped.target.execute("ANALYZE cdcsync.articles_backlog")
    assert (await stopped.status()).indexes["articles"].backlog == 5_000
    await stopped.target.execute("DELETE FROM cdcsync.articles_backlog")
    index = (await stopped.status()).indexes["articles"]
    assert (index.backlog, index.backlog_live, index.failed) == (0, 0, 0)
