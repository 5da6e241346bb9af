"""The open batch: what lies between the receiver, which fills it, and the applier, which takes it whole.

The rules:

1. The applier gets a batch when it is free and the stream is dry, or when the batch is full: so light load has no added
   wait, and heavy load makes its own large batches. While it commits a batch, it gets the next one to prepare once
   that is full: before, it could still grow. The first batches of a burst are smaller, so that the target has work
   while the next ones arrive; they end with a transaction. And it gets what has waited for a second: a stream of what
   no index reads may not be dry for hours.
2. What needs no apply (transactions of other tables, keepalives) moves the checkpoint only while nothing is in
   flight. It is then written at once after real work, so that readers who wait for an LSN continue, and less and less
   often from there, down to every `IDLE_CHECKPOINT_S`: each such write is itself WAL if source and target are one
   server. In between it is offered, to be written if a reader waits.
3. Once a pause is stored, the transaction under way is taken to its end, and nothing after it.
4. An open batch belongs to one connection and goes with it: everything after the checkpoint is delivered again.
"""

from __future__ import annotations

import math

import anyio
import msgspec

from cdcsync.errors import IndexFault
from cdcsync.lsn import Lsn
from cdcsync.model.batch import Batch, PageRows
from cdcsync.model.lag import Lag
from cdcsync.model.links import Touch
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Change
from cdcsync.model.transactions import Began, Committed, Part
from cdcsync.pgoutput.wire import to_datetime
from cdcsync.tracing import Tracing

IDLE_CHECKPOINT_S = 10.0
"""How often an idle pipeline writes its position: one small row, against WAL kept for nothing."""

PROMPT_CHECKPOINT_S = 0.25
"""How soon after real work the position is written again; the pause doubles from there."""

OFFER_S = 0.25
"""How often a position is offered that is not due yet: so long a reader may wait for it."""


HELD_S = 1.0
"""How long a change waits for others at most, while the applier is free."""

BURST_ROWS = 500
"""The first batch of a burst is full with so many rows, and each after it with twice as many as the one before."""


class Limits(msgspec.Struct):
    """How large a batch may grow: it is full at so many rows, or so many bytes."""

    rows: int
    bytes: int


class Position(msgspec.Struct, frozen=True):
    """A position up to which there is nothing to apply.

    :ivar due: whether it is to be written even if no reader waits for it.
    """

    lsn: Lsn
    due: bool


class Look(msgspec.Struct, frozen=True):
    """Nothing to commit: the session is to be opened again if it has ended."""


class IdlePace:
    """How often the position is written while there is nothing to apply."""

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._written_at = 0.0
        self._offered_at = 0.0

    def hasten(self) -> None:
        """Write the position at the next opportunity."""
        self._pause_s = 0.0

    def written(self) -> None:
        """Note that the position is being written; the next time is later."""
        self._written_at = self._offered_at = anyio.current_time()
        self._pause_s = min(IDLE_CHECKPOINT_S, max(PROMPT_CHECKPOINT_S, 2 * self._pause_s))

    def due(self, *, dry: bool) -> bool:
        """Whether to write it now."""
        rested_s = anyio.current_time() - self._written_at
        return rested_s >= IDLE_CHECKPOINT_S or (dry and rested_s >= self._pause_s)

    def offers(self) -> bool:
        """Say whether to offer it now, and note that it is."""
        now = anyio.current_time()
        if now - self._offered_at < OFFER_S:
            return False
        self._offered_at = now
        return True


class OpenBatch:
    """Changes on their way from one connection to the target."""

    def __init__(self, progress: Progress, limits: Limits, lag: Lag, tracing: Tracing, stopping: anyio.Event) -> None:
        self._progress = progress
        self._limits = limits
        self._lag = lag
        self._tracing = tracing
        self._stopping = stopping
        self._filling = Batch()
        self._taken: list[Batch] = []
        self._enough = BURST_ROWS
        """Rows with which a batch is full at the end of a transaction."""
        self._held_since = math.inf
        """When the first change of the batch was added."""
        self._transaction: Began | None = None
        self._mixed = False
        """Whether changes of the transaction are in the batch."""
        self._passed = progress.checkpoint
        self._dry = False
        self._heard_all = False
        self._pausing = False
        self._look = False
        self._pace = IdlePace()
        self._for_applier = anyio.Event()
        self._for_receiver = anyio.Event()
        self._note_lag()

    # -- filling ------------------------------------------------------------------------------------------------

    def begin(self, transaction: Began) -> None:
        """Note that a transaction begins."""
        self._transaction, self._mixed = transaction, False
        self._tracing.begin(transaction.commit_lsn)

    def add(self, change: Change | Touch) -> None:
        """Add a change of the transaction."""
        batch = self._filling
        self._hold()
        batch.add(change)
        if batch.oldest_us is None and self._transaction is not None:
            batch.oldest_us = self._transaction.commit_time_us
            self._note_lag()

    def add_part(self, part: Part) -> None:
        """Add a partition whose rows follow."""
        self._filling.parts.add(part)

    def add_page(self, page: PageRows) -> None:
        """Add the rows that belong at a mark."""
        self._hold()
        self._filling.add_page(page)

    def _hold(self) -> None:
        """Note that something of the transaction is in the batch, and since when the batch has something."""
        self._mixed = True
        if self._held_since == math.inf:
            self._held_since = anyio.current_time()

    def commit(self, transaction: Committed) -> None:
        """Note that the transaction is whole."""
        self._transaction = None
        if self._filling or self._filling.pages or self._pausing:
            self._filling.commit(transaction)
            self._tracing.end(self._filling.origins)
        else:
            self._note_passed(transaction.end_lsn)

    def pass_by(self, lsn: Lsn, *, promptly: bool) -> None:
        """Note that there is nothing to apply up to a position outside any transaction.

        :param promptly: whether the source waits to hear that the position is flushed here.
        """
        if not self._filling:
            self._note_passed(lsn)
        if promptly:
            self._pace.hasten()

    def pause(self, error: IndexFault) -> None:
        """Pause an index with the next commit.

        A transaction under way is taken to its end first: begun again before it, the same would be found again.
        """
        self._filling.paused[error.index] = error
        self._filling.partial = self._filling.partial or self._transaction is not None
        self._for_applier.set()

    def note_dry(self, *, heard_all: bool) -> None:
        """Note that nothing more has arrived.

        :param heard_all: whether the source has sent what it had when it was connected: before that, silence says
            nothing.
        """
        self._dry = True
        self._heard_all = heard_all
        self._note_lag()
        if self._ready or self._passed > self._progress.checkpoint:
            self._for_applier.set()

    def look(self) -> None:
        """Have the applier see that its session is open, once it is free."""
        self._look = True
        self._for_applier.set()

    def note_more(self) -> None:
        """Note that something has arrived."""
        self._dry = False

    @property
    def full(self) -> bool:
        """Whether there is no room for more."""
        rows = self._filling.rows
        enough = rows >= self._enough and self._transaction is None
        return enough or rows >= self._limits.rows or self._filling.bytes >= self._limits.bytes

    @property
    def applying(self) -> bool:
        """Whether the applier is working on a batch."""
        return bool(self._taken)

    @property
    def held(self) -> Lsn:
        """Up to where the target holds everything: the checkpoint, and what was passed by with nothing to apply."""
        checkpoint = self._progress.checkpoint
        return checkpoint if self._taken else max(self._passed, checkpoint)

    async def wait_for_applier(self, timeout_s: float) -> None:
        """Return once the applier has taken or finished a batch, or after `timeout_s` seconds."""
        if self.full:
            self._for_applier.set()
        self._for_receiver = anyio.Event()
        if self.applying or self.full:
            with anyio.move_on_after(timeout_s):
                await self._for_receiver.wait()

    # -- applying -----------------------------------------------------------------------------------------------

    async def next(self) -> Batch | Position | Look:
        """Return what is to be done next, once there is something: commit a batch, or just a position, or look.

        The caller calls `done` with a batch that is in the target.
        """
        while True:
            if self._look:
                self._look = False
                return Look()
            if self._ready:
                return self._take()
            if self._moved and self._pace.due(dry=self._dry):
                self._pace.written()
                return Position(self._passed, due=True)
            if self._moved and self._pace.offers():
                return Position(self._passed, due=False)
            self._for_applier = anyio.Event()
            with anyio.move_on_after(OFFER_S):
                await self._for_applier.wait()

    async def following(self) -> Batch:
        """Return the batch after the current one, once it is full.

        The caller calls `done` with it after the current one.
        """
        while not self.full or self._stopping.is_set():
            self._for_applier = anyio.Event()
            await self._for_applier.wait()
        return self._take()

    def _take(self) -> Batch:
        self._enough = BURST_ROWS if self._dry else min(2 * self._enough, self._limits.rows)
        batch, self._filling = self._filling, Batch()
        self._held_since = math.inf
        self._taken.append(batch)
        if self._transaction is not None and self._mixed:
            batch.ahead = self._transaction.ahead
        self._for_receiver.set()
        return batch

    def done(self, batch: Batch) -> None:
        """Note that the batch which was taken is in the target."""
        self._taken.remove(batch)
        self._pausing = self._pausing or bool(batch.paused)
        self._pace.hasten()
        self._note_lag()
        self._for_receiver.set()

    @property
    def nothing_left(self) -> bool:
        """Whether the source has sent everything, and only the current batch is left to apply."""
        return self._dry and self._heard_all and not self._filling and len(self._taken) <= 1

    @property
    def _ready(self) -> bool:
        if self._stopping.is_set():
            return False
        if self.full:
            return True
        # The end of a transaction in the middle of which an index was paused is stored even if nothing came after it.
        ends = self._pausing and self._filling.end_lsn is not None
        whole = self._transaction is None or not self._mixed
        held = whole and self._held_since + HELD_S <= anyio.current_time()
        return (self._dry or held) and not self._filling.partial and (bool(self._filling) or ends)

    @property
    def _moved(self) -> bool:
        """Whether there is nothing to apply up to a position beyond the checkpoint."""
        return self._passed > self._progress.checkpoint and not self._filling and self._transaction is None

    def _note_passed(self, lsn: Lsn) -> None:
        self._passed = max(self._passed, lsn)
        self._progress.receive(lsn)

    def _note_lag(self) -> None:
        oldest_us = next((one.oldest_us for one in (*self._taken, self._filling) if one.oldest_us), None)
        oldest_s = None if oldest_us is None else to_datetime(oldest_us).timestamp()
        self._lag.note(oldest_s, caught_up=self._heard_all and oldest_s is None)
