"""`cdcsync plan`: says what `run` would do, and approves what an index embeds, or another source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, Invocation, JsonOption, named
from cdcsync.errors import EXIT_WRONG
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.flows.plan import ConfigurationPlan
    from cdcsync.preflight import Finding

commands = typer.Typer()

EPILOG = """Before a deployment, by its exit status: `cdcsync plan`

    Let an index embed what the plan says: `cdcsync plan --approve articles`"""

EXIT_SOMETHING = 3
"""The status of a plan that is not empty, so that a pipeline of a deployment can stop and ask."""

COUNTED_S = 60.0
"""How long texts of an index are counted before the rest of its table is estimated."""


@commands.command(epilog=EPILOG)
def plan(
    context: typer.Context,
    config: ConfigOption = None,
    approve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INDEX",
            help="Approve what this index embeds, for this change of it alone; repeatable.",
            show_default=False,
        ),
    ] = None,
    approve_source: Annotated[
        bool,
        typer.Option(
            "--approve-source",
            help="Approve that the indexes follow the server that source.dsn leads to now, once, although they have"
            " followed another one: `run` reads every table again.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` would do with this configuration, and change nothing.

    Examines both servers as `check` does, then compares the configuration with what the target holds: indexes that are
    created, whose tables are read again and why, how many texts they embed and what that costs, what nothing uses any
    more. Rows are read and cut into chunks for it; after a minute an index's texts are estimated. Models embed a batch
    only if no worker has measured how long that takes.

    The exit status is 0 if there is nothing to do or an approval was given, 3 if there is something, 2 if the
    configuration is wrong.
    """
    import anyio

    from cdcsync import logs
    from cdcsync.cli import plans, printing

    configuration = context.ensure_object(Invocation).load(config)
    logs.configure("error", configuration.worker.log_format)
    for index in approve or ():
        configuration.index_named(index)
    findings, found, approved = anyio.run(
        interruptible, lambda: _plan(configuration, approve or [], source=approve_source)
    )
    if found is None:
        if as_json:
            printing.print_json({"ok": False, "findings": findings})
        else:
            printing.print_findings(findings)
            printing.print_verdict(findings, named(context, config))
        raise typer.Exit(EXIT_WRONG)
    if as_json:
        printing.print_json(found)
    else:
        plans.print_plan(found)
        for what, given in approved.items():
            printing.console().print(f"{what}: approved" if given else f"{what}: nothing to approve", markup=False)
    if not (approve or approve_source) and not found.empty:
        raise typer.Exit(EXIT_SOMETHING)


async def _plan(
    config: Config, approve: list[str], *, source: bool
) -> tuple[list[Finding], ConfigurationPlan | None, dict[str, bool]]:
    import anyio

    from cdcsync.cli.queries import gap_ahead
    from cdcsync.flows import plan as flow
    from cdcsync.flows.dry_run import Bounds
    from cdcsync.preflight import build_embedders, examine
    from cdcsync.preflight.findings import noting

    findings: list[Finding] = []
    embedders = build_embedders(config, findings)
    try:
        report = await examine(config, embedders)
        findings += report.findings
        approved = {}
        if source and not any(finding.level == "error" for finding in findings):
            with noting(findings, "source", "source.dsn"):
                approved["source.dsn"] = await flow.approve_source(config)
        gap = await gap_ahead(config, findings)
        if any(finding.level == "error" for finding in findings):
            return findings, None, {}
        bounds = Bounds(seconds=COUNTED_S)
        found = await flow.read_plan(config, report, embedders, bounds=bounds, measure=True, gap=gap)
        for one in found.indexes:
            if one.index in approve:
                approved[one.index] = await flow.approve(config, report, one)
        return findings, found, approved
    finally:
        with anyio.CancelScope(shield=True):
            for embedder in embedders.values():
                await embedder.aclose()
