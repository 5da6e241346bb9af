"""Keys as the target compares them: which texts are one key, and which row is taken."""

from __future__ import annotations

import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.model.rows import Key
from cdcsync.target.keys import page_of_keys, written_keys
from tests.support.indexes import (
    SCHEMA,
    OpenIndex,
    changes,
    document,
    kept,
    vector_text,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


KEYS: list[tuple[dict[str, str], list[Key]]] = [
    ({"a": "integer", "b": "text"}, [("1", "x"), ("1", "y"), ("2", "x")]),
    ({"id": "uuid"}, [("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",), ("00000000-0000-0000-0000-000000000000",)]),
    ({"id": "numeric"}, [("1.10",), ("-0.5",), ("NaN",), ("Infinity",)]),
    ({"id": "text"}, [("",), ("\\N",), ("é",)]),
    ({"id": "character(4)"}, [("ab  ",), ("    ",)]),
    ({"id": "timestamp with time zone"}, [("2024-01-01 00:00:00+00",), ("infinity",)]),
    ({"id": "bytea"}, [("\\x00",), ("\\x",)]),
    ({"id": "double precision"}, [("0.1",), ("NaN",)]),
    ({"id": "integer[]", "at": "date"}, [("{1,2}", "2024-01-01"), ("{}", "2024-01-01")]),
    ({"id": "public.citext", "at": "date"}, [("Ab", "2024-01-01"), ("cd", "2024-01-01")]),
    ({"id": "public.ltree"}, [("a.b",), ("a",)]),
]


@pytest.mark.parametrize(("key", "values"), KEYS, ids=[", ".join(key.values()) for key, _ in KEYS])
async def test_keys_may_be_of_any_type_and_composite(
    target: Database, open_index: OpenIndex, key: dict[str, str], values: list[Key]
) -> None:
    for type_ in key.values():
        if type_.startswith("public."):
            target.execute(f"CREATE EXTENSION IF NOT EXISTS {type_.removeprefix('public.')}")
    index = await open_index(key=key)
    await index.apply(changes(*[document(value, f"text {at}", "more") for at, value in enumerate(values)]))

    stored = await index.writer.stored_hashes(values)
    await index.apply(changes(*[kept(value, "5") for value in values]))
    await index.apply(changes(document(values[0], "new", existed=True), deleted=values[1:]))

    assert stored == {value: hash_text(f"text {at}\nmore") for at, value in enumerate(values)}
    assert await index.rows("SELECT content, tenant, chunk_no FROM {chunks}") == [("new", 1, 0)]
    assert list(await index.writer.stored_hashes(values)) == [values[0]]
    assert await index.faults() == []


async def test_pages_of_keys_come_in_order_where_their_operators_are_not_pg_catalogs(
    target: Database, open_index: OpenIndex
) -> None:
    target.execute("CREATE EXTENSION IF NOT EXISTS citext")
    index = await open_index(key={"id": "public.citext", "at": "integer"})
    keys: list[Key] = [("a", "1"), ("A", "2"), ("a", "10"), ("B", "1"), ("c", "1"), ("C", "2")]
    await index.apply(changes(*[document(key, "text") for key in reversed(keys)]))
    for limit in (1, 2, 4, 100):
        found: list[Key] = []
        while page := await page_of_keys(index.connection, SCHEMA, index.spec, found[-1] if found else None, limit):
            found += page
        assert found == keys


async def test_two_texts_of_one_key_in_a_batch_leave_the_row_that_came_last(open_index: OpenIndex) -> None:
    """UPDATE t SET id = 1.00 WHERE id = 1.0 moves the row from one text to another, and it is the same key."""
    index = await open_index(key={"id": "numeric"})
    await index.apply(changes(document("1.0", "a", "b"), document("2", "c"), inline=["a", "b", "c"]))

    assert await index.writer.stored_hashes([("1.0",), ("1.00",), ("2.000",)]) == {("2.000",): hash_text("c")}
    await index.apply(changes(document("1.00", "a"), deleted=["1.0"]))

    assert await index.texts() == {("1.00",): ["a"], ("2",): ["c"]}
    assert await index.embedded() == {"a": [vector_text("a")], "c": [vector_text("c")]}
    assert await index.waiting() == []
    assert await index.faults() == []


async def test_a_key_found_absent_takes_only_the_row_that_is_written_so(open_index: OpenIndex) -> None:
    """1.0 is not at the source, as a page found; 1.00 came since."""
    index = await open_index(key={"id": "numeric", "region": "text"})
    await index.apply(
        changes(document(("1.00", "eu"), "a", "b"), document(("2.0", "eu"), "c", "d"), inline=["a", "b", "c", "d"])
    )

    applied = await index.apply(changes(absent=[("1.0", "eu"), ("2.0", "eu"), ("3", "eu")]))

    assert applied.deleted == 2
    assert await index.texts() == {("1.00", "eu"): ["a", "b"]}
    assert await index.faults() == []
    await index.apply(changes(document(("1.000", "eu"), "e"), absent=[("1.00", "eu")]))
    assert await index.texts() == {("1.000", "eu"): ["e"]}
    assert await index.faults() == []


@pytest.mark.parametrize("carried", [{}, {"tenant": "integer"}])
async def test_a_document_that_did_not_change_is_written_under_its_key_of_now(
    open_index: OpenIndex, carried: dict[str, str]
) -> None:
    index = await open_index(key={"id": "numeric"}, carried=carried)
    values = ("3",) * len(carried)
    await index.apply(changes(document("1.0", "a", "b", carried=values)))

    await index.apply(changes(kept("1.00", *values)))

    assert await index.texts() == {("1.00",): ["a", "b"]}
    keys = [("1",), ("2",)]
    assert await written_keys(index.connection, SCHEMA, index.spec, keys) == {("1",): ("1.00",)}


async def test_an_upsert_under_another_text_of_the_key_takes_the_row_over(open_index: OpenIndex) -> None:
    index = await open_index(key={"id": "numeric"})
    await index.apply(changes(document("1.0", "a", "b")))
    await index.apply(changes(document("1.00", "c", existed=True)))
    assert await index.texts() == {("1.00",): ["c"]}
    assert await index.faults() == []


async def test_keys_that_their_own_type_takes_for_equal_are_one_document(
    target: Database, open_index: OpenIndex
) -> None:
    """Our sessions have no search path: `=` alone would compare citext as text, and see two keys."""
    target.execute("CREATE EXTENSION IF NOT EXISTS citext")
    index = await open_index(key={"id": "public.citext"})
    await index.apply(changes(document("Foo", "a", "b")))

    assert await index.writer.stored_hashes([("FOO",)]) == {("FOO",): hash_text("a\nb")}
    await index.apply(changes(document("foo", "c", existed=True)))
    assert await index.texts() == {("foo",): ["c"]}
    await index.apply(changes(deleted=["fOO"]))
    assert await index.texts() == {}
