"""Values that are too large for the worker are told apart by the server, and cost the rows that have them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.rows import OVERSIZED, Key, Shape
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source import statements
from cdcsync.source.tables import SourceTable

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

LARGEST = 50_000

VALUES = {
    "text that compresses": ("text", "repeat('x', {size})"),
    "text that does not": (
        "text",
        "(SELECT left(string_agg(md5(i::text), ''), {size}) FROM generate_series(1, 9999) i)",
    ),
    "characters of several bytes": ("text", "repeat('é', {size} / 2)"),
    "bytes": ("bytea", "decode(repeat('0f', ({size} - 2) / 2), 'hex')"),
    "json": ("jsonb", "to_jsonb(repeat('x', {size} - 2))"),
    "numbers": ("numeric[]", "ARRAY[repeat('9', {size} - 2)::numeric]"),
}
"""A type, and a value whose text has so many bytes."""


@pytest.fixture
async def source(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connection]:
    """A session as backfills have it, where values of 50,000 bytes are the largest that are read."""
    monkeypatch.setattr(statements, "largest_value", lambda: LARGEST)
    connection = await connect(database.dsn, "source")
    yield connection
    await connection.close()


@pytest.mark.parametrize("known", [False, True], ids=["types unknown", "types known"])
@pytest.mark.parametrize("value", VALUES)
async def test_a_value_is_read_up_to_the_largest_size_and_its_row_told_apart_above_it(
    database: Database, source: Connection, value: str, known: bool
) -> None:
    type_, written = VALUES[value]
    sizes = (10, LARGEST, LARGEST + 2)
    database.execute(f"CREATE TABLE t (id int PRIMARY KEY, v {type_}, w int)")
    for id_, size in enumerate(sizes):
        database.execute(f"INSERT INTO t VALUES ({id_}, {written.format(size=size)}, {id_})")
    database.execute("INSERT INTO t VALUES (3, NULL, 3)")
    made = database.execute("SELECT octet_length(v::text) FROM t WHERE id < 3 ORDER BY id")
    assert [size for (size,) in made] == list(sizes)
    ((oid,),) = database.execute("SELECT %s::regtype::oid::int", [type_])
    types = ((23, -1), (oid, -1), (23, -1)) if known else ()
    shape = Shape("index", QualifiedName("public", "t"), ("id",), ("v", "w"), ("v",), types)
    table = SourceTable(shape, ("integer",))
    keys: list[Key] = [("0",), ("1",), ("2",), ("3",)]

    first = await table.page(source, None, 3)
    second = await table.page(source, first.last, 3)
    named = await table.by_keys(source, keys)

    assert [len(str(row[1])) for row in first.rows] == [10 - value.startswith("char") * 5, *read_of(value)]
    assert (first.last, first.more, first.unread) == (("2",), True, {("2",): OVERSIZED})
    assert (second.rows, second.unread) == ([("3", None, "3", None)], {})
    assert {row[0] for row in named.rows} == {"0", "1", "3"}
    assert named.unread == {("2",): OVERSIZED}
    assert all(row[1] == row[3] for row in named.rows)


async def test_a_column_whose_type_has_changed_since_it_was_looked_up_is_read(
    database: Database, source: Connection
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, w text); INSERT INTO t VALUES (0, '12', '{}')")
    types = ((23, -1), (25, -1), (25, -1))
    shape = Shape("index", QualifiedName("public", "t"), ("id",), ("v", "w"), (), types)
    table = SourceTable(shape, ("integer",))
    database.execute("ALTER TABLE t ALTER v TYPE int USING v::int, ALTER w TYPE jsonb USING w::jsonb")

    page = await table.page(source, None, 3)

    assert page.rows == [("0", "12", "{}")]


def read_of(value: str) -> list[int]:
    return [LARGEST // 2 if value.startswith("char") else LARGEST]


async def test_a_value_that_is_too_large_beside_a_row_that_cannot_be_read_costs_only_its_own_row(
    database: Database, source: Connection
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, n int)")
    database.execute("INSERT INTO t SELECT i, 'v', 1 FROM generate_series(1, 9) i")
    database.execute("UPDATE t SET v = repeat('x', 50001) WHERE id = 3")
    database.execute("UPDATE t SET n = 0 WHERE id = 5")
    table = SourceTable(Shape("index", QualifiedName("public", "t"), ("id",), ("v",), ()), ("integer",), "10 / n > 0")

    page = await table.page(source, None, 9)

    assert [row[0] for row in page.rows] == ["1", "2", "4", "6", "7", "8", "9"]
    assert page.unread[("3",)] == OVERSIZED
    assert page.unread.keys() == {("3",), ("5",)}


async def test_pages_of_rows_that_are_all_too_large_follow_on_one_another(
    database: Database, source: Connection
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    database.execute("INSERT INTO t SELECT i, repeat('x', 60000) FROM generate_series(1, 5) i")
    table = SourceTable(Shape("index", QualifiedName("public", "t"), ("id",), ("v",), ()), ("integer",))

    first = await table.page(source, None, 2)
    second = await table.page(source, first.last, 2)
    third = await table.page(source, second.last, 2)

    assert [(one.rows, list(one.unread), one.more) for one in (first, second, third)] == [
        ([], [("1",), ("2",)], True),
        ([], [("3",), ("4",)], True),
        ([], [("5",)], False),
    ]
