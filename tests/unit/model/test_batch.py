"""Batches: which of several changes of a key is left, what barriers and pages do, and where the batch ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import IndexFault
from cdcsync.lsn import Lsn
from cdcsync.model.batch import ROW_OVERHEAD_BYTES, UNCHANGED_BYTES, Batch, IndexChanges, PageEnd, PageRows, RowChange
from cdcsync.model.links import Touch
from cdcsync.model.rows import Change, Delete, Key, Row, Shape, Truncation, Unread, UnreadRow, Upsert
from cdcsync.model.transactions import Committed
from cdcsync.pgoutput.messages import UNCHANGED, Value

SHAPE = Shape(index="articles", table=QualifiedName("public", "articles"), key=("id",), carried=("n",), text=("body",))
OTHER = Shape(index="notes", table=QualifiedName("public", "notes"), key=("id",), carried=(), text=("body",))
END = PageEnd(backfill_id=1, phase="rows", cursor=("k",), rows=2, done=False)


def put(key: str, n: Value, body: Value, *, moved_from: str | None = None, xid: int = 1, lsn: int = 10) -> Upsert:
    return Upsert(SHAPE, (key,), (key, n, body), xid, lsn, None if moved_from is None else (moved_from,))


def gone(key: str, *, xid: int = 1, lsn: int = 10) -> Delete:
    return Delete(SHAPE, (key,), xid, lsn)


def page(*rows: RowChange) -> tuple[RowChange, ...]:
    return rows


TRUNCATION = Truncation(SHAPE, 1, 10)

SWAP = [put(to, UNCHANGED, UNCHANGED, moved_from=key) for key, to in (("a", "t"), ("b", "a"), ("t", "b"))]

Step = Change | tuple[RowChange, ...]
"""A change of the stream, or the rows of a page."""


def taken(steps: Sequence[Step | Touch]) -> IndexChanges:
    changes = IndexChanges(SHAPE)
    for step in steps:
        if isinstance(step, tuple):
            changes.add_page(step, new=True)
        else:
            changes.add(step)
    return changes


def outcome(changes: dict[Key, RowChange] | dict[Key, Upsert]) -> dict[str, Row | None]:
    for key, change in changes.items():
        assert change.key == key
    return {change.key[0]: change.row if isinstance(change, Upsert) else None for change in changes.values()}


@pytest.mark.parametrize(
    ("steps", "live", "filled"),
    [
        pytest.param([], {}, {}, id="nothing"),
        pytest.param([put("a", "1", "x"), put("a", "2", "y")], {"a": ("a", "2", "y")}, {}, id="the last change wins"),
        pytest.param([put("a", "1", "x"), gone("a")], {"a": None}, {}, id="a deletion is kept for the target"),
        pytest.param([gone("a"), put("a", "1", "x")], {"a": ("a", "1", "x")}, {}, id="a key can come back"),
        pytest.param(
            [put("a", "1", "x"), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", "x")},
            {},
            id="an unchanged value is in the change before",
        ),
        pytest.param(
            [put("a", "1", "x"), put("a", UNCHANGED, UNCHANGED), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", "x")},
            {},
            id="and is handed on",
        ),
        pytest.param(
            [put("a", "1", None), put("a", "2", UNCHANGED)], {"a": ("a", "2", None)}, {}, id="an unchanged NULL is NULL"
        ),
        pytest.param(
            [page(UnreadRow.of(SHAPE, ("a",), 0, 5, Unread("it is damaged"))), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", UNCHANGED)},
            {},
            id="an unchanged value of a row that could not be read is not known",
        ),
        pytest.param(
            [put("a", "1", UNCHANGED), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", UNCHANGED)},
            {},
            id="what nothing tells stays open",
        ),
        pytest.param(
            [put("a", "1", "x"), gone("a"), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", UNCHANGED)},
            {},
            id="a deleted row tells nothing",
        ),
        pytest.param(
            [put("b", "1", "x", moved_from="a")],
            {"a": None, "b": ("b", "1", "x")},
            {},
            id="a move is a deletion and an upsert",
        ),
        pytest.param(
            [put("a", "1", "x"), put("b", "2", UNCHANGED, moved_from="a")],
            {"a": None, "b": ("b", "2", "x")},
            {},
            id="a moved row takes its values along",
        ),
        pytest.param(
            [put("b", "1", UNCHANGED, moved_from="a")],
            {"a": None, "b": ("b", "1", UNCHANGED)},
            {},
            id="a moved row that nothing tells stays open",
        ),
        pytest.param(
            [gone("b"), put("b", "1", "x", moved_from="a")],
            {"a": None, "b": ("b", "1", "x")},
            {},
            id="a move to a key that was deleted",
        ),
        pytest.param(
            [put("b", "9", "old b"), gone("b"), put("a", "1", "x"), put("b", "2", UNCHANGED, moved_from="a")],
            {"a": None, "b": ("b", "2", "x")},
            {},
            id="a moved row takes nothing from who had its key before",
        ),
        pytest.param(
            [put("a", "1", "x"), put("b", "2", UNCHANGED, moved_from="a"), put("a", "3", UNCHANGED, moved_from="b")],
            {"b": None, "a": ("a", "3", "x")},
            {},
            id="there and back again",
        ),
        pytest.param(
            [put("a", "1", "x"), put("b", "2", "y"), *SWAP],
            {"t": None, "a": ("a", "2", "y"), "b": ("b", "1", "x")},
            {},
            id="two rows swap their keys",
        ),
        pytest.param([put("a", "1", "x"), TRUNCATION], {}, {}, id="what came before a truncation is moot"),
        pytest.param(
            [put("a", "1", "x"), TRUNCATION, put("b", "2", "y"), gone("c")],
            {"b": ("b", "2", "y"), "c": None},
            {},
            id="what comes after it is kept",
        ),
        pytest.param(
            [page(put("a", "1", "x"), put("b", "2", "y"))],
            {},
            {"a": ("a", "1", "x"), "b": ("b", "2", "y")},
            id="a page fills",
        ),
        pytest.param(
            [put("a", "1", UNCHANGED), gone("b"), page(put("a", "2", "y"))],
            {"b": None},
            {"a": ("a", "2", "y")},
            id="a page row takes the place of a change it has seen",
        ),
        pytest.param(
            [page(put("a", "1", "x"), put("b", "1", "x")), put("a", "2", UNCHANGED)],
            {"a": ("a", "2", "x")},
            {"b": ("b", "1", "x")},
            id="a page row tells unchanged values",
        ),
        pytest.param(
            [page(put("a", "1", "x")), put("b", "2", UNCHANGED, moved_from="a")],
            {"a": None, "b": ("b", "2", "x")},
            {},
            id="a page row can move",
        ),
        pytest.param(
            [page(put("b", "0", "w")), gone("b"), page(put("a", "1", "x")), put("b", "2", "y", moved_from="a")],
            {"a": None, "b": ("b", "2", "y")},
            {},
            id="no key is in both",
        ),
        pytest.param([page(put("a", "1", "x")), gone("a")], {"a": None}, {}, id="a page row can be deleted"),
        pytest.param([page(put("a", "1", "x")), TRUNCATION], {}, {}, id="a page before a truncation is moot"),
        pytest.param(
            [TRUNCATION, page(put("a", "1", "x"))], {}, {"a": ("a", "1", "x")}, id="a page after a truncation is kept"
        ),
        pytest.param([page(gone("a"))], {"a": None}, {}, id="a page can say that a row is missing"),
        pytest.param(
            [page(put("a", "1", "x")), page(gone("a"))], {"a": None}, {}, id="and so take back what another page filled"
        ),
        pytest.param(
            [page(gone("a")), put("a", "1", "x")], {"a": ("a", "1", "x")}, {}, id="a row can come after it was missing"
        ),
    ],
)
def test_a_batch_keeps_what_its_changes_come_to(
    steps: Sequence[Step], live: dict[str, Row | None], filled: dict[str, Row | None]
) -> None:
    changes = taken(steps)

    assert outcome(changes.live) == live
    assert outcome(changes.filled) == filled
    assert changes.rows == len(live) + len(filled)
    assert changes.truncated is (TRUNCATION in steps)


def test_the_last_change_says_by_whom_and_when() -> None:
    changes = taken([put("a", "1", "x", xid=1, lsn=10), put("b", "2", UNCHANGED, moved_from="a", xid=2, lsn=20)])

    assert changes.live == {("a",): gone("a", xid=2, lsn=20), ("b",): put("b", "2", "x", xid=2, lsn=20)}


def test_an_empty_batch_has_nothing_to_apply() -> None:
    batch = Batch()

    assert not batch
    assert (batch.rows, batch.bytes, batch.transactions, batch.partial) == (0, 0, 0, False)
    assert (batch.end_lsn, batch.commit_time_us) == (None, None)


def test_a_batch_that_pauses_an_index_is_to_be_applied_even_without_changes() -> None:
    batch = Batch()

    batch.paused["articles"] = IndexFault("column author is gone", index="articles")

    assert batch


def test_indexes_are_kept_apart() -> None:
    batch = Batch()
    note = Upsert(OTHER, ("a",), ("a", "z"), 1, 10)

    batch.add(put("a", "1", "x"))
    batch.add(note)
    batch.add(TRUNCATION)

    assert batch
    assert set(batch.indexes) == {"articles", "notes"}
    assert batch.of(SHAPE).truncated
    assert batch.of(OTHER).live == {("a",): note}
    assert not batch.of(OTHER).truncated


def test_a_batch_is_as_large_as_what_was_added_to_it() -> None:
    batch = Batch()
    sizes = []
    for change in (put("a", "12", None), put("a", UNCHANGED, "12345"), gone("a"), TRUNCATION):
        batch.add(change)
        sizes.append((batch.rows, batch.bytes - batch.rows * ROW_OVERHEAD_BYTES))
    batch.add_page(PageRows(SHAPE, [put("b", "1", "123"), gone("c")], END, mark="m", rewrite=False))
    sizes.append((batch.rows, batch.bytes - batch.rows * ROW_OVERHEAD_BYTES))

    unknown = UNCHANGED_BYTES
    assert sizes == [(1, 3), (2, 9 + unknown), (3, 9 + unknown), (4, 9 + unknown), (6, 14 + unknown)]


def test_a_batch_ends_with_its_last_complete_transaction() -> None:
    batch = Batch()
    states = []
    for transaction in (Committed(Lsn(100), 1), Committed(Lsn(200), 2)):
        batch.add(put("a", "1", "x"))
        states.append((batch.end_lsn, batch.commit_time_us, batch.transactions, batch.partial))
        batch.commit(transaction)
        states.append((batch.end_lsn, batch.commit_time_us, batch.transactions, batch.partial))

    assert states == [(None, None, 0, True), (100, 1, 1, False), (100, 1, 1, True), (200, 2, 2, False)]


def test_a_page_brings_its_cursor_and_its_mark_even_when_all_its_rows_were_overtaken() -> None:
    batch = Batch()
    last = PageEnd(backfill_id=1, phase="rows", cursor=None, rows=2, done=True)

    batch.add_page(PageRows(SHAPE, [put("a", "1", "x")], END, mark="first", rewrite=False))
    batch.add_page(PageRows(SHAPE, [], last, mark="second", rewrite=False))

    assert batch
    assert not batch.partial
    assert batch.pages == [END, last]
    assert batch.marks == ["first", "second"]
    assert outcome(batch.of(SHAPE).filled) == {"a": ("a", "1", "x")}


def test_no_transaction_that_touched_related_rows_is_forgotten_for_a_later_one() -> None:
    changes = IndexChanges(SHAPE)

    for xid, values in ((1, (("3",),)), (2, (("3",),)), (3, None)):
        changes.add(Touch(SHAPE, 0, values, xid, 10))
    changes.add(Truncation(SHAPE, 4, 10))
    changes.add(put("3", "1", UNCHANGED, xid=5))

    assert changes.touched_by.keys() == {1, 2, 3}
    assert not changes.touched
    assert not changes.emptied


@pytest.mark.parametrize(
    ("steps", "since"),
    [
        ([put("a", "1", "x", lsn=30)], 30),
        ([put("a", "1", "x", lsn=20), put("a", "2", "x", lsn=25), put("a", "2", "y", lsn=30)], 20),
        ([put("b", "1", "x", lsn=20), put("a", "2", "x", lsn=30)], 30),
        ([gone("a", lsn=20), put("a", "2", "x", lsn=30)], 30),
        ([put("a", "2", "x", moved_from="b", lsn=30)], 0),
        ([put("b", "1", "x", lsn=20), put("a", "2", UNCHANGED, moved_from="b", lsn=30), put("a", "3", "x", lsn=40)], 0),
        ([page(put("a", "1", "x", lsn=30))], 0),
        ([page(put("a", "1", "x", lsn=20)), put("a", "2", "x", lsn=30)], 0),
        ([Touch(SHAPE, 0, (("3",),), 1, 10), Touch(SHAPE, 0, None, 2, 20), put("a", "2", "x", lsn=30)], 10),
    ],
)
def test_a_document_may_be_as_old_as_the_first_change_of_its_row_or_its_related_ones_and_as_anything_if_read_or_moved(
    steps: list[Step | Touch], since: int
) -> None:
    assert taken(steps).since(("a",), 30) == since


@pytest.mark.parametrize("rewrites", [(False, False), (True, False), (False, True)])
def test_one_page_that_rewrites_makes_the_batch_rewrite_that_index(rewrites: tuple[bool, bool]) -> None:
    batch = Batch()
    batch.add(Delete(OTHER, ("a",), 1, 10))

    for mark, rewrite in zip(("first", "second"), rewrites, strict=True):
        batch.add_page(PageRows(SHAPE, [put("a", "1", "x")], END, mark=mark, rewrite=rewrite))

    assert batch.of(SHAPE).rewrite is any(rewrites)
    assert not batch.of(OTHER).rewrite


def test_a_page_that_overtakes_a_change_may_be_of_a_document_that_the_index_has() -> None:
    alone, overtaking, second, known = (IndexChanges(SHAPE) for _ in range(4))
    overtaking.add(put("a", "1", "old"))
    second.add_page([put("b", "1", "new")], new=False)

    for changes in (alone, overtaking, second):
        changes.add_page([put("a", "1", "new")], new=True)
    known.add_page([put("a", "1", "new")], new=False)

    assert [changes.new for changes in (alone, overtaking, second, known)] == [True, False, False, False]
    assert not overtaking.live
