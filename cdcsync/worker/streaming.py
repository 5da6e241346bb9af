"""Following the slot, over any number of connections.

the target's session ─► the slot's connection ─► where to begin ─► the stream, until the connection breaks
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

import anyio
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.config import Config
from cdcsync.errors import CdcsyncError, DecodingFailed, IndexFault, SpoolUnusable
from cdcsync.flows.backfill.marks import Marks
from cdcsync.flows.follow.stream import Stream
from cdcsync.flows.setup.gaps import connect_slot, refuse_moved
from cdcsync.flows.setup.start import starting_point
from cdcsync.lsn import Lsn
from cdcsync.model.lag import SILENCE_S
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.followed import FollowedServer
from cdcsync.postgres.interrupts import cancelled_by
from cdcsync.postgres.sessions import Session
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.source.transactions import running_transactions
from cdcsync.target.session import ApplySession
from cdcsync.worker.state import WorkerState

log = structlog.get_logger()

REACH_POLL_S = 0.1
"""How often it is looked whether the stream has come to a position."""


class Streaming:
    """The connection to the slot, made again whenever it breaks."""

    def __init__(
        self,
        config: Config,
        state: WorkerState,
        session: ApplySession,
        specs: Sequence[IndexSpec],
        stream: Stream,
        marks: Marks,
        deliveries: Mapping[str, Deliveries],
        spool: Spool,
    ) -> None:
        self._config = config
        self._state = state
        self._session = session
        self._specs = specs
        self._stream = stream
        self._marks = marks
        self._deliveries = deliveries
        self._spool = spool
        self._backoff = Backoff(self._stream_waits, until=state.stopping)
        self.server = FollowedServer("source", stream.leave)
        self._connection = anyio.CancelScope()
        """What follows the slot over the present connection, or did over the last one."""
        self._again = anyio.Event()
        """Set with the next connection."""
        self.begun = anyio.Event()
        """Set once the slot is followed: before that, a mark would never be delivered."""
        self._status_every_s = config.source.feedback_every_s
        self._silence_s = SILENCE_S
        self._failed_at: tuple[str, Lsn] | None = None
        """The source's last failure to decode a change, and the checkpoint at that time."""
        self._stuck: DecodingFailed | None = None
        """Why the source cannot decode what follows the checkpoint, once it has failed there twice."""

    def fit(self, wal_sender_timeout_s: float) -> None:
        """Send statuses often enough for the source's timeout, and take longer silence for its end; 0 means none."""
        if wal_sender_timeout_s > 0:
            self._status_every_s = min(self._config.source.feedback_every_s, wal_sender_timeout_s / 3)
            self._silence_s = wal_sender_timeout_s

    def failing_for(self, seconds: float) -> CdcsyncError | None:
        """Return why no changes came, or none could be applied, for so long, if that is so."""
        return (self._stream if self._state.streaming else self._backoff).failing_for(seconds)

    async def run(self) -> list[IndexFault]:
        """Follow the slot over any number of connections until told to stop, or until indexes are paused.

        :returns: why they are.
        """
        backoff = self._backoff
        control = Session(self._config.source.dsn, "source", application_name="cdcsync control")
        followed: int | None = None
        """The timeline that what is remembered of deliveries belongs to."""
        while not self._state.stopping.is_set():
            async with backoff, control, self._disconnected_at_its_end():
                await self._session.ensure(self._specs)
                opened: SlotConnection | None = None
                async with cancelled_by(self._state.stopping):  # each host has its own time to answer
                    opened = await connect_slot(self._config, await self._session.state())
                if opened is None:
                    return []
                async with opened as slot:
                    self.server.follow(await slot.backend())
                    source = await control.connection()
                    self._session.take_changes_of(source)
                    # Also a start that fails, or has to connect again, may have found that what was delivered says
                    # nothing about what follows.
                    before, followed = followed, None
                    async with cancelled_by(self._state.stopping):
                        start = await starting_point(
                            slot,
                            source,
                            self._session,
                            self._config,
                            [spec.name for spec in self._specs],
                            stuck=self._stuck,
                            note=self._state.note_waiting,
                        )
                        self._stuck = None
                    if self._state.stopping.is_set():
                        return []
                    if start is None:
                        continue
                    # The marks of pages under way may lie before what this connection will deliver.
                    self._marks.interrupt()
                    checkpoint, timeline = start.checkpoint, start.server.timeline
                    if start.anew or timeline != before:
                        # On a new timeline, ids that were delivered may never have been given out: no snapshot would
                        # see them. What counts is delivered again.
                        # What these did before the slot or the publication took notice of their tables may never be
                        # delivered.
                        with speaking_of("source"):
                            running = await running_transactions(source)
                        for deliveries in self._deliveries.values():
                            deliveries.begin_anew()
                            deliveries.suspect(running)
                    followed = timeline
                    await slot.start(
                        self._config.source.slot,
                        [self._config.source.publication],
                        checkpoint,
                        streaming=self._config.source.streaming and self._spool.usable,
                    )
                    await refuse_moved(source, self._config.source.slot, checkpoint)
                    await control.aclose()
                    log.info("streaming", slot=self._config.source.slot, checkpoint=str(checkpoint))
                    self._state.connected(True)
                    self.begun.set()
                    self._again.set()
                    backoff.succeeded()
                    with anyio.CancelScope() as self._connection:
                        return await self._stream.follow(
                            slot,
                            checkpoint,
                            start.server.lsn,
                            one_wal=self._session.one_wal,
                            status_every_s=self._status_every_s,
                            silence_s=self._silence_s,
                        )
                    log.info("stream_renewed", slot=self._config.source.slot)
        return []

    async def reach(self, position: Lsn, anew: bool) -> None:
        """Return once the target holds everything that the source had committed before `position`.

        :param anew: whether the slot is to be followed over another connection by then, which begins there or later.
            The server then knows its catalogs as of there: it decodes no transaction again that ended before.
        """
        stream = self._stream
        while (stream.checkpoint if anew else stream.held) < position:  # noqa: ASYNC110 - it need not know of this
            await anyio.sleep(REACH_POLL_S)
        if not anew:
            return
        again = self._again = anyio.Event()
        self._connection.cancel()
        await again.wait()

    def _stream_waits(self, failure: Failure) -> None:
        self._state.metrics.reconnects.labels("source").inc()
        log.warning("stream_waits", error=str(failure.error), attempt=failure.attempt, delay_s=failure.delay_s)
        if isinstance(failure.error, SpoolUnusable):
            log.warning("spool_unusable", error=str(failure.error), fix=failure.error.hint)
        if isinstance(failure.error, DecodingFailed):
            here = (failure.error.message, self._stream.checkpoint)
            self._failed_at, self._stuck = here, failure.error if here == self._failed_at else None

    @contextlib.asynccontextmanager
    async def _disconnected_at_its_end(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self._state.connected(False)
