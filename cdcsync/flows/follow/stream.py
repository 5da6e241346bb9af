"""The stream flow: from the slot to the target, exactly once.

    slot ─► receiver ─► events ─► open batch ─► applier (one target transaction) ─► acknowledged by the receiver

Two tasks share one open batch. The *receiver* owns the slot's connection and yields events, which are put into the open
batch; the *applier* takes the batch, commits it, and returns what it did, which is accounted for here.
The checkpoint moves with the batch, to the end of its last complete transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import assert_never

import anyio

from cdcsync.errors import CdcsyncError, IndexFault, SourceUnavailable, leading
from cdcsync.flows.follow.accounts import Accounts
from cdcsync.flows.follow.apply import Applier, Outcome
from cdcsync.flows.follow.open_batch import Limits, Look, OpenBatch, Position
from cdcsync.flows.follow.receive import Dry, Heard, Passed, Receiver
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, PageRows
from cdcsync.model.lag import Lag
from cdcsync.model.links import Link, Touch
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Delete, Shape, Truncation, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Assembler, Began, Committed, Lost, Mark, Part
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.interrupts import cancelled_by
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.tracing import Tracing


class Stream:
    """Follows the slot for the life of the pipeline, over any number of connections."""

    def __init__(
        self,
        *,
        specs: Sequence[IndexSpec],
        applier: Applier,
        accounts: Accounts,
        deliveries: Mapping[str, Deliveries],
        page_at: Callable[[Mark], PageRows | None],
        applying: Callable[[Batch], None],
        applied: Callable[[Batch, float], None],
        spool: Spool,
        metrics: Metrics,
        tracing: Tracing,
        lag: Lag,
        limits: Limits,
        stopping: anyio.Event,
    ) -> None:
        """Put the parts together.

        :param page_at: returns the rows of a backfill that belong at a mark.
        :param applying: called with each batch before it is applied.
        :param applied: called with each batch that is in the target, and the seconds that applying it took.
        :param limits: may change at any time.
        :param stopping: ends in an orderly way: the current batch is finished, and the last status is sent.
        """
        self._applier = applier
        self._accounts = accounts
        self._deliveries = deliveries
        self._page_at = page_at
        self._applying = applying
        self._applied = applied
        self._spool = spool
        self._metrics = metrics
        self._tracing = tracing
        self._lag = lag
        self._limits = limits
        self._stopping = stopping
        self._tables: dict[tuple[str, str], list[Shape | Link]] = {}
        self._known: dict[int, tuple[str, str]] = {}
        for spec in specs:
            needs: list[Shape | Link] = [*(one.shape for one in spec.each), *spec.links]
            for one in needs:
                self._tables.setdefault((one.table.schema, one.table.name), []).append(one)
            own = {} if spec.shape.many else {spec.shape.table: spec.table_oid}
            for table, oid in (spec.oids | own).items():
                self._known[oid] = table.schema, table.name
        self.described: Callable[[], None] = lambda: None
        """Called when the source describes a table again."""
        self._pauses_asked: dict[str, IndexFault] = {}
        """The pauses from outside that are not stored yet: no other connection would deliver their reasons again."""
        self._progress = Progress(Lsn(0))
        self._open = self._new_batch()
        self._leaving = anyio.Event()
        self._why_left = ""

    @property
    def checkpoint(self) -> Lsn:
        """The checkpoint that the target holds."""
        return self._progress.checkpoint

    @property
    def received(self) -> Lsn:
        """How far the stream has been received: every transaction that committed before it has been delivered."""
        return self._progress.received

    @property
    def held(self) -> Lsn:
        """Up to where the target holds everything that the source has committed, even if its checkpoint is behind."""
        return self._open.held

    def pause(self, error: IndexFault) -> None:
        """Pause an index with the next commit, of this connection or a later one.

        `follow` returns the error once that is stored.
        """
        self._pauses_asked[error.index] = error
        self._open.pause(error)

    def leave(self, why: str = "the source takes no connections any more: it is shutting down") -> None:
        """Give up the connection and the current batch, also if they wait for the source, which waits for them."""
        self._why_left = why
        self._leaving.set()

    def look(self) -> None:
        """Open the session that applies changes again if it has ended, though there may be nothing to apply."""
        self._open.look()

    def failing_for(self, seconds: float) -> CdcsyncError | None:
        """Return why nothing that was received could be applied for so long, if that is so."""
        return self._applier.failing_for(seconds)

    async def follow(
        self,
        slot: SlotConnection,
        checkpoint: Lsn,
        source_end: Lsn,
        *,
        one_wal: bool = False,
        status_every_s: float,
        silence_s: float,
    ) -> list[IndexFault]:
        """Receive and apply over a connection that has begun to stream at `checkpoint`.

        :param source_end: where the source's WAL ended when it was connected.
        :param one_wal: whether the checkpoint was committed in that WAL, and commits tell where it ends.
        :param silence_s: a source that sends nothing for longer is away.
        :returns: why indexes were paused, once that is stored; nothing when it was told to stop.
        :raises SourceUnavailable: the connection ended; call again with a new one.
        """
        self._progress = Progress(checkpoint, committed_before=source_end if one_wal else None)
        self._lag.begin(checkpoint, silence_s)
        self._applier.begin()
        self._open = self._new_batch()
        for error in self._pauses_asked.values():
            self._open.pause(error)
        self._leaving = leaving = anyio.Event()
        receiver = Receiver(
            slot,
            source_end,
            assembler=Assembler(self._tables, checkpoint, known=self._known, described=self.described),
            spool=self._spool,
            open_batch=self._open,
            progress=self._progress,
            lag=self._lag,
            metrics=self._metrics,
            tracing=self._tracing,
            status_every_s=status_every_s,
        )
        paused: list[IndexFault] = []
        try:
            async with anyio.create_task_group() as tasks:

                async def apply() -> None:
                    paused.extend(await self._apply_until_paused())
                    tasks.cancel_scope.cancel()

                async def leave() -> None:
                    await leaving.wait()
                    raise SourceUnavailable(self._why_left, where="replication connection")

                tasks.start_soon(apply)
                tasks.start_soon(leave)
                # It is closed before what is being written has ended: a source that shuts down waits for that.
                async with slot:
                    async with cancelled_by(self._stopping), aclosing(receiver.events()) as events:
                        async for heard in events:
                            for one in heard:
                                self._take(one)
                    await receiver.finish()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise leading(group) from None
        finally:
            self._lag.end()
        return paused

    def _take(self, heard: Heard) -> None:
        """Put what was heard into the open batch.

        Changes are remembered as well, for pages that are read under an older snapshot.
        """
        match heard:
            case Upsert():
                deliveries = self._deliveries[heard.shape.index]
                deliveries.touched(heard.key, heard.xid)
                if heard.moved_from is not None:
                    deliveries.touched(heard.moved_from, heard.xid)
                self._open.add(heard)
            case Delete():
                self._deliveries[heard.shape.index].touched(heard.key, heard.xid)
                self._open.add(heard)
            case Touch():
                self._deliveries[heard.shape.index].related(heard.xid, heard.place, emptied=heard.values is None)
                self._open.add(heard)
            case Truncation():
                self._deliveries[heard.shape.index].truncated(heard.xid, heard.shape.source)
                self._open.add(heard)
            case Dry():
                self._open.note_dry(heard_all=heard.heard_all)
            case Began():
                self._open.begin(heard)
            case Committed():
                self._open.commit(heard)
            case Passed():
                self._open.pass_by(heard.lsn, promptly=heard.promptly)
            case Mark():
                if (page := self._page_at(heard)) is not None:
                    self._open.add_page(page)
            case Lost():
                self._open.pause(heard.error)
            case Part():
                self._open.add_part(heard)
            case _:
                assert_never(heard)

    async def _apply_until_paused(self) -> list[IndexFault]:
        """Commit what comes until a pause and the end of its transaction are stored; returns why there was one."""
        paused: dict[str, IndexFault] = {}
        following: Batch | None = None
        while True:
            work = following or await self._open.next()
            match work:
                case Batch():
                    following = await self._apply(work)
                    paused.update(work.paused)
                    if paused and not work.partial:
                        # Faults found meanwhile in changes that are not stored will be found again.
                        return list(paused.values())
                case Position():
                    if not work.due and not paused and not await self._applier.awaited():
                        continue
                    if await self._applier.note_position(work.lsn, caught_up=self._open.nothing_left):
                        self._progress.commit(work.lsn, wal_end=self._applier.wal_end)
                        if paused:
                            # The end of the transaction had come alone before the batch that paused was written.
                            return list(paused.values())
                case Look():
                    await self._applier.reopen()
                case _:
                    assert_never(work)

    async def _apply(self, batch: Batch) -> Batch | None:
        """Apply a batch; returns the one that follows it, if that was full before this one was committed.

        By then that one is prepared, as far as it can be.
        """
        before = self._progress.checkpoint
        self._note_rewriting(batch)
        self._applying(batch)

        def committed(outcome: Outcome) -> None:
            for index, changes in batch.indexes.items():
                if changes.resolved:
                    self._deliveries[index].resolved(changes.touched_by)
            self._progress.commit(batch.end_lsn, wal_end=self._applier.wal_end)
            self._accounts.note(batch, outcome, before=before, checkpoint=self._progress.checkpoint)
            self._applied(batch, outcome.seconds)
            self._open.done(batch)

        await self._applier.apply(
            batch, caught_up=lambda: self._open.nothing_left, following=self._following, committed=committed
        )
        return self._applier.following

    async def _following(self) -> Batch:
        batch = await self._open.following()
        self._note_rewriting(batch)
        return batch

    def _note_rewriting(self, batch: Batch) -> None:
        for index, changes in batch.indexes.items():
            changes.rewrite = changes.rewrite or self._deliveries[index].rewriting

    def _new_batch(self) -> OpenBatch:
        return OpenBatch(self._progress, self._limits, self._lag, self._tracing, self._stopping)
