"""Questions of the commands to both servers and to a model. Nothing here writes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from cdcsync.errors import AnotherServer, CdcsyncError, GapError, SourceUnavailable, Unavailable

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.flows.plan import ConfigurationPlan
    from cdcsync.postgres.liveness import WatchedConnection
    from cdcsync.postgres.sessions import Connection, Session
    from cdcsync.preflight import Finding
    from cdcsync.status import Paces, Status

WATCH_EVERY_S = 1.0
"""How often a watched status is read: as often as a person can follow, and a few cheap queries each time."""

COUNTED_S = 5.0
"""How long `check` counts the texts that all indexes would embed, before it estimates the rest; `plan` takes longer."""


async def examine_all(config: Config, *, deep: bool) -> tuple[list[Finding], ConfigurationPlan | None]:
    """Return what the checks of models, servers and tables find, and what `run` would do if they find no error.

    :param deep: load local models too.
    """
    import anyio

    from cdcsync.flows.dry_run import Bounds
    from cdcsync.flows.plan import read_plan
    from cdcsync.preflight import (
        build_embedders,
        examine,
        examine_embedders,
        examine_rerankers,
        local_models,
        unpinned,
    )
    from cdcsync.preflight.findings import noting

    findings: list[Finding] = []
    plan = None
    embedders = build_embedders(config, findings)
    try:
        async with anyio.create_task_group() as tasks:

            async def ask_models() -> None:
                described = () if deep else local_models(config)
                findings.extend(await examine_embedders(embedders, described=described))
                findings.extend(await examine_rerankers(config, deep=deep))
                findings.extend(unpinned(config, embedders))

            tasks.start_soon(ask_models)
            report = await examine(config, embedders)
        findings += report.findings
        gap = await gap_ahead(config, findings)
        if not any(finding.level == "error" for finding in findings):
            with noting(findings, "source", "plan"):
                bounds = Bounds(seconds=COUNTED_S / len(config.indexes))
                plan = await read_plan(config, report, embedders, bounds=bounds, measure=False, gap=gap)
    finally:
        for embedder in embedders.values():
            await embedder.aclose()
    return findings, plan


async def gap_ahead(config: Config, findings: list[Finding]) -> GapError | None:
    """Return the gap for which `run` would read every table again; one at which it would stop is an error among these.

    :param findings: what was found before; after an error nothing more is looked for.
    """
    from cdcsync.flows.setup.gaps import foreseen_gap, heals
    from cdcsync.preflight import Finding
    from cdcsync.preflight.findings import noting

    gap = None
    if not any(finding.level == "error" for finding in findings):
        with noting(findings, "source", f"slot {config.source.slot}"):
            gap = await foreseen_gap(config)
    if gap is None:
        return None
    slot = f"slot {config.source.slot}"
    where = gap.where or slot
    if heals(gap, config):
        if not any(finding.level == "warning" and finding.where == slot for finding in findings):
            why = "this server is approved" if isinstance(gap, AnotherServer) else "on_gap is resync"
            findings.append(Finding.warning(where, gap.message, f"{why}: `run` reads every table again"))
        return gap
    findings.append(Finding.of(gap, where))
    return None


@asynccontextmanager
async def _sessions(config: Config) -> AsyncIterator[tuple[Session, Session]]:
    from cdcsync.postgres.sessions import Session
    from cdcsync.preflight.identity import known_state, refuse_elsewhere

    async def right(connection: WatchedConnection) -> None:
        try:
            state = await known_state(await target.connection(), config)
        except CdcsyncError:
            return  # it is of the target, and told where that is read
        refuse_elsewhere(connection, state, config)

    async with (
        Session(config.source.dsn, "source", application_name="cdcsync status", right=right) as source,
        Session(config.target.dsn, "target", application_name="cdcsync status") as target,
    ):
        yield source, target


async def read_status_once(config: Config) -> Status:
    """Return the status of both servers.

    :raises TargetUnavailable: the target does not answer now; a source that does not is part of the status.
    """
    from cdcsync.status import Paces

    async with _sessions(config) as (source, target):
        return await _read(config, source, target, Paces())


async def _read(config: Config, source: Session, target: Session, paces: Paces) -> Status:
    from cdcsync.cli.beside import remembered_by_worker
    from cdcsync.status import read_status, with_headlines

    connected = await target.connection()
    connected_source: Connection | CdcsyncError
    try:
        connected_source = await source.connection()
    except (SourceUnavailable, AnotherServer) as error:
        connected_source = error
    status = paces.told(await read_status(config, connected_source, connected))
    return with_headlines(await remembered_by_worker(config, status), config.worker.ready_max_lag_s)


async def watch_status(config: Config, *, as_json: bool) -> None:
    """Show the status anew each second, until cancelled; as JSON, print it on a line of its own each time.

    :raises TargetUnavailable: the target does not answer, and a program is watching; a person is told, and waits.
    """
    import anyio
    from rich.live import Live

    from cdcsync.cli.printing import console, error_text, print_json
    from cdcsync.status import Paces, render_table

    paces = Paces()
    async with _sessions(config) as (source, target):
        if as_json:
            while True:
                print_json(await _read(config, source, target, paces), indent=False)
                await anyio.sleep(WATCH_EVERY_S)
        out = console(wrap=True)
        # A file or a pipe gets one after the other: there, a live display would show nothing before the end.
        live = Live(console=out, auto_refresh=False) if out.is_terminal else None
        with live or nullcontext():
            while True:
                try:
                    shown = render_table(await _read(config, source, target, paces))
                except Unavailable as error:
                    # Watching is what one does while a server restarts.
                    shown = error_text(error)
                if live is not None:
                    live.update(shown, refresh=True)
                else:
                    out.print(shown, "")
                await anyio.sleep(WATCH_EVERY_S)
