"""The worker: one process that keeps the indexes of one configuration in step until it is told to stop.

    preflight ─► lock ─► set-up ─► { stream, embed loop per index, backfills, build, gauges, HTTP }

Each of these is a task that mends its own connections. What ends the worker is an error that waiting does not mend.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import anyio
import anyio.abc
import msgspec
import structlog

from cdcsync import http
from cdcsync.backfill import Backfills
from cdcsync.build import build_until_live
from cdcsync.chunks import make_chunker
from cdcsync.config import Config
from cdcsync.embed import Desk, EmbedLoop, backoff_s
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import SourceUnavailable, TargetUnavailable, Unavailable, leading
from cdcsync.index.schema import IndexSpec
from cdcsync.index.session import ApplySession, worker_name
from cdcsync.metrics import Metrics
from cdcsync.postgres import Session, connect, speaking_of
from cdcsync.preflight import Finding, build_embedders, examine, refuse
from cdcsync.prepare import Preparer
from cdcsync.setup import set_up_indexes, set_up_publication, set_up_shared, starting_point
from cdcsync.source.catalog import current_snapshot, read_server
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.source.tables import SourceTable
from cdcsync.status import Status, read_status
from cdcsync.stream import Stream
from cdcsync.visibility import Deliveries

log = structlog.get_logger()

STANDBY_POLL_S = 1.0
"""How often a standby tries for the lock: well within the five seconds that a takeover may take."""

GAUGES_S = 2.0
"""How often the gauges are read from both servers."""

ALIVE_WITHIN_S = 30.0
"""The loop is alive if it turned within this time; the longest uninterrupted step is a batch being decoded."""


class WorkerHandle:
    """A running worker, as seen by whoever started it, and by its HTTP endpoints."""

    def __init__(self, config: Config) -> None:
        self.metrics = Metrics()
        self.port: int | None = None
        self._config = config
        self._stream: Stream | None = None
        self._desks: dict[str, Desk] = {}
        self._connected = False
        self._standby = False
        self._stopping = anyio.Event()
        self._turned = anyio.current_time()
        self._source = Session(config.source.dsn, "source", application_name="cdcsync status")
        self._target = Session(config.target.dsn, "target", application_name="cdcsync status")
        self._reading = anyio.Lock()
        self._last: Status | None = None

    def stop(self) -> None:
        """Ask for an orderly end: the batch in hand is finished, or abandoned whole."""
        self._stopping.set()
        if self._stream is not None:
            self._stream.stop()

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
        if self._standby:
            reasons.append("standby: another worker holds the pipeline")
        elif not self._connected:
            reasons.append("the replication stream is not connected")
        reasons += [f"embedder {name}: {desk.problem}" for name, desk in self._desks.items() if desk.problem]
        lag = self.lag_seconds
        if lag > self._config.worker.ready_max_lag_s:
            reasons.append(f"lag of {lag:.0f} s is above worker.ready_max_lag_s")
        if self._last is not None:
            reasons += [
                f"index {name} is paused: {index.reason}"
                for name, index in self._last.indexes.items()
                if index.state == "paused"
            ]
        return reasons

    @property
    def lag_seconds(self) -> float:
        """Age of the oldest received commit that is not in the target; 0.0 when there is none."""
        oldest = self._stream.oldest_unapplied if self._stream is not None else None
        return 0.0 if oldest is None else max(0.0, (datetime.now(UTC) - oldest).total_seconds())

    async def status(self) -> Status:
        """Return the status, read from both servers now."""
        async with self._reading:
            target = await self._target.connection()
            try:
                source = await self._source.connection()
            except SourceUnavailable:
                source = None
            with speaking_of("target"):
                status = await read_status(self._config, source, target)
        if self._connected and self._stream is not None:
            # What this process knows exactly, against what the tables tell anyone to within some seconds.
            status = msgspec.structs.replace(
                status, lag_seconds=self.lag_seconds, caught_up=self._stream.oldest_unapplied is None
            )
        self._last = status
        return status


class _Worker:
    """The parts of a worker and how they are wired."""

    def __init__(
        self, config: Config, handle: WorkerHandle, specs: list[IndexSpec], embedders: dict[str, Embedder]
    ) -> None:
        self.config = config
        self.handle = handle
        self.specs = specs
        metrics = handle.metrics
        source_dsn, target_dsn, schema = config.source.dsn, config.target.dsn, config.target.schema
        self.session = ApplySession(target_dsn, schema, config.source.slot)
        self.reads = Session(source_dsn, "source", application_name="cdcsync re-read")
        self.streaming = anyio.Event()
        self.desks = {name: Desk(embedder, metrics, anyio.current_time) for name, embedder in embedders.items()}
        self.deliveries = {spec.name: Deliveries() for spec in specs}
        tables = {spec.name: SourceTable(spec.shape, spec.source_key_types, spec.row_filter) for spec in specs}
        self.embed_loops = {
            spec.name: EmbedLoop(target_dsn, schema, spec, self.desks[spec.config.embedder], metrics) for spec in specs
        }
        self.backfills = Backfills(
            source_dsn=source_dsn,
            target_dsn=target_dsn,
            schema=schema,
            specs={spec.name: spec for spec in specs},
            tables=tables,
            deliveries=self.deliveries,
            page_rows=config.worker.backfill_page_rows,
            metrics=metrics,
        )
        preparers = {}
        for spec in specs:
            embedder = embedders[spec.config.embedder]
            chunker = make_chunker(
                spec.config.chunking,
                embedder.tokenizer_json,
                embedder.max_input_tokens,
                where=f"indexes.{spec.name}.chunking",
            )
            desk = self.desks[spec.config.embedder]
            preparers[spec.name] = Preparer(spec, chunker, desk, tables[spec.name], self.reads, metrics)
        directory = Path(config.source.spool_directory or tempfile.gettempdir()) / f"cdcsync-spool-{config.source.slot}"
        self.stream = Stream(
            specs=specs,
            session=self.session,
            preparers=preparers,
            embed_loops=self.embed_loops,
            deliveries=self.deliveries,
            take_page=self.backfills.take_page,
            page_applied=self.backfills.page_applied,
            spool=Spool(directory, config.source.spool_bytes),
            metrics=metrics,
            batch_rows=config.worker.batch_rows,
            batch_bytes=config.worker.batch_bytes,
            status_every_s=config.source.feedback_every_s,
        )
        handle._stream = self.stream
        handle._desks = self.desks

    async def set_up(self) -> bool:
        """Take the lock, then create what is missing; False when told to stop while waiting for the lock."""
        config = self.config
        async with await connect(config.target.dsn, "target") as target:
            await set_up_shared(target, config)
            while not await self.session.try_open():
                if not self.handle._standby:
                    log.info("standby", slot=config.source.slot)
                self.handle._standby = True
                with anyio.move_on_after(STANDBY_POLL_S):
                    await self.handle._stopping.wait()
                    return False
            self.handle._standby = False
            await set_up_indexes(target, config, self.specs)
        async with await connect(config.source.dsn, "source") as source:
            await set_up_publication(source, config, self.specs)
            with speaking_of("source"):
                server = await read_server(source)
        if server.wal_sender_timeout_s > 0:
            self.stream.status_every_s = min(config.source.feedback_every_s, server.wal_sender_timeout_s / 3)
        await self.session.prepare(self.specs)
        return True

    async def stream_for_ever(self) -> None:
        """Follow the slot over any number of connections until told to stop."""
        attempt = 0
        control = Session(self.config.source.dsn, "source", application_name="cdcsync control")
        suspected = False
        while not self.stream.stopping:
            try:
                async with control, await SlotConnection.connect(self.config.source.dsn) as slot:
                    source = await control.connection()
                    checkpoint = await starting_point(
                        slot, source, self.session, self.config, [spec.name for spec in self.specs]
                    )
                    if not suspected:
                        # What these did before the slot or the publication took notice of their tables may never be
                        # delivered.
                        with speaking_of("source"):
                            running = (await current_snapshot(source)).running
                        for deliveries in self.deliveries.values():
                            deliveries.suspect(running)
                        suspected = True
                    await slot.start(
                        self.config.source.slot,
                        [self.config.source.publication],
                        checkpoint,
                        streaming=self.config.source.streaming,
                    )
                    log.info("streaming", slot=self.config.source.slot, checkpoint=str(checkpoint))
                    self.connected(True)
                    self.streaming.set()
                    attempt = 0
                    await self.stream.follow(slot, checkpoint)
            except Unavailable as error:
                self.handle.metrics.reconnects.labels("source").inc()
                delay = backoff_s(attempt, first=0.2, most=15)
                log.warning("stream_waits", error=str(error), attempt=attempt + 1, delay_s=round(delay, 2))
                if isinstance(error, TargetUnavailable):
                    await self._reopen_target()
                with anyio.move_on_after(delay):
                    await self.handle._stopping.wait()
                attempt += 1
            finally:
                self.connected(False)

    async def backfill_once_streaming(self) -> None:
        """Serve backfills: not before the slot exists, which would never deliver a mark written earlier."""
        await self.streaming.wait()
        await self.backfills.run()

    async def end_in_time(self, scope: anyio.CancelScope) -> None:
        """Once told to stop, abandon what is not done by `worker.stop_timeout_s`."""
        await self.handle._stopping.wait()
        await anyio.sleep(self.config.worker.stop_timeout_s)
        log.warning("stop_timeout", seconds=self.config.worker.stop_timeout_s)
        scope.cancel()

    async def _reopen_target(self) -> None:
        try:
            await self.session.reopen(self.specs)
        except TargetUnavailable as error:
            log.debug("target_still_away", error=str(error))

    def connected(self, up: bool) -> None:
        """Note whether the stream flows."""
        self.handle._connected = up
        self.handle.metrics.connected.labels("source").set(up)

    async def gauges_for_ever(self) -> None:
        """Keep the gauges current."""
        while True:
            try:
                status = await self.handle.status()
                self._set_gauges(status)
            except Unavailable as error:
                log.debug("gauges_wait", error=str(error))
            await anyio.sleep(GAUGES_S)

    def _set_gauges(self, status: Status) -> None:
        metrics = self.handle.metrics
        metrics.checkpoint_lsn.set(int(self.stream.progress.checkpoint))
        metrics.lag_seconds.set(self.handle.lag_seconds)
        if status.lag_bytes is not None:
            metrics.lag_bytes.set(status.lag_bytes)
        if status.slot is not None:
            metrics.slot_retained_bytes.set(status.slot.retained_bytes or 0)
            safe = status.slot.safe_bytes
            metrics.slot_safe_bytes.set(float("inf") if safe is None else safe)
        for name, index in status.indexes.items():
            metrics.backlog.labels(name, "live").set(index.backlog_live)
            metrics.backlog.labels(name, "backfill").set(index.backlog - index.backlog_live)
            metrics.failed.labels(name).set(index.failed)
            for state in ("building", "live", "paused"):
                metrics.index_state.labels(name, state).set(index.state == state)


async def run(
    config: Config, *, started: Callable[[WorkerHandle], None] | None = None, handle_signals: bool = True
) -> None:
    """Run the worker until it is told to stop (SIGTERM, SIGINT or `WorkerHandle.stop`).

    :param started: called with the handle once HTTP answers and before the first change is applied.
    :raises SetupError: a check before the start failed; nothing was created.
    :raises GapError: changes may have been lost.
    :raises LeaseLost: another worker took over.
    """
    findings: list[Finding] = []
    embedders = build_embedders(config, findings)
    report = await examine(config, embedders)
    report.findings[:0] = findings
    refuse(report)
    for finding in report.findings:
        if finding.level == "warning":
            log.warning("preflight", where=finding.where, problem=finding.message, fix=finding.hint)
    handle = WorkerHandle(config)
    worker = _Worker(config, handle, report.specs, embedders)
    try:
        async with anyio.create_task_group() as tasks:
            if handle_signals:
                await tasks.start(_stop_on_signal, handle)
            tasks.start_soon(handle.turn)
            await tasks.start(_serve, config, handle)
            if started is not None:
                started(handle)
            if await worker.set_up():
                await _work(worker)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None
    finally:
        with anyio.CancelScope(shield=True):
            await worker.session.aclose()
            await worker.reads.aclose()
            await handle._source.aclose()
            await handle._target.aclose()
            for embedder in embedders.values():
                await embedder.aclose()
    log.info("stopped", checkpoint=str(worker.stream.progress.checkpoint), worker=worker_name())


async def _work(worker: _Worker) -> None:
    async with anyio.create_task_group() as tasks:
        for desk in worker.desks.values():
            tasks.start_soon(desk.run)
        for loop in worker.embed_loops.values():
            tasks.start_soon(loop.run)
        tasks.start_soon(worker.backfill_once_streaming)
        tasks.start_soon(build_until_live, worker.config.target.dsn, worker.config.target.schema, worker.specs)
        tasks.start_soon(worker.gauges_for_ever)
        tasks.start_soon(worker.end_in_time, tasks.cancel_scope)
        await worker.stream_for_ever()
        tasks.cancel_scope.cancel()


async def _stop_on_signal(
    handle: WorkerHandle, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name)
            handle.stop()
            return


async def _serve(
    config: Config, handle: WorkerHandle, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    host, port = config.worker.listen_address

    def bound(actual: int) -> None:
        handle.port = actual
        log.info("listening", host=host, port=actual)
        task_status.started()

    await http.serve(http.make_app(handle), host, port, started=bound)
