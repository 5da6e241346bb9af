"""A backfill beside the stream, played against a model of the source: the index ends as the table does.

The model keeps PostgreSQL's rules and nothing else: a transaction locks the keys that it touches until it is visible;
its commit is in the WAL, and may be delivered, before it is visible; ids are given out with the first write; a snapshot
lists only the running ids below the last finished one; TRUNCATE shows at once, whatever the snapshot.

The pipeline does the least that keeps the rules of `cdcsync.model.visibility`. The index begins with stale rows, some
of them of keys that the table does not have.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from random import Random
from typing import TypeAlias

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cdcsync.config import QualifiedName
from cdcsync.model.batch import IndexChanges
from cdcsync.model.rows import Delete, Key, Row, Shape, Truncation, Upsert, complete
from cdcsync.model.visibility import XID_SPAN, Deliveries, Snapshot
from cdcsync.pgoutput.messages import UNCHANGED

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
        if self.kind == "truncate":
            rows.clear()
        if self.kind in ("delete", "move"):
            del rows[self.key]
        if self.kind in ("put", "move"):
            rows[self.to] = self.values

    @property
    def keys(self) -> set[Key]:
        return set(KEYS) if self.kind == "truncate" else {self.key, self.to}


class Transaction:
    def __init__(self, xid: int) -> None:
        self.xid = xid
        self.writes: list[Write] = []

    @property
    def keys(self) -> set[Key]:
        return set().union(*(write.keys for write in self.writes))

    @property
    def truncates(self) -> bool:
        return any(write.kind == "truncate" for write in self.writes)


class Page(msgspec.Struct, frozen=True, eq=False):
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
        for entry in self.wal:
            if isinstance(entry, Transaction) and entry.xid in visible:
                for write in entry.writes:
                    write.apply(rows)
            elif isinstance(entry, Transaction) and entry.truncates:
                return {}
        return rows

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

    def __init__(self, next_xid: int, index: Rows, most: int) -> None:
        self.source = Source(next_xid)
        self.most = most
        self.index = self.stale = index
        self.settled: set[Key] = set()
        """The keys of which the index must be right in the end: delivered to it, or read by a page that it took."""
        self.deliveries = Deliveries(most, most)
        self.streaming = False
        self.checkpoint = self.at = self.within = 0
        self.pending: list[Page] = []
        self.unmarked: list[Page] = []
        self.reading: tuple[Snapshot, Set[int]] | None = None
        self.values = 0
        self._open_batch()

    def does(self, step: Step) -> None:
        source = self.source
        match step.kind:
            case "write":
                self._write(step, source.running[step.number] if step.number < len(source.running) else None)
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
            case "deliver" | "deliver all":
                self._deliver(step.number if step.kind == "deliver" else 1000)
            case "apply" if self._applied():
                self._open_batch()
            case "reconnect":
                self._connect()
            case "restart":
                self._restart()
            case "record":
                self.deliveries.record()
            case "stop":
                self._stop()
            case "prune" if not self.deliveries.recording:
                self.deliveries.forget_seen(source.snapshot())
            case "begin a page" | "page" if self.deliveries.recording:
                self.reading = source.snapshot(), frozenset(source.visible)
                self._forget(source.snapshot())
                if step.kind == "page":
                    self._read(step)
                    self._mark()
            case "read it":
                self._read(step)
            case "mark it":
                self._mark()

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

    def create_the_slot(self) -> None:
        self.streaming = True
        self.checkpoint = len(self.source.wal)
        self._restart()

    def _deliver(self, most: int) -> None:
        for _ in range(most):
            if self.at == len(self.source.wal):
                return
            entry = self.source.wal[self.at]
            if isinstance(entry, Transaction) and self.within < len(entry.writes):
                self._take(entry.xid % XID_SPAN, entry.writes[self.within])
                self.within += 1
            else:
                if isinstance(entry, Page) and entry in self.pending:
                    if self.deliveries.unseen(entry.snapshot):
                        self.pending.remove(entry)  # more was delivered under it than is remembered
                    else:
                        self._meet_mark(entry)
                self.at += 1
                self.within = 0

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
                row = gone if values is None else Upsert(SHAPE, key, (*key, *values), 0, 0)
                self.batch.add_page([row], new=True)
        self.batch_pages.append(page)

    def _applied(self) -> bool:
        """Apply the open batch, unless it leaves open what cannot be read again yet."""
        target = {} if self.batch.truncated else dict(self.index)
        snapshot = self.source.snapshot()
        rows = self.source.rows()
        for change in [*self.batch.live.values(), *self.batch.filled.values()]:
            if isinstance(change, Delete):
                target.pop(change.key, None)
            elif complete(change.row):
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
                self._forget(page.snapshot)
        return True

    def _forget(self, snapshot: Snapshot) -> None:
        pending = [one.snapshot for one in self.pending]
        self.deliveries.forget_seen(min(pending, key=lambda one: one.xmax, default=snapshot))

    def _connect(self) -> None:
        self._open_batch()
        self.at, self.within = self.checkpoint, 0

    def _open_batch(self) -> None:
        self.batch = IndexChanges(SHAPE)
        self.batch_pages: list[Page] = []

    def _restart(self) -> None:
        self._connect()
        self._stop()
        self.deliveries = Deliveries(self.most, self.most)
        self.source.roll_back(self.source.begin())  # an id of our own: all others are then below the snapshot's end
        self.deliveries.suspect(self.source.snapshot().running)

    def _stop(self) -> None:
        self.pending.clear()
        self.unmarked.clear()
        self.reading = None
        self.deliveries.stop()

    def _read(self, step: Step) -> None:
        """Read a page of the table, or ask which keys of the index the table lacks."""
        if self.reading is None or any(one.truncates for one in self.source.unfinished):
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
        self.source.wal += self.unmarked
        self.source.finish_all()
        self._deliver(1000)
        assert self._applied()


AT_THE_SOURCE = dict.fromkeys(["write", "commit"], 2) | dict.fromkeys(["roll back", "take an id"], 1)
AT_THE_SOURCE |= {"write and commit": 6, "show": 4, "finish all": 3}
PIPELINE = {"deliver": 2, "deliver all": 4, "apply": 3, "reconnect": 1, "restart": 1}
BACKFILL = {"record": 3, "stop": 2, "prune": 2, "page": 4, "begin a page": 2, "read it": 3, "mark it": 3}
EVERYTHING = AT_THE_SOURCE | PIPELINE | BACKFILL
WRITES = {"put": 4, "delete": 1, "move": 2, "truncate": 1}


def steps(random: Random, kinds: dict[str, int], count: int) -> list[Step]:
    def one_of(weights: dict[str, int]) -> str:
        return random.choices(list(weights), list(weights.values()))[0]

    def step(key: Key, to: Key) -> Step:
        return Step(one_of(kinds), random.randrange(4), one_of(WRITES), key, to, random.random() < 0.5)

    return [step(*random.choices(KEYS, k=2)) for _ in range(count)]


def ends_right(next_xid: int, index: Rows, most: int, before: Sequence[Step], after: Sequence[Step]) -> bool:
    """Play the steps; say whether the index is right in the end, and untouched where nothing concerned it."""
    pipeline = Pipeline(next_xid, index, most)
    for step in before:
        pipeline.does(step)
    pipeline.create_the_slot()
    pipeline.deliveries.record()
    for step in after:
        pipeline.does(step)
    pipeline.end()
    table = pipeline.source.rows()
    right = {key: (table if key in pipeline.settled else pipeline.stale).get(key) for key in KEYS}
    return {key: pipeline.index.get(key) for key in KEYS} == right


# The steps are drawn evenly, not by hypothesis: its draws dwell on simple values, and the faults looked for here take
# several steps that are not. So a failure is made small here too.
@settings(max_examples=2000)
@given(st.randoms(use_true_random=True))
def test_a_backfill_beside_the_stream_ends_with_what_the_table_holds(random: Random) -> None:
    next_xid = random.choice([3, 5, XID_SPAN - 6, XID_SPAN - 2, XID_SPAN + 1])  # ids wrap sooner or later, or do not
    index: Rows = {key: ("stale", "stale") for key in KEYS if random.random() < 0.4}
    most = random.choice([0, 1, 2, 1_000])  # keys and suspects that are remembered
    before, after = steps(random, AT_THE_SOURCE, 8), steps(random, EVERYTHING, 60)
    if not ends_right(next_xid, index, most, before, after):
        for part in (after, before):
            for at in reversed(range(len(part))):
                step = part.pop(at)
                if ends_right(next_xid, index, most, before, after):
                    part.insert(at, step)

    story = "\n".join(map(str, [next_xid, index, most, *before, "-- the slot is created", *after]))
    assert ends_right(next_xid, index, most, before, after), story
