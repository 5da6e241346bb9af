"""`cdcsync teardown` and `cdcsync drop`: ask, take away, and say what became of each thing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, Invocation, JsonOption
from cdcsync.errors import UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cdcsync.flows.teardown.publication import Step
    from cdcsync.target.belongings import Belongings

commands = typer.Typer()

EPILOG = """Let the source go, and keep the index as it is: `cdcsync teardown`

    Leave nothing behind: `cdcsync teardown --purge`"""

_MARKS = {"dropped": ("✓", "green"), "absent": ("·", "dim"), "kept": ("!", "yellow")}


@commands.command(epilog=EPILOG)
def teardown(
    context: typer.Context,
    config: ConfigOption = None,
    purge: Annotated[bool, typer.Option("--purge", help="Drop the indexes in the target too, after a yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Say yes beforehand.")] = False,
    as_json: JsonOption = False,
) -> None:
    """End a pipeline: drop its slot and its publication on the source.

    Stop the worker and its standbys first. The index stays searchable as it is, and follows no more; starting again
    means reading the tables again. With --purge the index goes too: its view, its tables and, with the last pipeline,
    cdcsync's schema. Source tables are never touched. Doing it twice does no harm.
    """
    import anyio

    from cdcsync.cli import printing
    from cdcsync.flows.teardown.pipeline import read_belongings, tear_down

    configuration = context.ensure_object(Invocation).load(config)
    if purge and not yes:
        belongings = anyio.run(interruptible, read_belongings, configuration)
        if belongings.set_up:
            _ask(belongings)
    steps = anyio.run(interruptible, lambda: tear_down(configuration, purge=purge))
    if as_json:
        printing.print_json(steps)
    else:
        _print(steps)


DROP_EPILOG = """Remove an index that left the configuration: `cdcsync drop articles`"""


@commands.command(epilog=DROP_EPILOG)
def drop(
    context: typer.Context,
    index: Annotated[str, typer.Argument(help="The index, as the target knows it.")],
    config: ConfigOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Say yes beforehand.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop one index: its view and its tables in the target. The others, the slot and the source's table stay.

    Remove the index from the configuration and start the worker again first: it lets go of the index, which stays
    searchable as it was until it is dropped.
    """
    import anyio

    from cdcsync.cli import printing
    from cdcsync.flows.teardown.one_index import drop_index

    configuration = context.ensure_object(Invocation).load(config)
    if not yes:
        confirm(f"drops the index {index} from the target; this cannot be undone.", needs="drop")
    steps = anyio.run(interruptible, lambda: drop_index(configuration, index))
    if as_json:
        printing.print_json(steps)
    else:
        _print(steps)


def _ask(belongings: Belongings) -> None:
    """Return only if the answer is yes.

    :raises UsageError: there is nobody to ask.
    """
    from cdcsync.cli.printing import console, plain

    out = console(errors=True)
    out.print("--purge drops from the target; this cannot be undone:")
    for kind, names in (("view", belongings.relations.views), ("table", belongings.relations.tables)):
        for name in names:
            out.print(f"  {kind} {plain(name)}", markup=False)
    confirm(None, needs="--purge")


def confirm(what: str | None, *, needs: str) -> None:
    """Return only if the answer is yes.

    :param needs: the command or option that asks.
    :raises UsageError: there is nobody to ask.
    """
    from cdcsync.cli.printing import console, plain

    out = console(errors=True)
    if what is not None:
        out.print(f"{needs} {plain(what)}", markup=False)
    out.print("Go on? [y/N] ", end="", markup=False)
    answer = sys.stdin.readline()
    if not answer:
        out.print()
        raise UsageError(
            f"{needs} must be confirmed, and there is no terminal to ask on", where=needs, hint="add --yes"
        )
    if answer.strip().lower() not in ("y", "yes"):
        out.print("nothing was changed")
        raise typer.Exit(1)


def _print(steps: Sequence[Step]) -> None:
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    for step in steps:
        mark, style = _MARKS[step.outcome]
        outcome = "was not there" if step.outcome == "absent" else step.outcome
        note = f": {plain(step.note)}" if step.note else ""
        out.print(Text.assemble((mark, style), " ", (plain(step.what), "bold"), f" {outcome}{note}"))
