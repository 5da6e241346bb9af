"""`cdcsync search`: searches indexes, as applications do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption, Mode
from cdcsync.cli.printing import MARKS, waiting
from cdcsync.errors import UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cdcsync.config import Config
    from cdcsync.model.spec import IndexSpec
    from cdcsync.target.ddl.filters import Column
    from cdcsync.target.search import Hit, Plan

    Vector = Sequence[float] | npt.NDArray[np.float32]

commands = typer.Typer()

EPILOG = """By meaning and by words: `cdcsync search articles "how do I reset my password"`

    Several indexes: `cdcsync search articles notes "how do I reset my password"`

    Among some rows: `cdcsync search articles refund --filter tenant=7 --filter "created_at>=2026-01-01"`

    By the words alone, without a model: `cdcsync search articles '"error 1234"' --mode text`

    Why in this order? `cdcsync search articles refund --explain`"""

HEADLINE = f"StartSel={MARKS[0]}, StopSel={MARKS[1]}, MaxFragments=2, MaxWords=30, MinWords=12"

_SIGNS = {
    **{"eq": "=", "in": "=", "ne": "!=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "like": "~"},
    **{"contains": "@>", "overlaps": "&&", "null": "is null"},
}
"""How each operator of a filter is written here."""

_OPERATORS = {sign: name for name, sign in _SIGNS.items()} | {"<>": "ne", "==": "in"}
_JSON_SIGNS = ("@>", "&&")
_QUOTED = r'"(?:[^"]|"")+"'
_COLUMN = rf"({_QUOTED}|[^=<>!~]+?)"
_FILTER = re.compile(_COLUMN + r"\s*(!=|<>|<=|>=|@>|&&|==?|<|>|~)\s*(.*)", re.DOTALL)
_NULL = re.compile(_COLUMN + r"\s+is\s+(not\s+)?null", re.IGNORECASE)


class Found(NamedTuple):
    """A hit and the index that it is of."""

    name: str
    hit: Hit


class Answer:
    """The result of a search, and how it was made."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.plans: dict[str, list[Plan]] = {}
        self.warnings: list[str] = []


@commands.command(epilog=EPILOG)
def search(
    context: typer.Context,
    index: IndexArgument,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[INDEX]... TEXT", help="Names of more indexes, and last what to look for."),
    ],
    config: ConfigOption = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many hits.")] = 10,
    mode: Annotated[
        Mode, typer.Option(help="By nearness of meaning (vector), by words (text), or by both, fused by rank (hybrid).")
    ] = Mode.hybrid,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="COLUMN=VALUE",
            help="Only rows with this value; also !=, <, <=, >, >=, ~ (LIKE) and 'COLUMN is null'. 'COLUMN@>VALUE': the"
            " array has this element, or all of a JSON list, or the jsonb contains this JSON; 'COLUMN&&LIST': the array"
            " has any of these. Several filters must all hold; a column that is given several values with = may have"
            " any of them.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL",
            help="A condition on key and carried columns, run read-only. Not on a standby.",
            show_default=False,
        ),
    ] = None,
    per_document: Annotated[
        bool, typer.Option("--per-document/--chunks", help="Each document once, by its best chunk, or every chunk.")
    ] = True,
    skip: Annotated[int, typer.Option(min=0, max=999, help="Leave out so many of the first hits.")] = 0,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show places and score of both legs, and how the server executed them. Not on a standby.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search indexes, as your users would.

    Embeds the text with the model of each index, by a running worker if there is one on this machine, and asks the
    target. Needs neither the source nor a worker.
    """
    import anyio

    from cdcsync.cli import printing

    configuration = context.ensure_object(Invocation).load(config)
    *more, text = words
    names = list(dict.fromkeys([index, *more]))
    if not text.strip():
        raise UsageError("the search text is empty", where="TEXT", hint="give the words to search for")
    answer = anyio.run(
        interruptible,
        lambda: find(
            configuration,
            names,
            text,
            k=k,
            mode=mode.value,
            filter_=parse_filters(filters or ()),
            where=where,
            per_document=per_document,
            skip=skip,
            explain=explain,
        ),
    )
    for warning in dict.fromkeys(answer.warnings):
        printing.print_warning(warning)
    if as_json:
        import msgspec

        hits = [{"index": one.name, **msgspec.to_builtins(one.hit, enc_hook=str)} for one in answer.found]
        plans = {name: [msgspec.to_builtins(plan) for plan in plans] for name, plans in answer.plans.items()}
        printing.print_json({"hits": hits, "plans": plans} if explain else hits)
        return
    printing.print_hits(
        [one.hit for one in answer.found],
        indexes=[one.name for one in answer.found] if len(names) > 1 else None,
        first=skip + 1,
        explain=explain,
    )
    for name, plans_ in answer.plans.items():
        for plan in plans_:
            printing.print_plan(f"{name}: {plan.leg}", plan.lines)


def parse_filters(given: Sequence[str]) -> dict[str, Any]:
    """Return a filter made of `column=value` and the like.

    :raises UsageError: one of them is not of that form.
    """
    parsed: dict[str, Any] = {}
    for one in given:
        if (null := _NULL.fullmatch(one.strip())) is not None:
            column = _unquoted(null[1])
            if parsed.setdefault(column, {}).setdefault("null", null[2] is None) is not (null[2] is None):
                raise UsageError(
                    f"{column} cannot be both null and not null", where=f"--filter {one}", hint="leave one of them out"
                )
            continue
        match = _FILTER.fullmatch(one.strip())
        if match is None:
            raise UsageError(
                "a filter is a column, an operator and a value",
                where=f"--filter {one}",
                hint='write tenant=3, "created_at>=2026-01-01", "title~%login%", "tags@>urgent" or "closed_at is null";'
                " for any of several values, give the option several times",
            )
        column, sign, value = _unquoted(match[1]), match[2], match[3]
        operators = parsed.setdefault(column, {})
        if _OPERATORS[sign] == "in":
            operators.setdefault("in", []).append(value)
        elif _OPERATORS[sign] in operators:
            hint = """give one list, such as 'tags@>["a", "b"]'""" if sign in _JSON_SIGNS else "leave one of them out"
            raise UsageError(f"{column} has {sign} twice", where=f"--filter {one}", hint=hint)
        else:
            operators[_OPERATORS[sign]] = _read_json(value) if sign in _JSON_SIGNS else value
    return parsed


def _read_json(written: str) -> Any:
    """Return what a value says as JSON, with its numbers as they are written; what is not JSON is a text.

    So is a number that PostgreSQL writes in another way: `12e4567` may be a part of a hash, and `-0` a text.
    """
    try:
        value = json.loads(written, parse_float=Decimal, parse_constant=str)
    except (ValueError, RecursionError):
        return written
    rewritten = type(value) in (int, Decimal) and ("e" in written.lower() or written.strip() == "-0")
    return written if rewritten else value


def check_operators(filter_: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column]) -> None:
    """Refuse an operator that a column does not have, as it is written on a command line.

    A column that is not there is left to the search.

    :raises UsageError: a filter has one.
    """
    for name, operators in filter_.items():
        column = columns.get(name)
        for operator in operators:
            if column is not None and operator not in column.operators:
                known = dict.fromkeys(sign for one, sign in _SIGNS.items() if one in column.operators)
                raise UsageError(
                    f"a filter on {name} cannot use {_SIGNS[operator]}",
                    where="--filter",
                    hint=f"a column of the type {column.shown} takes {', '.join(known)}",
                )


def _unquoted(column: str) -> str:
    """Return the name of a column that may be in double quotes, as SQL has it."""
    return column[1:-1].replace('""', '"') if re.fullmatch(_QUOTED, column) else column


async def find(
    config: Config,
    names: Sequence[str],
    text: str,
    *,
    k: int,
    mode: Literal["hybrid", "vector", "text"],
    filter_: dict[str, Any],
    where: str | None,
    per_document: bool,
    skip: int,
    explain: bool,
) -> Answer:
    """Search indexes of the configuration, each with the query embedded by its own model; the best hits of all.

    :raises UsageError: there is no such index, or an argument cannot be used.
    :raises SetupError: the target does not hold an index, or its embedder cannot be used or is of another model.
    """
    from cdcsync.errors import EmbedError
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.postgres.sessions import connect
    from cdcsync.target.ddl.filters import read_columns
    from cdcsync.target.search import MAX_HITS, check_condition, search, served_now, stored_spec

    if skip + k > MAX_HITS:
        raise UsageError(
            f"cannot return {k} hits after skipping {skip}",
            where="--skip" if skip else "-k",
            hint=f"ask for hits within the first {MAX_HITS}",
        )
    schema = config.target.schema
    answer = Answer()
    vectors: dict[str, Vector | None] = {}
    indexes = {name: config.index_named(name) for name in names}
    async with await connect(config.target.dsn, "target", application_name="cdcsync search") as connection:

        async def embed(spec: IndexSpec) -> None:
            """Have the vector of the query by the model of an index; None if that is away and words will do."""
            if mode == "text" or spec.model in vectors:
                return
            try:
                vectors[spec.model] = await embed_query(config, spec, text, partial(try_search, spec))
            except EmbedError as error:
                if mode == "vector" or spec.config.search is None:
                    raise
                vectors[spec.model] = None
                answer.warnings.append(f"searched by words alone: {error}")

        async def try_search(spec: IndexSpec) -> None:
            if filter_ or where is not None or explain:
                anywhere = [1.0, *[0.0] * (spec.dimensions - 1)]
                await search(
                    connection,
                    schema,
                    spec,
                    text=None,
                    vector=anywhere,
                    k=1,
                    mode="vector",
                    filter=filter_,
                    where=where,
                    plans=[] if explain else None,
                )

        specs = {name: await stored_spec(connection, schema, name, index) for name, index in indexes.items()}
        for spec in specs.values():
            # A wrong condition or filter is told before a model is loaded, which takes seconds.
            await check_condition(connection, schema, spec, where)
            if filter_:
                with speaking_of("target", where=f"index {spec.name}"):
                    check_operators(filter_, await read_columns(connection, spec))
        for name, spec in specs.items():
            await embed(spec)
            now = await served_now(connection, schema, name)
            if now is not None and not now.fits(spec):
                # It was switched while the model was loaded.
                spec = await stored_spec(connection, schema, name, indexes[name])
                await embed(spec)
            plans: list[Plan] = []
            hits = await search(
                connection,
                schema,
                spec,
                text=text,
                vector=vectors.get(spec.model),
                k=k if len(specs) == 1 else k + skip,
                skip=skip if len(specs) == 1 else 0,
                mode=mode,
                filter=filter_,
                where=where,
                per_document=per_document,
                headline=HEADLINE,
                plans=plans if explain else None,
                warnings=answer.warnings,
                for_json=True,
            )
            answer.found += [Found(name, hit) for hit in hits]
            if explain:
                answer.plans[name] = plans
    if len(specs) > 1:
        # Scores come from places, so those of several indexes can be compared.
        answer.found = sorted(answer.found, key=lambda one: -one.hit.score)[skip : skip + k]
    return answer


async def embed_query(
    config: Config, spec: IndexSpec, text: str, before_loading: Callable[[], Awaitable[None]]
) -> Vector:
    """Return the query's vector, by the model that made the index's vectors: a running worker's, or one loaded here.

    :param before_loading: looks at what can be wrong with the search, as loading a model takes seconds.
    :raises EmbedError: the model is away, the provider refuses us, or the model refuses the text.
    :raises EmbedderSetupError: the configuration does not have the model, or it cannot be loaded on this machine.
    """
    from cdcsync.cli.beside import embedded_by_worker

    vector = await embedded_by_worker(config, spec.config.embedder, spec.model, text)
    if vector is not None:
        return vector
    from cdcsync import logs
    from cdcsync.embedders import embedder_of
    from cdcsync.embedders.queries import QueryEmbedder

    logs.configure("error", config.worker.log_format)
    await before_loading()
    model = QueryEmbedder(embedder_of(config.embedders, spec.model, spec.config.embedder), timeout_s=math.inf)
    try:
        with waiting("loading the model, as no worker with it runs on this machine"):
            return await model.embed_one(text)
    finally:
        await model.aclose()
