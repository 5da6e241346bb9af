"""Filters of the search function: values by column, and what a wrong one is told."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.support.indexes import LiveIndex, live_index, make_spec
from tests.support.searching import filled, find
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


Wanted = dict[str, Any]


@pytest.mark.proof_from(8)
@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, "1234"),
        ({"tenant": 3}, "12"),
        ({"tenant": "3"}, "12"),
        ({"tenant": 3, "state": ["open", "closed'; --"]}, "1"),
        ({"state": "closed'; --"}, "3"),
        ({"state": []}, ""),
        ({"tenant": {"in": [4, 5]}}, "34"),
        ({"tenant": {"ne": 3}}, "34"),
        ({"state": {"ne": "new"}}, "13"),
        ({"made": {"gte": "2026-02-05 11:00+01", "lt": "2026-03-05 10:00Z"}}, "2"),
        ({"score": {"gt": 1.5, "lte": 10}}, "23"),
        ({"score": 1.505}, ""),  # and not what the column's scale would make of it
        ({"code": "ab"}, "1"),
        ({"code": "abcde"}, ""),
        ({"open": True}, "14"),
        ({"open": {"null": True}}, "3"),
        ({"extra": {"null": False}}, "1"),
        ({"state": None}, "4"),
        ({"state": {"like": "%e%"}}, "123"),
        ({"state": {"like": "%\\\\"}}, ""),
        ({"id": {"gte": 2, "ne": 3}}, "24"),
    ],
)
async def test_a_filter_holds_in_both_legs(shelf: LiveIndex, wanted: Wanted, found: str) -> None:
    for mode in ("text", "vector", "hybrid"):
        hits = await find(shelf.connection, "page", embedding="[1,2,3]", mode=mode, filter=wanted)
        assert sorted(hits) == list(found), mode


@pytest.mark.parametrize(
    ("wanted", "problem", "hint"),
    [
        ({"tenat": 3}, "does not have: tenat", "code, extra, id, made, open, score, state, tenant"),
        ({"tenant": {"above": 3}}, "tenant has no operator 'above'", "eq, ne, in, lt, lte, gt, gte, like, null"),
        ({"extra": "x"}, "extra has no operator 'eq'", "like, null"),
        ({"tenant": "x"}, "filter on tenant: invalid input syntax", "integer"),
        ({"tenant": {"eq": [3]}}, "tenant: eq cannot take", "one value"),
        ({"tenant": {"in": 3}}, "tenant: in cannot take", "list"),
        ({"tenant": [None]}, "tenant: in cannot take", "list"),
        ({"tenant": {"null": 1}}, "tenant: null cannot take", "true or false"),
        ({"tenant": {"gt": None}}, "tenant: gt cannot take", "one value"),
        ({"state": {"like": "op\\"}}, "state: the pattern of like ends in a backslash", "write two"),
        ({"state": {"like": "op\\\\\\"}}, "state: the pattern of like ends in a backslash", "write two"),
        (None, "the filter is null", "an object that names columns"),
        ([], r"the filter is \[\]", "an object that names columns"),
    ],
)
async def test_a_wrong_filter_names_the_column_and_what_it_allows(
    shelf: LiveIndex, wanted: Wanted, problem: str, hint: str
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=problem) as refused:
        await find(shelf.connection, "page", filter=wanted)
    assert hint in (refused.value.diag.message_hint or "")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"tags": "{a}"}, "1"),
        ({"tags": {"in": ["{a}", "{a,b}"]}}, "12"),
        ({"tags": {"in": []}}, ""),
        ({"tags": {"ne": "{a}"}}, "23"),
        ({"tags": {"like": "%b%"}}, "23"),
        ({"tags": None}, "4"),
    ],
    ids=str,
)
async def test_an_array_is_compared_whole(target: Database, wanted: Wanted, found: str) -> None:
    async with live_index(target, make_spec(carried={"tags": "text[]"})) as index:
        await filled(index, ["a page"] * 4, [("{a}",), ("{a,b}",), ("{b}",), (None,)])
        assert sorted(await find(index.connection, "page", mode="text", filter=wanted)) == list(found)
