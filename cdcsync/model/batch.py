"""A batch: the changes that one apply takes to the target, at most one per key.

The rules:

1. Within a batch the last change of a key wins; an unchanged TOAST value is taken from the change before it, when the
   batch has one.
2. A moved key is a deletion of the old key and an upsert of the new one.
3. A TRUNCATE is a barrier: what came before it in the batch is moot, what comes after it is applied after it.
   That of a related table is not: it only says that all documents are to be rebuilt.
4. The batch's position is the end of its last *complete* transaction. When it closes inside a large transaction, the
   rows of that transaction are applied and the position stays before it; they are delivered again after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import msgspec

from cdcsync.errors import IndexFault
from cdcsync.lsn import Lsn
from cdcsync.model.links import Touch, Values
from cdcsync.model.rows import Change, Delete, Key, Shape, Truncation, Unread, UnreadRow, Upsert, complete, fill
from cdcsync.model.transactions import Committed, Part
from cdcsync.pgoutput.messages import UNCHANGED

ROW_OVERHEAD_BYTES = 200
"""Memory that a row takes besides its text: two tuples, the change, a dictionary entry, string headers."""

UNCHANGED_BYTES = 64 * 1024
"""The assumed size of a value that has to be read again, until it is read: TOAST holds values from 2 kB to 1 GB."""

RELATED_BYTES = 1024
"""The assumed size of a row's related rows, which are read only when the batch is applied. That reading is
bounded by itself."""

RowChange = Upsert | Delete


class PageEnd(msgspec.Struct, frozen=True):
    """A backfill page whose rows are in this batch: its cursor commits together with them.

    :ivar force_embed: keys of `index` whose vectors are to be made again, whatever their text.
    """

    backfill_id: int
    phase: str
    cursor: tuple[str, ...] | None
    rows: int
    done: bool
    index: str = ""
    force_embed: tuple[Key, ...] = ()


class PageRows(msgspec.Struct, frozen=True):
    """The rows to apply at a backfill's mark: those of its page that no newer change has overtaken.

    :ivar end: None for a page of which nothing is applied, whose mark only has to be waited for.
    :ivar rewrite: whether the rows are to be chunked again even where the document is unchanged.
    :ivar new: whether the index most likely has none of them.
    :ivar overtaken_by: transactions that touched related rows, which were delivered and which its snapshot does not
        see; the rows are then to be read again.
    """

    shape: Shape
    rows: Sequence[RowChange]
    end: PageEnd | None
    mark: str
    rewrite: bool = False
    new: bool = False
    overtaken_by: frozenset[int] = frozenset()


class IndexChanges:
    """The changes of one index in a batch."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.truncated = False
        self.cleared: set[str] = set()
        """Names of tables that were truncated, of an index over many."""
        self.live: dict[Key, RowChange] = {}
        """The last change of each key that came through the stream."""
        self.first: dict[Key, int] = {}
        """Where the first change is of each key that changed more than once; 0 where nobody knows since when the row's
        text was there: a backfill read it before, or it had another key."""
        self.filled: dict[Key, Upsert] = {}
        """Rows that a backfill read; a key is never both here and in `live`."""
        self.touched: dict[tuple[int, Values], Touch] = {}
        """The last change of the related rows of each link that have these values, or had them."""
        self.emptied: dict[int, Touch] = {}
        """The links whose tables were truncated."""
        self.first_touch: int | None = None
        """Where the first change of a related row is."""
        self.touched_by: dict[int, int] = {}
        """All transactions that touched related rows, and how often. They are not visible in the order of their
        commits, so that a reading has to see each, whatever was touched or truncated later."""
        self.resolved = False
        """Whether all documents that these touches concern were read again when this was prepared."""
        self.overtaken: set[int] = set()
        """Transactions that touched related rows and that the reading of the backfilled rows did not see."""
        self.rewrite = False
        """Whether rows are to be chunked again even where the document is unchanged: those of a backfill that asks for
        it, and live ones, which may have taken the place of such rows."""
        self._new = True
        """Whether the index most likely has no document of the backfilled rows."""

    @property
    def rows(self) -> int:
        """How many keys change."""
        return len(self.live) + len(self.filled)

    @property
    def new(self) -> bool:
        """Whether all of this is rows that the index most likely does not have, so that they can be copied in."""
        return (
            self._new
            and bool(self.filled)
            and not (self.live or self.truncated or self.cleared or self.touched or self.overtaken)
        )

    def add(self, change: Change | Touch) -> None:
        """Add the next change of the stream."""
        match change:
            case Upsert():
                self._add_upsert(change)
            case Touch():
                if self.first_touch is None:
                    self.first_touch = change.lsn
                self.touched_by[change.xid] = self.touched_by.get(change.xid, 0) + 1
                if change.values is None:
                    self.emptied[change.place] = change
                else:
                    self.touched |= {(change.place, values): change for values in change.values}
            case Delete():
                self._put(change)
            case Truncation() if change.shape.source is not None:
                source = change.shape.source
                self.cleared.add(source)
                self.live = {key: one for key, one in self.live.items() if key[0] != source}
                self.filled = {key: one for key, one in self.filled.items() if key[0] != source}
            case Truncation():
                self.truncated = True
                self.live.clear()
                self.filled.clear()
                self.touched.clear()
                self.emptied.clear()
            case _:
                assert_never(change)

    def since(self, key: Key, lsn: int) -> int:
        """Return a position no later than the commit that brought what this row's document says after the batch.

        Nobody knows since when the source has had a row that a backfill read, or what a row says that got another key.

        :param lsn: where the last change of the row is.
        """
        if key in self.filled:
            return 0
        own = self.live.get(key)
        first = self.first.get(key, lsn if own is None else own.lsn)
        return first if self.first_touch is None else min(first, self.first_touch)

    def _add_upsert(self, change: Upsert) -> None:
        before_key = change.key if change.moved_from is None else change.moved_from
        row = change.row
        whole = complete(row)
        if whole and change.moved_from is None:
            self._put(change)
            return
        # Related rows may be others by now, so that such a row is read again anyway.
        if not whole and not change.shape.computed:
            before = self.live.get(before_key) or self.filled.get(before_key)
            # Of a row that could not be read, the batch has no values.
            if isinstance(before, Upsert) and not isinstance(before, UnreadRow):
                row = fill(row, before.row)
        if change.moved_from is not None:
            self._put(Delete(change.shape, change.moved_from, change.xid, change.lsn))
        if row is not change.row:
            change = Upsert(change.shape, change.key, row, change.xid, change.lsn)
        self._put(change)
        if before_key != change.key:
            self.first[change.key] = 0

    def add_page(self, rows: Sequence[RowChange], *, new: bool) -> None:
        """Add the rows of a page at its mark: those that a backfill read, and those that it found missing."""
        self._new = self._new and new
        for row in rows:
            match row:
                case Delete():
                    if not isinstance(self.live.get(row.key), Delete):
                        self._put(row)
                case Upsert():
                    # Earlier changes of the key may be in batches that are written already.
                    self._new = self.live.pop(row.key, None) is None and self._new
                    self.filled[row.key] = row
                case _:
                    assert_never(row)

    def leave_out(self, key: Key, why: Unread) -> bool:
        """Treat a row as one that cannot be read; returns False if nothing in the batch could bring such a row."""
        for changes in (self.live, self.filled):
            change = changes.get(key)
            if isinstance(change, Upsert) and not isinstance(change, UnreadRow):
                changes[key] = UnreadRow.of(change.shape, key, change.xid, change.lsn, why)
                return True
        if not self.touched or isinstance(self.live.get(key), UnreadRow):
            return False
        # It is read again because related rows changed.
        touch = max(self.touched.values(), key=lambda one: one.lsn)
        self.live[key] = UnreadRow.of(self.shape, key, touch.xid, touch.lsn, why)
        return True

    def _put(self, change: RowChange) -> None:
        if isinstance(before := self.live.get(change.key), Upsert):
            self.first.setdefault(change.key, before.lsn)
        elif change.key in self.filled:
            self.first[change.key] = 0
        if self.filled:
            self.filled.pop(change.key, None)
        self.live[change.key] = change


class Batch:
    """Changes in the making; the stream adds, apply takes the whole."""

    def __init__(self) -> None:
        self.indexes: dict[str, IndexChanges] = {}
        self.pages: list[PageEnd] = []
        self.marks: list[str] = []
        self.paused: dict[str, IndexFault] = {}
        """Why indexes stop following their tables here; committed with the position, so that it cannot be forgotten."""
        self.parts: set[Part] = set()
        """Partitions that have rows here, or had some before; committed with the rows, and nothing to apply by
        themselves."""
        self.rows = 0
        self.bytes = 0
        self.transactions = 0
        self.end_lsn: Lsn | None = None
        self.commit_time_us: int | None = None
        self.oldest_us: int | None = None
        """When the first transaction that changed something here was committed."""
        self.origins: dict[int, Any] = {}
        """Where traced transactions come from, by the LSN that their changes carry."""
        self.partial = False
        """Whether the last transaction in it is not complete."""
        self.ahead: Lsn | None = None
        """When it is taken inside a transaction: the position just after the beginning of that one's commit record."""

    def __bool__(self) -> bool:
        return bool(self.indexes) or bool(self.paused)

    def of(self, shape: Shape) -> IndexChanges:
        """Return the changes of the shape's index, empty at first."""
        changes = self.indexes.get(shape.index)
        if changes is None:
            changes = self.indexes[shape.index] = IndexChanges(shape)
        return changes

    def add(self, change: Change | Touch) -> None:
        """Add the next change of the stream."""
        changes = self.indexes.get(change.shape.index) or self.of(change.shape)
        changes.add(change)
        self.partial = True
        self.rows += 1
        self.bytes += _size(change)

    def add_page(self, page: PageRows) -> None:
        """Add the rows of a backfill page at its mark."""
        changes = self.of(page.shape)
        self.marks.append(page.mark)
        if page.end is None:
            return
        changes.rewrite = changes.rewrite or page.rewrite
        changes.overtaken |= page.overtaken_by
        changes.add_page(page.rows, new=page.new)
        self.bytes += sum(map(_size, page.rows))
        self.rows += len(page.rows)
        self.pages.append(page.end)

    def commit(self, transaction: Committed) -> None:
        """Note that everything of a transaction has been added."""
        self.transactions += 1
        self.end_lsn = transaction.end_lsn
        self.commit_time_us = transaction.commit_time_us
        self.partial = False


def _size(change: Change | Touch) -> int:
    if isinstance(change, Upsert):
        size = ROW_OVERHEAD_BYTES
        unchanged = RELATED_BYTES if change.shape.computed else 0
        for value in change.row:
            if type(value) is str:
                size += len(value)
            elif value is UNCHANGED and not unchanged:
                unchanged = UNCHANGED_BYTES
        return size + unchanged
    return ROW_OVERHEAD_BYTES
