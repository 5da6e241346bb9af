"""A backfill beside the stream, played against a model of the source: the index ends as the table does.

The model keeps PostgreSQL's rules and nothing else: a transaction locks the keys that it touches until it is visible;
its commit is in the WAL, and may be delivered, before it is visible; ids are given out with the first write; a snapshot
lists only the running ids below the last finished one; TRUNCATE shows at once, whatever the snapshot.

What the pipeline does is the smallest that keeps the rules of `cdcsync.visibility`. The index begins with stale rows,
some of them of keys that the table does not have.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import product
from typing import TypeAlias

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cdcsync.batches import IndexChanges
from cdcsync.changes import Delete, Key, Row, Shape, Truncation, Upsert, complete
from cdcsync.config import QualifiedName
from cdcsync.pgoutput.messages import UNCHANGED
from cdcsync.visibility import XID_SPAN, Deliveries, Snapshot

SHAPE = Shape(index="i", table=QualifiedName("public", "t"), key=("id",), carried=("n",), text=("body",))
KEYS: list[Key] = [("a",), ("b",), ("c",)]

Values: TypeAlias = tuple[str, str]
Rows: TypeAlias = dict[Key, Values]


class Write(msgspec.Struct, frozen=True):
    """One change; `published` is False for what was written before the pipeline began."""

    kind: str
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

    def commit(self, transaction: Transaction) -> None:
        self.running.remove(transaction)
        self.wal.append(transaction)
        self.invisible.append(transaction)

    def show(self, transaction: Transaction) -> None:
        self.invisible.remove(transaction)
        self.visible.add(transaction.xid)
        self.latest_finished = max(self.latest_finished, transaction.xid)

    def roll_back(self, transaction: Transaction) -> None:
        self.running.remove(transaction)
        self.latest_finished = max(self.latest_finished, transaction.xid)

    def finish_all(self) -> None:
        for transaction in list(self.running):
            self.commit(transaction)
        for transaction in list(self.invisible):
            self.show(transaction)

    @property
    def unfinished(self) -> list[Transaction]:
        return self.running + self.invisible

    def snapshot(self) -> Snapshot:
        xmax = self.latest_finished + 1
        running = frozenset(one.xid for one in self.unfinished if one.xid < xmax)
        return Snapshot.parse(f"{min(running, default=xmax)}:{xmax}:{','.join(map(str, sorted(running)))}")

    def rows(self, visible: Set[int] | None = None) -> Rows:
        """What a statement reads now, or under an earlier snapshot; it waits while a TRUNCATE has its lock."""
        visible = self.visible if visible is None else visible
        rows: Rows = {}
        truncated = False
        for entry in self.wal:
            if isinstance(entry, Transaction):
                if entry.xid in visible:
                    for write in entry.writes:
                        write.apply(rows)
                elif entry.truncates:
                    truncated = True
        return {} if truncated else rows

    def seen_by(self, transaction: Transaction | None) -> Rows:
        """What a statement of the transaction reads now, or of a new one."""
        rows = self.rows()
        for write in transaction.writes if transaction else ():
            write.apply(rows)
        return rows


class Step(msgspec.Struct, frozen=True):
    """What happens next; a step that cannot happen now does not."""

    kind: str
    number: int
    write: str
    key: Key
    to: Key
    whole: bool


class Pipeline:
    """The stream and the backfill of one index, and the source that they follow."""

    def __init__(self, next_xid: int, index: Rows) -> None:
        self.source = Source(next_xid)
        self.index = dict(index)
        self.stale = dict(index)
        self.settled: set[Key] = set()
        """The keys of which the index must be right in the end: delivered to it, or read by a page that it took."""
        self.deliveries = Deliveries()
        self.streaming = False
        self.checkpoint = self.at = self.within = 0
        self.batch = IndexChanges(SHAPE)
        self.batch_pages: list[Page] = []
        self.pending: list[Page] = []
        self.unmarked: list[Page] = []
        self.reading: tuple[Snapshot, Set[int]] | None = None
        self.values = 0

    def does(self, step: Step) -> None:
        source = self.source
        match step.kind:
            case "wait":
                pass
            case "write":
                self._write(step, source.running[step.number % 3] if step.number % 3 < len(source.running) else None)
            case "write and commit":
                if transaction := self._write(step, None):
                    source.commit(transaction)
            case "commit" if source.running:
                source.commit(source.running[step.number % len(source.running)])
            case "roll back" if source.running:
                source.roll_back(source.running[step.number % len(source.running)])
            case "show" if source.invisible:
                source.show(source.invisible[step.number % len(source.invisible)])
            case "finish all":
                source.finish_all()
            case "take an id":
                source.roll_back(source.begin())
            case "deliver":
                self._deliver(step.number)
            case "deliver all":
                self._deliver(None)
            case "apply":
                self._apply()
            case "reconnect":
                self._reconnect()
            case "restart" if self.streaming:
                self._restart()
            case "record":
                self.deliveries.record()
            case "stop":
                self._stop()
            case "prune" if not self.deliveries.recording:
                self.deliveries.forget_seen(source.snapshot())
            case "snapshot":
                self.reading = source.snapshot(), frozenset(source.visible)
            case "read":
                self._read(step)
            case "page":
                self.reading = source.snapshot(), frozenset(source.visible)
                self._read(step)
                if step.to != step.key:  # else anything may come between
                    self._mark()
            case "mark":
                self._mark()

    # -- the source -----------------------------------------------------------------------------------------------

    def _write(self, step: Step, transaction: Transaction | None) -> Transaction | None:
        rows = self.source.seen_by(transaction)
        kind, key, to = step.write, step.key, step.to
        if (kind in ("delete", "move") and key not in rows) or (kind == "move" and to in rows):
            kind = "put"
        if kind != "move":
            to = key
        self.values += 1
        whole = step.whole or key not in rows
        values = (f"n{self.values}", f"body{self.values}" if whole else rows[key][1])
        write = Write(kind, key, values, whole, to, self.streaming)
        if any(write.keys & other.keys for other in self.source.unfinished if other is not transaction):
            return None  # it waits for a lock
        transaction = transaction or self.source.begin()
        transaction.writes.append(write)
        return transaction

    # -- the stream -----------------------------------------------------------------------------------------------

    def create_the_slot(self) -> None:
        self.streaming = True
        self.checkpoint = self.at = len(self.source.wal)
        self._suspect_all_that_run()

    def _suspect_all_that_run(self) -> None:
        self.source.roll_back(self.source.begin())  # an id of our own: all others are then below the snapshot's end
        self.deliveries.suspect(self.source.snapshot().running)

    def _deliver(self, most: int | None) -> None:
        while self.streaming and self.at < len(self.source.wal) and most != 0:
            entry = self.source.wal[self.at]
            if isinstance(entry, Transaction) and self.within < len(entry.writes):
                self._take(entry.xid % XID_SPAN, entry.writes[self.within])
                self.within += 1
            else:
                if isinstance(entry, Page) and entry in self.pending:
                    self._meet_mark(entry)
                self.at += 1
                self.within = 0
            most = None if most is None else most - 1

    def _take(self, xid: int, write: Write) -> None:
        if not write.published:
            return
        if write.kind == "truncate":
            self.deliveries.truncated(xid)
            self.batch.add(Truncation(SHAPE, xid, 0))
        elif write.kind == "delete":
            self.deliveries.touched(write.key, xid)
            self.batch.add(Delete(SHAPE, write.key, xid, 0))
        else:
            row: Row = (*write.to, write.values[0], write.values[1] if write.whole else UNCHANGED)
            self.deliveries.touched(write.to, xid)
            if write.kind == "move":
                self.deliveries.touched(write.key, xid)
            self.batch.add(Upsert(SHAPE, write.to, row, xid, 0, write.key if write.kind == "move" else None))
        self.settled |= write.keys

    def _meet_mark(self, page: Page) -> None:
        for key, values in page.rows.items():
            if not self.deliveries.hides(key, page.snapshot):
                gone = Delete(SHAPE, key, 0, 0)
                self.batch.add_page_row(gone if values is None else Upsert(SHAPE, key, (*key, *values), 0, 0))
        self.batch_pages.append(page)

    def _apply(self) -> bool:
        """Apply the open batch, unless it leaves open what cannot be read again yet."""
        target = {} if self.batch.truncated else dict(self.index)
        snapshot = self.source.snapshot()
        rows = self.source.rows()
        for change in self.batch.live.values():
            if isinstance(change, Delete):
                target.pop(change.key, None)
        for change in [*self.batch.live.values(), *self.batch.filled.values()]:
            if isinstance(change, Delete):
                continue
            if complete(change.row):
                target[change.key] = (str(change.row[1]), str(change.row[2]))
            elif not snapshot.sees(change.xid):
                return False
            elif change.key in rows:
                target[change.key] = rows[change.key]
        self.index = target
        self.checkpoint = self.at
        for page in self.batch_pages:
            self.settled |= page.keys
            if page in self.pending:
                self.pending.remove(page)
                others = [one.snapshot for one in self.pending]
                self.deliveries.forget_seen(min(others, key=lambda one: one.xmax, default=page.snapshot))
        self._open_batch()
        return True

    def _open_batch(self) -> None:
        self.batch = IndexChanges(SHAPE)
        self.batch_pages = []

    def _reconnect(self) -> None:
        self._open_batch()
        self.at, self.within = self.checkpoint, 0

    def _restart(self) -> None:
        self._reconnect()
        self._forget_pages()
        self.deliveries = Deliveries()
        self._suspect_all_that_run()

    # -- the backfill ---------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._forget_pages()
        self.deliveries.stop()

    def _forget_pages(self) -> None:
        self.pending.clear()
        self.unmarked.clear()
        self.reading = None

    def _read(self, step: Step) -> None:
        """Read a page of the table, or ask which keys of the index the table lacks."""
        blocked = any(one.truncates for one in self.source.unfinished)
        if self.reading is None or blocked or not self.deliveries.recording or not self.streaming:
            return
        (snapshot, visible), self.reading = self.reading, None
        if self.deliveries.unseen(snapshot):
            return
        keys = frozenset(KEYS if step.whole else {step.key, step.to})
        rows = self.source.rows(visible)
        found: dict[Key, Values | None] = {key: rows[key] for key in keys & rows.keys()}
        if step.number == 0:
            keys = (keys & self.index.keys()) - rows.keys()
            found = dict.fromkeys(keys)
        page = Page(snapshot, keys - (self.stale.keys() - found.keys()), found)
        self.pending.append(page)
        self.unmarked.append(page)

    def _mark(self) -> None:
        if self.unmarked:
            self.source.wal.append(self.unmarked.pop(0))

    def end(self) -> None:
        """Let everything end and arrive."""
        while self.unmarked:
            self._mark()
        self.source.finish_all()
        self._deliver(None)
        assert self._apply()


AT_THE_SOURCE = {"wait": 1, "write": 2, "write and commit": 6, "commit": 2, "roll back": 1, "show": 4}
AT_THE_SOURCE |= {"finish all": 4, "take an id": 1}
IN_THE_PIPELINE = {"deliver": 2, "deliver all": 4, "apply": 3, "reconnect": 1, "restart": 1}
IN_THE_BACKFILL = {"record": 3, "stop": 1, "prune": 1, "snapshot": 1, "read": 1, "page": 6, "mark": 2}
WRITES = {"put": 4, "delete": 1, "move": 2, "truncate": 1}


def steps(kinds: dict[str, int], count: int) -> st.SearchStrategy[list[Step]]:
    """So many steps, some of which only wait: left to itself, hypothesis tries mostly short lists."""
    weighted = ([choice for choice, weight in weights.items() for _ in range(weight)] for weights in (kinds, WRITES))
    kind, write = weighted
    every = [Step(*choices) for choices in product(kind, range(4), write, KEYS, KEYS, (True, False))]
    return st.lists(st.sampled_from(every), min_size=count, max_size=count)


@settings(max_examples=600)
@given(
    next_xid=st.integers(XID_SPAN - 8, XID_SPAN + 3) | st.integers(3, 6),
    index=st.dictionaries(st.sampled_from(KEYS), st.just(("stale", "stale"))),
    before=steps(AT_THE_SOURCE, 8),
    after=steps(AT_THE_SOURCE | IN_THE_PIPELINE | IN_THE_BACKFILL, 60),
)
def test_a_backfill_beside_the_stream_ends_with_what_the_table_holds(
    next_xid: int, index: Rows, before: list[Step], after: list[Step]
) -> None:
    pipeline = Pipeline(next_xid, index)
    for step in before:
        pipeline.does(step)
    pipeline.create_the_slot()
    pipeline.deliveries.record()
    for step in after:
        pipeline.does(step)
    pipeline.end()

    table = pipeline.source.rows()
    for key in KEYS:
        right = table if key in pipeline.settled else pipeline.stale
        assert pipeline.index.get(key) == right.get(key)
