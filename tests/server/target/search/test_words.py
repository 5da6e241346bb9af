"""How often words occur: what the keyword leg weights them by."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cdcsync.target.ddl.search_function import BUDGET
from cdcsync.target.search import words
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec
from tests.support.searching import SHELF, filled, find
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def articles(target: Database) -> AsyncIterator[LiveIndex]:
    async with live_index(target, make_spec()) as index:
        yield index


async def test_a_word_that_is_in_every_chunk_still_finds_them(articles: LiveIndex) -> None:
    await filled(articles, [f"common text {n}" for n in range(BUDGET + 500)])
    assert len(await find(articles.connection, "common", mode="text", k=50)) == 50
    assert await find(articles.connection, "common 1234", mode="text", k=1) == ["1235"]


async def test_words_are_found_before_they_were_ever_counted(articles: LiveIndex) -> None:
    await articles.apply(changes(*(document(str(n), text) for n, text in enumerate(SHELF, 1))))
    assert await find(articles.connection, "hums", mode="text") == ["3"]


async def test_words_of_a_large_index_without_statistics_are_counted_in_a_sample(
    articles: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "SAMPLE_CHUNKS", 200)
    await articles.connection.execute("ALTER TABLE cdcsync.articles_chunks SET (autovacuum_enabled = off)")
    await articles.apply(changes(*(document(str(n), f"common text {n}") for n in range(2_000))))
    assert await words.count_words(articles.connection, SCHEMA, articles.spec) < 1_000
