"""A backfill beside the stream, played against a model of the source: the index ends as the table does.

The model keeps PostgreSQL's rules and nothing else: a transaction locks the keys that it touches until it is visible;
its commit is in the WAL, and may be delivered, before it is visible; ids are given out with the first write; a snapshot
lists only the running ids below the last finished one; TRUNCATE shows at once, whatever the snapshot.

What the pipeline does is the smallest that keeps the rules of `cdcsync.visibility`. The index begins with rows of a time
before: some are right, some are not, some are of keys that the table does not have.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from cdcsync.batches import IndexChanges
from cdcsync.changes import Delete, Key, Row, Shape, Truncation, Upsert, complete
from cdcsync.config import QualifiedName
from cdcsync.pgoutput.messages import UNCHANGED
from cdcsync.visibility import XID_SPAN, Deliveries, Snapshot

SHAPE = Shape(index="i", table=QualifiedName("public", "t"), key=("id",), carried=("n",), text=("body",))
KEYS: list[Key] = [("a",), ("b",), ("c",), ("d",)]

Values: TypeAlias = tuple[str, str]
Rows: TypeAlias = dict[Key, Values]


class Write(msgspec.Struct, frozen=True):
    """One change; `published` is False for what was written before the pipeline began."""

    kind: Literal["put", "delete", "move", "truncate"]
    key: Key
    values: Values
    whole: bool
    to: Key
    published: bool

    def apply(self, rows: Rows) -> None:
        match self.kind:
            case "put":
                rows[self.key] = self.values
            case "delete":
                del rows[self.key]
            case "move":
                del rows[self.key]
                rows[self.to] = self.values
            case "truncate":
                rows.clear()

    @property
    def keys(self) -> set[Key]:
        return set(KEYS) if self.kind == "truncate" else {self.key, self.to}


class Transaction:
    def __init__(self, xid: int) -> None:
        self.xid = xid
        self.writes: list[Write] = []

    @property
    def keys(self) -> set[Key]:
        return {key for write in self.writes for key in write.keys}

    @property
    def truncates(self) -> bool:
        return any(write.kind == "truncate" for write in self.writes)


class Page(msgspec.Struct, frozen=True):
    """What a backfill read: rows of `keys`, None where there is none and that is to be said."""

    snapshot: Snapshot
    keys: frozenset[Key]
    rows: dict[Key, Values | None]


class Source:
    """The table, its transactions and its WAL."""

    def __init__(self, next_xid: int) -> None:
        self.next_xid = next_xid
        self.latest_finished = next_xid - 1
        self.running: list[Transaction] = []
        self.invisible: list[Transaction] = []
        self.wal: list[Transaction | Page] = []
        self.visible: set[int] = set()

    def begin(self) -> Transaction:
        transaction = Transaction(self.next_xid)
        self.next_xid += 1
        self.running.append(transaction)
        return transaction

    def finish(self, transaction: Transaction) -> None:
        self.latest_finished = max(self.latest_finished, transaction.xid)

    @property
    def unfinished(self) -> list[Transaction]:
        return self.running + self.invisible

    def snapshot(self) -> Snapshot:
        xmax = self.latest_finished + 1
        running = frozenset(one.xid for one in self.unfinished if one.xid < xmax)
        return Snapshot.parse(f"{min(running, default=xmax)}:{xmax}:{','.join(map(str, sorted(running)))}")

    def rows(self, snapshot: Snapshot) -> Rows:
        """What a statement reads now under a snapshot of now or earlier; it waits while a TRUNCATE has its lock."""
        rows: Rows = {}
        truncated = False
        for entry in self.wal:
            if isinstance(entry, Transaction):
                if entry.xid in self.visible and snapshot.sees(entry.xid):
                    for write in entry.writes:
                        write.apply(rows)
                elif entry.truncates:
                    truncated = True
        return {} if truncated else rows

    def seen_by(self, transaction: Transaction) -> Rows:
        rows = self.rows(self.snapshot())
        for write in transaction.writes:
            write.apply(rows)
        return rows


class BackfillBesideTheStream(RuleBasedStateMachine):
    """The source, the stream and the backfill, one step at a time and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0
        self.streaming = False
        self.deliveries = Deliveries()
        self.batch = IndexChanges(SHAPE)
        self.batch_pages: list[int] = []
        self.pending: dict[int, Page] = {}
        self.reading: Snapshot | None = None
        self.checkpoint = self.at = self.within = 0
        self.settled: set[Key] = set()

    @initialize(
        next_xid=st.integers(XID_SPAN - 6, XID_SPAN + 3) | st.integers(3, 6),
        index=st.dictionaries(st.sampled_from(KEYS), st.just(("stale", "stale"))),
    )
    def begin(self, next_xid: int, index: Rows) -> None:
        self.source = Source(next_xid)
        self.index: Rows = dict(index)
        self.stale = dict(index)

    # -- the source -----------------------------------------------------------------------------------------------

    @rule(
        which=st.integers(0, 2),
        kind=st.sampled_from(["put", "put", "put", "delete", "move", "move", "truncate"]),
        key=st.sampled_from(KEYS),
        to=st.sampled_from(KEYS),
        whole=st.booleans(),
    )
    def write(
        self, which: int, kind: Literal["put", "delete", "move", "truncate"], key: Key, to: Key, whole: bool
    ) -> None:
        running = self.source.running
        transaction = running[which] if which < len(running) else None
        rows = self.source.seen_by(transaction) if transaction else self.source.rows(self.source.snapshot())
        self.values += 1
        if kind == "move" and (key not in rows or to in rows):
            kind = "put"
        if kind == "delete" and key not in rows:
            kind = "put"
        if kind != "move":
            to = key
        whole = whole or key not in rows
        values = (f"n{self.values}", f"body{self.values}" if whole else rows[key][1])
        write = Write(kind, key, values, whole, to, self.streaming)
        locked = {key for other in self.source.unfinished if other is not transaction for key in other.keys}
        if not locked & write.keys:
            (transaction or self.source.begin()).writes.append(write)

    @rule()
    def begin_something_else(self) -> None:
        """Another table's transaction takes an id, and with it makes the snapshots' ends move."""
        one = self.source.begin()
        self.source.running.remove(one)
        self.source.finish(one)

    @precondition(lambda self: self.source.running)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        transaction = data.draw(st.sampled_from(self.source.running))
        self.source.running.remove(transaction)
        self.source.wal.append(transaction)
        self.source.invisible.append(transaction)

    @precondition(lambda self: self.source.running)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        transaction = data.draw(st.sampled_from(self.source.running))
        self.source.running.remove(transaction)
        self.source.finish(transaction)

    @precondition(lambda self: self.source.invisible)
    @rule(data=st.data())
    def show(self, data: st.DataObject) -> None:
        transaction = data.draw(st.sampled_from(self.source.invisible))
        self.source.invisible.remove(transaction)
        self.source.visible.add(transaction.xid)
        self.source.finish(transaction)

    # -- the stream -----------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.streaming)
    @rule()
    def create_the_slot(self) -> None:
        self.streaming = True
        self.checkpoint = self.at = len(self.source.wal)
        self._suspect_all_that_run()

    def _suspect_all_that_run(self) -> None:
        self.source.begin()  # an id of our own: all others are then below the snapshot's end
        self.source.finish(self.source.running.pop())
        self.deliveries.suspect(self.source.snapshot().running)

    @precondition(lambda self: self.streaming)
    @rule(steps=st.integers(1, 5))
    def deliver(self, steps: int) -> None:
        for _ in range(steps):
            self._deliver_one()

    def _deliver_one(self) -> bool:
        if self.at == len(self.source.wal):
            return False
        entry = self.source.wal[self.at]
        if isinstance(entry, Page):
            self._meet_mark(entry)
        elif self.within < len(entry.writes):
            self._take(entry, entry.writes[self.within])
            self.within += 1
            return True
        self.at += 1
        self.within = 0
        return True

    def _take(self, transaction: Transaction, write: Write) -> None:
        if not write.published:
            return
        xid, lsn, shape = transaction.xid % XID_SPAN, self.at, SHAPE
        if write.kind == "truncate":
            self.deliveries.truncated(xid)
            self.batch.add(Truncation(shape, xid, lsn))
        elif write.kind == "delete":
            self.deliveries.touched(write.key, xid)
            self.batch.add(Delete(shape, write.key, xid, lsn))
        else:
            row: Row = (*write.to, write.values[0], write.values[1] if write.whole else UNCHANGED)
            self.deliveries.touched(write.to, xid)
            if write.kind == "move":
                self.deliveries.touched(write.key, xid)
            self.batch.add(Upsert(shape, write.to, row, xid, lsn, write.key if write.kind == "move" else None))
        self.settled |= write.keys

    def _meet_mark(self, page: Page) -> None:
        if self.pending.get(self.at) is not page:
            return
        for key, values in page.rows.items():
            if not self.deliveries.hides(key, page.snapshot):
                change = Delete(SHAPE, key, 0, 0) if values is None else Upsert(SHAPE, key, (*key, *values), 0, 0)
                self.batch.add_page_row(change)
        self.batch_pages.append(self.at)

    @rule()
    def apply(self) -> None:
        """Apply the open batch, if what it leaves open can be read again."""
        target = dict(self.index)
        if self.batch.truncated:
            target.clear()
        for change in self.batch.live.values():
            if isinstance(change, Delete):
                target.pop(change.key, None)
        snapshot = self.source.snapshot()
        rows = self.source.rows(snapshot)
        for change in [*self.batch.live.values(), *self.batch.filled.values()]:
            if isinstance(change, Upsert):
                if complete(change.row):
                    target[change.key] = (str(change.row[1]), str(change.row[2]))
                elif not snapshot.sees(change.xid):
                    return
                elif change.key in rows:
                    target[change.key] = rows[change.key]
        self.index = target
        self.checkpoint = self.at
        for mark in self.batch_pages:
            page = self.pending.pop(mark)
            self.settled |= page.keys
            oldest = min((one.snapshot for one in self.pending.values()), key=lambda one: one.xmax, default=page.snapshot)
            self.deliveries.forget_seen(oldest)
        self._open_batch()

    def _open_batch(self) -> None:
        self.batch = IndexChanges(SHAPE)
        self.batch_pages = []

    @rule()
    def reconnect(self) -> None:
        self._open_batch()
        self.at, self.within = self.checkpoint, 0

    @precondition(lambda self: self.streaming)
    @rule()
    def restart(self) -> None:
        self.pending.clear()
        self.reading = None
        self.deliveries = Deliveries()
        self.reconnect()
        self._suspect_all_that_run()

    # -- the backfill ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.streaming)
    @rule()
    def record(self) -> None:
        self.deliveries.record()

    @rule()
    def stop(self) -> None:
        self.pending.clear()
        self.batch_pages.clear()
        self.reading = None
        self.deliveries.stop()

    @precondition(lambda self: not self.deliveries.recording)
    @rule()
    def prune(self) -> None:
        self.deliveries.forget_seen(self.source.snapshot())

    @precondition(lambda self: self.deliveries.recording)
    @rule()
    def take_snapshot(self) -> None:
        self.reading = self.source.snapshot()

    @precondition(lambda self: self.reading and not any(one.truncates for one in self.source.unfinished))
    @rule(keys=st.frozensets(st.sampled_from(KEYS), min_size=1), orphans=st.booleans())
    def read(self, keys: frozenset[Key], orphans: bool) -> None:
        """Read a page of the table, or ask which of some keys of the index the table lacks."""
        assert self.reading is not None
        snapshot, self.reading = self.reading, None
        if self.deliveries.unseen(snapshot):
            return
        rows = self.source.rows(snapshot)
        found: dict[Key, Values | None]
        if orphans:
            keys &= self.index.keys()
            found = dict.fromkeys(keys - rows.keys())
            keys = frozenset(found)
        else:
            found = {key: rows[key] for key in keys & rows.keys()}
            keys -= self.stale.keys() - rows.keys()
        page = Page(snapshot, keys, found)
        self.pending[len(self.source.wal)] = page
        self.source.wal.append(page)

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def what_is_recorded_is_bounded_by_what_is_there(self) -> None:
        if self.deliveries.recording:
            assert self.deliveries.size <= len(KEYS) + 1 + len(self.deliveries.suspects)

    def teardown(self) -> None:
        """Let everything end and arrive; then the index holds each settled key as the table does."""
        if not self.streaming:
            return
        for transaction in list(self.source.running):
            self.source.running.remove(transaction)
            self.source.wal.append(transaction)
            self.source.invisible.append(transaction)
        for transaction in list(self.source.invisible):
            self.source.invisible.remove(transaction)
            self.source.visible.add(transaction.xid)
            self.source.finish(transaction)
        while self._deliver_one():
            pass
        self.apply()
        rows = self.source.rows(self.source.snapshot())
        assert {key: rows[key] for key in self.settled & rows.keys()} == {
            key: self.index[key] for key in self.settled & self.index.keys()
        }
        for key in self.index.keys() - self.settled:
            assert self.index[key] == self.stale[key]


def test_a_backfill_beside_the_stream_ends_with_what_the_table_holds() -> None:
    run_state_machine_as_test(BackfillBesideTheStream, settings=settings(max_examples=200, stateful_step_count=60))
