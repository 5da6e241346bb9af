"""Marks: which rows of a page belong at its mark, and what becomes of pages whose marks never come."""

from __future__ import annotations

import anyio
import pytest

from cdcsync.errors import SourceUnavailable
from cdcsync.flows.backfill.marks import LIVE_RECENTLY_S, Marks, Pending
from cdcsync.flows.backfill.pages import Page
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, PageEnd
from cdcsync.model.requests import Kind, Request
from cdcsync.model.rows import Delete, Key, Row, Unread, UnreadRow, Upsert
from cdcsync.model.transactions import Mark
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput.messages import UNCHANGED
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={})
SNAPSHOT = Snapshot(10, 20, frozenset())
END = PageEnd(backfill_id=1, phase="rows", cursor=("b",), rows=2, done=False)


def request(kind: Kind = "initial", *, rewrite: bool = False, id_: int = 1) -> Request:
    return Request(id_, "articles", kind, rewrite, None, "running", "rows", None, 0, None, None)


def row(key: str) -> Row:
    return (key, f"text of {key}")


def pending(of: Request | None = None, end: PageEnd | None = END, *, gone: tuple[str, ...] = ()) -> Pending:
    """A page of the keys a and b, read under `SNAPSHOT`."""
    entries: list[tuple[Key, Row | None]] = [((key,), None if key in gone else row(key)) for key in "ab"]
    return Pending(of or request(), SPEC, Page(SNAPSHOT, entries, ("b",), False), end, anyio.Event())


class Marked:
    """Marks of one index whose deliveries are being remembered."""

    def __init__(self) -> None:
        self.deliveries = Deliveries()
        self.deliveries.record()
        self.metrics = Metrics()
        self.marks = Marks({"articles": self.deliveries}, self.metrics)


@pytest.fixture
def marked() -> Marked:
    return Marked()


async def test_a_page_belongs_at_its_own_mark_and_at_no_other(marked: Marked) -> None:
    marks = marked.marks
    mark = marks.register(pending())
    assert marks.page_at(Mark("another process's", 5)) is None
    page = marks.page_at(Mark(mark, 5))
    assert page is not None
    assert page.rows == [Upsert(SPEC.shape, (key,), row(key), 0, 5) for key in "ab"]
    assert (page.end, page.mark, page.new) == (END, mark, True)


async def test_rows_that_the_stream_overtook_are_left_out(marked: Marked) -> None:
    mark = marked.marks.register(pending())
    marked.deliveries.touched(("a",), 25)  # a transaction that the snapshot does not see
    marked.deliveries.touched(("b",), 5)
    page = marked.marks.page_at(Mark(mark, 5))
    assert page is not None
    assert [one.key for one in page.rows] == [("b",)]
    assert marked.metrics.backfill_overtaken.labels("articles")._value.get() == 1


async def test_a_key_that_the_source_lacks_is_deleted_as_it_is_written(marked: Marked) -> None:
    mark = marked.marks.register(pending(request("resync"), gone=("a",)))
    page = marked.marks.page_at(Mark(mark, 5))
    assert page is not None
    assert page.rows[0] == Delete(SPEC.shape, ("a",), 0, 5, as_written=True)
    assert not page.new


async def test_a_row_that_could_not_be_read_is_read_again_if_a_change_of_related_rows_overtook_it(
    marked: Marked,
) -> None:
    def sent() -> str:
        page = Page(SNAPSHOT, [(("a",), Unread("it divides by zero"))], ("a",), False)
        return marked.marks.register(Pending(request(), SPEC, page, END, anyio.Event()))

    page = marked.marks.page_at(Mark(sent(), 5))
    assert page is not None
    assert [type(one) for one in page.rows] == [UnreadRow]
    marked.deliveries.related(25, 0)  # a transaction that the snapshot does not see
    page = marked.marks.page_at(Mark(sent(), 5))
    assert page is not None
    assert page.rows == [Upsert(SPEC.shape, ("a",), ("a", UNCHANGED), 0, 5)]
    assert page.overtaken_by == {25}


async def test_of_a_page_that_is_only_compared_nothing_is_applied(marked: Marked) -> None:
    mark = marked.marks.register(pending(request("verify"), None))
    page = marked.marks.page_at(Mark(mark, 5))
    assert page is not None
    assert (page.rows, page.end, page.mark) == ((), None, mark)


async def test_a_page_is_waited_for_until_its_batch_is_in_the_target(marked: Marked) -> None:
    sent = pending()
    batch = Batch()
    page = marked.marks.page_at(Mark(marked.marks.register(sent), 5))
    assert page is not None
    batch.add_page(page)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sent.wait)
        await anyio.wait_all_tasks_blocked()
        assert not sent.applied.is_set()
        marked.marks.note_applied(batch, 0.0)
    assert marked.metrics.backfill_rows.labels("articles")._value.get() == 2
    assert marked.marks.page_at(Mark(page.mark, 5)) is None


async def test_pages_of_a_stream_that_began_anew_are_to_be_read_again(marked: Marked) -> None:
    sent = [pending(), pending(request(id_=2))]
    marks = [marked.marks.register(one) for one in sent]
    marked.marks.interrupt()
    for one, mark in zip(sent, marks, strict=True):
        with pytest.raises(SourceUnavailable, match="read again"):
            await one.wait()
        assert marked.marks.page_at(Mark(mark, 5)) is None


async def test_no_page_follows_one_that_was_given_up_until_the_request_is_served_again(marked: Marked) -> None:
    """Its cursor, committed with it, would pass over the rows of the page before it."""
    marked.marks.register(pending())
    marked.marks.interrupt()
    with pytest.raises(SourceUnavailable, match="read again"):
        marked.marks.register(pending())
    assert marked.marks.page_at(Mark(marked.marks.register(pending(request(id_=2))), 5)) is not None

    marked.marks.drop(request())
    assert marked.marks.page_at(Mark(marked.marks.register(pending()), 5)) is not None


async def test_a_request_that_is_not_served_any_more_takes_its_pages_with_it_and_no_others(marked: Marked) -> None:
    ended, other = marked.marks.register(pending()), marked.marks.register(pending(request(id_=2)))
    marked.marks.drop(request())
    assert marked.marks.page_at(Mark(ended, 5)) is None
    assert marked.marks.page_at(Mark(other, 5)) is not None


async def test_changes_come_in_for_a_moment_after_two_batches_that_had_some(marked: Marked) -> None:
    batch = Batch()
    batch.oldest_us = 7
    live = []
    for applied in (Batch(), batch, Batch(), batch, Batch()):
        marked.marks.note_applied(applied, 0.0)
        live.append(marked.marks.beside_live)
    assert live == [False, False, False, True, True]


async def test_changes_still_come_in_while_pages_take_so_long_that_few_of_them_fit_between(
    marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(anyio, "current_time", lambda: now)
    change, paged = Batch(), Batch()
    change.oldest_us = 7
    live = []
    for _ in range(4):
        page = marked.marks.page_at(Mark(marked.marks.register(pending()), 5))
        assert page is not None
        paged = Batch()
        paged.add_page(page)
        marked.marks.note_applying(paged)
        now += 5 * LIVE_RECENTLY_S
        live.append(marked.marks.beside_live)
        marked.marks.note_applied(paged, 5 * LIVE_RECENTLY_S)
        marked.marks.note_applying(change)
        marked.marks.note_applied(change, 0.0)
    assert live == [False, False, True, True]
    assert marked.marks.beside_live
    now += LIVE_RECENTLY_S
    assert not marked.marks.beside_live
