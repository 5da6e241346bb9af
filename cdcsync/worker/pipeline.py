"""The pipeline: what keeps the indexes of one slot in step, from taking the lock to giving it up.

    lock ─► set-up ─► { stream | what works beside it }

    vectors     an embed loop for each generation of an index, and a fill for each that is not live
    embedders   notes of their state, a probe of providers, models kept from the garbage collector
    tables      backfills, comparisons, the audit, the watch of the catalog
    searches    words counted and entered, settling, builds, recall measured
    worker      the watch of the slot, heartbeats, gauges, and the end in time

Each of these is a task that reconnects by itself. They all end on an error for which a retry does not help, or on a
table that changed.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import anyio
import anyio.lowlevel
import msgspec
import structlog

from cdcsync.config import Config, RemoteEmbedder, tokens_per_day
from cdcsync.config.names import own_name
from cdcsync.documents.chunks import make_chunker
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import (
    CdcsyncError,
    IndexFault,
    LeaseLost,
    RunError,
    SetupError,
    TablesChanged,
    TargetRewound,
    leading,
)
from cdcsync.flows.address import watch_address
from cdcsync.flows.audit import RollingAudit, compare_for_ever
from cdcsync.flows.backfill import Backfills
from cdcsync.flows.backfill.preparing import PagePreparer
from cdcsync.flows.build import Builds, build_until_live
from cdcsync.flows.embed import BacklogPool, Dispatcher, EmbedLoop, note_for_ever, probe_for_ever, recall
from cdcsync.flows.evaluate.periodic import evaluate_for_ever
from cdcsync.flows.follow.accounts import Accounts
from cdcsync.flows.follow.apply import Applier
from cdcsync.flows.follow.open_batch import Limits
from cdcsync.flows.follow.prepare import Preparer
from cdcsync.flows.follow.stream import Stream
from cdcsync.flows.heartbeat import send_heartbeats
from cdcsync.flows.migrate.fill import Fill
from cdcsync.flows.migrate.models import note_embedders
from cdcsync.flows.retention import watch_slot
from cdcsync.flows.settle import Settle
from cdcsync.flows.setup.approval import Held
from cdcsync.flows.setup.exchange import do_what_was_asked
from cdcsync.flows.setup.indexes import let_go, outdated, pause_indexes, set_up_indexes
from cdcsync.flows.setup.start import refuse_early, set_up_publication, set_up_shared
from cdcsync.flows.watch import Watch
from cdcsync.flows.words import count_words_for_ever, enter_words_for_ever
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from cdcsync.model.pauses import Pause, Pauses
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.followed import FollowedServer
from cdcsync.postgres.interrupts import INTERRUPT_EVERY_S, interrupted_by
from cdcsync.postgres.sessions import IDLE_S, Connection, Session, admitting
from cdcsync.postgres.settings import Side
from cdcsync.preflight.identity import connect_source
from cdcsync.preflight.indexes import Plan
from cdcsync.process import collector
from cdcsync.source.catalog import read_catalog, read_server
from cdcsync.source.many import source_table
from cdcsync.source.spool import Spool
from cdcsync.target.session import ApplySession
from cdcsync.worker.gauges import set_gauges_for_ever
from cdcsync.worker.state import WorkerState
from cdcsync.worker.streaming import Streaming

log = structlog.get_logger()

STANDBY_POLL_S = 1.0
"""How often a standby tries for the lock: well within the five seconds that a takeover may take."""

SetUp = Literal["ready", "stopped", "outdated"] | list[IndexFault]
"""How a set-up ended: the worker may begin, was told to stop, has to examine everything again, or has to leave these
indexes out."""


def make_dispatchers(config: Config, state: WorkerState, embedders: Mapping[str, Embedder]) -> dict[str, Dispatcher]:
    """Return the dispatcher of each embedder. They outlive a pipeline, so that no call is lost when a table changes."""
    return {
        name: Dispatcher(
            one,
            state.metrics,
            anyio.current_time,
            config.worker.live_wait_ms / 1000,
            tokens_per_day(config.embedders[name]),
            tracing=state.tracing,
        )
        for name, one in embedders.items()
    }


class Pipeline:
    """The parts of a pipeline and how they are connected; call `set_up`, then `work`, and `aclose` in any case."""

    def __init__(
        self,
        config: Config,
        state: WorkerState,
        specs: list[IndexSpec],
        embedders: dict[str, Embedder],
        dispatchers: Mapping[str, Dispatcher],
        *,
        plans: Sequence[Plan],
        pauses: Pauses,
        held: Mapping[str, Held],
        known: set[str],
        builds: Builds,
        look_again: Callable[[], Awaitable[None]],
        before: Pipeline | None = None,
    ) -> None:
        """Make the parts.

        :param known: the indexes that an earlier pipeline of this worker has set up; takes those that this one does.
        :param builds: the worker's; those that the specs want go on.
        :param look_again: examines everything for the next pipeline, while this one still works.
        :param before: the worker's last pipeline, which is closed.
        """
        self.config = config
        self._look_again = look_again
        self.held = held
        self._known = known
        self._builds = builds
        self.state = state
        self.specs = specs
        metrics = state.metrics
        source_dsn, target_dsn, schema = config.source.dsn, config.target.dsn, config.target.schema
        last = None if before is None else before.session
        self.session: ApplySession = ApplySession(target_dsn, schema, config.source.slot, before=last)
        self.reads = Session(source_dsn, "source", application_name="cdcsync re-read", idle_s=IDLE_S)
        self.lag = Lag(time.time, anyio.current_time)
        self.limits = Limits(config.worker.batch_rows, config.worker.batch_bytes)
        self.dispatchers = dispatchers
        for dispatcher in dispatchers.values():
            dispatcher.lag = self.lag
        self.deliveries = {spec.name: Deliveries() for spec in specs}
        tables = {spec.name: source_table(spec) for spec in specs}
        self._pipeline = schema, config.source.slot
        self.embedding = BacklogPool(target_dsn, schema, sum(len(spec.generations) for spec in specs))
        self.embed_loops = {
            spec.name: EmbedLoop(
                self.embedding,
                spec,
                self.dispatchers[spec.config.embedder],
                metrics,
                alike=spec.alike(spec),
            )
            for spec in specs
        }
        self.beside: dict[str, list[EmbedLoop]] = {}
        """The embed loops of generations beside the live ones."""
        self.fills: list[Fill] = []
        for spec in specs:
            self._look_after_others(spec, metrics)
            for link in spec.links:
                metrics.related_changes.labels(spec.name, link.relation)  # begins at 0, as all counters
        preparers, page_preparers = {}, {}
        for spec in specs:
            embedder = embedders[spec.cut_by]
            chunker = make_chunker(
                spec.config.chunking,
                embedder.tokenizer_json,
                embedder.max_input_tokens,
                where=f"indexes.{spec.name}.chunking",
            )
            dispatcher = self.dispatchers[spec.config.embedder]
            preparers[spec.name] = Preparer(
                spec, chunker, dispatcher, tables[spec.name], self.reads, metrics, self.deliveries[spec.name]
            )
            page_preparers[spec.name] = PagePreparer(spec, schema, chunker, dispatcher)
        self.backfills = Backfills(
            source_dsn=source_dsn,
            target_dsn=target_dsn,
            schema=schema,
            specs={spec.name: spec for spec in specs},
            tables=tables,
            page_preparers=page_preparers,
            deliveries=self.deliveries,
            page_rows=config.worker.backfill_page_rows,
            metrics=metrics,
            max_rows_per_s=config.worker.backfill_max_rows_per_s or None,
            forget_vectors=self._forget_vectors,
        )
        self.settle = Settle(target_dsn, schema, specs, lambda: self.config.worker, metrics, self.lag)
        self.spool = Spool(config.source.spool_directory, config.source.spool_bytes)
        self.stream = Stream(
            specs=specs,
            applier=Applier(self.session, specs, preparers, metrics, state.tracing),
            accounts=Accounts(metrics, self.embed_loops, self.beside),
            deliveries=self.deliveries,
            page_at=self.backfills.marks.page_at,
            applying=self.backfills.marks.note_applying,
            applied=self.backfills.marks.note_applied,
            spool=self.spool,
            metrics=metrics,
            tracing=state.tracing,
            lag=self.lag,
            limits=self.limits,
            stopping=state.stopping,
        )
        self.streaming = Streaming(
            config, state, self.session, specs, self.stream, self.backfills.marks, self.deliveries, self.spool
        )
        self.watch = Watch(
            config,
            plans,
            specs,
            pauses,
            self.stream.pause,
            deliveries=self.deliveries,
            received=lambda: self.stream.received,
            unapproved={name: one.change for name, one in held.items()},
        )
        self.stream.described = self.watch.look
        self.comparing: dict[str, str] = {}
        """Whose transactions the comparison of an index waits for."""
        state.problems = ChainMap(self.watch.problems, self.embedding.problems, self.comparing, self.backfills.problems)
        state.attach(
            self.lag,
            lambda: self.stream.checkpoint,
            self.streaming.failing_for,
            self.dispatchers,
            self.reconfigure,
        )
        state.admit = self.streaming.server.admit

        def leave(_: str) -> None:
            self.session.cut()
            self.stream.look()

        self.applied = FollowedServer("target", leave)
        """The server to which changes are applied."""
        self.session.opened = self.applied.follow
        state.is_followed = self.applied.is_on

    def _look_after_others(self, spec: IndexSpec, metrics: Metrics) -> None:
        """Make the flows of an index's generations beside the live one, as far as their embedders are configured."""
        target = self.config.target
        for one in spec.others:
            dispatcher = self.dispatchers.get(one.config.embedder)
            if dispatcher is None or dispatcher.embedder.identity != one.model:
                log.warning(
                    "generation_without_embedder",
                    index=one.name,
                    generation=one.generation,
                    model=one.model,
                    fix="put its [embedders] section back and start the worker again, or drop it:"
                    f" cdcsync migrate {own_name(one.name)} drop",
                )
                continue
            loop = EmbedLoop(self.embedding, one, dispatcher, metrics, searched=False, alike=spec.alike(one))
            self.beside.setdefault(one.name, []).append(loop)
            limit = lambda: float(self.config.worker.backfill_max_rows_per_s)  # noqa: E731 - read anew at each page
            self.fills.append(Fill(target.dsn, target.schema, spec, one, dispatcher, loop, limit, self._builds))

    def _forget_vectors(self, index: str) -> None:
        """Have the vectors of an index made anew, those of each of its generations, instead of remembered."""
        for one in next(spec for spec in self.specs if spec.name == index).generations:
            if dispatcher := self.dispatchers.get(one.config.embedder):
                dispatcher.forget()

    def reconfigure(self, config: Config) -> None:
        """Go by another configuration, in what may change while the worker works."""
        self.config = msgspec.structs.replace(config, indexes=self.config.indexes)
        self.limits.rows, self.limits.bytes = config.worker.batch_rows, config.worker.batch_bytes
        self.backfills.limit(config.worker.backfill_page_rows, config.worker.backfill_max_rows_per_s or None)

    async def set_up(self, broken: Mapping[str, Pause]) -> SetUp:
        """Take the lock, then create what is missing.

        :param broken: why indexes cannot be followed; they are paused.
        :returns: how it ended; if some indexes have to be left out, why each of them. The others, as far as they were
            come to, are set up.
        """
        config = self.config

        async def shared(target: Connection) -> None:
            async with interrupted_by(self.state.stopping, target):
                await set_up_shared(target, config)

        # A standby may be of a newer version than the worker that it waits for, whose tables they still are.
        while not await self.session.try_open(shared, spared=lambda: self._builds.pids):
            if not self.state.standby:
                log.info("standby", slot=config.source.slot, holder_pid=self.session.holder)
            self.state.stand_by()
            self.state.note_waiting(None)
            self._known.clear()  # another worker may do anything to them
            with anyio.move_on_after(STANDBY_POLL_S):
                await self.state.stopping.wait()
                return "stopped"
        if self.state.standby:
            # The tables examined before the wait may be long gone.
            self.state.standby = False
            return "outdated"
        # Over the connection that holds the lock: if it breaks, nothing more is written until the lock is taken again.
        target = self.session.connection
        async with (
            await connect_source(config, await self.session.state(), application_name="cdcsync") as source,
            interrupted_by(self.state.stopping, target, source),
        ):
            await self._builds.keep(self.specs)
            if await do_what_was_asked(target, config, release=self._builds.release):
                return "outdated"
            await refuse_early(source, self.session, config)
            waiting = {name: one.pause for name, one in self.held.items()}
            await pause_indexes(target, config, waiting | dict(broken))
            await let_go(target, config)
            specs = [*self.specs, *(one.spec for one in self.held.values() if one.new)]
            tables = sorted({table for spec in specs for table in spec.tables})
            index_of = {one: spec.name for spec in specs for one in spec.single_tables}
            try:
                await set_up_publication(source, config, sorted(index_of), index_of=index_of)
            except IndexFault as error:
                return [error]
            with speaking_of("source"):
                expressions = {text for spec in specs for text in spec.config.expressions}
                catalog = await read_catalog(source, config.source.publication, tables, expressions=expressions)
                server = await read_server(source)
            if outdated(catalog, specs):
                return "outdated"
            await recall(target, *self._pipeline, self.dispatchers)
            refused = await set_up_indexes(target, config, specs, catalog, waiting, known=self._known)
            await pause_indexes(target, config, {one.index: Pause.of(one) for one in refused})
            if refused:
                return refused
            await note_embedders(target, config, {name: one.embedder for name, one in self.dispatchers.items()})
            await self.session.prepare(self.specs)
        self.streaming.fit(server.wal_sender_timeout_s)
        return "ready"

    async def work(self) -> list[IndexFault]:
        """Keep the indexes in step until told to stop, or until some are paused.

        :returns: why those are: begin again without them, or with what their tables are now.
        :raises TargetRewound: the target went back to an earlier state; begin again with what it is now.
        :raises LeaseLost: another worker, or a command, has taken over.
        :raises RunError: the worker cannot continue until someone acts.
        """
        paused: list[IndexFault] = []
        lost: list[CdcsyncError] = []
        collector.keep()  # before changes come: it takes some time
        try:
            async with anyio.create_task_group() as ending:
                async with anyio.create_task_group() as tasks:
                    ending.start_soon(self.end_in_time, tasks.cancel_scope)
                    tasks.start_soon(set_gauges_for_ever, self.state)  # over a session that outlives this pipeline

                    async def end(error: CdcsyncError) -> None:
                        lost.append(error)
                        tasks.cancel_scope.cancel()
                        # A task that works for one index or request would take the error for one of these.
                        await anyio.lowlevel.checkpoint()

                    async def admit(connection: Connection, side: Side) -> None:
                        if side == "source":
                            self.streaming.server.admit(connection)
                            return
                        self.applied.admit(connection)
                        await self.session.admit(connection)

                    async def refused(error: CdcsyncError) -> None:
                        if isinstance(error, SetupError):
                            await end(RunError.of(error))
                        elif isinstance(error, (LeaseLost, TargetRewound, RunError)):
                            await end(error)
                        self.streaming.server.refused(error)
                        self.applied.refused(error)

                    with admitting(admit, refused), self.state.outages.noted():
                        self._begin(tasks)
                        paused = await self.streaming.run()
                    tasks.cancel_scope.cancel()
                ending.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = leading(group)
            if lost and isinstance(error, CdcsyncError):
                raise lost[0] from None
            if isinstance(error, SetupError):
                raise RunError.of(error) from error
            raise error from None
        if lost:
            raise lost[0]
        return paused

    def _begin(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start all that works beside the stream."""
        for loop in [*self.embed_loops.values(), *(one for of in self.beside.values() for one in of)]:
            tasks.start_soon(loop.run)
        for fill in self.fills:
            tasks.start_soon(fill.run)
        tasks.start_soon(note_for_ever, self.embedding, *self._pipeline, self.dispatchers)
        tasks.start_soon(self.probe_providers)
        tasks.start_soon(self.keep_models)
        tasks.start_soon(self.evaluate_on_schedule)
        for words in (count_words_for_ever, enter_words_for_ever):
            tasks.start_soon(words, self.config.target.dsn, self.config.target.schema, self.specs)
        tasks.start_soon(self.settle.run)
        target = self.config.target
        tasks.start_soon(build_until_live, target.dsn, target.schema, self.specs, self._builds)
        tasks.start_soon(send_heartbeats, self.config)
        # Not before the slot exists: it would never deliver a mark that was written earlier.
        for run in (self.backfills.run, self.compare, self.audit, self.watch_tables, self.watch_slot):
            tasks.start_soon(self.once_streaming, run)
        tasks.start_soon(self.once_streaming, partial(watch_address, self.config.source.dsn, "source"))
        tasks.start_soon(self.once_streaming, partial(watch_address, target.dsn, "target"))

    async def aclose(self) -> None:
        """Give up the lock and every connection."""
        self.state.connected(False)
        with anyio.CancelScope(shield=True):
            await self.session.aclose()
            await self.reads.aclose()
            await self.embedding.aclose()
        self.spool.clear()

    async def once_streaming(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run a task once the slot is followed."""
        await self.streaming.begun.wait()
        await run()

    async def watch_tables(self) -> None:
        """Ask the source what the stream does not tell."""
        try:
            await self.watch.run()
        except TablesChanged:
            # The other indexes go on for as long as that takes.
            await self._look_again()
            raise

    async def watch_slot(self) -> None:
        """Look at the slot, and let go of a source that shuts down."""
        source = self.config.source
        await watch_slot(source.dsn, source.slot, self.state.metrics, self.stream.leave)

    async def keep_models(self) -> None:
        """Spare the garbage collector the models, too, which take seconds to load."""
        if not all(dispatcher.ready.is_set() for dispatcher in self.dispatchers.values()):
            for dispatcher in self.dispatchers.values():
                await dispatcher.ready.wait()
            collector.keep()

    async def compare(self) -> None:
        """Compare the indexes whose rows may have changed without the stream telling it."""
        specs = {spec.name: spec for spec in self.specs}
        config = self.config
        await compare_for_ever(
            config.source.dsn,
            config.target.dsn,
            config.target.schema,
            specs,
            deliveries=self.deliveries,
            reach=self.streaming.reach,
            problems=self.comparing,
        )

    async def audit(self) -> None:
        """Compare the indexes with their source for ever, unless the configuration forbids it."""
        worker = self.config.worker
        if not (worker.audit_max_rows_per_s or worker.verify_every_s):
            return
        audit = RollingAudit(
            self.config.source.dsn,
            self.config.target.dsn,
            self.config.target.schema,
            self.specs,
            self.state.metrics,
            most_rows_per_s=worker.audit_max_rows_per_s,
            every_s=worker.verify_every_s,
            busy=lambda: self.backfills.marks.beside_live or not self.lag.caught_up,
        )
        await audit.run()

    async def probe_providers(self) -> None:
        """Look for providers that serve another model under the same name; a local model is known by its files."""
        remote = {
            name: one
            for name, one in self.dispatchers.items()
            if isinstance(self.config.embedders[name], RemoteEmbedder)
        }
        await probe_for_ever(self.embedding, *self._pipeline, remote, self.state.metrics)

    async def evaluate_on_schedule(self) -> None:
        """Measure each index's recall from time to time, where the configuration asks for it."""
        target = self.config.target
        if every_s := self.config.worker.evaluate_every_s:
            await evaluate_for_ever(target.dsn, target.schema, self.specs, every_s=every_s)

    async def end_in_time(self, scope: anyio.CancelScope) -> None:
        """Once told to stop, abandon what is not done by `worker.stop_timeout_s`."""
        await self.state.stopping.wait()
        await anyio.sleep(self.config.worker.stop_timeout_s)
        log.warning("stop_timeout", seconds=self.config.worker.stop_timeout_s)
        async with anyio.create_task_group() as tasks:
            # A transaction that has begun is not cancelled from this side: its statement has to fail.
            tasks.start_soon(self.session.interrupt)
            await anyio.sleep(INTERRUPT_EVERY_S)
            scope.cancel()
