"""The receiver: it owns the slot's connection, and yields what the stream says.

    frames ─► spool (transactions that are still open) ─► messages ─► events

The rules:

1. A status is sent on time whatever the applier, the target or the embedder do: while there is no room, the receiver
   waits for room and for the next status, and reads nothing. A status reports as flushed only what is committed, and
   kept (`model/progress`).
2. Silence is not health. While nothing comes, each status that is due asks for a reply; a source that has not sent a
   frame for too long is away.
3. Events come in the order of the stream; a transaction that was streamed while it was open comes whole, at its
   commit. Its descriptions of tables hold for it, and afterwards those that came last.
4. A source that falls quiet is nudged: since PostgreSQL 16 a walsender can miss what is committed just as it goes to
   sleep, and sends it only with the next commit, or once it hears from its client. So statuses follow the last message
   soon, and then at pauses that grow. They ask for no reply.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import assert_never

import anyio
import anyio.lowlevel
import msgspec

from cdcsync.flows.follow.open_batch import OpenBatch
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.descriptions import Descriptions
from cdcsync.model.lag import Lag
from cdcsync.model.progress import Progress
from cdcsync.model.transactions import Assembler, Event
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive, XLogData
from cdcsync.pgoutput.messages import (
    Begin,
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
    Update,
)
from cdcsync.process.crashpoints import crash_point
from cdcsync.process.memory import largest_value
from cdcsync.source.slot import SlotConnection, silence
from cdcsync.source.spool import Spool
from cdcsync.tracing import PREFIX, Tracing

PROMPT_STATUS_S = 1.0
"""A moved checkpoint is reported within this time, so that the source can recycle WAL."""

NUDGE_S = 0.005
"""How soon after the last message a source that has fallen quiet is nudged."""

NUDGE_GROWTH = 4
"""The pauses between nudges grow by this factor. So a change that was missed waits for `NUDGE_S`, or this many times as
long as the silence before it had lasted, and never beyond the next status that is due."""

TURN_MESSAGES = 50
"""Messages handled before other tasks get a turn: half a millisecond, which the target may wait for the next statement
of a batch. A turn costs some microseconds, a message five."""


class Passed(msgspec.Struct, frozen=True):
    """Up to here there is nothing to apply.

    :ivar promptly: whether the source waits to hear that this is flushed.
    """

    lsn: Lsn
    promptly: bool


class Dry(msgspec.Struct, frozen=True):
    """Nothing more has arrived.

    :ivar heard_all: whether the source has sent what it had when it was connected.
    """

    heard_all: bool


Heard = Event | Passed | Dry

NOTHING: tuple[Heard, ...] = ()
NOTHING_YET: tuple[tuple[Heard, ...]] = (NOTHING,)


class Receiver:
    """Reads one connection that has begun to stream."""

    def __init__(
        self,
        slot: SlotConnection,
        source_end: Lsn,
        *,
        assembler: Assembler,
        spool: Spool,
        open_batch: OpenBatch,
        progress: Progress,
        lag: Lag,
        metrics: Metrics,
        tracing: Tracing,
        status_every_s: float,
    ) -> None:
        """Take over a connection.

        :param source_end: where the source's WAL ended when it was connected.
        :raises SpoolUnusable: the spool has no place for its files.
        """
        self._slot = slot
        self._source_end = source_end
        self._assembler = assembler
        self._spool = spool
        self._open_batch = open_batch
        self._progress = progress
        self._lag = lag
        self._metrics = metrics
        self._tracing = tracing
        self._status_every_s = status_every_s
        self._status_due = anyio.current_time()
        self._nudge_due = math.inf
        """When the source is nudged next, once it has fallen quiet; before that, never."""
        self._nudge_s = NUDGE_S
        """The pause before that nudge."""
        self._quiet = False
        self._handled = 0
        self._came = False
        self._bytes = 0
        """Counts since metrics were last updated: updating them costs as much as decoding a message."""
        self._told = Lsn(0)
        """The furthest position that the source told of."""
        self._largest = largest_value()
        self._descriptions = Descriptions()
        self._spool.begin()

    async def events(self) -> AsyncGenerator[Sequence[Heard]]:
        """Yield the events of the stream, of one message at a time, as soon as the open batch has room for them.

        :raises SourceUnavailable: the connection ended, or the source has fallen silent.
        """
        while True:
            frame = self._slot.poll()
            if frame is None:
                if self._nudge_due == math.inf:
                    self._nudge_due, self._nudge_s = anyio.current_time() + NUDGE_S, NUDGE_S
                self._account()
                await self._report_when_due()
                yield (Dry(self._lag.heard >= self._source_end),)
                frame = await self._slot.receive(self._patience())
                if frame is None:
                    self._quiet = True
                    if not self._lag.silent:
                        continue
                    frame = self._slot.poll()  # a frame that came while this process was not running is not silence
                    if frame is None:
                        raise silence(self._lag.silent_s)
            self._quiet = False
            self._open_batch.note_more()
            self._came = True
            if frame.wal_end > self._told:
                self._told = frame.wal_end
                self._nudge_due = math.inf
            match frame:
                case XLogData():
                    self._nudge_due = math.inf  # a keepalive may only answer
                    self._bytes += len(frame.payload)
                    self._progress.receive(frame.wal_start)
                    for events in self._take(frame.payload):
                        if events:
                            while self._open_batch.full:
                                await self._open_batch.wait_for_applier(self._patience())
                                self._lag.listen()
                                await self._report_when_due()
                            yield events
                        self._handled += 1
                        if self._handled % TURN_MESSAGES == 0:
                            self._account()
                            await self._report_when_due()
                            await anyio.lowlevel.checkpoint()
                case Keepalive():
                    yield self._keepalive(frame)
                case _:
                    assert_never(frame)

    async def finish(self) -> None:
        """Wait for the batch that is being applied, and tell the source how far it got: the last status."""
        while self._open_batch.applying:
            await self._open_batch.wait_for_applier(self._patience())
            await self._report_when_due()
        self._progress.sent(self._told)
        await self._slot.send_status(self._progress.received, self._progress.acknowledge())
        crash_point("last status sent")

    def _account(self) -> None:
        """Tell lag and metrics of what came."""
        if self._came:
            self._lag.hear(self._told)
            self._metrics.received_bytes.inc(self._bytes)
            self._came, self._bytes = False, 0

    def _take(self, payload: bytes) -> Iterable[Sequence[Heard]]:
        """Return what each message of a payload means: nothing yet if its transaction is still open."""
        if self._spool.receiving and payload[:1] != b"E":
            number = self._descriptions.arrive() if payload[:1] == b"R" else None
            self._spool.append(int.from_bytes(payload[1:5], "big"), payload, description=number)
            return NOTHING_YET
        message = decode(payload, largest=self._largest)
        match message:
            case Insert() | Update() | Delete() | Begin() | Commit():
                return (self._assembler.feed(message),)
            case StreamStart():
                self._spool.enter(message.xid)
            case StreamStop():
                self._spool.leave()
            case StreamAbort():
                self._spool.abort(message.xid, message.subxid)
            case StreamCommit():
                return self._replay(message)
            case Relation():
                self._descriptions.take(message, self._descriptions.arrive())
                return (self._assembler.feed(message),)
            case _:
                return (self._feed(message),)
        return NOTHING_YET

    def _replay(self, commit: StreamCommit) -> Iterator[Sequence[Heard]]:
        """Yield what a spooled transaction means, as if it had been sent whole at its commit, and drop it then."""
        yield self._feed(Begin(final_lsn=commit.commit_lsn, commit_time_us=commit.commit_time_us, xid=commit.xid))
        numbers = iter(self._spool.descriptions(commit.xid))
        for payload in self._spool.replay(commit.xid):
            message = decode(payload, streamed=True, largest=self._largest)
            if type(message) is Relation:
                self._descriptions.take(message, next(numbers))
            yield self._feed(message)
        yield self._feed(
            Commit(flags=0, commit_lsn=commit.commit_lsn, end_lsn=commit.end_lsn, commit_time_us=commit.commit_time_us)
        )
        yield self._assembler.restore(self._descriptions.overtaken())
        self._spool.drop(commit.xid)

    def _feed(self, message: PgoutputMessage) -> Sequence[Heard]:
        if type(message) is Message and message.transactional and message.prefix == PREFIX:
            self._tracing.note(message.content)
        return self._assembler.feed(message)

    def _keepalive(self, keepalive: Keepalive) -> Sequence[Heard]:
        if keepalive.reply_requested:
            self._status_due = anyio.current_time()
        # A server that shuts down asks for a reply, and waits until what it sent is flushed here.
        passed = Passed(keepalive.wal_end, promptly=keepalive.reply_requested)
        return NOTHING if self._assembler.in_transaction else (passed,)

    def _patience(self) -> float:
        """Return how long to wait before a status is due, in seconds."""
        left_s = min(self._status_due, self._nudge_due) - anyio.current_time()
        if self._progress.unacknowledged or self._open_batch.applying:
            left_s = min(left_s, PROMPT_STATUS_S)
        return max(0.0, left_s)

    async def _report_when_due(self) -> None:
        now = anyio.current_time()
        self._progress.sent(self._told)
        prompt = self._progress.unacknowledged and self._status_due - self._status_every_s + PROMPT_STATUS_S <= now
        due, nudge = now >= self._status_due or prompt, now >= self._nudge_due
        if due:
            self._status_due = now + self._status_every_s
        if nudge:
            self._nudge_s *= NUDGE_GROWTH
            self._nudge_due = now + self._nudge_s
        if due or nudge:
            ask = due and self._quiet
            await self._slot.send_status(self._progress.received, self._progress.acknowledge(), ask=ask)
            crash_point("status sent")
