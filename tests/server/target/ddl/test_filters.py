"""Filters of the search function: values by column, and what a wrong one is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any, Literal
from uuid import UUID

import msgspec
import numpy as np
import psycopg
import pytest
from psycopg import sql

from cdcsync.cli.search import parse_filters
from cdcsync.config.names import quote
from cdcsync.errors import SetupError, UsageError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl import filters, search_function
from cdcsync.target.search import Plan, search
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


ELEMENTS: dict[str, list[Any]] = {
    "text": ["a", "A", "", "NULL", "null", "{a,b}", 'a"b', "a\\b", "a,b", "a'b", " a ", "ä\U0001f600", "%L $1", "[]"],
    "character varying(20)": ["a", "A", "{}"],
    "character(4)": ["a", "a  ", "b"],
    "integer": [1, -2, "3"],
    "numeric(6,2)": [1, 1.5, "1.50", "NaN", -0.25],
    "double precision": [1, 0.1, "Infinity", -0.0, 0],
    "boolean": [True, False],
    "uuid": ["00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000A"],
    "timestamp with time zone": ["2026-01-01T00:00:00Z", "2026-01-01 01:00+01", "infinity"],
    "date": ["2026-01-01", "2026-02-01"],
    "interval": ["24:00", "1 day", "1 mon"],
    "bytea": ["\\x00ff", "\\x"],
    "inet": ["10.0.0.1", "10.0.0.0/8"],
    "bit varying": ["101", ""],
    "int4range": ["[1,3)", "[1,2]", "empty"],
    "jsonb": [1, 1.0, "a", "1", True, {"a": [1, {"b": None}]}, [1, "a"], [None], {}, []],
    "extensions.citext": ["a", "A", "b"],
    'public."Odd type"': ["sad", "it's"],
    "public.short": ["a", "b"],
    "public.packed": [{"a": 1}, 1, []],
    "public.pair": ["(1,a)", '(1,"a,b")'],
    "public.numbers": ["{1,2}", "{3}"],
}
"""Elements of arrays by their type, as JSON has them."""


async def ids(
    index: LiveIndex, mode: Literal["text", "vector"], filter: Wanted, plans: list[Plan] | None = None
) -> list[Any]:
    """Return the ids that a search from Python finds."""
    vector = [1.0, 2.0, 3.0] if mode == "vector" else None
    hits = await search(
        index.connection, SCHEMA, index.spec, text="page", vector=vector, mode=mode, k=20, filter=filter, plans=plans
    )
    return [hit.key["id"] for hit in hits]


OF_JSON = ("jsonb", "public.packed")

MADE_FOR_ELEMENTS = """
    CREATE SCHEMA extensions;
    CREATE EXTENSION citext SCHEMA extensions;
    CREATE TYPE public."Odd type" AS ENUM ('sad', 'it''s');
    CREATE DOMAIN public.short AS text CHECK (length(VALUE) < 3);
    CREATE DOMAIN public.packed AS jsonb;
    CREATE TYPE public.pair AS (no int, name text);
    CREATE DOMAIN public.numbers AS int[];
    CREATE DOMAIN public.labels AS text[];
"""

ASKED = {"contains": "@>", "overlaps": "&&"}


def written(type_: str, element: Any) -> str:
    """Return an element as PostgreSQL reads it."""
    return element if isinstance(element, str) and type_ not in OF_JSON else json.dumps(element)


def array_of(type_: str, texts: Sequence[str | None], more: str = "") -> sql.Composed:
    """Return an array as SQL, by other means than a filter: the server collects its elements from rows."""
    return sql.SQL(
        "array(SELECT e::{} FROM unnest({}::text[]) WITH ORDINALITY AS u (e, no) ORDER BY no)" + more
    ).format(sql.SQL(type_), list(texts))


async def test_an_array_is_asked_for_elements_as_postgresql_compares_arrays(target: Database) -> None:
    with target.connect() as connection:
        connection.execute(MADE_FOR_ELEMENTS)
    chance = Random(20261130)
    names = {type_: f"c{place}" for place, type_ in enumerate(ELEMENTS)}
    rows: list[list[str | None]] = []
    with target.connect() as connection:

        def text(value: sql.Composable) -> str:
            return str(connection.execute(sql.SQL("SELECT ({})::text").format(value)).fetchone()[0])  # type: ignore[index]

        for number in range(12):
            row: list[str | None] = []
            for type_, elements in ELEMENTS.items():
                some: list[str | None] = [
                    written(type_, one) for one in chance.choices(elements, k=chance.randint(1, 4))
                ]
                if number == 0:
                    row.append(None)
                elif number == 1:
                    row.append("{}")
                elif number == 2 and type_ != "public.numbers":  # of two dimensions
                    row.append(text(sql.SQL("ARRAY[{0}, {0}]").format(array_of(type_, some))))
                else:
                    row.append(text(array_of(type_, [*some, None] if number < 6 else some)))
            rows.append(row)
    async with live_index(target, make_spec(carried={name: f"{type_}[]" for type_, name in names.items()})) as index:
        await filled(index, ["a page"] * len(rows), [tuple(row) for row in rows])
        seen = 0
        for type_, elements in ELEMENTS.items():
            lists = [
                [],
                *([one] for one in elements),
                *(chance.choices(elements, k=chance.randint(2, 3)) for _ in range(6)),
            ]
            for wanted in lists:
                value = array_of(type_, [written(type_, one) for one in wanted], f"::{type_}[]")
                for operator, sign in ASKED.items():
                    cursor = await index.connection.execute(
                        sql.SQL(
                            "SELECT id::text FROM cdcsync.articles_chunks WHERE {} OPERATOR(pg_catalog.{}) {}"
                        ).format(sql.Identifier(names[type_]), sql.SQL(sign), value)
                    )
                    expected = sorted(id_ for (id_,) in await cursor.fetchall())
                    ways: list[Any] = [wanted]
                    if len(wanted) == 1 and not isinstance(wanted[0], list):
                        ways.append(wanted[0])  # one element need not be in a list
                    for way in ways:
                        hits = await find(
                            index.connection, "page", mode="text", k=20, filter={names[type_]: {operator: way}}
                        )
                        assert sorted(hits) == expected, (type_, operator, way)
                    seen += 0 < len(expected) < len(rows)
        assert seen > 150


JSON = (
    *(
        '{"lang": "en", "n": 1.50, "tags": ["a", "b"], "in": {"x": null}}',
        '["red", "blue", 3]',
        '"red"',
        "3",
        "null",
        "{}",
    ),
    *('[[1, 2], {"a": 1}]', "true", '{"lang": "EN"}'),
)
WISHES: tuple[Any, ...] = (
    *(
        {"lang": "en"},
        {"n": 1.5},
        {"tags": ["b"]},
        {"in": {}},
        {"in": {"x": None}},
        {},
        [],
        "red",
        ["red"],
        3,
        "3",
        None,
    ),
    *(["blue", 3], [[2]], [{"a": 1}], True, {"lang": "en", "missing": 1}, {"it's": "\\ %L"}),
)


@pytest.mark.parametrize("type_", ["jsonb", "public.packed"])
async def test_jsonb_contains_any_json_as_postgresql_says(target: Database, type_: str) -> None:
    target.execute("CREATE DOMAIN public.packed AS jsonb")
    async with live_index(target, make_spec(carried={"extra": type_})) as index:
        await filled(index, ["a page"] * (len(JSON) + 1), [*((one,) for one in JSON), (None,)])
        for wish in WISHES:
            cursor = await index.connection.execute(
                "SELECT id::text FROM cdcsync.articles_chunks WHERE extra @> %s::jsonb", [json.dumps(wish)]
            )
            expected = sorted(id_ for (id_,) in await cursor.fetchall())
            found = await find(index.connection, "page", mode="text", k=20, filter={"extra": {"contains": wish}})
            assert sorted(found) == expected, wish
            hits = await ids(index, "text", {"extra": {"contains": wish}})
            assert sorted(map(str, hits)) == expected, wish


async def test_a_domain_of_arrays_is_asked_for_elements_and_other_conditions_hold_too(target: Database) -> None:
    target.execute("CREATE DOMAIN public.labels AS text[]")
    async with live_index(target, make_spec(carried={"tags": "public.labels", "tenant": "integer"})) as index:
        await filled(index, ["a page"] * 4, [("{a,b}", "1"), ("{a}", "1"), ("{a,c}", "2"), (None, "1")])
        await index.embed()
        for mode in ("text", "vector", "hybrid"):

            async def found(wish: Any, mode: str = mode) -> list[str]:
                return sorted(await find(index.connection, "page", embedding="[1,2,3]", mode=mode, filter=wish))

            assert await found({"tags": {"contains": "a", "overlaps": ["b", "c"]}}) == ["1", "3"]
            assert await found({"tags": {"contains": ["a"], "ne": "{a}"}, "tenant": 1}) == ["1"]
            assert await found({"tags": {"overlaps": []}}) == []


@pytest.mark.parametrize(
    ("wanted", "problem", "hint"),
    [
        ({"tags": ["red"]}, "filter on tags: malformed array literal", "contains and overlaps take a list of elements"),
        ({"tags": {"contains": [None]}}, r"tags: contains cannot take \[null\]", "one element or a list of them"),
        ({"tags": {"overlaps": None}}, "tags: overlaps cannot take null", "one element or a list of them"),
        ({"tags": {"contains": [["a"]]}}, "tags: contains cannot take", "one element or a list of them"),
        ({"tags": {"overlaps": {"a": 1}}}, "tags: overlaps cannot take", "one element or a list of them"),
        ({"packs": {"contains": [None]}}, "packs: contains cannot take", "one element or a list of them"),
        ({"numbers": {"contains": ["x"]}}, "filter on numbers: invalid input syntax", "integer[]"),
        ({"numbers": {"contains": [1.5]}}, "filter on numbers: invalid input syntax", "integer[]"),
        ({"shorts": {"overlaps": ["abc"]}}, "filter on shorts: value for domain", "short[]"),
        ({"extra": {"overlaps": ["a"]}}, "extra has no operator 'overlaps'", "like, contains, null. "),
        ({"extra": {"eq": "{"}}, "filter on extra: invalid input syntax", "contains takes JSON"),
        ({"tags": {"has": "a"}}, "tags has no operator 'has'", "like, contains, overlaps, null. "),
        ({"places": {"contains": ["(1,1),(0,0)"]}}, "places has no operator 'contains'", "operators are like, null. "),
        ({"whole": {"contains": [1]}}, "whole has no operator 'contains'", "like, null. "),
        ({"code": {"contains": "a"}}, "code has no operator 'contains'", "like, null. "),
    ],
)
async def test_what_an_array_or_json_cannot_contain_is_told_with_what_it_can(
    target: Database, wanted: Wanted, problem: str, hint: str
) -> None:
    target.execute("CREATE DOMAIN public.short AS text CHECK (length(VALUE) < 3)")
    columns = {"tags": "text[]", "packs": "jsonb[]", "numbers": "integer[]", "shorts": "public.short[]"}
    others = {"extra": "jsonb", "places": "box[]", "whole": "int2vector", "code": "text"}
    async with live_index(target, make_spec(carried=columns | others)) as index:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=problem) as refused:
            await find(index.connection, "page", mode="text", filter=wanted)
        assert hint in (refused.value.diag.message_hint or "")


async def test_values_of_python_are_elements(target: Database) -> None:
    columns = {
        "at": "timestamp with time zone[]",
        "price": "numeric[]",
        "extra": "jsonb",
        "who": "uuid[]",
        "raw": "bytea[]",
    }
    row = (
        "{2026-01-01 00:00:00+00}",
        "{1.50,NaN}",
        '{"n": [1.5, 12345678901234567890]}',
        f"{{{UUID(int=7)}}}",
        '{"\\\\x00ff"}',
    )
    async with live_index(target, make_spec(carried=columns)) as index:
        await filled(index, ["a page"], [row])

        async def found(**filter: Any) -> list[Any]:
            return await ids(index, "text", filter)

        assert await found(at={"contains": datetime(2026, 1, 1, tzinfo=UTC)})
        assert await found(price={"contains": {Decimal("1.5"), float("nan")}})
        assert await found(who={"overlaps": (UUID(int=7), UUID(int=8))})
        assert await found(raw={"contains": [b"\x00\xff"]})
        assert await found(extra={"contains": {"n": [Decimal("1.50")]}})
        assert await found(extra={"contains": {"n": [12345678901234567890]}})
        assert not await found(extra={"contains": {"n": ["1.5"]}})


async def test_an_index_on_a_carried_array_serves_its_filter(target: Database) -> None:
    async with live_index(target, make_spec(carried={"tags": "text[]"})) as index:
        await index.connection.execute("CREATE INDEX ON cdcsync.articles_chunks USING gin (tags)")
        await filled(index, ["a page"] * 300, [("{a,b}",), *([("{a}",)] * 299)])
        await index.connection.execute("ANALYZE cdcsync.articles_chunks")
        await index.connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = on")
        plans: list[Plan] = []
        await ids(index, "vector", {"tags": {"contains": "b"}}, plans)
        assert any("articles_chunks_tags_idx" in line for plan in plans for line in plan.lines)


async def test_a_function_of_a_version_without_an_operator_gets_it_at_a_start(
    target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, wanted = make_spec(carried={"tags": "text[]"}), {"tags": {"contains": "a"}}

    async def read_earlier(connection: Connection, spec: IndexSpec) -> dict[str, filters.Column]:
        return {
            name: msgspec.structs.replace(
                column, operators={one: sign for one, sign in column.operators.items() if one not in ASKED}
            )
            for name, column in (await filters.read_columns(connection, spec)).items()
        }

    with monkeypatch.context() as earlier:
        earlier.setattr(search_function, "read_columns", read_earlier)
        known = [one for one in filters.FILTER_OPERATORS if one not in ASKED]
        earlier.setattr(search_function, "FILTER_OPERATORS", known)
        async with live_index(target, spec) as index:
            await filled(index, ["a page"] * 2, [("{a,b}",), ("{b}",)])
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="no operator 'contains'"):
                await find(index.connection, "page", mode="text", filter=wanted)
            # A search of this version, such as of a server that was upgraded before the worker, says what is missing.
            with pytest.raises(SetupError, match="search function of an earlier version, without contains") as refused:
                await ids(index, "text", wanted)
            assert "`cdcsync run` of this version" in (refused.value.hint or "")
            assert await ids(index, "text", {"tags": "{b}"}) == [2]
            with pytest.raises(UsageError, match="no operator 'has'"):
                await ids(index, "text", {"tags": {"has": "a"}})
    async with live_index(target, spec) as index:
        assert await find(index.connection, "page", mode="text", filter=wanted) == ["1"]
