"""Queries that somebody pasted, with and without blanks: whatever they consist of, they are searched by their words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.indexes import live_index, make_spec
from tests.support.searching import filled
from tests.support.servers import Database, Row, Server, fresh_database

pytestmark = pytest.mark.server

MARKS = ('"', '""', "-", "--", ",", ":", '":"', '{"', '"}', "'", "\\", "_", "~/")
WORDS = ("1", "23", "0.5", "a", "order", "the", "東京", "緊急会見", "「", "」", "、", "。", "é", "Ж")
BLANKS = (" ", "\n", ' "', '" ', ' -"', " -a", " -東京", " OR ", "\u3000")

REPEATED = 40
"""A query that has the sought word so often is a long one."""


async def fill(database: Database, search: str) -> None:
    async with live_index(database, make_spec(carried={"language": "text"}, search=search)) as index:
        languages = [("english",), ("fr",), ("simple",)]
        await filled(index, ["an order shipped to Berlin"] * len(languages), languages)


@pytest.fixture(scope="module", params=["english", "{language}", "cjk"])
def connection(server: Server, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Row]]:
    """A session on an index of three documents."""
    with fresh_database(server) as database:
        asyncio.run(fill(database, request.param))
        with database.connect() as opened:
            yield opened


def hits(connection: psycopg.Connection[Row], query: str) -> int:
    return len(connection.execute("SELECT FROM cdcsync.articles_search(%s)", [query]).fetchall())


@settings(max_examples=60)
@given(
    pieces=st.lists(st.sampled_from(MARKS + WORDS + BLANKS), max_size=20).map("".join),
    times=st.sampled_from((1, 5, REPEATED, 2_000)),
)
@example(pieces='{"status":"open","city":"', times=REPEATED)
@example(pieces='"a-b"', times=2_000)
@example(pieces='"', times=2_000)
@example(pieces="緊急会見。", times=2_000)
def test_a_long_query_finds_whatever_has_one_of_its_words(
    connection: psycopg.Connection[Row], pieces: str, times: int
) -> None:
    query = f"{pieces},shipped," * times
    spaced = query.replace(",", ", ").replace('"', ' " ')
    found = hits(connection, query), hits(connection, spaced), hits(connection, f'"{query}"')
    assert times < REPEATED or found == (3, 3, 3)
