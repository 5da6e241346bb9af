"""`cdcsync evaluate`: measures what an index's searches find, against exact searches and against judged answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption, judged_option, least_option
from cdcsync.errors import EXIT_FAILED, UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.flows.evaluate.audited import Gathered
    from cdcsync.flows.evaluate.gates import Verdict
    from cdcsync.model.spec import IndexSpec
    from cdcsync.postgres.sessions import Connection
    from cdcsync.target.evaluations import Evaluation
    from cdcsync.target.judged_runs import Run

commands = typer.Typer()

EPILOG = """How much of what is nearest is found? `cdcsync evaluate articles`

    What does it cost to look further? `cdcsync evaluate articles --ef-search 40 --ef-search 100 --ef-search 400`

    How well are questions answered? `cdcsync evaluate articles --judged questions/`

    By what callers of `cdcsync serve` asked: `cdcsync evaluate articles --from-audit questions/`

    In a pipeline: `cdcsync evaluate articles --judged questions/ --min "nDCG@10=0.40" --against LAST`"""


@commands.command(epilog=EPILOG)
def evaluate(
    context: typer.Context,
    index: IndexArgument,
    config: ConfigOption = None,
    queries: Annotated[
        int, typer.Option(min=1, max=100_000, help="How many stored vectors, or questions of the record.")
    ] = 100,
    k: Annotated[int, typer.Option("-k", min=1, max=999, help="How many neighbours to look for.")] = 10,
    ef_search: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="How far HNSW looks, as in a query of the view; may be given several times. [as far as searches do]",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL", help="Find only what meets this condition on key and carried columns.", show_default=False
        ),
    ] = None,
    judged: Annotated[
        Path | None,
        judged_option("Answer the questions of a judged collection (BEIR or TREC layout) in every mode of search."),
    ] = None,
    from_audit: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Add the questions of the tool server's record, with what they find, to DIR/judgments.jsonl for you to"
            " grade, and answer those that are graded.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A measure of ir-measures; may be given several times, the first decides. [nDCG@10, R@100, RR@10]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO:STEP", help="Also try hybrid search with these weights of the words.", show_default=False
        ),
    ] = None,
    least: Annotated[
        list[str] | None,
        least_option(
            "[MODE] MEASURE=VALUE",
            "Fail if the index's own search, or that mode, reaches less; may be given several times.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="LAST|RUN", help="Fail if a mode is surely worse than in that earlier run.", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what was measured into this file, .svg or .png.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how good an index's searches are.

    Without --judged, how much of what an exact search finds is found by HNSW, and how long both take: stored vectors
    are taken at random as queries, the chunk that each is of is left out, and distances are compared. The exact
    searches read the whole table.

    With --judged, how well searches by words, by vectors and by both answer questions whose answers are known, with
    intervals of 95 % confidence. Both are measured with --judged and --ef-search.

    The outcome is stored for the status, where the role may write; not with --where. The exit status is 1 if --min or
    --against is not met.
    """
    import anyio

    from cdcsync import logs

    configuration = context.ensure_object(Invocation).load(config)
    logs.configure("error", configuration.worker.log_format)
    if judged is not None and from_audit is not None:
        raise UsageError(
            "--judged and --from-audit cannot be combined", where="--from-audit", hint="leave one of them out"
        )
    asked_for = judged or from_audit
    if asked_for is None and (measure or weights or least or against):
        raise UsageError(
            "--measure, --weights, --min and --against apply to judged questions only",
            where="evaluate",
            hint="name the questions with --judged DIR or --from-audit DIR",
        )
    if asked_for is not None and where is not None:
        raise UsageError(
            "judged questions are answered from all rows, so there can be no condition",
            where="--where",
            hint="leave it out with --judged",
        )
    if plot is not None:
        _check_plot(plot)
    gathered = None
    if from_audit is not None:
        gathered = anyio.run(interruptible, _gather, configuration, index, from_audit, queries)
        judged = from_audit if gathered.graded else None
        if judged is None and (least or against):
            raise UsageError("nothing is graded yet", where=str(gathered.path), hint="grade the lines of that file")
    recall = None
    if asked_for is None or ef_search:
        recall = anyio.run(interruptible, _measure_recall, configuration, index, queries, k, ef_search or [], where)
    answers = None
    if judged is not None:
        asked = _Judging(judged, measure or [], weights, least or [], against)
        answers = anyio.run(interruptible, _measure_answers, configuration, index, asked)
    if plot is not None:
        _draw(plot, recall, answers)
    if as_json:
        _print_json(gathered, recall, answers, where)
    else:
        from cdcsync.cli.figures import print_answers, print_gathered, print_recall

        if gathered is not None:
            print_gathered(gathered)
        if recall is not None:
            print_recall(recall.found, where, recall.not_stored)
        if answers is not None:
            print_answers(answers.run, answers.number, answers.not_stored, answers.verdicts)
    if answers is not None and not all(verdict.passed for verdict in answers.verdicts):
        raise typer.Exit(EXIT_FAILED)


class _Recall(NamedTuple):
    found: Evaluation
    not_stored: str | None


class _Judging(NamedTuple):
    """The options for judged questions, as they were written."""

    directory: Path
    measures: list[str]
    weights: str | None
    least: list[str]
    against: str | None


class _Answers(NamedTuple):
    run: Run
    number: int | None
    not_stored: str | None
    verdicts: list[Verdict]


async def _measure_recall(
    config: Config, name: str, queries: int, k: int, ef_search: list[int], where: str | None
) -> _Recall:
    from cdcsync.flows.evaluate import recall
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.target import evaluations

    async with _opened(config, name) as (connection, spec):
        schema = config.target.schema
        found = await recall.evaluate(connection, schema, spec, queries=queries, k=k, ef_search=ef_search, where=where)
        if where is not None:
            return _Recall(found, "a condition's recall is not the index's")
        with speaking_of("target", where=f"index {name}"):
            return _Recall(found, await evaluations.store(connection, schema, found))


async def _gather(config: Config, name: str, directory: Path, most: int) -> Gathered:
    from cdcsync.flows.evaluate.audited import gather

    async with _opened(config, name) as (connection, spec):
        return await gather(connection, config, spec, directory, most=most)


async def _measure_answers(config: Config, name: str, asked: _Judging) -> _Answers:
    import msgspec

    from cdcsync.cli.beside import questions_by_worker
    from cdcsync.flows.evaluate import gates, judged
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.target import judged_runs

    collection, floors, measures = gates.read_questions(asked.directory, asked.least, asked.measures)
    weights = gates.parse_weights(asked.weights) if asked.weights else []
    number = gates.parse_run(asked.against)
    schema = config.target.schema
    async with _opened(config, name) as (connection, spec):
        earlier = None
        if asked.against is not None:
            with speaking_of("target", where=f"index {name}"):
                if number is None:
                    earlier = await judged_runs.last(
                        connection,
                        schema,
                        name,
                        collection.name,
                        spec.generation,
                        measure=measures[0],
                        queries=collection.queries,
                    )
                else:
                    earlier = await judged_runs.read(connection, schema, name, collection.name, number)
        if asked.against is not None and earlier is None and number is not None:
            raise UsageError(
                f"there is no run {number} of {name} by {collection.name}",
                where="--against",
                hint=f"the runs are in the table {schema}.judged_runs; LAST is the last of them",
            )
        vectors = await questions_by_worker(config, spec, collection.queries)
        run = await judged.evaluate_index(
            connection, config, spec, collection, measures=measures, weights=weights, vectors=vectors
        )
        verdicts = gates.judge(run, floors, earlier)
        if asked.against is not None and earlier is None:
            text = f"there is no earlier run by {measures[0]} of these questions to compare with: this is the first"
            verdicts.append(gates.Verdict(True, text))
        run = msgspec.structs.replace(run, passed=all(verdict.passed for verdict in verdicts))
        with speaking_of("target", where=f"index {name}"):
            return _Answers(run, *await judged_runs.store(connection, schema, run), verdicts)


@asynccontextmanager
async def _opened(config: Config, name: str) -> AsyncIterator[tuple[Connection, IndexSpec]]:
    from cdcsync.target.search import stored_spec
    from cdcsync.target.version import open_target

    index = config.index_named(name)
    async with await open_target(config.target, application_name="cdcsync evaluate") as connection:
        yield connection, await stored_spec(connection, config.target.schema, name, index)


def _check_plot(plot: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is measured."""
    if not plot.parent.is_dir():
        raise UsageError("there is no such directory", where=f"--plot {plot}", hint="name a file in one that exists")
    match plot.suffix.lower():
        case ".svg":
            pass
        case ".png":
            from cdcsync.flows.evaluate.pictures import pillow_parts

            pillow_parts()
        case _:
            raise UsageError(
                "only SVG and PNG can be drawn", where=f"--plot {plot}", hint="name a file that ends in .svg or .png"
            )


def _draw(plot: Path, recall: _Recall | None, answers: _Answers | None) -> None:
    from cdcsync.flows.evaluate.drawing import draw
    from cdcsync.flows.evaluate.pictures import png, svg

    picture = draw(recall and recall.found, answers and answers.run)
    try:
        plot.write_bytes(svg(*picture).encode() if plot.suffix.lower() == ".svg" else png(*picture))
    except OSError as error:
        raise UsageError(
            f"cannot be written: {error.strerror}", where=f"--plot {plot}", hint="name a file in an existing directory"
        ) from None


def _print_json(gathered: Gathered | None, recall: _Recall | None, answers: _Answers | None, where: str | None) -> None:
    import msgspec

    from cdcsync.cli.printing import print_json

    shown: dict[str, Any] = {}
    if gathered is not None:
        shown["from_audit"] = {**gathered._asdict(), "path": str(gathered.path)}
    if recall is not None:
        shown |= {**msgspec.to_builtins(recall.found), "where": where, "not_stored": recall.not_stored}
    if answers is not None:
        shown["judged"] = {
            "run": answers.number,
            **msgspec.to_builtins(answers.run),
            "not_stored": answers.not_stored,
            "gates": [verdict._asdict() for verdict in answers.verdicts],
        }
    print_json(shown)
