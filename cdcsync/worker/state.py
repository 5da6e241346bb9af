"""A running worker as others see it: the process that started it, and its HTTP endpoints.

Nothing here does the worker's work; it is asked how that goes, over connections of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial

import anyio
import anyio.to_thread
import msgspec
import structlog

from cdcsync import tracing
from cdcsync.backoff import Outages
from cdcsync.config import Config
from cdcsync.errors import CdcsyncError, EmbedderUnavailable, TargetUnavailable
from cdcsync.flows.embed import Dispatcher
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import IDLE_S, Connection, Session, admitting
from cdcsync.postgres.settings import Side
from cdcsync.status import (
    Headline,
    Paces,
    Status,
    as_starting,
    as_waiting,
    read_status,
    with_headlines,
    with_problems,
    without_problems,
)
from cdcsync.target.locked_session import worker_name
from cdcsync.worker.history import History, Memory
from cdcsync.worker.readings import AWAY_S, Readings

log = structlog.get_logger()

QUERY_S = 4.0
"""How long a query may wait for its vector behind the worker's own texts; the client can load the model instead."""

STARTING_S = 15.0
"""How long a worker may take to follow its source before that is a problem; a start takes a second or two."""

ALIVE_WITHIN_S = 30.0
"""The loop is alive if it turned within this time; the longest uninterrupted step is a batch being decoded."""


class WorkerState:
    """A running worker, as seen by the process that started it and by its HTTP endpoints."""

    def __init__(self, config: Config) -> None:
        self.metrics = Metrics()
        self.tracing = tracing.from_environment(os.environ)
        self.port: int | None = None
        self.standby = False
        """Whether the target, when it was last asked, said that another worker holds the pipeline's lock."""
        self._waiting_for: str | None = None
        """The servers, or the transactions, that a start or a set-up waits for, and why."""
        self.stopping = anyio.Event()
        """Set once the worker is asked to end."""
        self.config = config
        """The configuration in effect: read again on SIGHUP."""
        self._lag: Lag | None = None
        self._checkpoint: Callable[[], Lsn] = lambda: Lsn(0)
        self._failing_for: Callable[[float], CdcsyncError | None] = lambda seconds: None
        self.outages = Outages()
        """What waits beside the stream, and why."""
        self.problems: Mapping[str, str] = {}
        """Problems of the application's writes to indexed tables, and of what vectors, pages and comparisons wait for,
        by index."""
        self.admit: Callable[[Connection], None] = lambda source: None
        """Sees that a session with the source is on the server that is followed."""
        self.is_followed: Callable[[Connection], bool] = lambda target: True
        """Says whether a session with the target is on the server that changes are written to."""
        self._reconfigure: Callable[[Config], None] = lambda config: None
        self._dispatchers: Mapping[str, Dispatcher] = {}
        self._connected = False
        self._followed = False
        self._begun = anyio.current_time()
        self._turned = anyio.current_time()
        self._source = Session(config.source.dsn, "source", application_name="cdcsync status", idle_s=IDLE_S)
        self._target = Session(config.target.dsn, "target", application_name="cdcsync status", idle_s=IDLE_S)
        self._reading = anyio.Lock()
        self.readings = Readings(lambda: self._target.used_at)
        self.last: Status | None = None
        """The status as it was last read, for whomever: what readiness goes by, and /status shows."""
        self._unreadable: dict[str, float] = {}
        """Since when the tables of an index cannot be read."""
        self._memory = Memory(self.metrics)
        self._paces = Paces()
        self.metrics.begin(config.indexes, config.embedders)
        # Asked when they are scraped: they have to tell the truth when a server is away and nothing else is read.
        self.metrics.ready.set_function(lambda: float(not self.not_ready()))
        self.metrics.standby.set_function(lambda: float(self.standby))
        self.metrics.lag_seconds.set_function(lambda: self.lag_seconds)

    def attach(
        self,
        lag: Lag,
        checkpoint: Callable[[], Lsn],
        failing_for: Callable[[float], CdcsyncError | None],
        dispatchers: Mapping[str, Dispatcher],
        reconfigure: Callable[[Config], None],
    ) -> None:
        """Show these parts of a pipeline from now on.

        :param failing_for: returns why no changes came, or none could be applied, for so many seconds, if that is so.
        :param reconfigure: tells them of another configuration.
        """
        self._lag = lag
        self._checkpoint = checkpoint
        self._failing_for = failing_for
        self._dispatchers = dispatchers
        for name, dispatcher in dispatchers.items():
            self.metrics.embedder_problem.labels(name).set_function(partial(_troubled, dispatcher))
        self._reconfigure = reconfigure
        # Of readings, which are made from now on.
        self.metrics.connected.labels("target").set_function(lambda: float(self.readings.answered))

    def connected(self, up: bool) -> None:
        """Note whether the stream flows."""
        self._connected = up
        self._followed = self._followed or up
        self.metrics.connected.labels("source").set(up)

    @property
    def streaming(self) -> bool:
        """Whether changes flow."""
        return self._connected

    @property
    def _waits(self) -> str | None:
        """Why the start, or the set-up of another pipeline, has to wait."""
        what = "set-up" if self._followed else "start"
        return None if self._waiting_for is None else f"the {what} waits: {self._waiting_for}"

    @property
    def starting(self) -> bool:
        """Whether the worker began so lately that it need not follow its source yet."""
        waits = self._followed or self.standby or self._waiting_for is not None
        return not waits and anyio.current_time() - self._begun < STARTING_S

    def stand_by(self) -> None:
        """Note that the target says now that another worker holds the pipeline.

        That one shows how it is, and what this one knew goes stale.
        """
        self.readings.conclude(None)  # no reading of ours may follow that would show that the target answers
        if self.standby:
            return
        self.standby, self.last = True, None
        self._unreadable.clear()
        self.metrics.forget()

    def note_waiting(self, why: str | None) -> None:
        """Note why a start or a set-up waits: until that is over, nobody knows whether another worker works.

        :param why: None once it waits no more.
        """
        self._waiting_for = why
        if why is not None:
            self.standby = False

    def examined(self, *, target_reached: bool) -> None:
        """Note whether the target could be reached, between pipelines, when nothing else asks it."""
        self.readings.conclude(None if target_reached else TargetUnavailable("it cannot be reached", where="target"))

    def stop(self) -> None:
        """Ask for an orderly end: the current batch is finished, or abandoned whole."""
        self.stopping.set()

    def reconfigure(self, config: Config) -> None:
        """Go by another configuration, in what may change while the worker works."""
        self.config = config
        self._memory.happened("the configuration was read again", datetime.now(UTC))
        self._reconfigure(config)

    async def embed_query(self, name: str, text: str) -> tuple[str, list[float]]:
        """Return the identity of an embedder's model, and the vector that it makes of a query.

        :raises EmbedderUnavailable: there is no such embedder, or it is away or busy.
        :raises TextRejected: it refuses the text.
        """
        dispatcher = self._dispatchers.get(name)
        if dispatcher is not None and dispatcher.problem is None:
            with anyio.move_on_after(QUERY_S):
                vectors = await dispatcher.embedder.embed([text], kind="query")
                return dispatcher.embedder.identity, [float(one) for one in vectors[0]]
        raise EmbedderUnavailable(
            "the worker cannot embed this query now", where=f"embedders.{name}", hint="see `cdcsync status`"
        )

    def alive(self) -> bool:
        """Whether the event loop turns."""
        return anyio.current_time() - self._turned < ALIVE_WITHIN_S

    async def turn(self) -> None:
        """Show that the event loop turns, until cancelled."""
        while True:
            self._turned = anyio.current_time()
            await anyio.sleep(1.0)

    def not_ready(self) -> list[str]:
        """Return why the worker is not doing its work just now; nothing when it is."""
        reasons = []
        if self._waits is not None:
            reasons.append(self._waits)
        elif self.standby:
            reasons.append("standby: another worker holds the pipeline")
        elif not self._connected:
            reasons.append(self._why_not_followed or "the replication stream is not connected")
        elif self._lag is not None and not self._lag.heard_lately:
            reasons.append("nothing has been heard from the source lately, so the lag is unknown")
        if (why := self.readings.why_failing or (self._why_not_followed if self._connected else None)) is not None:
            reasons.append(why)
        reasons += self._why_others_wait
        reasons += [
            f"embedder {name}: {dispatcher.problem}"
            for name, dispatcher in self._dispatchers.items()
            if dispatcher.problem
        ]
        lag = self.lag_seconds
        if lag > self.config.worker.ready_max_lag_s:
            reasons.append(f"lag of {lag:.0f} s is above worker.ready_max_lag_s")
        if self._unheard_bytes > self.config.worker.ready_max_lag_bytes:
            reasons.append(
                f"the source has written {self._unheard_bytes:,} bytes of WAL that it has not sent yet, more than"
                " worker.ready_max_lag_bytes"
            )
        reasons += [f"index {name}: {problem}" for name, problem in self.problems.items()]
        if self.last is not None and not self.standby:  # a standby reads only when it is asked
            reasons += [
                f"index {name} is paused: {index.reason}"
                for name, index in self.last.indexes.items()
                if index.state == "paused"
            ]
            reasons += [
                f"index {name} waits to be built: {index.reason}"
                for name, index in self.last.indexes.items()
                if index.state == "building" and index.reason
            ]
            reasons += [
                f"index {name} cannot use a table: {index.locked}"
                for name, index in self.last.indexes.items()
                if index.locked is not None
            ]
            reasons += [
                f"index {name} cannot be read: {index.unreadable}"
                for name, index in self.last.indexes.items()
                if anyio.current_time() - self._unreadable.get(name, math.inf) > self.config.worker.ready_max_lag_s
            ]
        return reasons

    def not_loaded(self) -> list[str]:
        """Return which indexes do not hold all rows of their tables with vectors yet; nothing when all do.

        As of the last reading, which is some seconds old at most; a standby has to be made to read before.
        """
        if self.last is None:
            return ["the indexes have not been looked at yet"]
        reasons = []
        for name, index in self.last.indexes.items():
            waiting = index.backlog - index.backlog_live
            if index.state != "live":
                reasons.append(f"index {name} is {index.state}, not live")
            elif index.unreadable is not None:
                reasons.append(f"index {name} cannot be read: {index.unreadable}")
            elif waiting:
                reasons.append(f"index {name}: {waiting:,} loaded texts have no vector yet")
        return reasons

    @property
    def headline(self) -> str | None:
        """How the pipeline is, in a few words, as of the last reading; None before the first one."""
        if self.last is None or self.last.headline is None:
            return None
        head = self.last.headline
        return head.words if head.index is None else f"{head.index}: {head.words}"

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest received commit that is not in the target; NaN while that is unknown."""
        return math.nan if self._lag is None else self._lag.seconds

    @property
    def checkpoint(self) -> Lsn:
        """The position up to which the target has everything."""
        return self._checkpoint()

    @property
    def _why_not_followed(self) -> str | None:
        """Why no changes come, or none can be applied, unless that is likely to pass in a moment."""
        error = self._failing_for(AWAY_S)
        what = "changes cannot be applied" if self._connected else "the replication stream is not connected"
        return None if error is None else f"{what}: {error.with_fix}"

    @property
    def _why_others_wait(self) -> list[str]:
        """Why loops beside the stream cannot work, for a while already; without a cause that stops the stream, too."""
        told = self._why_not_followed or ""
        lasting = self.outages.lasting(AWAY_S)
        return [f"{', '.join(waits)}: {cause}" for cause, waits in lasting.items() if cause not in told]

    @property
    def _unheard_bytes(self) -> int:
        """How much WAL the source had at the last look that it had not sent by then; 0 when that is not known."""
        if self._lag is None or not self._lag.heard_lately or self.last is None:
            return 0
        checkpoint, behind = self.last.checkpoint, self.last.lag_bytes
        if checkpoint is None or behind is None:
            return 0
        return max(0, Lsn.parse(checkpoint) + behind - self._lag.heard)

    async def status(self) -> Status:
        """Return the status, read from both servers now.

        :raises TargetUnavailable: the target does not answer now.
        :raises SetupError: it refuses the login, or the pipeline's own tables cannot be read.
        """
        async with self._reading:
            with self.readings.noted():
                status = await self._read()
        if self._connected and self._lag is not None:
            # This process knows these figures exactly; the tables tell them to anyone to within some seconds.
            seconds = None if math.isnan(self._lag.seconds) else self._lag.seconds
            caught_up = self._lag.caught_up if self._lag.heard_lately else None
            status = msgspec.structs.replace(status, lag_seconds=seconds, caught_up=caught_up)
        by_another = status.worker.running and status.worker.name != worker_name()
        why = self._waits
        if why is None and (self._connected or not status.worker.running):
            why = self._why_not_followed
        if why is not None and not by_another:
            status = as_waiting(status, worker_name(), why)
        status = msgspec.structs.replace(status, problems=[*status.problems, *self._why_others_wait])
        status = with_problems(status, self.problems)
        self._note_unreadable(status)
        self.last = status
        reasons = self.not_ready()
        if starting := self.starting:
            # Of a pipeline that is not set up yet, or not followed, all of this is as it should be.
            status, reasons = without_problems(status), []
        status = self._memory.noted(self._paces.told(status), reasons)
        status = with_headlines(status, self.config.worker.ready_max_lag_s, reasons)
        if starting:
            status = as_starting(status)
        if self.standby:
            status = msgspec.structs.replace(status, headline=Headline("standby: another worker runs", "busy"))
        self.last = status
        return status

    async def _read(self) -> Status:
        target = await self._target.connection()
        if not self.is_followed(target):
            await self._target.aclose()
            target = await self._target.connection()
        source: Connection | CdcsyncError
        try:
            with admitting(self._admit, _let_be):
                source = await self._source.connection()
            self.admit(source)  # since it was opened, the stream may have gone to another server
        except CdcsyncError as error:
            await self._source.aclose()
            source = error
        with speaking_of("target"):
            return await read_status(self.config, source, target)

    async def _admit(self, connection: Connection, side: Side) -> None:
        self.admit(connection)

    def _note_unreadable(self, status: Status) -> None:
        """Note and log since when the tables of indexes cannot be read."""
        for name, index in status.indexes.items():
            if index.unreadable is None:
                self._unreadable.pop(name, None)
            elif name not in self._unreadable:
                self._unreadable[name] = anyio.current_time()
                log.warning("index_unreadable", index=name, error=index.unreadable)

    def history(self) -> History:
        """Return the rates of the last hour."""
        return self._memory.history()

    async def aclose(self) -> None:
        """Close the connections that the status is read over, and send the last spans."""
        await self._source.aclose()
        await self._target.aclose()
        await anyio.to_thread.run_sync(self.tracing.close)


def _troubled(dispatcher: Dispatcher) -> float:
    return float(dispatcher.problem is not None)


async def _let_be(error: CdcsyncError) -> None:
    """Leave it to the status to tell that the source cannot be asked."""
