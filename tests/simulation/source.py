"""A source that exists in memory: tables with transactions and snapshots, a log of commits, and a slot that reads it.

It may do whatever a real server may: deliver a commit that no snapshot sees yet, deliver transactions again, stream
large ones while they are open and abort parts of them, leave large values out of updates that did not change them, give
out transaction ids beyond the point where they wrap, and have a standby promoted that has no more than it has sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec

from cdcsync.lsn import Lsn
from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.model.visibility import XID_SPAN, Snapshot
from cdcsync.pgoutput.messages import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    Message,
    PgoutputMessage,
    Relation,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Update,
    Value,
)

OID = 16_400
KEYS = 6

Row = tuple[str, str]
"""What a key holds: a small value, and one that is sent only when it changes."""

RELATION = Relation(
    xid=None,
    oid=OID,
    namespace="public",
    name="t",
    replica_identity="d",
    columns=(
        Column(key=True, name="id", type_oid=25, typmod=-1),
        Column(key=False, name="small", type_oid=25, typmod=-1),
        Column(key=False, name="large", type_oid=25, typmod=-1),
    ),
)


class Write(msgspec.Struct, frozen=True):
    """A change inside a transaction: key and row before and after; all keys are None for a TRUNCATE."""

    sub: int
    before: str | None = None
    old: Row | None = None
    after: str | None = None
    new: Row | None = None


class Open(msgspec.Struct):
    """A transaction that has begun."""

    xid: int
    """The whole 64-bit id."""
    writes: list[Write]
    stack: list[int] = []
    """The savepoints that are open; the writes of one carry its number."""
    streamed: int = 0
    """So many of its writes have been streamed on the present connection."""
    message: str | None = None


class Done(msgspec.Struct, frozen=True):
    """A commit record."""

    xid: int
    lsn: int
    end: int
    writes: tuple[Write, ...]
    message: str | None


class Source:
    """The server."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.lsn = 1_000
        self.xid = XID_SPAN - chance.randint(1, 40) if chance.random() < 0.3 else 700
        self.rows: dict[str, Row] = {}
        """What the newest snapshot would see if every commit were visible: the truth at the end."""
        self.open: list[Open] = []
        self.log: list[Done] = []
        self.invisible: set[int] = set()
        """Committed, in the log, and not yet out of the list of running transactions."""
        self.flushed = 1_000
        """How far the slot was told that everything is safe."""
        self.begin_lsn = 0
        """Where the slot began."""
        self.sent = 0
        """How far the slot has sent the WAL."""
        self._number = 0
        self._subs = 0

    # -- sessions -----------------------------------------------------------------------------------------------

    def _row(self) -> Row:
        self._number += 1
        return f"s{self._number}", f"l{self._number}"

    def _seen_by(self, one: Open) -> dict[str, Row]:
        rows = dict(self.rows)
        for write in one.writes:
            _do(rows, write)
        return rows

    def begin(self) -> Open:
        """Begin a transaction."""
        self.xid += 1
        one = Open(self.xid, [])
        self.open.append(one)
        return one

    def write(self, one: Open) -> None:
        """Make one change that no other open transaction is in the way of."""
        chance = self.chance
        others = {key for other in self.open if other is not one for w in other.writes for key in (w.before, w.after)}
        rows = self._seen_by(one)
        free = [f"k{at}" for at in range(KEYS) if f"k{at}" not in others]
        if chance.random() < 0.4:
            self._subs += 1
            one.stack.append(self._subs)
        sub = one.stack[-1] if one.stack else 0
        there = [key for key in free if key in rows]
        gone = [key for key in free if key not in rows]
        kind = chance.random()
        if kind < 0.05 and len(self.open) == 1:
            one.writes.append(Write(sub))
        elif kind < 0.35 and gone:
            one.writes.append(Write(sub, after=chance.choice(gone), new=self._row()))
        elif there:
            key = chance.choice(there)
            old = rows[key]
            if kind < 0.5:
                one.writes.append(Write(sub, before=key, old=old))
            elif kind < 0.65 and gone:
                one.writes.append(Write(sub, key, old, chance.choice(gone), (self._row()[0], old[1])))
            elif kind < 0.85:
                one.writes.append(Write(sub, key, old, key, (self._row()[0], old[1])))
            else:
                one.writes.append(Write(sub, key, old, key, self._row()))

    def roll_back_to(self, one: Open) -> list[int]:
        """Undo a transaction's last savepoints; returns their numbers."""
        if not one.stack:
            return []
        place = self.chance.randrange(len(one.stack))
        undone, one.stack = one.stack[place:], one.stack[:place]
        one.writes = [write for write in one.writes if write.sub not in undone]
        return undone

    def commit(self, one: Open) -> Done:
        """Commit; snapshots may see it only later."""
        self.open.remove(one)
        self.lsn += 10
        done = Done(one.xid, self.lsn, self.lsn + 5, tuple(one.writes), one.message)
        self.lsn += 5
        for write in one.writes:
            _do(self.rows, write)
        self.log.append(done)
        if self.chance.random() < 0.25:
            self.invisible.add(one.xid)
        return done

    def roll_back(self, one: Open) -> None:
        """Abort."""
        self.open.remove(one)

    def emit(self, content: str) -> None:
        """Write one of our marks in a transaction of its own."""
        one = self.begin()
        one.message = content
        self.commit(one)

    def settle(self) -> None:
        """Let every commit be visible."""
        self.invisible.clear()

    def promote(self) -> int:
        """Be a standby that is promoted; returns up to where it has the WAL: all that its slot has sent, or more."""
        if self.chance.random() < 0.5:
            self.lsn = self.sent
        else:
            self.lsn = self.chance.randint(self.sent, self.lsn)
        self.open.clear()
        self.log = [done for done in self.log if done.end <= self.lsn]
        self.invisible.clear()
        self.rows = {}
        for done in self.log:
            for write in done.writes:
                _do(self.rows, write)
        return self.lsn

    # -- readers ------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return what `pg_current_snapshot()` would."""
        running = frozenset({one.xid for one in self.open} | self.invisible)
        return Snapshot(min(running, default=self.xid + 1), self.xid + 1, running)

    def read(self, snapshot: Snapshot) -> dict[str, Row]:
        """Return the rows that a snapshot sees."""
        rows: dict[str, Row] = {}
        for done in self.log:
            # Said anew here, so that a fault of the snapshot's own is noticed.
            if done.xid < snapshot.xmax and done.xid not in snapshot.running:
                for write in done.writes:
                    _do(rows, write)
        return rows


def _do(rows: dict[str, Row], write: Write) -> None:
    if write.before is None and write.after is None:
        rows.clear()
        return
    if write.before is not None:
        rows.pop(write.before, None)
    if write.after is not None:
        assert write.new is not None
        rows[write.after] = write.new


class Slot:
    """One connection to the slot: sends what was committed from a position on, and streams what is open."""

    def __init__(self, source: Source, start: Lsn, *, streaming: bool) -> None:
        self._source = source
        self._streaming = streaming
        # A server may begin with what the client has had before: what it was told is not always on its disk. Of what
        # precedes the slot's own position it sends nothing, whatever the client asks for.
        begin = max(int(start), source.flushed) if source.chance.random() < 0.7 else source.flushed
        self._place = next((at for at, done in enumerate(source.log) if done.end > begin), len(source.log))
        self._described: set[int] = set()
        """The streamed transactions that the table was described in; 0 for what is sent at its commit."""
        self._parts: dict[int, int] = {}
        """Of transactions of which a part was streamed, by id, how many of their writes."""
        self._subs: set[int] = set()
        """The savepoints of which something was streamed."""

    def aborted(self, one: Open, undone: list[int] | None) -> list[PgoutputMessage]:
        """Return what is sent when savepoints of a streamed transaction, or all of it, are rolled back."""
        if one.xid not in self._parts:
            return []
        xid = _short(one.xid)
        if undone is None:
            del self._parts[one.xid]
            return [StreamAbort(xid=xid, subxid=xid, abort_lsn=None, abort_time_us=None)]
        self._parts[one.xid] = min(self._parts[one.xid], len(one.writes))
        sent = [sub for sub in undone if sub in self._subs]
        if sent:
            # The description may have been in what is undone: the server sends it again.
            self._described.discard(one.xid)
        return [StreamAbort(xid=xid, subxid=_sub(one.xid, sub), abort_lsn=None, abort_time_us=None) for sub in sent]

    def stream(self, one: Open) -> Iterator[tuple[int, PgoutputMessage]]:
        """Send what an open transaction has written since; each message with the (sub)transaction it is of."""
        if not self._streaming or len(one.writes) == self._parts.get(one.xid, 0):
            return
        yield from self._block(one.xid, one.writes[self._parts.get(one.xid, 0) :], first=one.xid not in self._parts)
        self._parts[one.xid] = len(one.writes)

    def _block(self, xid: int, writes: Sequence[Write], *, first: bool) -> Iterator[tuple[int, PgoutputMessage]]:
        yield _short(xid), StreamStart(xid=_short(xid), first_segment=first)
        for write in writes:
            self._subs.add(write.sub)
            for message in self._messages(write, xid):
                yield _sub(xid, write.sub), message
        yield _short(xid), StreamStop()

    def next(self) -> Iterator[tuple[int, PgoutputMessage]] | None:
        """Return the messages of the next committed transaction, None if there is none."""
        if self._place == len(self._source.log):
            self._source.sent = self._source.lsn
            return None
        done = self._source.log[self._place]
        self._place += 1
        self._source.sent = max(self._source.sent, done.end)
        return self._of(done)

    def _of(self, done: Done) -> Iterator[tuple[int, PgoutputMessage]]:
        xid = _short(done.xid)
        if done.xid in self._parts:
            if rest := done.writes[self._parts.pop(done.xid) :]:
                yield from self._block(done.xid, rest, first=False)
            yield (
                xid,
                StreamCommit(
                    xid=xid, flags=0, commit_lsn=Lsn(done.lsn), end_lsn=Lsn(done.end), commit_time_us=done.lsn
                ),
            )
            return
        yield xid, Begin(final_lsn=Lsn(done.lsn), commit_time_us=done.lsn, xid=xid)
        for write in done.writes:
            for message in self._messages(write, 0):
                yield xid, message
        if done.message is not None:
            content = done.message.encode()
            yield xid, Message(xid=None, transactional=True, lsn=Lsn(done.lsn), prefix=MARK_PREFIX, content=content)
        yield xid, Commit(flags=0, commit_lsn=Lsn(done.lsn), end_lsn=Lsn(done.end), commit_time_us=done.lsn)

    def _messages(self, write: Write, streamed: int) -> Iterator[PgoutputMessage]:
        if streamed not in self._described or self._source.chance.random() < 0.02:
            self._described.add(streamed)
            yield RELATION
        yield _message(write)


def _message(write: Write) -> PgoutputMessage:
    if write.before is None and write.after is None:
        return Truncate(xid=None, relation_oids=(OID,), cascade=False, restart_identity=False)
    if write.after is None:
        return Delete(xid=None, relation_oid=OID, old_kind="K", old=(write.before, None, None))
    assert write.new is not None
    new: tuple[Value, ...] = (write.after, *write.new)
    if write.before is None:
        return Insert(xid=None, relation_oid=OID, new=new)
    assert write.old is not None
    if write.old[1] == write.new[1]:
        new = (write.after, write.new[0], UNCHANGED)
    moved = write.before != write.after
    return Update(
        xid=None,
        relation_oid=OID,
        old_kind="K" if moved else None,
        old=(write.before, None, None) if moved else None,
        new=new,
    )


def _short(xid: int) -> int:
    return xid % XID_SPAN


def _sub(xid: int, sub: int) -> int:
    """Subtransactions have ids of their own, above their transaction's; here from a range that nobody else uses."""
    return _short(xid) if sub == 0 else (xid + (1 << 20) + sub) % XID_SPAN
