"""`cdcsync migrate`: another model, precision, distance or graph for an index, or other chunks; searches continue."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption, judged_option, least_option
from cdcsync.cli.teardown import confirm
from cdcsync.errors import EXIT_FAILED, UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cdcsync.config import Config
    from cdcsync.flows.evaluate.gates import Verdict
    from cdcsync.flows.migrate.compare import Quality
    from cdcsync.flows.migrate.present import Started
    from cdcsync.status.generations import GenerationStatus
    from cdcsync.target.generations import Generation
    from cdcsync.target.judged_runs import Figure, Run

T = TypeVar("T")

commands = typer.Typer()

EPILOG = """To what the configuration asks for now: `cdcsync migrate articles start`

    How far is it? `cdcsync migrate articles status`

    Switch, if it finds much the same: `cdcsync migrate articles activate --min overlap=0.5 --min recall=0.95`

    Back, and forth again: `cdcsync migrate articles rollback`

    Free the space of the generation that searches do not use: `cdcsync migrate articles drop`"""


class Action(StrEnum):
    """The step of a migration."""

    start = "start"
    status = "status"
    activate = "activate"
    rollback = "rollback"
    drop = "drop"


@commands.command(epilog=EPILOG)
def migrate(
    context: typer.Context,
    index: IndexArgument,
    action: Annotated[Action, typer.Argument(help="Begin, look, switch, switch back, or free what is not used.")],
    config: ConfigOption = None,
    max_rows_per_s: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**9, metavar="N", help="With start: fill at most so many chunks a second.", show_default=False
        ),
    ] = None,
    least: Annotated[
        list[str] | None,
        least_option(
            "MEASURE=VALUE",
            "With activate: refuse to switch below this: recall, overlap, or with --judged a measure such as nDCG@10."
            " May be given several times.",
        ),
    ] = None,
    judged: Annotated[
        Path | None,
        judged_option("With activate: also answer these judged questions with both generations; see `evaluate`."),
    ] = None,
    not_worse: Annotated[
        bool, typer.Option("--not-worse", help="With --judged: refuse to switch if the answers are surely worse.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With activate: measure, check as a switch does, and do not switch.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes",
            "-y",
            help="With drop, with start above confirm_above_texts, and to switch to fewer vectors or to those that the"
            " worker has no embedder for: say yes beforehand.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Exchange the vectors of an index, or its chunks too, without a gap.

    Change embedder, vector_type, distance or hnsw of [indexes.INDEX] in the configuration, and keep the [embedders]
    section of the vectors that are in use. Then `start` has a running worker make a second generation of vectors from
    the stored chunks, while both follow all changes. Searches use the live generation until `activate`, which switches
    view, search function and the model of queries in one transaction; `rollback` switches back as quickly. `drop` frees
    the generation that is not live.

    If text, chunk_text, chunking or another key changes that chunks are made by, the generation has chunks of its own,
    which are read from the table. Run `start` before the worker starts with that file: it would cut the documents again
    in place.

    The worker has to know both models: start it again with the changed configuration. So do `cdcsync serve` and
    applications that use cdcsync.Index: without the model that is live they search by words alone.

    The exit status of `activate` is 1 if --min or --not-worse refuses. A generation that lacks more vectors than the
    live one, or that the worker has no embedder for, becomes live with --yes only.
    """
    import anyio

    from cdcsync import logs
    from cdcsync.cli import printing
    from cdcsync.flows.migrate import present, start

    asked = context.ensure_object(Invocation)
    _check_options(action, max_rows_per_s, least, judged, not_worse=not_worse, dry_run=dry_run, yes=yes)
    configuration = asked.load(config)
    configuration.index_named(index)
    logs.configure("error", configuration.worker.log_format)
    match action:
        case Action.start:
            started = anyio.run(
                interruptible,
                lambda: start.start(configuration, index, max_rows_per_s=max_rows_per_s, confirmed=yes),
            )
            printing.print_json(started) if as_json else _print_started(started)
        case Action.status:
            generations = anyio.run(interruptible, present.status, configuration, index)
            printing.print_json(generations) if as_json else _print_generations(index, generations)
        case Action.activate if (already := anyio.run(interruptible, _live_already, configuration, index)) is not None:
            text = f"generation {already} is live already; back to the other one: cdcsync migrate {index} rollback"
            _say(as_json, {"index": index, "live": already, "before": None, "switched": False, "gates": []}, text)
        case Action.activate:
            outcome = anyio.run(
                interruptible,
                lambda: _activate(
                    configuration, index, least or [], judged, not_worse=not_worse, dry_run=dry_run, yes=yes
                ),
            )
            printing.print_json(outcome.json) if as_json else _print_outcome(outcome)
            if not outcome.passed:
                raise typer.Exit(EXIT_FAILED)
        case Action.rollback:
            facts, text = anyio.run(interruptible, lambda: _roll_back(configuration, index, yes=yes))
            _say(as_json, facts, text)
        case Action.drop:
            spare = anyio.run(interruptible, present.spare, configuration, index)
            if not yes:
                confirm(_what_goes(spare), needs="drop")
            gone = anyio.run(interruptible, _drop, configuration, index, spare.generation)
            _say(as_json, {"index": index, "dropped": gone}, f"generation {gone} is dropped")


def _what_goes(spare: Generation) -> str:
    from cdcsync.config.names import own_name

    made = f"{spare.embedder or spare.model}, {spare.vector_type}({spare.dimensions})"
    all_its = "chunks and vectors" if spare.of_other_chunks else "vectors"
    index = own_name(spare.index_name)
    return f"removes generation {spare.generation} of {index} ({made}, {spare.state}) with all its {all_its}."


def _check_options(
    action: Action,
    max_rows_per_s: int | None,
    least: list[str] | None,
    judged: Path | None,
    *,
    not_worse: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Refuse options that are of another step.

    :raises UsageError: one is.
    """
    given = {
        "--max-rows-per-s": (max_rows_per_s is not None, Action.start),
        "--min": (bool(least), Action.activate),
        "--judged": (judged is not None, Action.activate),
        "--not-worse": (not_worse, Action.activate),
        "--dry-run": (dry_run, Action.activate),
        "--yes": (yes and action is Action.status, Action.drop),
    }
    for option, (used, of) in given.items():
        if used and action is not of:
            raise UsageError(f"{option} belongs to {of}, not to {action}", where=option, hint="leave it out")
    if not_worse and judged is None:
        raise UsageError(
            "--not-worse applies to judged questions only", where="--not-worse", hint="name them with --judged DIR"
        )


class _Outcome(NamedTuple):
    """The result of `activate`.

    :ivar before: the generation that was live before; None where nothing was switched.
    """

    name: str
    live: int
    other: int
    quality: Quality
    runs: tuple[Run, Run] | None
    verdicts: list[Verdict]
    before: int | None

    @property
    def passed(self) -> bool:
        """Whether no gate refuses."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def json(self) -> dict[str, Any]:
        """The outcome as JSON has it."""
        return {
            "index": self.name,
            "live": self.live if self.before is None else self.other,
            "before": self.before,
            "switched": self.before is not None,
            "quality": self.quality,
            "judged": None if self.runs is None else {"live": self.runs[0], "other": self.runs[1]},
            "gates": [verdict._asdict() for verdict in self.verdicts],
        }


async def _live_already(config: Config, index: str) -> int | None:
    """Return the live generation if it is the newer one of two: a command that is repeated switches nothing back."""
    from cdcsync.flows.migrate import switch

    live, other = await switch.candidates(config, index)
    return live.generation if other.generation < live.generation else None


async def _activate(
    config: Config, index: str, least: Sequence[str], judged: Path | None, *, not_worse: bool, dry_run: bool, yes: bool
) -> _Outcome:
    import msgspec

    from cdcsync.flows.evaluate import gates
    from cdcsync.flows.evaluate.judged import evaluate_index
    from cdcsync.flows.migrate import switch
    from cdcsync.flows.migrate.compare import compare, parse_floors
    from cdcsync.target import judged_runs
    from cdcsync.target.version import open_target

    own, of_answers = parse_floors(least)
    if of_answers and judged is None:
        raise UsageError(
            f"{of_answers[0]} is a measure of judged answers",
            where="--min",
            hint="name the questions with --judged DIR",
        )
    questions = None if judged is None else gates.read_questions(judged, of_answers)
    live, other = await switch.candidates(config, index)
    async with await open_target(config.target, application_name="cdcsync migrate") as connection:
        quality = await compare(connection, config.target.schema, live, other)
        verdicts = quality.judge(other.generation, own)
        runs = None
        if questions is not None:
            collection, floors, measures = questions
            first = await evaluate_index(connection, config, live, collection, measures=measures)
            second = await evaluate_index(connection, config, other, collection, measures=measures)
            verdicts += gates.judge(second, floors, first if not_worse else None)
            second = msgspec.structs.replace(second, passed=all(verdict.passed for verdict in verdicts))
            runs = first, second
            for run in runs:
                await judged_runs.store(connection, config.target.schema, run)
    before = None
    if all(verdict.passed for verdict in verdicts):
        if dry_run:
            await switch.check(config, index, other.generation, confirmed=yes)
        else:
            before = await _switch(config, index, other.generation, yes=yes)
    return _Outcome(index, live.generation, other.generation, quality, runs, verdicts, before)


async def _switch(config: Config, index: str, generation: int, *, yes: bool) -> int:
    from cdcsync.flows.migrate import switch, withdrawal

    return await _unless_interrupted(
        switch.switch(config, index, generation, confirmed=yes),
        lambda: withdrawal.end_of_switch(config, index, generation),
    )


async def _drop(config: Config, index: str, generation: int) -> int:
    from cdcsync.flows.migrate import drop, withdrawal

    return await _unless_interrupted(
        drop.drop(config, index, generation), lambda: withdrawal.end_of_drop(config, index, generation)
    )


async def _unless_interrupted(step: Awaitable[T], end: Callable[[], Awaitable[str]]) -> T:
    """Return the result of a step that a worker may have to make; if it is interrupted, say what has become of it."""
    import anyio

    try:
        return await step
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            print(await end(), file=sys.stderr)
        raise


async def _roll_back(config: Config, index: str, *, yes: bool) -> tuple[dict[str, Any], str]:
    """Return what was done, for programs and for people."""
    from cdcsync.flows.migrate import switch, withdrawal

    now, withdrawn = await withdrawal.withdraw_activation(config, index, newer=True)
    facts = {"index": index, "live": now, "before": now, "withdrawn": withdrawn}
    if withdrawn is not None:
        return facts, f"the switch to generation {withdrawn} is withdrawn; generation {now} stays live"
    live, other = await switch.candidates(config, index)
    if other.generation > live.generation:
        raise UsageError(
            f"generation {live.generation} is live, which is the older one of the two",
            where=f"index {index}",
            hint=f"to switch to generation {other.generation}: cdcsync migrate {index} activate",
        )
    before = await _switch(config, index, other.generation, yes=yes)
    return facts | {"live": other.generation, "before": before}, f"generation {other.generation} is live again"


def _say(as_json: bool, facts: dict[str, Any], text: str) -> None:
    from cdcsync.cli.printing import console, print_json

    if as_json:
        print_json(facts)
    else:
        console().print(text, markup=False, highlight=False)


def _print_started(started: Started) -> None:
    from cdcsync.cli.printing import console, plain

    out = console()
    verb = "begins" if started.begun else "is under way"
    lines = [f"the migration of {started.index} {verb}: generation {started.generation}, by {started.embedder}"]
    if started.own_chunks is not None:
        lines += [f"  with chunks of its own: {change}" for change in started.own_chunks]
    if started.own_chunks is not None and not started.begun:
        lines.append("  it reads the table, as a first load does")
    elif started.own_chunks is not None:
        price = "" if started.price is None else f", at a price of about {started.price:,.2f}"
        about = "about " if started.estimated else ""
        lines.append(
            f"  reads the table, and embeds {about}{started.chunks:,} texts, some {started.tokens:,} tokens{price}"
        )
    elif started.tokens:
        price = "" if started.price is None else f", at a price of about {started.price:,.2f}"
        lines.append(f"  embeds {started.chunks:,} chunks, about {started.tokens:,} tokens{price}")
    else:
        lines.append(f"  converts {started.chunks:,} vectors; no text is embedded again")
    lines += [f"  note: {warning}" for warning in started.warnings]
    lines.append(f"  a running worker with this configuration fills it: cdcsync migrate {started.index} status")
    for line in lines:
        out.print(plain(line), markup=False, highlight=False)


def _print_generations(index: str, generations: Sequence[GenerationStatus]) -> None:
    from rich.table import Table

    from cdcsync.cli.printing import console, plain
    from cdcsync.status.generations import hindrance

    table = Table(box=None, pad_edge=False)
    for heading in ("generation", "state", "embedder", "vectors", "distance", "graph", "filled", "failed", "size"):
        table.add_column(heading)
    table.add_column("recall")
    for one in generations:
        share = one.vectors / one.chunks if one.chunks else float(one.state != "filling")
        share *= 1.0 if one.read is None else one.read
        table.add_row(
            str(one.generation),
            one.state,
            plain(one.embedder or one.model),
            f"{one.vector_type}({one.dimensions})",
            one.distance,
            ("" if one.m is None else f"m {one.m}, ef {one.ef_construction}")
            + (", binary" if one.quantise == "binary" else ""),
            f"{min(share, 1.0):.1%} of {one.chunks:,}",
            f"{one.failed:,}",
            _size(one.bytes),
            "" if one.recall is None else f"{one.recall:.3f}",
        )
    out = console()
    out.print(table)
    for one in generations:
        for change in one.own_chunks:
            text = f"generation {one.generation} has chunks of its own: {plain(change)}"
            out.print(text, markup=False, highlight=False)
    for one in generations:
        if one.failed_documents:
            rows = "1 row is" if one.failed_documents == 1 else f"{one.failed_documents:,} rows are"
            text = (
                f"{rows} left out of generation {one.generation}, as no document could be made; see why: cdcsync"
                f" failures {index} list"
            )
            out.print(text, markup=False, highlight=False)
    for one in generations:
        if one.reason is not None:
            out.print(plain(hindrance(one.generation, one.reason)), markup=False, highlight=False)
        if one.has_embedder is False:
            text = f"the worker has no embedder for generation {one.generation}, by {one.embedder or one.model}"
            out.print(plain(f"{text}: live, it would be paused"), markup=False, highlight=False)
        if one.refusal is not None:
            said = f"generation {one.generation} was not dropped or made live when that was last asked"
            text = f"{said}: {plain(one.refusal)}"
            out.print(text, markup=False, highlight=False)


def _size(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TB"


def _with_interval(figure: Figure) -> str:
    if figure.interval is None:
        return f"{figure.mean:.3f}"
    low, high = figure.interval
    return f"{figure.mean:.3f} ({low:.3f} to {high:.3f})"


def _print_outcome(outcome: _Outcome) -> None:
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out, quality = console(), outcome.quality
    for generation, recall in quality.recall.items():
        which = "live" if generation == outcome.live else "new"
        found = "too few vectors to tell" if recall is None else f"{recall:.3f}"
        out.print(f"generation {generation} ({which}): recall@{quality.k} {found}", markup=False, highlight=False)
    if quality.overlap is not None:
        text = f"overlap@{quality.k} of {quality.queries} searches: {quality.overlap:.3f}"
        out.print(text, markup=False, highlight=False)
    for run in outcome.runs or ():
        own = run.modes[run.own_mode].figures
        shown = ", ".join(f"{name} {_with_interval(one)}" for name, one in own.items())
        out.print(plain(f"generation {run.generation}, {run.own_mode}: {shown}"), markup=False, highlight=False)
    for verdict in outcome.verdicts:
        mark, style = ("✓", "green") if verdict.passed else ("✗", "red")
        out.print(Text.assemble((mark, style), " ", plain(verdict.text)))
    if outcome.before is not None:
        out.print(f"generation {outcome.other} is live", markup=False, highlight=False)
        text = (
            "a cdcsync serve or an application without its model in the configuration searches by words until it has it"
        )
        out.print(text, markup=False, highlight=False)
    else:
        why = "nothing was switched" if outcome.passed else "refused: nothing was switched"
        out.print(f"{why}; generation {outcome.live} stays live", markup=False, highlight=False)
