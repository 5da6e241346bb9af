"""The stream flow: from the slot to the target, exactly once.

    slot ─► receive ─► assemble ─► batch ─► apply (one target transaction) ─► acknowledge

Two tasks share one open batch. *Receive* owns the slot's connection: it fills the batch, reports progress on a
timer, and stops reading while the batch is full. *Apply* takes the batch when it is free and the stream is dry, or
when the batch is full: so light load has no added wait, and heavy load makes its own large batches.

The rules:

1. A status is sent on time whatever apply, the target or the embedder do. It reports as flushed only what is committed.
2. The checkpoint moves with the batch, to the end of its last complete transaction.
3. What needs no apply (transactions of other tables, keepalives) moves the checkpoint only while nothing is in
   flight. It is then written at once after real work, so that readers who wait for an LSN get on, and more and more
   rarely from there, down to every `IDLE_CHECKPOINT_S`: each such write is itself WAL where source and target are one
   server.
4. When the connection ends, the open batch is thrown away: everything after the checkpoint is delivered again.
5. Silence is not health. While nothing comes, each status asks for a reply; a source that has not sent a frame within
   `silence_s` is away, and within half of that, nobody knows how far behind the index is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import anyio
import anyio.lowlevel
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.crashpoints import crash_point
from cdcsync.errors import SchemaChanged, SourceUnavailable, TargetUnavailable, leading
from cdcsync.flows.embed import EmbedLoop
from cdcsync.flows.follow.prepare import Preparer
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import LIVE, Applied, ChangeSet
from cdcsync.model.pauses import Pause
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Shape, Truncation, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Assembler, Committed, Lost, Mark
from cdcsync.model.visibility import Deliveries
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive
from cdcsync.pgoutput.messages import (
    Begin,
    Commit,
    Message,
    PgoutputMessage,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
)
from cdcsync.pgoutput.wire import to_datetime
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.target.session import ApplySession
from cdcsync.tracing import PREFIX, Tracing

log = structlog.get_logger()

IDLE_CHECKPOINT_S = 10.0
"""How often an idle pipeline writes its position: one small row, against WAL kept for nothing."""

PROMPT_CHECKPOINT_S = 0.25
"""How soon after real work the position is written again; the pause doubles from there."""

PROMPT_STATUS_S = 1.0
"""A moved checkpoint is reported within this time, so that the source can recycle WAL."""

SILENCE_S = 60.0
"""How long a source may be silent, where its `wal_sender_timeout` does not say."""

TURN_MESSAGES = 500
"""Messages handled before other tasks get a turn: a few milliseconds."""


class Stream:
    """Follows the slot for the life of the worker, over any number of connections."""

    def __init__(
        self,
        *,
        specs: Sequence[IndexSpec],
        session: ApplySession,
        preparers: Mapping[str, Preparer],
        embed_loops: Mapping[str, EmbedLoop],
        deliveries: Mapping[str, Deliveries],
        take_page: Callable[[Mark, Batch], None],
        page_applied: Callable[[Batch], None],
        spool: Spool,
        metrics: Metrics,
        batch_rows: int,
        batch_bytes: int,
        status_every_s: float,
    ) -> None:
        self._specs = specs
        self._session = session
        self._preparers = preparers
        self._embed_loops = embed_loops
        self._backoff = Backoff(self._apply_waits, first=0.1, most=10)
        self._deliveries = deliveries
        self._take_page = take_page
        self._page_applied = page_applied
        self._spool = spool
        self._metrics = metrics
        self.limit(batch_rows, batch_bytes)
        self.status_every_s = status_every_s
        self.silence_s = SILENCE_S
        self._tables: dict[tuple[str, str], list[Shape]] = {}
        for spec in specs:
            table = spec.shape.table
            self._tables.setdefault((table.schema, table.name), []).append(spec.shape)
        self.tracing = Tracing()
        self.progress = Progress(Lsn(0))
        self.stopping = False
        self._listening = anyio.CancelScope()
        self._reset(Lsn(0), Lsn(0))

    def _reset(self, checkpoint: Lsn, source_end: Lsn) -> None:
        self._heard_at = float("-inf")
        self.progress = Progress(checkpoint)
        self._batch = Batch()
        self._assembler = Assembler(self._tables, checkpoint)
        self._dry = False
        self._applying: Batch | None = None
        self._committed_at_us = 0
        self._passed = checkpoint
        self._heard = checkpoint
        self._source_end = source_end
        self.pauses: list[SchemaChanged] = []
        """Why indexes were paused on this connection."""
        self._paused: set[str] = set()
        """Those whose pause is stored."""
        self._idle_pause_s = 0.0
        self._last_idle_checkpoint = 0.0
        self._wake_apply = anyio.Event()
        self._wake_receive = anyio.Event()
        self._spool.begin()

    @property
    def caught_up(self) -> bool:
        """Whether everything that the source has sent is in the target."""
        return self._drained and self._applying is None and not self._batch and not self._assembler.in_transaction

    @property
    def heard_all(self) -> bool:
        """Whether the source has sent what it had when it was connected: before that, silence says nothing."""
        return self._heard >= self._source_end

    @property
    def heard_lately(self) -> bool:
        """Whether the source has shown lately that it is there: otherwise nobody knows what it has that we lack."""
        return self._silent_s < self.silence_s / 2

    @property
    def received(self) -> Lsn:
        """The furthest position that the source has told us of."""
        return self._heard

    @property
    def _drained(self) -> bool:
        return self._dry and self.heard_all

    @property
    def oldest_unapplied(self) -> datetime | None:
        """When the oldest transaction that is received and not in the target was committed."""
        for batch in (self._applying, self._batch):
            if batch is not None and batch.oldest_us is not None:
                return to_datetime(batch.oldest_us)
        return None

    async def follow(self, slot: SlotConnection, checkpoint: Lsn, source_end: Lsn) -> None:
        """Receive and apply over a connection that has begun to stream at `checkpoint`; returns when told to stop.

        :param source_end: where the source's WAL ended when it was connected.
        :raises SourceUnavailable: the connection ended; call again with a new one.
        """
        self._reset(checkpoint, source_end)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._apply_for_ever)
                await self._receive_until_stopped(slot)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise leading(group) from None

    def pause(self, error: SchemaChanged) -> None:
        """Pause an index with the next commit; following then ends with this error, to be begun again without it.

        A transaction under way is taken to its end first: begun again before it, the same would be found again.
        """
        self._batch.paused[error.index] = Pause.of(error)
        self._batch.partial = self._batch.partial or self._assembler.unfinished
        self.pauses.append(error)
        self._wake_apply.set()

    def limit(self, batch_rows: int, batch_bytes: int) -> None:
        """Close a batch at so many rows or bytes, from the present one on."""
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes

    def stop(self) -> None:
        """Ask for an orderly end: the batch in hand is finished, the last status is sent."""
        self.stopping = True
        self._listening.cancel()
        self._wake_receive.set()
        self._wake_apply.set()

    # -- receive ------------------------------------------------------------------------------------------------

    async def _receive_until_stopped(self, slot: SlotConnection) -> None:
        self._slot = slot
        self._status_due = self._heard_at = anyio.current_time()
        handled = 0
        while not self.stopping:
            await self._report_when_due()
            if self._full:
                await self._wait_for_room()
                continue
            frame = slot.poll()
            if frame is None:
                self._note_dry()
                with anyio.CancelScope() as self._listening:
                    frame = await slot.receive(self._patience())
                if frame is None and self._silent_s > self.silence_s:
                    frame = slot.poll()  # what came while this process had no turn is no silence
                    if frame is None:
                        raise SourceUnavailable(
                            f"nothing has come from the source for {self._silent_s:.0f} s,"
                            " although it was asked to reply",
                            where="replication connection",
                            hint="check the network between here and the source, and any proxy in it",
                        )
                if frame is None:
                    continue
            self._dry = False
            self._heard_at = anyio.current_time()
            self._heard = max(self._heard, frame.wal_end)
            if isinstance(frame, Keepalive):
                self._keepalive(frame)
            else:
                self._metrics.received_bytes.inc(len(frame.payload))
                self.progress.receive(frame.wal_start)
                await self._take(frame.payload)
            handled += 1
            if handled % TURN_MESSAGES == 0:
                await anyio.lowlevel.checkpoint()
        # Whoever stops waits for the batch that is being applied, and tells the source how far it got.
        while self._applying is not None:
            await self._pause_receiving(self._patience())
            await self._report_when_due()
        await slot.send_status(self.progress.received, self.progress.acknowledge())
        crash_point("last status sent")

    @property
    def _silent_s(self) -> float:
        return anyio.current_time() - self._heard_at

    async def _take(self, payload: bytes) -> None:
        """Handle one message: keep it for later if its transaction is still open, else hand it on."""
        if self._spool.receiving and payload[:1] != b"E":
            self._spool.append(int.from_bytes(payload[1:5], "big"), payload)
            return
        message = decode(payload)
        match message:
            case StreamStart():
                self._spool.enter(message.xid)
            case StreamStop():
                self._spool.leave()
            case StreamAbort():
                self._spool.abort(message.xid, message.subxid)
            case StreamCommit():
                for number, replayed in enumerate(self._replay(message), start=1):
                    await self._hand_on(replayed)
                    if number % TURN_MESSAGES == 0:
                        await self._report_when_due()
                        await anyio.lowlevel.checkpoint()
                    if self.stopping:
                        return
                self._spool.drop(message.xid)
            case _:
                await self._hand_on(message)

    def _replay(self, commit: StreamCommit) -> Iterator[PgoutputMessage]:
        """Yield a spooled transaction as if it had been sent whole at its commit."""
        yield Begin(final_lsn=commit.commit_lsn, commit_time_us=commit.commit_time_us, xid=commit.xid)
        for payload in self._spool.replay(commit.xid):
            yield decode(payload, streamed=True)
        yield Commit(
            flags=0, commit_lsn=commit.commit_lsn, end_lsn=commit.end_lsn, commit_time_us=commit.commit_time_us
        )

    async def _hand_on(self, message: PgoutputMessage) -> None:
        """Put what a message means into the open batch, waiting for room first."""
        while self._full and not self.stopping:
            await self._report_when_due()
            await self._wait_for_room()
        if type(message) is Begin:
            self._committed_at_us = message.commit_time_us
            self.tracing.begin(message.final_lsn)
        elif type(message) is Message and message.transactional and message.prefix == PREFIX:
            self.tracing.note(message.content)
        for event in self._assembler.feed(message):
            match event:
                case Committed():
                    self._end_transaction(event)
                case Mark():
                    self._take_page(event, self._batch)
                case Lost():
                    self.pause(event.error)
                case _:
                    deliveries = self._deliveries[event.shape.index]
                    if isinstance(event, Truncation):
                        deliveries.truncated(event.xid)
                    else:
                        deliveries.touched(event.key, event.xid)
                        if isinstance(event, Upsert) and event.moved_from is not None:
                            deliveries.touched(event.moved_from, event.xid)
                    self._batch.add(event)
                    if self._batch.oldest_us is None:
                        self._batch.oldest_us = self._committed_at_us

    def _end_transaction(self, transaction: Committed) -> None:
        if self._batch or self._batch.pages or self._paused:
            self._batch.commit(transaction)
            self.tracing.end(self._batch.origins)
        else:
            self._pass(transaction.end_lsn)

    def _keepalive(self, keepalive: Keepalive) -> None:
        if not self._assembler.in_transaction and not self._batch:
            self._pass(keepalive.wal_end)
        if keepalive.reply_requested:
            self._status_due = anyio.current_time()
            # A server that shuts down waits until what it sent is flushed here.
            self._idle_pause_s = 0.0

    def _pass(self, lsn: Lsn) -> None:
        """Note a position up to which there is nothing (more) to apply."""
        self._passed = max(self._passed, lsn)
        self.progress.receive(lsn)

    def _note_dry(self) -> None:
        self._dry = True
        if self._ready or self._passed > self.progress.checkpoint:
            self._wake_apply.set()

    @property
    def _full(self) -> bool:
        return self._batch.rows >= self._batch_rows or self._batch.bytes >= self._batch_bytes

    async def _wait_for_room(self) -> None:
        self._wake_apply.set()
        await self._pause_receiving(self._patience())
        self._heard_at = anyio.current_time()  # who does not listen hears nothing

    async def _pause_receiving(self, timeout_s: float) -> None:
        self._wake_receive = anyio.Event()
        if self._applying is not None or self._full:
            with anyio.move_on_after(timeout_s):
                await self._wake_receive.wait()

    def _patience(self) -> float:
        """Return how long receive may wait before a status is due, in seconds."""
        left = self._status_due - anyio.current_time()
        if self.progress.checkpoint > self.progress.acknowledged or self._applying is not None:
            left = min(left, PROMPT_STATUS_S)
        return max(0.0, left)

    async def _report_when_due(self) -> None:
        now = anyio.current_time()
        moved = self.progress.checkpoint > self.progress.acknowledged
        prompt = moved and self._status_due - self.status_every_s + PROMPT_STATUS_S <= now
        if now >= self._status_due or prompt:
            self._status_due = now + self.status_every_s
            await self._slot.send_status(self.progress.received, self.progress.acknowledge())
            crash_point("status sent")

    # -- apply --------------------------------------------------------------------------------------------------

    async def _apply_for_ever(self) -> None:
        while True:
            if self._ready:
                batch, self._batch = self._batch, Batch()
                batch.ahead = self._assembler.ahead
                self._applying = batch
                self._wake_receive.set()
                try:
                    await self._apply(batch)
                finally:
                    self._applying = None
                    self._wake_receive.set()
                continue
            if self._idle_checkpoint_due:
                await self._write_idle_checkpoint()
                continue
            self._wake_apply = anyio.Event()
            if not self._ready:
                with anyio.move_on_after(max(PROMPT_CHECKPOINT_S, self._idle_pause_s - self._idle_rested_s)):
                    await self._wake_apply.wait()

    @property
    def _ready(self) -> bool:
        if self.stopping:
            return False
        if self._full:
            return True
        # The end of a transaction in the middle of which an index was paused is stored even if nothing came after it.
        ends = bool(self._paused) and self._batch.end_lsn is not None
        return self._dry and not self._batch.partial and (bool(self._batch) or ends)

    async def _apply(self, batch: Batch) -> None:
        """Bring a batch to the target."""
        started = anyio.current_time()
        with self.tracing.batch(batch.origins, rows=batch.rows, transactions=batch.transactions):
            changes, applied = await self._until_committed(batch)
        before = self.progress.checkpoint
        if batch.end_lsn is not None:
            self.progress.commit(batch.end_lsn)
        self._idle_pause_s = 0.0
        self._account(batch, before, changes, applied, anyio.current_time() - started)
        self._page_applied(batch)
        self._paused |= batch.paused.keys()
        if self._paused and not batch.partial:
            # What else was found meanwhile will be found again, and a transaction whose end is not stored, too.
            self.pauses = [error for error in self.pauses if error.index in self._paused]
            raise self.pauses[0]

    async def _until_committed(self, batch: Batch) -> tuple[dict[str, ChangeSet], dict[str, Applied]]:
        """Prepare and commit, trying again for as long as a server is away."""
        while True:
            try:
                await self._session.ensure(self._specs)
                changes = {}
                for index, of_index in batch.indexes.items():
                    with self.tracing.span("cdcsync.prepare", index=index):
                        changes[index] = await self._preparers[index].prepare(of_index, self._session.writer(index))
                with self.tracing.span("cdcsync.commit"):
                    applied = await self._commit(changes, batch)
            except SchemaChanged as error:
                # What is left out of this batch is read again when the index is resumed.
                batch.indexes.pop(error.index, None)
                batch.paused[error.index] = Pause.of(error)
                self.pauses.append(error)
            except (TargetUnavailable, SourceUnavailable) as error:
                await self._backoff.wait(error)
            else:
                self._backoff.succeeded()
                return changes, applied

    async def _commit(self, changes: Mapping[str, ChangeSet], batch: Batch) -> dict[str, Applied]:
        # Cancelled in the middle, the driver could leave the transaction open: one that has begun is finished.
        applied: dict[str, Applied] = {}
        with anyio.CancelScope(shield=True):
            applied.update(
                await self._session.apply(
                    changes,
                    batch.pages,
                    batch.end_lsn,
                    ahead=batch.ahead,
                    paused=batch.paused,
                    commit_time=to_datetime(batch.commit_time_us) if batch.commit_time_us is not None else None,
                    caught_up=self._drained and not self._batch,
                )
            )
        return applied

    def _apply_waits(self, failure: Failure) -> None:
        side = "target" if isinstance(failure.error, TargetUnavailable) else "source"
        if side == "target":
            self._metrics.reconnects.labels(side).inc()
        log.warning(
            "apply_waits", side=side, error=str(failure.error), attempt=failure.attempt, delay_s=failure.delay_s
        )

    @property
    def _idle_checkpoint_due(self) -> bool:
        if self._passed <= self.progress.checkpoint or self._batch or self._assembler.in_transaction:
            return False
        rested = self._idle_rested_s
        return rested >= IDLE_CHECKPOINT_S or (self._dry and rested >= self._idle_pause_s)

    @property
    def _idle_rested_s(self) -> float:
        return anyio.current_time() - self._last_idle_checkpoint

    async def _write_idle_checkpoint(self) -> None:
        passed = self._passed
        self._last_idle_checkpoint = anyio.current_time()
        self._idle_pause_s = min(IDLE_CHECKPOINT_S, max(PROMPT_CHECKPOINT_S, 2 * self._idle_pause_s))
        try:
            await self._session.ensure(self._specs)
            with anyio.CancelScope(shield=True):
                await self._session.apply({}, (), passed, commit_time=None, caught_up=self._drained)
        except TargetUnavailable as error:
            await self._backoff.wait(error)
        else:
            self._backoff.succeeded()
            self.progress.commit(passed)

    def _account(
        self,
        batch: Batch,
        before: Lsn,
        changes: Mapping[str, ChangeSet],
        applied: Mapping[str, Applied],
        seconds: float,
    ) -> None:
        metrics = self._metrics
        metrics.transactions.inc(batch.transactions)
        metrics.batch_rows.observe(batch.rows)
        metrics.apply_seconds.observe(seconds)
        if batch.commit_time_us is not None and batch.end_lsn is not None:
            committed = to_datetime(batch.commit_time_us)
            age = max(0.0, (datetime.now(UTC) - committed).total_seconds())
            metrics.text_freshness.observe(age)
            for index, result in applied.items():
                self._embed_loops[index].commits.note(before, batch.end_lsn, committed)
                if all(one.lane == LIVE for one in changes[index].documents):
                    for _ in range(result.inline + result.reused):
                        metrics.vector_freshness.observe(age)
        for index, of_index in batch.indexes.items():
            upserts = sum(1 for change in of_index.live.values() if isinstance(change, Upsert))
            metrics.changes.labels(index, "upsert").inc(upserts)
            metrics.changes.labels(index, "delete").inc(len(of_index.live) - upserts)
            metrics.changes.labels(index, "truncate").inc(of_index.truncated)
        for index, result in applied.items():
            metrics.chunks.labels(index).inc(result.chunks)
            metrics.chunks_deleted.labels(index).inc(result.deleted)
            metrics.vectors.labels(index, "reused").inc(result.reused)
            metrics.vectors.labels(index, "inline").inc(result.inline)
            current = result.chunks - result.reused - result.inline - result.queued
            self._embed_loops[index].avoided("current", current)
            if result.queued:
                self._embed_loops[index].notify(live=any(one.lane == 0 for one in changes[index].documents))
        log.debug(
            "batch_applied",
            rows=batch.rows,
            transactions=batch.transactions,
            checkpoint=str(self.progress.checkpoint),
            milliseconds=round(seconds * 1000, 1),
        )
