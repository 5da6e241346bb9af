"""`cdcsync replay`: asks for rows to be read again, and shows how far that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption
from cdcsync.errors import EXIT_FAILED, UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.flows.dry_run import Estimate
    from cdcsync.flows.replay import Replay
    from cdcsync.model.requests import Request, RequestAction
    from cdcsync.model.spec import IndexSpec
    from cdcsync.postgres.sessions import Connection

commands = typer.Typer()

EPILOG = """All rows; what has not changed costs no embedding: `cdcsync replay articles`

    Some of them: `cdcsync replay articles --where "tenant = 7"`

    A few, by key: `cdcsync replay articles --key 17 --key 18`, or `… | cdcsync replay articles --key -`

    A key of several columns: `cdcsync replay orders --key '["eu", 17]'`

    What would it cost? `cdcsync replay articles --force-embed --dry-run`"""


class OnInterrupt(StrEnum):
    """The fate of a request when Ctrl-C ends the command that follows it."""

    leave = "leave"
    cancel = "cancel"


@commands.command(epilog=EPILOG)
def replay(
    context: typer.Context,
    index: IndexArgument,
    config: ConfigOption = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only rows for which this holds; run read-only.", show_default=False),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Only the row of this key; repeatable. `-` reads keys from standard input, one a line. A key of"
            " several columns is a JSON array. A key without a row leaves the index.",
            show_default=False,
        ),
    ] = None,
    force_embed: Annotated[
        bool, typer.Option("--force-embed", help="Make the vectors again, even of texts that have not changed.")
    ] = False,
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="Cut documents into chunks again, even where they have not changed.")
    ] = False,
    max_rows_per_s: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Read at most so many rows a second.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do and cost, and change nothing.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it to the worker and return at once.")] = False,
    on_interrupt: Annotated[
        OnInterrupt, typer.Option(help="After Ctrl-C, leave the request to the worker, or cancel it.")
    ] = OnInterrupt.leave,
    pause: Annotated[
        bool, typer.Option("--pause", help="Pause the index's open requests, and do nothing else.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the paused ones where they were.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the open ones; what is applied stays.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read rows of the source again, beside the stream of changes and without disturbing it.

    Only what changed is embedded again. A running worker does it, wherever it runs; requests of one index are served in
    the order they came. Where no worker runs, this command takes its place until the rows are in the index and have
    their vectors. After a kill a request resumes at its last page.
    """
    import anyio

    from cdcsync import logs
    from cdcsync.flows.replay import Replay

    configuration = context.ensure_object(Invocation).load(config)
    logs.configure("error", configuration.worker.log_format)
    actions: list[RequestAction] = [action for action, asked in _actions(pause, resume, cancel) if asked]
    selects = (
        where is not None or bool(key) or force_embed or rewrite or dry_run or detach or max_rows_per_s is not None
    )
    if len(actions) > 1 or (actions and selects):
        raise UsageError(
            f"--{actions[0]} cannot be combined with options of a replay",
            where="options",
            hint="ask for a replay, or change those that are open",
        )
    if actions:
        anyio.run(interruptible, _change, configuration, index, actions[0], as_json)
        return
    if where is not None and key:
        raise UsageError(
            "--where and --key cannot be combined", where="options", hint="put the keys into the condition"
        )
    given = _keys(key) if key else None
    wanted = Replay(where, None, force_embed, rewrite, max_rows_per_s)
    if dry_run:
        anyio.run(interruptible, _estimate, configuration, index, wanted, given, as_json)
        return
    done = anyio.run(interruptible, _replay, configuration, index, wanted, given, detach, on_interrupt, as_json)
    if not done:
        raise typer.Exit(EXIT_FAILED)


def _actions(pause: bool, resume: bool, cancel: bool) -> Iterator[tuple[RequestAction, bool]]:
    yield "pause", pause
    yield "resume", resume
    yield "cancel", cancel


def _keys(given: list[str]) -> list[str]:
    """Return the keys of the command line, with those of standard input where `-` stands.

    :raises UsageError: standard input is not UTF-8.
    """
    keys = []
    for key in given:
        if key != "-":
            keys.append(key)
            continue
        try:
            lines = sys.stdin.buffer.read().decode().split("\n")
        except UnicodeDecodeError:
            raise UsageError(
                "standard input is not UTF-8", where="--key -", hint="write one key a line, in UTF-8"
            ) from None
        keys += [line.removesuffix("\r") for line in lines if line.removesuffix("\r")]
    return keys


async def _change(config: Config, index: str, action: RequestAction, as_json: bool) -> None:
    from cdcsync.cli.printing import console, print_json
    from cdcsync.flows.replay import change, open_index
    from cdcsync.target.version import open_target

    async with await open_target(config.target, application_name="cdcsync replay") as target:
        await open_index(target, config, index, even_paused=True)
        changed, kept = await change(target, config.target.schema, index, action)
    if as_json:
        print_json({"index": index, "action": action, "requests": changed, "kept": kept})
    else:
        past = {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}[action]
        console().print(f"{past}: request {', '.join(map(str, changed))}")
        if kept:
            numbers = ", ".join(map(str, kept))
            console().print(f"not cancelled: request {numbers}; without it documents would stay out of date")


async def _checked(
    stack: AsyncExitStack,
    target: Connection,
    config: Config,
    index: str,
    wanted: Replay,
    keys: list[str] | None,
    *,
    needs_source: bool,
) -> tuple[IndexSpec, Replay, Connection | None]:
    """Return the index and what is wanted of it, once both are known to be right."""
    import msgspec

    from cdcsync.flows.replay import as_on_source, canonical_keys, check_where, open_index
    from cdcsync.preflight.identity import connect_followed

    spec = await open_index(target, config, index)
    if keys is not None:
        wanted = msgspec.structs.replace(wanted, keys=await canonical_keys(target, spec, keys))
    if not needs_source and wanted.where is None:
        return spec, wanted, None
    source = await stack.enter_async_context(await connect_followed(config, target, application_name="cdcsync replay"))
    spec = await as_on_source(source, config.source.publication, spec)
    if wanted.where is not None:
        await check_where(source, spec, wanted.where)
    return spec, wanted, source


async def _estimate(config: Config, index: str, wanted: Replay, keys: list[str] | None, as_json: bool) -> None:
    from cdcsync.cli.printing import print_json
    from cdcsync.flows.dry_run import estimate
    from cdcsync.target.version import open_target

    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(await open_target(config.target, application_name="cdcsync replay"))
        spec, wanted, source = await _checked(stack, target, config, index, wanted, keys, needs_source=True)
        assert source is not None
        found = await estimate(source, target, config, spec, wanted)
    if as_json:
        print_json(found)
    else:
        _print_estimate(found)


def _print_estimate(found: Estimate) -> None:
    from cdcsync.cli.printing import console

    out = console()
    out.print(f"rows          {found.rows:>12,}")
    out.print(f"gone          {found.gone:>12,}  keys that would leave the index")
    out.print(f"changed       {found.changed:>12,}  documents")
    out.print(f"chunks        {found.chunks:>12,}  some {found.tokens:,} tokens")
    out.print(f"to be embedded{found.embeddings:>12,}  some {found.embedding_tokens:,} tokens")
    out.print("time          " + ("     unknown" if found.seconds is None else f"{found.seconds:>12,.1f}  s, about"))
    if found.price is not None:
        out.print(f"price         {found.price:>12,.2f}  at the embedder's price_per_million_tokens")
    out.print("nothing was changed")


async def _replay(
    config: Config,
    index: str,
    wanted: Replay,
    keys: list[str] | None,
    detach: bool,
    on_interrupt: OnInterrupt,
    as_json: bool,
) -> bool:
    """Ask, and unless detached follow; returns whether the request was served, or left to be."""
    import anyio

    from cdcsync.flows.replay import ask, backlog_left, follow
    from cdcsync.target.requests.submission import Requests
    from cdcsync.target.version import open_target
    from cdcsync.worker.substitute import worker_ensured

    schema = config.target.schema
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(await open_target(config.target, application_name="cdcsync replay"))
        spec, wanted, _ = await _checked(stack, target, config, index, wanted, keys, needs_source=False)
        id_ = await ask(target, schema, spec, wanted)
        if detach:
            _say(as_json, {"index": index, "request": id_, "state": "requested"}, f"request {id_} is for the worker")
            return True
        try:
            with _bar(index) as show:
                async with worker_ensured(target, config) as ourselves:
                    request = await follow(target, schema, id_, show)
                    while ourselves and request.state == "done" and (left := await backlog_left(target, schema, spec)):
                        show(request, left)
                        await anyio.sleep(0.2)
        except anyio.get_cancelled_exc_class():
            left_to = "left to the worker: --cancel cancels it"
            if on_interrupt is OnInterrupt.cancel:
                with anyio.CancelScope(shield=True):
                    async with await open_target(config.target, application_name="cdcsync replay") as again:
                        await Requests(schema).action(again, index, "cancel", id_=id_)
                left_to = "cancelled"
            print(f"request {id_} is {left_to}", file=sys.stderr)
            raise
    _say(
        as_json,
        {
            "index": index,
            "request": id_,
            "state": request.state,
            "rows": request.rows_done,
            "error": request.error,
        },
        f"request {id_} {request.state}: {request.rows_done:,} rows" + (f": {request.error}" if request.error else ""),
    )
    return request.state == "done"


def _say(as_json: bool, value: dict[str, object], text: str) -> None:
    from cdcsync.cli.printing import console, plain, print_json

    if as_json:
        print_json(value)
    else:
        console().print(plain(text), markup=False)


@contextmanager
def _bar(index: str) -> Iterator[Callable[..., None]]:
    """Yield what shows a request, with rate and time left, on a terminal; elsewhere nothing is shown."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cdcsync.cli.printing import console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(errors=True, wrap=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(index, total=None, rate="")

        def show(request: Request, waiting: int | None = None) -> None:
            phase = request.state if request.phase == "rows" else "looking for rows that are gone"
            what = phase if waiting is None else f"{waiting:,} chunks wait for vectors"
            speed = progress.tasks[0].speed
            progress.update(
                task,
                description=f"{index}: {what}",
                completed=request.rows_done,
                total=request.rows_total,
                rate=f"{speed:,.0f} rows/s" if speed else "",
            )

        yield show
