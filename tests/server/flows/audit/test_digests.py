"""Digests of documents: equal on both sides for every value, different for whatever differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

import cdcsync.flows.audit.digests as module
from cdcsync.documents.chunks import Chunk
from cdcsync.documents.templates import hash_text
from cdcsync.flows.audit.digests import Digests, differing, source_digests
from cdcsync.model.changeset import Document
from cdcsync.model.rows import Row
from cdcsync.postgres.comparisons import Comparison, comparisons
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.tables import SourceTable
from tests.support.indexes import SCHEMA, LiveIndex, changes, live_index, make_spec
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SPEC = make_spec(
    key={"region": "text", "id": "numeric"},
    carried={"price": "numeric", "made": "timestamp with time zone", "tags": "text[]"},
    text="{title}\n\n{body}",
    search=None,
)
TABLE = (
    "CREATE TABLE articles (region text, id numeric, price numeric, made timestamptz, tags text[], title text,"
    " body text, PRIMARY KEY (region, id))"
)
ROWS = """
    ('eu', 1, 1.50, '2026-05-04 12:00+02', '{a,NULL,"b c"}', 'A title', 'a body'),
    ('eu', 1.5, NULL, NULL, NULL, NULL, 'only a body'),
    ('eu', 'NaN', 'Infinity', 'infinity', '{}', 'Größe 東京 \U0001f600', E'line\\n\\n\\tline'),
    ('Ünï "x" ,()', 7, -0.00, '0044-03-15 12:00 BC', '{"{}"}', '  blanks  ', E'   \\n '),
    ('eu', 9, 1, NULL, NULL, NULL, NULL),
    ('eu', 10, 1, NULL, NULL, ' ', E'\\n\\t')
"""


async def applied(index: LiveIndex, rows: list[Row]) -> None:
    """Put rows into the index as a worker does, in one chunk each."""
    spec = index.spec
    documents = []
    for row in rows:
        made = spec.render(row)
        text = made.text.strip()
        chunks = [Chunk(0, text, hash_text(text))] if text else []
        documents.append(Document(spec.shape.key_of(row), spec.shape.carried_of(row), made.hash, chunks, 1, 0, False))
    await index.apply(changes(*documents))


class Sides:
    """A table, and an index of it that is equal."""

    def __init__(self, source: Connection, index: LiveIndex, database: Database) -> None:
        self.source = source
        self.index = index
        self.database = database

    async def digests(self, limit: int = 100, after: Any = None, **options: Any) -> Digests:
        return await source_digests(self.source, self.index.spec, after, limit, **options)

    async def differing(self) -> list[tuple[str, ...]]:
        return list(await differing(self.index.connection, SCHEMA, self.index.spec, await self.digests()))


@pytest.fixture
async def sides(database: Database) -> Any:
    database.execute(TABLE)
    database.execute(f"INSERT INTO articles VALUES {ROWS}")
    async with live_index(database, SPEC) as index, await connect(database.dsn, "source") as source:
        await applied(index, (await SourceTable.of(SPEC).page(source, None, 100)).rows)
        yield Sides(source, index, database)


async def test_equal_documents_have_equal_digests_whatever_their_values(sides: Sides) -> None:
    found = await sides.digests()
    assert len(found.by_key) == 6
    assert sorted(key[1] for key, digest in found.by_key.items() if digest is None) == ["10", "9"]
    assert len({digest for digest in found.by_key.values() if digest is not None}) == 4
    assert await sides.differing() == []


DIFFERENCES = {
    "another text": "UPDATE articles SET title = 'Another title' WHERE id = 1",
    "white space": "UPDATE articles SET title = 'A  title' WHERE id = 1",
    "a carried value": "UPDATE articles SET price = 1.51 WHERE id = 1",
    "a carried value that is equal and written otherwise": "UPDATE articles SET price = 1.500 WHERE id = 1",
    "no carried value": "UPDATE articles SET made = NULL WHERE id = 1",
    "no text any more": "UPDATE articles SET title = NULL, body = ' ' WHERE id = 1",
    "gone from the index": "DELETE FROM cdcsync.articles_chunks WHERE id = 1",
    "another hash in the index": "UPDATE cdcsync.articles_chunks SET document_hash = '\\x00' WHERE id = 1",
}


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("what", DIFFERENCES)
async def test_a_document_that_differs_has_another_digest(sides: Sides, what: str) -> None:
    sides.database.execute(DIFFERENCES[what])
    assert await sides.differing() == [("eu", "1")]


async def test_a_text_where_there_was_none_differs_too(sides: Sides) -> None:
    sides.database.execute("UPDATE articles SET title = 'new' WHERE id = 9")
    assert await sides.differing() == [("eu", "9")]


@pytest.mark.parametrize("plain", [True, False])
async def test_pages_together_have_each_row_once_in_the_order_of_the_keys(
    sides: Sides, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is read in parts if the key's types are compared by other operators than pg_catalog's."""

    async def compared(connection: Connection, types: Sequence[str]) -> list[Comparison]:
        return [msgspec.structs.replace(one, plain=plain) for one in await comparisons(connection, types)]

    monkeypatch.setattr(module, "comparisons", compared)
    whole = await sides.digests()
    found: dict[Any, Any] = {}
    page, after = await sides.digests(2), None
    while True:
        found |= page.by_key
        if page.last:
            break
        assert page.after != after
        after = page.after
        page = await sides.digests(2, after)
    assert list(found.items()) == list(whole.by_key.items())


async def test_rows_are_digested_by_their_keys_however_these_are_written(sides: Sides) -> None:
    whole = await sides.digests()
    found = await sides.digests(keys=[("eu", "1.0"), ("eu", "1.50"), ("eu", "4711")])
    assert found.by_key == {key: whole.by_key[key] for key in (("eu", "1"), ("eu", "1.5"))}


async def test_a_value_too_large_for_a_digest_makes_its_document_a_suspect_and_no_other(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides.database.execute("UPDATE articles SET body = repeat('large ', 1000) WHERE id = 1.5")
    monkeypatch.setattr(module, "TOO_LARGE", 5_999)
    whole = await sides.digests()
    assert whole.by_key["eu", "1.5"] == module.NO_DOCUMENT
    assert await sides.differing() == [("eu", "1.5")]
    assert (await sides.digests(keys=list(whole.by_key))).by_key == whole.by_key
    monkeypatch.setattr(module, "TOO_LARGE", 6_000)
    assert (await sides.digests()).by_key["eu", "1.5"] not in (module.NO_DOCUMENT, None)


@pytest.fixture
def repeated(database: Database) -> Database:
    """A table whose key no longer identifies its rows."""
    database.execute("CREATE TABLE articles (id bigint, tenant int, body text)")
    database.execute("INSERT INTO articles VALUES (1, 1, 'a'), (2, 1, 'b'), (2, 1, 'c')")
    return database


async def test_a_key_of_several_rows_is_told(repeated: Database) -> None:
    async with await connect(repeated.dsn, "source") as source:
        found = await source_digests(source, make_spec(search=None), None, 10)
    assert found.repeated == [("2",)]
