"""A worker made of what decides in the product and does no I/O: assembler, batch, progress, deliveries, spool, chain,
and whether a slot can still send what follows the checkpoint.

The flows between them (reading pages, applying batches, moving the checkpoint, acknowledging, beginning) are written
once more here, in the order of the product's, one step at a time, so that a scheduler can let anything happen in
between. So a fault in the product's flows, or in its SQL, is not found here. The target is a dictionary whose
transactions are atomic, and whose answers may be lost. It compares its row before it sets it, as the product's UPDATE
does. If it is a server of its own, a standby of it may be promoted that lacks the last commits.

Left out: embedding, vectors, settling and builds, with the sessions that are admitted for them; several indexes, paused
ones, related tables and conditions; a source that is restored, or whose timeline branches off before the checkpoint;
crashes between the steps of a set-up. Of two workers, the first one has lost its stream once the second one begins, and
the lock of the pipeline goes to the second one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.errors import GapError, TargetRewound
from cdcsync.flows.setup.gaps import refuse_lost
from cdcsync.lsn import Lsn
from cdcsync.model.batch import Batch, PageEnd, PageRows
from cdcsync.model.chain import Chain, Lease, continued
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Delete, Key, Shape, Truncation, Upsert, complete
from cdcsync.model.transactions import Assembler, Began, Committed, Mark
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput.messages import (
    Begin,
    Commit,
    PgoutputMessage,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
)
from cdcsync.source.catalog import Slot as SlotRow
from cdcsync.source.slot import ServerIdentity
from cdcsync.source.spool import Spool
from cdcsync.target.pipelines import PipelineState
from tests.simulation.source import Row, Slot, Source

SHAPE = Shape("t", QualifiedName("public", "t"), ("id",), ("small",), ("large",))


SLOT = "s"
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
REMEMBERED = 12
"""So many commits a target can lose."""


class Wrong(AssertionError):
    """A property did not hold."""


class Unanswered(Exception):
    """A commit may have happened, or not."""


class State(msgspec.Struct, frozen=True):
    """What is committed in the target.

    :ivar phase: of the request to read the table: rows, orphans or done.
    :ivar request: which one that is.
    :ivar orphans: whether rows that the source lacks are looked for after the rows that it has.
    """

    rows: Mapping[Key, Row] = {}
    checkpoint: Lsn | None = None
    fence: int = 0
    commits: int = 0
    phase: str = "done"
    cursor: Key | None = None
    request: int = 0
    orphans: bool = False

    @property
    def lease(self) -> Lease:
        """What each commit of a worker compares."""
        return Lease(self.fence, self.checkpoint, self.commits)


class Refused(Exception):
    """The row is not as a commit expects it."""


class Target:
    """The server that has the index."""

    def __init__(self, server: Source | None = None) -> None:
        """:param server: the source, if the target is on its server, so that both are in one WAL."""
        self.server = server
        self.now = State()
        self._past: list[tuple[int, State]] = []
        """What was committed before, by where its commit ended in the source's WAL."""
        self._clock = 0
        """Fences and requests are numbered by it; it never goes back."""
        self.lost = 0
        """The checkpoint that was there before the target went back; 0 once another worker has begun since."""
        self.went_back = False
        """Whether it has since the last worker began."""

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def update(self, lease: Lease, changes: Mapping[str, Any]) -> State:
        """Return what a worker's commit would make of the state.

        :raises Refused: it is not as the worker last saw it.
        """
        if self.now.lease != lease:
            raise Refused
        return msgspec.structs.replace(self.now, **changes, commits=self.now.commits + 1)

    def commit(self, state: State) -> Lsn | None:
        """Commit a state; returns where the WAL ended as it was written, None if that is not the source's."""
        self.now = state
        if self.server is None:
            self._past = [*self._past[-REMEMBERED:], (0, state)]
            return None
        self.server.lsn += 1
        written = Lsn(self.server.lsn)
        if self.server.open and self.server.chance.random() < 0.3:
            self.server.commit(self.server.open[0])
        self.server.lsn += 2
        self._past.append((self.server.lsn, state))
        return written

    def take_over(self) -> Lease:
        """Raise the fence, as a worker does that begins."""
        self.lost, self.went_back = 0, False
        self.commit(msgspec.structs.replace(self.now, fence=self._tick()))
        return self.now.lease

    def ask(self, *, orphans: bool) -> None:
        """Ask for the whole table to be read, unless that is under way."""
        if self.now.phase == "done":
            self.commit(msgspec.structs.replace(self.now, **self.read_all(orphans=orphans)))

    def read_all(self, *, orphans: bool) -> dict[str, Any]:
        """Return the changes that ask for the whole table to be read."""
        return {"phase": "rows", "cursor": None, "orphans": orphans, "request": self._tick()}

    def promote(self, end: int) -> None:
        """Be what a standby has that has the WAL up to here."""
        self._past = [one for one in self._past if one[0] <= end]
        self.now = self._past[-1][1]

    def go_back(self, commits: int) -> None:
        """Be a standby that was promoted without the last commits, as many as these or as are remembered."""
        kept = self._past[: max(1, len(self._past) - commits)]
        self.lost = max(self.lost, int(self.now.checkpoint or 0))
        self.went_back = self.went_back or kept[-1][1] != self.now
        self._past, self.now = kept, kept[-1][1]


class Page(msgspec.Struct):
    """A page whose mark is under way."""

    snapshot: Snapshot
    entries: list[tuple[Key, Row | None]]
    end: PageEnd


class Worker:
    """One process; what it knows goes with it."""

    def __init__(self, source: Source, target: Target, chance: random.Random) -> None:
        self.source, self.target, self.chance = source, target, chance
        self.chain = Chain(SLOT, target.take_over())
        self._broken = False
        """Whether the session with the target has ended."""
        self.batch_rows = chance.choice((1, 2, 3, 50))
        self.deliveries = Deliveries(chance.choice((2, 100)), chance.choice((1, 100)))
        self.spool = Spool("", 1 << 30)
        self._payloads: list[PgoutputMessage] = []
        self._known = False
        self._sequence = 0
        self.slot: Slot | None = None
        self.connect()

    # -- the connection -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Begin to stream at the checkpoint; whatever was under way is thrown away.

        After a gap, that is a new slot, and everything is read again.
        """
        self._reopen()
        if self._gap():
            self._commit(checkpoint=None, **self.target.read_all(orphans=True))
            self._known = False
        if self.target.now.checkpoint is None:
            # A slot's creation waits for what writes now, so there is nothing under way.
            for one in list(self.source.open):
                self.source.commit(one)
            self.source.flushed = self.source.begin_lsn = self.source.lsn
            self._commit(checkpoint=Lsn(self.source.lsn))
        self.pages: dict[str, Page] = {}
        self._unmarked: str | None = None
        if not self._known:
            self._known = True
            self.deliveries.begin_anew()
            self.deliveries.suspect({one.xid for one in self.source.open} | self.source.invisible)
        checkpoint = self.target.now.checkpoint
        assert checkpoint is not None
        self.slot = Slot(self.source, checkpoint, streaming=self.chance.random() < 0.8)
        self.progress = Progress(checkpoint, committed_before=Lsn(self.source.lsn) if self.target.server else None)
        self.assembler = Assembler({("public", "t"): [SHAPE]}, checkpoint)
        self.batch = Batch()
        self.applying: Batch | None = None
        self.spool.begin()
        if self.spool.transactions or self.spool.bytes:
            raise Wrong("what was spooled for another connection is kept")
        self._payloads.clear()
        self._coming: Iterator[tuple[int, PgoutputMessage]] = iter(())
        self._replaying: Iterator[PgoutputMessage] = iter(())

    def _gap(self) -> bool:
        """Say whether the slot cannot send all that follows the checkpoint any more."""
        now, source = self.target.now, self.source
        if now.checkpoint is None:
            return False
        state = PipelineState(now.checkpoint, None, now.commits, None, None, now.fence, None, None, None, LONG_AGO)
        slot = SlotRow(SLOT, "pgoutput", None, None, Lsn(source.flushed), None, "reserved", None, None)
        try:
            refuse_lost(state, ServerIdentity("1", 1, Lsn(source.lsn), "d"), slot, SLOT)
        except GapError as error:
            if self.target.server is not None or now.checkpoint >= source.flushed:
                raise Wrong(f"there is a gap where nothing was lost: {error}") from error
            return True
        return False

    # -- the target ---------------------------------------------------------------------------------------------

    def lose_session(self) -> None:
        """Have the session with the target end: it is opened again at its next use."""
        self._broken = True

    def _reopen(self) -> None:
        """Open the session again, and see that the row is as it was left.

        :raises LeaseLost, TargetRewound: it is not.
        """
        self._broken = False
        self.chain.continue_with(self.target.now.lease)

    def _commit(self, fate: float = 1.0, **changes: Any) -> Lsn | None:
        """Commit changes of the target.

        :param fate: below a twentieth the target says that it has undone them. Below a fifth its answer is lost: below
            a tenth nothing is committed then, else all of it.
        :raises Unanswered: it may be committed, or not.
        :raises LeaseLost, TargetRewound: nothing is, because the row is not as this worker left it.
        """
        if self._broken:
            self._reopen()
        try:
            state = self.target.update(self.chain.held, changes)
        except Refused:
            self.chain.failed(answered=True)
            continued(SLOT, self.chain.held, self.target.now.lease)
            raise TargetRewound("the row changed while it was read") from None
        self.chain.proposed = state.lease
        if fate < 0.05:
            self.chain.failed(answered=True)
            raise Unanswered
        written = self.target.commit(state) if fate >= 0.1 else None
        if fate < 0.2:
            self.chain.failed(answered=False)
            self._broken = True
            raise Unanswered
        self.chain.committed()
        return written

    def thaw(self) -> None:
        """Go on after another worker has taken over: write the mark and the batch that were under way.

        :raises LeaseLost: as it must.
        """
        if self._unmarked is not None:
            self.source.emit(self._unmarked)
        self.apply()
        self._commit()

    # -- the stream ---------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take the next message, unless the batch is full; returns whether there was one."""
        if self.full:
            return False
        message = next(self._replaying, None)
        if message is not None:
            self._take_in(message)
            return True
        self.progress.sent(Lsn(self.source.sent))
        sent = next(self._coming, None)
        if sent is None:
            assert self.slot is not None
            coming = self.slot.next()
            if coming is None:
                return False
            self._coming = coming
            return self.receive()
        self.take(*sent)
        return True

    def take(self, xid: int, message: PgoutputMessage) -> None:
        """Keep a message of an open transaction for later, or take it in."""
        if self.spool.receiving and not isinstance(message, StreamStop):
            self._payloads.append(message)
            self.spool.append(xid, (len(self._payloads) - 1).to_bytes(4, "big"))
            return
        match message:
            case StreamStart():
                self.spool.enter(message.xid)
            case StreamStop():
                self.spool.leave()
            case StreamAbort():
                self.spool.abort(message.xid, message.subxid)
            case StreamCommit():
                self._replaying = self._replay(message)
            case _:
                self._take_in(message)

    @property
    def between_blocks(self) -> bool:
        """Whether the stream stands between two transactions or blocks, where something else may be sent."""
        return not self.spool.receiving and not self.assembler.in_transaction

    def open_block(self, block: Iterator[tuple[int, PgoutputMessage]]) -> None:
        """Receive a block of an open transaction whole."""
        for xid, message in block:
            self.take(xid, message)

    def _replay(self, commit: StreamCommit) -> Iterator[PgoutputMessage]:
        yield Begin(final_lsn=commit.commit_lsn, commit_time_us=commit.commit_time_us, xid=commit.xid)
        for payload in self.spool.replay(commit.xid):
            yield self._payloads[int.from_bytes(payload, "big")]
        yield Commit(
            flags=0, commit_lsn=commit.commit_lsn, end_lsn=commit.end_lsn, commit_time_us=commit.commit_time_us
        )
        self.spool.drop(commit.xid)

    def _take_in(self, message: PgoutputMessage) -> None:
        for event in self.assembler.feed(message):
            match event:
                case Began():
                    pass
                case Committed():
                    if self.batch or self.batch.pages:
                        self.batch.commit(event)
                    else:
                        self.progress.receive(event.end_lsn)
                        self._passed(event.end_lsn)
                case Mark():
                    self._take_page(event)
                case Truncation():
                    self.deliveries.truncated(event.xid)
                    self.batch.add(event)
                case Upsert() | Delete():
                    self.deliveries.touched(event.key, event.xid)
                    if isinstance(event, Upsert) and event.moved_from is not None:
                        self.deliveries.touched(event.moved_from, event.xid)
                    self.batch.add(event)
                case _:
                    raise Wrong(f"{event} was not expected")

    def _passed(self, lsn: Lsn) -> None:
        """Move the checkpoint over what needs no apply, if nothing is in flight."""
        if self.applying is None and not self.batch:
            self.progress.commit(lsn, wal_end=self._commit(checkpoint=max(self.target.now.checkpoint or lsn, lsn)))

    @property
    def full(self) -> bool:
        """Whether the batch takes no more."""
        return self.batch.rows >= self.batch_rows

    # -- apply --------------------------------------------------------------------------------------------------

    def apply(self) -> bool:
        """Bring a batch to the target, or try again; returns whether it could."""
        if self.applying is None:
            if not self.batch or (self.batch.partial and not self.full):
                return False
            self.applying, self.batch = self.batch, Batch()
        batch = self.applying
        now = self.target.now
        rows = dict(now.rows)
        for changes in batch.indexes.values():
            if changes.truncated:
                rows.clear()
            written = [*changes.live.values(), *changes.filled.values()]
            read: dict[str, Row] = {}
            partial = [one for one in written if isinstance(one, Upsert) and not complete(one.row)]
            if partial:
                snapshot = self.source.snapshot()
                if not all(snapshot.sees(one.xid) for one in partial):
                    return False
                read = self.source.read(snapshot)
            for one in written:
                if isinstance(one, Delete):
                    rows.pop(one.key, None)
            for one in written:
                if isinstance(one, Upsert):
                    if complete(one.row):
                        rows[one.key] = (str(one.row[1]), str(one.row[2]))
                    elif (found := read.get(one.key[0])) is not None:
                        rows[one.key] = found
        moved: dict[str, Any] = {"rows": rows}
        for end in batch.pages:
            if end.backfill_id == now.request:
                moved |= {"cursor": end.cursor, "phase": "done" if end.done else end.phase}
        if batch.end_lsn is not None:
            moved["checkpoint"] = max(now.checkpoint or batch.end_lsn, batch.end_lsn)
        try:
            wal_end = self._commit(self.chance.random(), **moved)
        except Unanswered:
            return True  # the same batch is applied again
        self.applying = None
        self.progress.commit(batch.end_lsn, wal_end=wal_end)
        for mark in batch.marks:
            page = self.pages.pop(mark, None)
            if page is not None:
                self._forget(page.snapshot)
        if self.target.now.phase == "done" and self.deliveries.recording:
            self.deliveries.stop()
        return True

    def acknowledge(self) -> None:
        """Tell the source what is safe."""
        told = self.progress.acknowledge()
        progress = self.progress
        committed = max(self.target.now.checkpoint or 0, self.target.lost)
        if told > min(committed, progress.kept):
            raise Wrong(
                f"{told} was acknowledged, beyond the checkpoint {Lsn(committed)}, of which {progress.kept} is kept"
            )
        if not progress.kept <= progress.checkpoint <= progress.received:
            raise Wrong("kept ≤ checkpoint ≤ received does not hold")
        if not told:
            return
        self.source.flushed = max(self.source.flushed, int(told))
        if told != self.source.begin_lsn and all(done.end != told for done in self.source.log):
            raise Wrong(f"the checkpoint {told} is not the end of a transaction: readers would wait for that in vain")

    # -- backfill -----------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask for the table to be read, sometimes rid of what the source lacks too, unless that is under way."""
        self.target.ask(orphans=self.chance.random() < 0.3)

    def page(self) -> bool:
        """Read the next page, or write the mark of one that was read; returns whether there was something to do."""
        if self._unmarked is not None:
            mark, self._unmarked = self._unmarked, None
            self.source.emit(mark)
            return True
        now = self.target.now
        if now.phase == "done" or self.pages:
            return False
        self.deliveries.record()
        phase, cursor = now.phase, now.cursor
        entries: list[tuple[Key, Row | None]]
        if phase == "rows":
            snapshot = self.source.snapshot()
            if self.deliveries.unseen(snapshot):
                return False
            rows = self.source.read(snapshot)
            keys = sorted(key for key in rows if cursor is None or key > cursor[0])[:2]
            entries = [((key,), rows[key]) for key in keys]
        else:
            found = sorted(key for key in now.rows if cursor is None or key > cursor)[:2]
            snapshot = self.source.snapshot()
            if self.deliveries.unseen(snapshot):
                return False
            rows = self.source.read(snapshot)
            entries = [(key, None) for key in found if key[0] not in rows]
            keys = [key[0] for key in found]
        last = len(keys) < 2
        after = (keys[-1],) if keys else cursor
        if last and phase == "rows" and now.orphans:
            end = PageEnd(now.request, "orphans", None, 0, False, "t")
        else:
            end = PageEnd(now.request, phase, after, 0, last, "t")
        self._sequence += 1
        self._unmarked = f"{self.chain.held.fence}:{self._sequence}"
        self.pages[self._unmarked] = Page(snapshot, entries, end)
        return True

    def _take_page(self, mark: Mark) -> None:
        page = self.pages.get(mark.content)
        if page is None:
            return
        if self.deliveries.unseen(page.snapshot):
            del self.pages[mark.content]
            return
        rows: list[Upsert | Delete] = []
        for key, row in page.entries:
            if self.deliveries.hides(key, page.snapshot):
                continue
            if row is None:
                rows.append(Delete(SHAPE, key, 0, mark.lsn, as_written=True))
            else:
                rows.append(Upsert(SHAPE, key, (key[0], *row), 0, mark.lsn))
        self.batch.add_page(PageRows(SHAPE, rows, page.end, mark.content))

    def _forget(self, snapshot: Snapshot) -> None:
        waiting = [page.snapshot for page in self.pages.values()]
        self.deliveries.forget_seen(min(waiting, key=lambda one: one.xmax, default=snapshot))

    def prune(self) -> None:
        """Forget what no later page can miss, while nothing is asked for."""
        if self.target.now.phase == "done" and not self.pages:
            if self.deliveries.size == 0:
                self.deliveries.forget_snapshot()
            else:
                self._forget(self.source.snapshot())

    def close(self) -> None:
        """Leave no file behind."""
        self.spool.clear()
