"""Preparing batches, as far as no server is needed: what becomes of rows that no document can be made of."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from cdcsync.config import Chunking, QualifiedName
from cdcsync.documents.chunks import make_chunker
from cdcsync.documents.documents import Documents
from cdcsync.documents.functions import DocumentFunction
from cdcsync.documents.related import RelatedRows, Step
from cdcsync.errors import DocumentError
from cdcsync.flows.follow.prepare import MOST_BYTES_READ, READ_BYTES, Preparer
from cdcsync.flows.follow.related import Concerned
from cdcsync.metrics import Metrics
from cdcsync.model.batch import IndexChanges
from cdcsync.model.changeset import ChangeSet
from cdcsync.model.conditions import Term, Where
from cdcsync.model.links import Touch
from cdcsync.model.rows import OVERSIZED, Key, Row, Unread, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput.messages import TOO_LARGE, UNCHANGED
from cdcsync.source.reads import Page
from cdcsync.tracing import Tracing
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio


class Failing(DocumentFunction):
    """Makes documents of whatever does not begin with a !, and else fails for that reason."""

    def render(self, values: Sequence[str | None]) -> str:
        (body,) = cast(Sequence[str], values)
        if body.startswith("!"):
            raise DocumentError(body[1:])
        return body


async def prepared(*bodies: str) -> ChangeSet:
    """Return what rows with the keys 0, 1, … come to, read by the first load; chunks are of 8 tokens, at most 2."""
    spec = make_spec(carried={})
    spec = msgspec.structs.replace(spec, documents=Documents(Failing("m:f", ("body",), "documents")))
    chunking = Chunking(strategy="characters", max_tokens=8, overlap_tokens=0, max_chunks=2)
    changes = IndexChanges(spec.shape)
    rows = [Upsert(spec.shape, (f"key {at}",), (f"key {at}", body), 0, 0x10 + at) for at, body in enumerate(bodies)]
    changes.add_page(rows, new=True)
    nothing: Any = None
    dispatcher: Any = SimpleNamespace(tracing=Tracing())
    chunker = make_chunker(chunking, None, None)
    return await Preparer(spec, chunker, dispatcher, nothing, nothing, Metrics(), Deliveries()).prepare(
        changes, nothing
    )


async def test_rows_that_cannot_be_rendered_or_cut_come_without_chunks_and_with_their_reason() -> None:
    made = await prepared("good", "!no such thing", "too many words " * 9, "")

    assert [(one.key, len(one.chunks)) for one in made.documents] == [
        (("key 0",), 1),
        (("key 1",), 0),
        (("key 2",), 0),
        (("key 3",), 0),
    ]
    first, second = made.failed
    assert (first.key, first.error, first.commit_lsn) == (("key 1",), "no such thing", 0x11)
    assert second.key == ("key 2",)
    assert "max_chunks is 2" in second.error


@pytest.mark.parametrize("rewrite", [True, False])
async def test_a_live_row_whose_document_is_unchanged_is_chunked_again_only_where_the_batch_rewrites(
    rewrite: bool,
) -> None:
    spec = make_spec(carried={})
    row = ("key", "text")
    changes = IndexChanges(spec.shape)
    changes.add(Upsert(spec.shape, ("key",), row, 1, 0x10))
    changes.rewrite = rewrite

    async def stored_hashes(keys: Sequence[Key]) -> dict[Key, bytes]:
        return dict.fromkeys(keys, spec.render(row).hash)

    nothing: Any = None
    dispatcher: Any = SimpleNamespace(tracing=Tracing(), free_within=lambda budget_s: False)
    chunker = make_chunker(Chunking(strategy="characters", max_tokens=8, overlap_tokens=0), None, None)
    writer: Any = SimpleNamespace(stored_hashes=stored_hashes, flush_with=lambda _: False)

    made = await Preparer(spec, chunker, dispatcher, nothing, nothing, Metrics(), Deliveries()).prepare(changes, writer)

    assert [one.key for one in made.documents] == [("key",)] * rewrite
    assert [one.key for one in made.kept] == [("key",)] * (not rewrite)


class Sized:
    """A table of rows, each of so many bytes, that notes how many were asked for at a time.

    It tells how large they are before they are read only if there are no related rows.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[int] = []

    async def fitting_keys(self, connection: object, keys: Sequence[Key], most_bytes: int) -> int:
        return max(1, min(len(keys), most_bytes // self.size))

    async def unflushed(self, connection: object) -> None: ...

    async def by_keys(self, connection: object, keys: Sequence[Key]) -> Page:
        self.asked.append(len(keys))
        return Page(Snapshot(10, 10, frozenset()), [(*key, "x" * self.size) for key in keys])

    async def connection(self) -> None: ...


@pytest.mark.parametrize(
    ("size", "asked", "left"),
    [
        (10, [16, 64, 256, 500, 164], 0),
        (READ_BYTES // 32 - 16, [16, 32, 32, 32, 32, 32, 32, 32, 32], 1000 - 272),
        (MOST_BYTES_READ // 20, [16, 2, 2], 1000 - 20),
    ],
)
async def test_rows_with_related_ones_are_read_in_portions_as_large_as_the_last_one_allows(
    size: int, asked: list[int], left: int
) -> None:
    spec = make_spec(carried={})
    step = Step(QualifiedName("public", "comments"), (("article_id", "id"),))
    comments = RelatedRows(("comments",), (step,), None, (), (), "", 100, " ", "")
    spec = msgspec.structs.replace(spec, documents=msgspec.structs.replace(spec.documents, related=(comments,)))

    assert await read_again(spec, size) == (asked, 1000 - left, left)


@pytest.mark.parametrize(
    ("size", "asked", "left"),
    [
        (10, [500, 500], 0),
        (READ_BYTES // 32, [32] * 8, 1000 - 256),
        (READ_BYTES * 2, [1] * 4, 1000 - 4),
    ],
)
async def test_rows_without_related_ones_are_read_in_portions_by_their_sizes(
    size: int, asked: list[int], left: int
) -> None:
    assert await read_again(make_spec(carried={}), size) == (asked, 1000 - left, left)


async def read_again(spec: IndexSpec, size: int) -> tuple[list[int], int, int]:
    """Prepare 1000 incomplete rows; returns how many were read at a time, how many came, and how many were left."""
    changes = IndexChanges(spec.shape)
    for at in range(1000):
        changes.add(Upsert(spec.shape, (f"{at}",), (f"{at}", UNCHANGED), 1, 0x10))
    table: Any = Sized(size)
    dispatcher: Any = SimpleNamespace(tracing=Tracing(), free_within=lambda budget_s: False)
    chunker = make_chunker(Chunking(strategy="characters", max_tokens=10**6, overlap_tokens=0), None, None)

    async def stored_hashes(keys: Sequence[Key]) -> dict[Key, bytes]:
        return {}

    writer: Any = SimpleNamespace(stored_hashes=stored_hashes, flush_with=lambda _: False)
    made = await Preparer(spec, chunker, dispatcher, table, table, Metrics(), Deliveries()).prepare(changes, writer)

    return table.asked, len(made.documents), sum(len(one.keys or ()) for one in made.rebuilds)


@pytest.mark.parametrize(("own", "touched"), [(0x10, 0x20), (0x20, 0x10)])
async def test_a_row_that_changed_as_well_as_its_related_ones_carries_the_positions_of_the_last_and_the_first_change(
    own: int, touched: int
) -> None:
    spec = make_spec(carried={})
    step = Step(QualifiedName("public", "comments"), (("article_id", "id"),))
    comments = RelatedRows(("comments",), (step,), None, (), (), "", 100, " ", "")
    spec = msgspec.structs.replace(spec, documents=msgspec.structs.replace(spec.documents, related=(comments,)))
    changes = IndexChanges(spec.shape)
    changes.add(Upsert(spec.shape, ("1",), ("1", "text"), 1, own))
    touch = Touch(spec.shape, 0, (("a",),), 2, touched)
    changes.add(touch)

    async def concerned(changes: IndexChanges) -> Concerned:
        return Concerned({("1",): touch}, [])

    async def stored_hashes(keys: Sequence[Key]) -> dict[Key, bytes]:
        return {}

    table: Any = Sized(10)
    dispatcher: Any = SimpleNamespace(tracing=Tracing(), free_within=lambda budget_s: False)
    chunker = make_chunker(Chunking(strategy="characters", max_tokens=8, overlap_tokens=0), None, None)
    writer: Any = SimpleNamespace(stored_hashes=stored_hashes, flush_with=lambda _: False)
    preparer = Preparer(spec, chunker, dispatcher, table, table, Metrics(), Deliveries())
    preparer._related = cast(Any, SimpleNamespace(concerned=concerned))

    documents = (await preparer.prepare(changes, writer)).documents
    assert [(one.commit_lsn, one.text_lsn) for one in documents] == [(0x20, 0x10)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((TOO_LARGE, "wanted"), "failed"),
        ((TOO_LARGE, "other"), "deleted"),
        (("text", TOO_LARGE), "deleted"),
        ((TOO_LARGE, UNCHANGED), "read again"),
    ],
)
async def test_a_row_with_a_value_that_is_too_large_is_left_out_and_listed_if_the_index_has_it(
    values: Row, expected: str
) -> None:
    """As the constant of a condition is small, a value that is too large is another one."""
    spec = make_spec(carried={})
    where = Where("kind = 'wanted'", ("kind",), ("kind",), (Term(0, frozenset(["wanted"]), inside=True, null=False),))
    shape = msgspec.structs.replace(spec.shape, deciding=("kind",))
    spec = msgspec.structs.replace(spec, where=where, shape=shape)
    changes = IndexChanges(shape)
    changes.add(Upsert(shape, ("1",), ("1", *values), 7, 0x10))

    class Table:
        async def connection(self) -> None: ...

        async def fitting_keys(self, connection: object, keys: Sequence[Key], most_bytes: int) -> int:
            return len(keys)

        async def unflushed(self, connection: object) -> None: ...

        async def by_keys(self, connection: object, keys: Sequence[Key]) -> Page:
            return Page(Snapshot(10, 10, frozenset()), [], unread=dict.fromkeys(keys, Unread("read again")))

    async def stored_hashes(keys: Sequence[Key]) -> dict[Key, bytes]:
        return {}

    table, look_ups = (
        cast(Any, Table()),
        cast(Any, SimpleNamespace(stored_hashes=stored_hashes, flush_with=lambda _: False)),
    )
    dispatcher: Any = SimpleNamespace(tracing=Tracing(), free_within=lambda budget_s: False)
    chunker = make_chunker(Chunking(strategy="characters", max_tokens=8, overlap_tokens=0), None, None)
    made = await Preparer(spec, chunker, dispatcher, table, table, Metrics(), Deliveries()).prepare(changes, look_ups)

    assert made.deleted == ([("1",)] if expected == "deleted" else [])
    errors = {"failed": [OVERSIZED.reason], "read again": ["read again"]}.get(expected, [])
    assert [one.error for one in made.failed] == errors
    assert all(one.chunks == [] and "larger" not in str(one.carried) for one in made.documents)
