"""Columns and types as the catalog describes them."""

from __future__ import annotations

import pytest

from cdcsync.postgres.sessions import connect
from cdcsync.source.columns import Type, reachable_types, read_columns, read_types
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TYPES = """
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TYPE inner_point AS (x int, y int);
    CREATE TYPE spot AS (at inner_point, z int);
    CREATE DOMAIN short AS varchar(10);
    CREATE DOMAIN shorter AS short CHECK (length(value) < 5);
    CREATE TYPE days AS RANGE (subtype = date);
    CREATE TABLE t (
        id int PRIMARY KEY, gone text, mood mood, moods mood[], spot spot, name shorter, days days, price numeric(8,2),
        word text COLLATE "C", twice int GENERATED ALWAYS AS (id * 2) STORED);
    ALTER TABLE t DROP gone;
"""


async def test_columns_are_described_by_what_their_values_are_made_of(database: Database) -> None:
    database.execute(TYPES)
    ((oid,),) = database.execute("SELECT 't'::regclass::oid::int8")
    async with await connect(database.dsn, "source") as source:
        columns = (await read_columns(source, [oid]))[oid]
        assert await read_columns(source, []) == {}
    assert list(columns) == ["id", "mood", "moods", "spot", "name", "days", "price", "word", "twice"]
    assert columns["id"].not_null
    assert not columns["mood"].not_null
    assert columns["mood"].labels == ("sad", "ok", "happy")
    assert (columns["name"].type, columns["name"].base_type) == ("public.shorter", "character varying(10)")
    assert (columns["name"].value_type, columns["price"].value_type) == ("character varying(10)", "numeric(8,2)")
    assert (columns["word"].collation, columns["id"].collation) == ('pg_catalog."C"', "")
    assert columns["word"].deterministic
    assert columns["twice"].generated == "s"
    assert columns["twice"].expression is not None
    assert columns["mood"].number == 3, "a dropped column keeps its number"


async def test_a_type_is_described_with_those_that_it_is_made_of(database: Database) -> None:
    database.execute(TYPES)
    async with await connect(database.dsn, "source") as source:
        roots = {
            name: oid
            for name, oid in database.execute(
                "SELECT attname::text, atttypid::int8 FROM pg_attribute"
                " WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped"
            )
        }
        types = await read_types(source, list(roots.values()))
    by_name = {one.name.removeprefix("public."): one for one in types.values()}
    assert set(by_name) == {"mood", "mood[]", "inner_point", "spot", "short", "shorter", "days"}
    assert list(by_name["mood"].labels.values()) == ["sad", "ok", "happy"]
    assert [one.kind for one in map(by_name.__getitem__, ("mood", "mood[]", "spot", "short", "days"))] == list("ebcdr")
    reached = {
        one.name.removeprefix("public.") for one in reachable_types(types, [roots["spot"], roots["name"]]).values()
    }
    assert reached == {"spot", "inner_point", "short", "shorter"}


def test_types_that_are_made_of_each_other_are_reached_once() -> None:
    first, second = Type("a", "c", parts=((1, 2, -1), (2, 23, -1))), Type("b", "b", parts=((0, 1, -1),))
    assert reachable_types({1: first, 2: second, 3: Type("c", "e")}, [1]) == {1: first, 2: second}


async def test_only_an_enum_itself_has_labels(database: Database) -> None:
    database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN mine AS mood; CREATE DOMAIN moods AS mood[];"
        " CREATE TABLE t (a mood, b mine, c moods, d int)"
    )
    ((oid,),) = database.execute("SELECT 't'::regclass::oid::int8")
    async with await connect(database.dsn, "source") as source:
        columns = (await read_columns(source, [oid]))[oid]
    assert {name: (one.base_type, one.labels) for name, one in columns.items()} == {
        "a": (None, ("sad", "ok")),
        "b": ("public.mood", ()),
        "c": ("public.mood[]", ()),
        "d": (None, ()),
    }
