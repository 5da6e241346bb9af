"""`cdcsync failures`: what could not be embedded or made a document, and what is to become of it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption
from cdcsync.errors import EXIT_FAILED, UsageError
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cdcsync.config import Config
    from cdcsync.model.requests import Request
    from cdcsync.model.spec import IndexSpec
    from cdcsync.postgres.sessions import Connection
    from cdcsync.target.failures.documents import Listed
    from cdcsync.target.failures.listing import Failure, Failures

commands = typer.Typer()

T = TypeVar("T")

EPILOG = """List failures and their reasons: `cdcsync failures articles list`

    After the cause was fixed: `cdcsync failures articles retry`

    Live without them: `cdcsync failures articles discard`

    Try discarded texts again after all: `cdcsync failures articles retry --discarded`"""


class Action(StrEnum):
    """The action on the failures."""

    list = "list"
    retry = "retry"
    discard = "discard"


@commands.command(epilog=EPILOG)
def failures(
    context: typer.Context,
    index: IndexArgument,
    action: Annotated[Action, typer.Argument(help="Show them, have them tried again now, or give them up.")],
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to list of each kind.")] = 100,
    discarded: Annotated[
        bool, typer.Option("--discarded", help="List or retry also the texts that were discarded.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what could not be embedded or made a document, have it tried again, or give it up.

    A text that the embedder refuses does not hold up others: it waits here with its error, never shown itself. Other
    failures of embedding are tried again by themselves, at growing intervals, and wait here after some attempts. A row
    that no document could be made of, or too many chunks, is left out of the index and waits here too.

    `retry` is for all of them: texts are tried again by a running worker within some seconds, rows are read again as by
    `cdcsync replay`. `discard` is for those that nobody tries any more: chunks then stay without a vector, and rows out
    of the index without being listed, until they change. `cdcsync status` counts the chunks, and `--discarded` lists
    them or has their texts tried again.
    """
    import anyio

    from cdcsync import logs
    from cdcsync.cli import printing

    configuration = context.ensure_object(Invocation).load(config)
    if index not in configuration.indexes:
        raise UsageError(
            f"the configuration has no index {index}",
            where="INDEX",
            hint=f"there are: {', '.join(sorted(configuration.indexes))}",
        )
    if discarded and action is Action.discard:
        raise UsageError("--discarded belongs to list and retry", where="--discarded", hint="leave it out")
    match action:
        case Action.list:
            found, listed, several, hidden = anyio.run(interruptible, _list, configuration, index, limit, discarded)
            if as_json:
                printing.print_json(found)
            else:
                _print(index, found, listed, limit, several=several, discarded=hidden)
        case Action.retry:
            logs.configure("error", configuration.worker.log_format)
            if not anyio.run(interruptible, _retry, configuration, index, as_json, discarded):
                raise typer.Exit(EXIT_FAILED)
        case Action.discard:
            count = anyio.run(interruptible, _discard, configuration, index)
            _say(as_json, {"discard": count}, f"{count} discarded")


async def _open(target: Connection, config: Config, name: str) -> tuple[IndexSpec, Failures]:
    from cdcsync.target.failures.listing import Failures
    from cdcsync.target.search import stored_spec

    spec = await stored_spec(target, config.target.schema, name, config.indexes[name])
    return spec, Failures(target, config.target.schema, spec)


async def _of_beside(
    target: Connection, config: Config, spec: IndexSpec, ask: Callable[[Failures], Awaitable[T]], nothing: T
) -> T:
    """Ask for the failures of the chunks that stand beside an index, where there are any."""
    from cdcsync.target.failures.listing import Failures

    if spec.beside is None:
        return nothing
    return await ask(Failures(target, config.target.schema, spec.beside))


async def _list(config: Config, name: str, limit: int, discarded: bool) -> tuple[list[Failure], Listed, bool, int]:
    """Return some failures, how many documents there are, and whether the index has several generations of vectors.

    :returns: also how many texts were discarded and are not among them: none if those were asked for.
    """
    import msgspec

    from cdcsync.postgres.errors import speaking_of
    from cdcsync.target.version import open_target

    async with await open_target(config.target, application_name="cdcsync failures", works=True) as target:
        spec, failed = await _open(target, config, name)
        with speaking_of("target", where=f"index {name}"):
            found, listed = await failed.some(limit, discarded=discarded), await failed.listed()
            nothing: list[Failure] = []
            for one in await _of_beside(
                target, config, spec, lambda other: other.some(limit, discarded=discarded), nothing
            ):
                # A document that has failed there too is another one.
                found.append(msgspec.structs.replace(one, generation=spec.beside and spec.beside.generation))
            unlisted = await _of_beside(target, config, spec, lambda other: other.listed(), listed)
            listed = msgspec.structs.replace(listed, unlisted=max(listed.unlisted, unlisted.unlisted))
            hidden = 0
            if not discarded:
                hidden = await failed.discarded()
                hidden += await _of_beside(target, config, spec, lambda other: other.discarded(), 0)
            return found, listed, len(spec.searchable) > 1, hidden


async def _discard(config: Config, name: str) -> int:
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.target.version import open_target

    async with await open_target(config.target, application_name="cdcsync failures", works=True) as target:
        spec, failed = await _open(target, config, name)
        with speaking_of("target", where=f"index {name}"):
            return await failed.discard() + await _of_beside(target, config, spec, lambda other: other.discard(), 0)


async def _retry(config: Config, name: str, as_json: bool, discarded: bool) -> bool:
    """Request another attempt for everything, and follow the rows that are read again; returns whether that worked."""
    from cdcsync.flows.replay import open_index, require_followed
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.target.failures.listing import Failures
    from cdcsync.target.version import open_target

    async with await open_target(config.target, application_name="cdcsync failures", works=True) as target:
        spec, _ = await _open(target, config, name)
        texts, lacking = 0, []
        for side in (spec, spec.beside):
            if side is None:
                continue
            failed = Failures(target, config.target.schema, side)
            with speaking_of("target", where=f"index {name}"):
                before = await failed.listed()
            if before.at_least:
                lacking.append((side, failed, before))
        for side, _, _ in lacking:  # a paused one reads nothing
            await (require_followed(target, config, side) if side.hidden else open_index(target, config, name))
        with speaking_of("target", where=f"index {name}"):
            for side in filter(None, (spec, spec.beside)):
                texts += await Failures(target, config.target.schema, side).retry_texts(discarded=discarded)
        if not lacking:
            _say(as_json, {"retry": texts}, f"{texts} to be tried again")
            return True
        requests = [await _read_again(target, config, side, failed, before) for side, failed, before in lacking]
        with speaking_of("target", where=f"index {name}"):
            after = sum([(await failed.listed()).documents for _, failed, _ in lacking])
    last = next((one for one in requests if one.state != "done"), requests[0])
    _say(
        as_json,
        {
            "retry": texts + sum(before.documents for _, _, before in lacking),
            "documents": {
                "request": last.id,
                "state": last.state,
                "rows": sum(one.rows_done for one in requests),
                "failed": after,
                "error": last.error,
            },
        },
        f"{texts} texts to be tried again; request {', '.join(str(one.id) for one in requests)} {last.state}:"
        f" {sum(one.rows_done for one in requests):,} rows read again, {after:,} are left out"
        + (f": {last.error}" if last.error else ""),
    )
    return last.state == "done"


async def _read_again(target: Connection, config: Config, spec: IndexSpec, failed: Failures, listed: Listed) -> Request:
    """Request that the rows, or all rows if not every failed one is listed, are read again; returns when that ended."""
    from cdcsync.flows.replay import Replay, ask, follow
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.worker.substitute import worker_ensured

    with speaking_of("target", where=f"index {spec.name}"):
        keys = None if listed.unlisted else tuple(await failed.document_keys())
    id_ = await ask(target, config.target.schema, spec, Replay(keys=keys))
    async with worker_ensured(target, config):
        return await follow(target, config.target.schema, id_, lambda request: None)


def _say(as_json: bool, value: dict[str, object], text: str) -> None:
    from cdcsync.cli.printing import console, plain, print_json

    if as_json:
        print_json(value)
    else:
        console().print(plain(text), markup=False)


def _print(
    index: str, found: Sequence[Failure], listed: Listed, limit: int, *, several: bool = False, discarded: int = 0
) -> None:
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    if not found:
        out.print("nothing has failed")
    for failure in found:
        key = ", ".join(f"{name}={plain(value)}" for name, value in failure.key.items())
        what = "no document" if failure.chunk_no is None else f"chunk {failure.chunk_no}"
        what += f" in generation {failure.generation}" if several and failure.generation is not None else ""
        out.print(
            Text.assemble(
                (key, "bold"),
                f"  {what}  attempts {failure.attempts}  ",
                _next_attempt(failure),
                f"\n     {plain(failure.error)}",
            )
        )
    kinds = [failure.kind for failure in found]
    if limit in (kinds.count("document"), kinds.count("text")):
        out.print(f"the first {limit} of each kind; --limit shows more", markup=False)
    if listed.unlisted:
        out.print(f"more rows failed than are listed; `cdcsync verify {index}` finds the others", markup=False)
    if discarded:
        texts = "1 text was" if discarded == 1 else f"{discarded:,} texts were"
        out.print(f"{texts} discarded; --discarded lists them, too", markup=False)


def _next_attempt(failure: Failure) -> str | tuple[str, str]:
    """Return when a failure is tried again, or who decides about that; with a style where there is one."""
    if failure.discarded:
        return "discarded"
    if failure.next_attempt_at is None:
        return "waits for you", "red"
    return f"next attempt {failure.next_attempt_at:%Y-%m-%d %H:%M:%S %Z}"
