"""What the search function asks of pg_textsearch, which few test servers have."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.target.ddl.bm25 import Bm25, best_by_words, rankable, usable
from tests.support.indexes import make_spec


def test_the_best_chunks_are_those_that_the_extensions_index_puts_first() -> None:
    asked = best_by_words("Our schema", make_spec()).as_string()
    score = """c.content OPERATOR(<ranker>.<@>) <ranker>.to_bm25query($1, '"Our schema"."articles_chunks_bm25"')"""
    assert f"SELECT c.chunk_id, {score} AS score" in asked
    assert f"""FROM "Our schema"."articles_chunks" AS c WHERE <rows> ORDER BY {score} LIMIT $2""" in asked
    assert "WHERE m.score OPERATOR(pg_catalog.<) 0" in asked


def test_the_index_is_made_of_the_chunks_text_by_the_configuration() -> None:
    bm25 = Bm25("ranking", "pg_catalog.english")
    assert bm25.method.as_string() == (
        """bm25 (content "ranking".text_bm25_ops) WITH (text_config = 'pg_catalog.english')"""
    )
    assert bm25.option == "text_config=pg_catalog.english"


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, True),
        ({"search": "public.plain"}, True),
        ({"ranking": "sql"}, False),
        ({"search": None}, False),
        ({"search": "cjk"}, False),
        ({"search": "{language}", "carried": {"language": "text"}}, False),
    ],
)
def test_the_extension_ranks_where_all_words_are_of_one_configuration(settings: dict[str, Any], ranks: bool) -> None:
    spec = make_spec(**settings)
    assert rankable(spec) is ranks
    assert ("articles_chunks_bm25" in usable("cdcsync", spec).as_string()) is ranks
