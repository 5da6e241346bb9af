"""A worker made of the product's pure floors (assembler, batch, progress, deliveries, spool) and nothing else.

The flows between them (reading pages, applying batches, moving the checkpoint, acknowledging) are written once more
here, in the order of the product's, one step at a time, so that a scheduler can let anything happen in between. So a
fault in the product's flows, or in its SQL, is not found here. The target is a dictionary whose transactions are
atomic, and whose answers may be lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.lsn import Lsn
from cdcsync.model.batch import Batch, PageEnd, PageRows
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
from cdcsync.source.spool import Spool
from tests.simulation.source import Row, Slot, Source

SHAPE = Shape("t", QualifiedName("public", "t"), ("id",), ("small",), ("large",))


class Wrong(AssertionError):
    """A property did not hold."""


class Target:
    """What is committed."""

    def __init__(self, server: Source | None = None) -> None:
        """:param server: the source, if the target is on its server, so that both are in one WAL."""
        self.server = server
        self._states: list[tuple[int, dict[str, Any]]] = []
        """What was committed, by where its commit ended in the source's WAL."""
        self.rows: dict[Key, Row] = {}
        self.checkpoint: Lsn | None = None
        self.phase = "done"
        """Of the request to read the table: rows, orphans or done."""
        self.cursor: Key | None = None
        self.orphans = False
        """Whether rows that the source lacks are looked for after the rows that it has."""

    def commit(self) -> Lsn | None:
        """Commit what was changed; returns where the WAL ended as it was written, None if that is not the source's."""
        if self.server is None:
            return None
        self.server.lsn += 1
        written = Lsn(self.server.lsn)
        if self.server.open and self.server.chance.random() < 0.3:
            self.server.commit(self.server.open[0])
        self.server.lsn += 2
        state = {name: value for name, value in vars(self).items() if name not in ("server", "_states")}
        self._states.append((self.server.lsn, state))
        return written

    def promote(self, end: int) -> None:
        """Be what a standby has that has the WAL up to here."""
        self._states = [one for one in self._states if one[0] <= end]
        vars(self).update(self._states[-1][1])


class Page(msgspec.Struct):
    """A page whose mark is under way."""

    snapshot: Snapshot
    entries: list[tuple[Key, Row | None]]
    end: PageEnd


class Worker:
    """One process; what it knows goes with it."""

    def __init__(self, source: Source, target: Target, chance: random.Random) -> None:
        self.source, self.target, self.chance = source, target, chance
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
        """Begin to stream at the checkpoint; whatever was under way is thrown away."""
        if self.target.checkpoint is None:
            # A slot's creation waits for what writes now, so there is nothing under way.
            for one in list(self.source.open):
                self.source.commit(one)
            self.target.checkpoint = Lsn(self.source.lsn)
            self.source.flushed = self.source.begin_lsn = self.source.lsn
            self.target.commit()
        self.pages: dict[str, Page] = {}
        self._unmarked: str | None = None
        if not self._known:
            self._known = True
            self.deliveries.begin_anew()
            self.deliveries.suspect({one.xid for one in self.source.open} | self.source.invisible)
        checkpoint = self.target.checkpoint
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
            self.target.checkpoint = max(self.target.checkpoint or lsn, lsn)
            self.progress.commit(lsn, wal_end=self.target.commit())

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
        rows = dict(self.target.rows)
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
        fate = self.chance.random()
        if fate < 0.1:
            return True  # nothing was committed; the same batch is applied again
        self.target.rows = rows
        for end in batch.pages:
            self.target.cursor = end.cursor
            self.target.phase = "done" if end.done else end.phase
        if batch.end_lsn is not None:
            self.target.checkpoint = max(self.target.checkpoint or batch.end_lsn, batch.end_lsn)
        wal_end = self.target.commit()
        if fate < 0.2:
            return True  # committed, and the answer was lost: the same batch is applied again
        self.applying = None
        self.progress.commit(batch.end_lsn, wal_end=wal_end)
        for mark in batch.marks:
            page = self.pages.pop(mark, None)
            if page is not None:
                self._forget(page.snapshot)
        if self.target.phase == "done" and self.deliveries.recording:
            self.deliveries.stop()
        return True

    def acknowledge(self) -> None:
        """Tell the source what is safe."""
        told = self.progress.acknowledge()
        progress = self.progress
        if told > min(self.target.checkpoint or 0, progress.kept):
            raise Wrong(
                f"{told} was acknowledged, beyond the checkpoint {self.target.checkpoint}, of which {progress.kept} is"
                " kept"
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
        if self.target.phase == "done":
            self.target.phase, self.target.cursor = "rows", None
            self.target.orphans = self.chance.random() < 0.3
            self.target.commit()

    def page(self) -> bool:
        """Read the next page, or write the mark of one that was read; returns whether there was something to do."""
        if self._unmarked is not None:
            mark, self._unmarked = self._unmarked, None
            self.source.emit(mark)
            return True
        if self.target.phase == "done" or self.pages:
            return False
        self.deliveries.record()
        phase, cursor = self.target.phase, self.target.cursor
        entries: list[tuple[Key, Row | None]]
        if phase == "rows":
            snapshot = self.source.snapshot()
            if self.deliveries.unseen(snapshot):
                return False
            rows = self.source.read(snapshot)
            keys = sorted(key for key in rows if cursor is None or key > cursor[0])[:2]
            entries = [((key,), rows[key]) for key in keys]
        else:
            found = sorted(key for key in self.target.rows if cursor is None or key > cursor)[:2]
            snapshot = self.source.snapshot()
            if self.deliveries.unseen(snapshot):
                return False
            rows = self.source.read(snapshot)
            entries = [(key, None) for key in found if key[0] not in rows]
            keys = [key[0] for key in found]
        last = len(keys) < 2
        after = (keys[-1],) if keys else cursor
        if last and phase == "rows" and self.target.orphans:
            end = PageEnd(1, "orphans", None, 0, False, "t")
        else:
            end = PageEnd(1, phase, after, 0, last, "t")
        self._sequence += 1
        self._unmarked = f"{id(self)}:{self._sequence}"
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
        if self.target.phase == "done" and not self.pages:
            if self.deliveries.size == 0:
                self.deliveries.forget_snapshot()
            else:
                self._forget(self.source.snapshot())

    def close(self) -> None:
        """Leave no file behind."""
        self.spool.clear()
