"""Filters of the search function: values by column, and what a wrong one is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdcsync.cli.search import parse_filters
from cdcsync.config.names import quote
from cdcsync.target.search import search
from tests.support.indexes import SCHEMA, LiveIndex, live_index, make_spec
from tests.support.searching import filled, find
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


Wanted = dict[str, Any]

MADE = """
    CREATE TYPE public.mood AS ENUM ('sad', 'happy');
    CREATE DOMAIN public.place AS box;
    CREATE DOMAIN public.moods AS public.mood[];
    CREATE TYPE public.pair AS (no int, moods public.moods);
    CREATE TYPE public.spot AS (no int, at public.place);
    CREATE TYPE public.noted AS (note json[]);
"""

VALUES = {
    "box": ("(1,1),(0,0)", "(101,1),(100,0)"),
    "point": ("(1,2)", "(3,4)"),
    "json": ("1", "2"),
    "box[]": ("{(1,1),(0,0)}", "{(101,1),(100,0)}"),
    "point[]": ('{"(1,2)"}', '{"(3,4)"}'),
    "json[]": ("{1}", "{2}"),
    "public.place": ("(1,1),(0,0)", "(101,1),(100,0)"),
    "public.place[]": ("{(1,1),(0,0)}", "{(101,1),(100,0)}"),
    "public.spot": ('(1,"(1,1),(0,0)")', '(1,"(101,1),(100,0)")'),
    "public.spot[]": ('{"(1,\\"(1,1),(0,0)\\")"}', '{"(1,\\"(101,1),(100,0)\\")"}'),
    "public.noted": ("({1})", "({2})"),
    "int2vector": ("1 2", "1 3"),
    "oidvector": ("1 2", "1 3"),
    "name": ("a", "b"),
    "character varying": ("a", "b"),
    "cidr": ("10.0.0.0/8", "11.0.0.0/8"),
    "regtype": ("int4", "text"),
    "jsonb": ("1", "2"),
    "integer[]": ("{1,2}", "{1,3}"),
    "character varying[]": ("{a}", "{b}"),
    "public.mood": ("sad", "happy"),
    "public.mood[]": ("{sad}", "{happy}"),
    "public.moods": ("{sad}", "{happy}"),
    "public.pair": ("(1,{sad})", "(1,{happy})"),
    "public.pair[]": ('{"(1,{sad})"}', '{"(1,{happy})"}'),
    "int4range": ("[1,2)", "[1,3)"),
    "int4multirange": ("{[1,2)}", "{[1,3)}"),
    "int4range[]": ('{"[1,2)"}', '{"[1,3)"}'),
}
"""Two values of each type, the lesser one first where the type has an order."""

OPERATORS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


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


async def test_the_columns_that_an_error_lists_are_what_a_filter_takes(target: Database) -> None:
    names = ["author.name", "Größe", "net price", 'say "hi"', "a=b", "select"]
    async with live_index(target, make_spec(carried=dict.fromkeys(names, "text"))) as index:
        await filled(index, ["a page"], [tuple(names)])
        with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
            await find(index.connection, "page", filter={"nothing": 3})
        listed = (refused.value.diag.message_hint or "").removeprefix("The columns are ").removesuffix(".").split(", ")
        assert sorted(listed) == sorted([*names, "id"])
        for name in names:
            assert await find(index.connection, "page", mode="text", filter={name: name}) == ["1"]
            assert await find(
                index.connection, "page", mode="text", filter=parse_filters([f"{quote(name)}={name}"])
            ) == ["1"]


@pytest.mark.parametrize("type_", ["double precision", "real", "numeric"])
async def test_a_float_that_no_json_has_finds_its_row(target: Database, type_: str) -> None:
    async with live_index(target, make_spec(carried={"price": type_})) as index:
        await filled(index, ["a page"] * 4, [("NaN",), ("Infinity",), ("-Infinity",), ("1.5",)])

        async def found(wish: object) -> list[int]:
            hits = await search(
                index.connection, SCHEMA, index.spec, text="page", vector=None, mode="text", filter={"price": wish}
            )
            return sorted(hit.key["id"] for hit in hits)

        hits = await search(index.connection, SCHEMA, index.spec, text="page", vector=None, mode="text")
        for hit in hits:
            assert await found(hit.carried["price"]) == [hit.key["id"]]
            assert await found(np.float64(hit.carried["price"])) == [hit.key["id"]]
        assert await found({"in": [float("nan"), float("-inf")]}) == [1, 3]
        assert await found({"lt": float("inf")}) == [3, 4]


@pytest.mark.parametrize(
    ("column", "wish"),
    [
        ("numbers", [1, 2]),
        ("numbers", {"eq": [1, 2]}),
        ("numbers", {"ne": [1, 2]}),
        ("numbers", [[1, 2]]),
        ("numbers", "1,2"),
        ("extra", {"a": 1}),
        ("extra", {"eq": {"a": 1}}),
        ("extra", [{"a": 1}]),
        ("extra", "a"),
        ("packed", {"eq": {"a": 1}}),
    ],
    ids=str,
)
async def test_a_refused_array_or_json_is_told_as_the_text_that_is_taken(
    target: Database, column: str, wish: Any
) -> None:
    target.execute("CREATE DOMAIN public.packed AS jsonb")
    columns = {"numbers": "integer[]", "extra": "jsonb", "packed": "public.packed"}
    async with live_index(target, make_spec(carried=columns)) as index:
        await filled(index, ["a page"] * 2, [("{1,2}", '{"a": 1}', '{"a": 1}'), ("{3}", "3", "3")])
        with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
            await find(index.connection, "page", mode="text", filter={column: wish})
        literal = (refused.value.diag.message_hint or "").partition("such as ")[2].removesuffix(".")
        assert await find(index.connection, "page", mode="text", filter={column: json.loads(literal)}) == ["1"]


def sorted_types(target: Database) -> set[str]:
    """Return the types that PostgreSQL can sort by."""

    def is_sorted(type_: str) -> bool:
        try:
            target.execute(sql.SQL("SELECT v FROM unnest({}::text[]::{}[]) AS v ORDER BY 1").format([], sql.SQL(type_)))
        except psycopg.errors.UndefinedFunction:
            return False
        return True

    return {type_ for type_ in VALUES if is_sorted(type_)}


def compared(target: Database, type_: str, sign: str) -> str:
    """Return the numbers of a type's values that PostgreSQL says compare so with the first."""
    condition = sql.SQL("v.value::{0} " + sign + " {1}::{0}").format(sql.SQL(type_), VALUES[type_][0])
    values = sql.SQL("unnest({}::text[]) WITH ORDINALITY AS v (value, no)").format(list(VALUES[type_]))
    return "".join(str(no) for (no,) in target.execute(sql.SQL("SELECT no FROM {} WHERE {}").format(values, condition)))


async def test_a_column_has_the_operators_of_an_order_if_postgresql_can_sort_by_it_and_each_then_works(
    target: Database,
) -> None:
    with target.connect() as connection:
        connection.execute(MADE)
    ordered = sorted_types(target)
    assert {"json", "box", "json[]", "public.spot"}.isdisjoint(ordered)
    assert {"public.mood", "public.moods", "public.pair[]", "int4range[]"} <= ordered
    names = {type_: f"c{place}" for place, type_ in enumerate(VALUES)}
    columns = {name: type_ for type_, name in names.items()}
    async with live_index(target, make_spec(carried=columns)) as index:
        await filled(index, ["a page"] * 2, list(zip(*VALUES.values(), strict=True)))

        async def found(type_: str, wish: Mapping[str, Any]) -> str:
            hits = await find(index.connection, "page", mode="text", filter={names[type_]: wish})
            return "".join(sorted(hits))

        for type_, (first, second) in VALUES.items():
            for operator, sign in OPERATORS.items():
                if type_ in ordered:
                    assert await found(type_, {operator: first}) == compared(target, type_, sign), (type_, operator)
                    continue
                with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"no operator '{operator}'") as refused:
                    await found(type_, {operator: first})
                assert (refused.value.diag.message_hint or "").startswith("The operators are like, null. "), type_
            if type_ in ordered:
                assert await found(type_, {"in": [first, second]}) == "12", type_
            assert await found(type_, {"null": True}) == ""
