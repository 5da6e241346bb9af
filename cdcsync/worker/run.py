"""The worker: one process that keeps the indexes of one configuration in step until it is told to stop.

    preflight ─► HTTP, signals ─► { a pipeline, until one of its tables changes; then preflight and another } ─► the end

The worker ends only on an error for which a retry does not help.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, assert_never

import anyio
import anyio.abc
import msgspec
import structlog

from cdcsync.backoff import Backoff
from cdcsync.config import Config
from cdcsync.config.values import is_loopback
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import (
    CdcsyncError,
    IndexFault,
    LeaseLost,
    SetupError,
    TablesChanged,
    TargetRewound,
    Unavailable,
    leading,
)
from cdcsync.flows.build import Builds
from cdcsync.flows.setup.approval import Held, hold_unapproved
from cdcsync.http.listening import serve
from cdcsync.model.pauses import Pause, Pauses
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.interrupts import cancelled_by
from cdcsync.preflight import Finding, Report, build_embedders, examine, refuse
from cdcsync.process.stopping import end_at_once
from cdcsync.target.locked_session import worker_name
from cdcsync.worker import http
from cdcsync.worker.descriptors import raise_descriptor_limit
from cdcsync.worker.pipeline import STANDBY_POLL_S, Pipeline, make_dispatchers
from cdcsync.worker.reload import reload_on_signal
from cdcsync.worker.state import WorkerState
from cdcsync.worker.systemd import ServiceManager, keep_informed

log = structlog.get_logger()

SET_UP_ATTEMPTS = 3
"""How often in a row a server may refuse a set-up in the same words, though the examination finds nothing wrong, before
the worker ends. Once it may: somebody edits the same publication, or drops a table, between the two."""


async def run(
    config: Config,
    *,
    reread: Callable[[], Config] | None = None,
    started: Callable[[WorkerState], None] | None = None,
    shown: Callable[[WorkerState], Coroutine[Any, Any, None]] | None = None,
    handle_signals: bool = True,
    listening: bool = True,
) -> None:
    """Run the worker as `cdcsync run` does, until SIGTERM or SIGINT.

    Inside an application, pass `handle_signals=False` and cancel the task to stop. Whenever that happens, the next
    worker resumes from the last commit.

    :param reread: reads the configuration again, at SIGHUP; without it, that signal keeps its usual meaning.
    :param started: called with the worker's state once HTTP answers and before the first change is applied.
    :param shown: a coroutine that runs beside the worker and shows its state to people; it must not raise.
    :param handle_signals: stop on SIGTERM and SIGINT.
    :param listening: serve the HTTP endpoints.
    :raises SetupError: a check before the start failed; nothing was created.
    :raises RunError: the worker cannot continue until someone acts; what is committed stays.
    :raises GapError: changes may have been lost.
    """
    raise_descriptor_limit()
    findings: list[Finding] = []
    embedders = build_embedders(config, findings)
    report = await examine(config, embedders)
    report.findings[:0] = findings
    if not report.passes:
        refuse(report)
    state = WorkerState(config)
    try:
        async with anyio.create_task_group() as tasks:
            if handle_signals:
                await tasks.start(_stop_on_signal, state)
                if manager := ServiceManager.from_environment(os.environ):
                    tasks.start_soon(keep_informed, manager, state)
                if reread is not None:
                    await tasks.start(reload_on_signal, state, reread, manager)
            tasks.start_soon(state.turn)
            if listening:
                await tasks.start(_serve, config, state)
            if started is not None:
                started(state)
            if shown is not None:
                tasks.start_soon(shown, state)
            if report.passes:
                report = await _wait_for_servers(config, state, report, embedders)
                report.findings[:0] = findings
                if state.stopping.is_set():
                    tasks.cancel_scope.cancel()
                    return
                refuse(report)
            for finding in report.findings:
                if finding.level == "warning":
                    log.warning("preflight", where=finding.where, problem=finding.message, fix=finding.hint)
            await _run_pipelines(config, state, report, embedders, tasks)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None
    finally:
        with anyio.CancelScope(shield=True):
            await state.aclose()
            for embedder in embedders.values():
                await embedder.aclose()
    log.info("stopped", worker=worker_name())


async def _wait_for_servers(
    config: Config, state: WorkerState, report: Report, embedders: dict[str, Embedder]
) -> Report:
    """Examine again for as long as servers are away, for up to `worker.start_timeout_s`; returns the last report."""
    backoff = Backoff(first=0.5, most=5, until=state.stopping)
    with anyio.move_on_after(config.worker.start_timeout_s):
        while report.passes and not state.stopping.is_set():
            away = _said(report)
            state.note_waiting(away)
            log.warning("start_waits", error=away, most_s=config.worker.start_timeout_s)
            await backoff.wait()
            report = await examine(config, embedders)
    state.note_waiting(None)
    return report


class Ended(msgspec.Struct, frozen=True):
    """How a pipeline ended; if nothing is said, the next one begins with another examination.

    :ivar paused: why it does not follow indexes any more: the next one begins without these.
    :ivar in_set_up: whether its set-up left them out, which would fail again if nothing else is done before.
    :ivar refusals: what a server said to this set-up and to those before, in the same words each time.
    """

    paused: Sequence[IndexFault] = ()
    in_set_up: bool = False
    refusals: Sequence[str] = ()


async def _run_pipelines(
    config: Config,
    state: WorkerState,
    report: Report,
    embedders: dict[str, Embedder],
    tasks: anyio.abc.TaskGroup,
) -> None:
    """Run one pipeline after the other until told to stop; an index that pauses is examined while the others go on.

    An index whose table still has all it needs (a type changed, the table was created again) is resumed by reading the
    table again. The others stay paused, and their changes are skipped, until the configuration or the table is fixed.
    """
    pauses = Pauses()
    dispatchers = make_dispatchers(config, state, embedders)
    unopened = list(dispatchers.values())
    """A standby opens no model."""
    known: set[str] = set()
    builds = Builds(config.target.dsn, config.target.schema, tasks)
    ahead: list[Report] = []
    """The examination for the next pipeline, if it was made while the one before still worked."""
    noted: Report | None = None
    """The examination that is gone by: when indexes are paused, it holds for the others, which go on at once."""
    left_out: dict[str, Pause] = {}
    """The indexes that were paused since. The next pipeline's watch sees when they may be followed again, and has that
    examined while the others are followed."""
    pipeline: Pipeline | None = None
    ended = Ended()

    async def look_again() -> None:
        found = await examine(config, embedders)
        if not found.errors:
            ahead.append(found)

    def open_models() -> None:
        while unopened:
            tasks.start_soon(unopened.pop().run)

    def pause(error: IndexFault, *, in_set_up: bool) -> None:
        log.error("index_paused", index=error.index, error=str(error), fix=error.hint)
        seen = {plan.name: plan.seen for plan in report.plans}.get(error.index)
        pauses.note(error, anyio.current_time(), seen, refused=in_set_up)
        left_out[error.index] = Pause.of(error)

    while not state.stopping.is_set():
        if report is not noted:
            noted = report
            left_out.clear()
            for plan in report.plans:
                if plan.name in report.broken and not plan.unfit:
                    pauses.note_standing(plan.name, anyio.current_time())
        broken = left_out | pauses.standing(report.broken, anyio.current_time())
        specs = [spec for spec in report.specs if spec.name not in broken]
        try:
            held = await _hold(state, report, specs, embedders)
        except IndexFault as error:
            pause(error, in_set_up=True)
            continue
        if held is None:
            report = await _examine_again(config, state, embedders)
            continue
        examined = msgspec.structs.replace(state.config, indexes=report.indexes)
        specs = [spec for spec in specs if spec.name not in held]
        pipeline = Pipeline(
            *(examined, state, specs, embedders, dispatchers),
            plans=report.plans,
            pauses=pauses,
            held=held,
            known=known,
            builds=builds,
            look_again=look_again,
            before=pipeline,
        )
        ended = await _run(pipeline, state, broken, known=known, refusals=ended.refusals, once_set_up=open_models)
        for why in ended.paused:
            pause(why, in_set_up=ended.in_set_up)
        if state.stopping.is_set():
            return
        if not ended.paused:
            report = ahead.pop() if ahead else await _examine_again(config, state, embedders)
        ahead.clear()


async def _run(
    pipeline: Pipeline,
    state: WorkerState,
    broken: Mapping[str, Pause],
    *,
    known: set[str],
    refusals: Sequence[str],
    once_set_up: Callable[[], None],
) -> Ended:
    """Set a pipeline up, let it work and close it. If a server has to be waited for, that is done before it is closed.

    :param broken: why indexes cannot be followed.
    :param known: the indexes that were set up; emptied if others may have changed them since.
    :param refusals: what a server said to the set-ups before, in the same words each time.
    :raises SetupError: a server refuses the set-up, and has said so often enough.
    :raises RunError: the worker cannot continue until someone acts.
    """
    try:
        ending = await pipeline.set_up(broken)
        state.note_waiting(None)
        match ending:
            case "ready":
                once_set_up()
                return Ended(await pipeline.work())
            case list():
                return Ended(ending, in_set_up=True)
            case "stopped" | "outdated":
                pass
            case _:
                assert_never(ending)
    except IndexFault as error:
        return Ended([error])
    except TablesChanged as error:
        log.info("tables_changed", where=error.where, because=error.message)
    except SetupError as error:
        refusals = [*(one for one in refusals if one == str(error)), str(error)]
        if error.sqlstate is None or len(refusals) == SET_UP_ATTEMPTS:
            raise
        if not state.stopping.is_set():
            log.warning("set_up_refused", error=str(error), fix=error.hint)
            await _wait(state, error)
        return Ended(refusals=refusals)
    except TargetRewound as error:
        known.clear()
        log.error("target_rewound", error=str(error), fix=error.hint)
    except LeaseLost as error:
        # By a command, it may be, that did its work while this worker was cut off, and has ended since.
        known.clear()
        log.warning("overtaken", error=str(error))
    except Unavailable as error:
        known.clear()
        if not state.stopping.is_set():
            log.warning("set_up_waits", error=str(error), fix=error.hint)
            await _wait(state, error)
    finally:
        await pipeline.aclose()
    return Ended()


async def _hold(
    state: WorkerState, report: Report, specs: list[IndexSpec], embedders: dict[str, Embedder]
) -> dict[str, Held] | None:
    """Return which indexes wait for an approval; None if that could not be found out."""
    try:
        async with cancelled_by(state.stopping):
            return await hold_unapproved(state.config, specs, report.catalog, embedders)
    except Unavailable as error:
        log.warning("set_up_waits", error=str(error), fix=error.hint)
        await _wait(state, error)
    return None


async def _wait(state: WorkerState, error: CdcsyncError) -> None:
    """Wait a second before another set-up, or until told to stop, and show why."""
    state.note_waiting(error.with_fix)
    with anyio.move_on_after(STANDBY_POLL_S):
        await state.stopping.wait()


async def _examine_again(config: Config, state: WorkerState, embedders: dict[str, Embedder]) -> Report:
    backoff = Backoff(first=0.5, most=30, until=state.stopping)
    while True:
        report = await examine(config, embedders)
        state.examined(target_reached=report.target_reached)
        if not report.errors or state.stopping.is_set():
            return report
        state.note_waiting(_said(report))
        log.warning("examination_waits", problems=_problems(report))
        await backoff.wait()


def _said(report: Report) -> str:
    return "; ".join(_problems(report))


def _problems(report: Report) -> list[str]:
    return [f"{finding.where}: {finding.with_fix}" for finding in report.errors]


async def _stop_on_signal(
    state: WorkerState, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        number = await anext(signals)
        log.info("stopping", signal=signal.Signals(number).name)
        state.stop()
    # A second signal means: do not wait for the current batch.
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)
    try:
        await anyio.sleep_forever()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


async def _serve(
    config: Config, state: WorkerState, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    host, port = config.worker.listen_address

    def bound(actual: int) -> None:
        state.port = actual
        log.info("listening", host=host, port=actual)
        task_status.started()

    app = http.make_app(state, embed=state.embed_query, hosts=config.worker.hosts if is_loopback(host) else None)
    await serve(app, host, port, bounds=http.BOUNDS, started=bound)
