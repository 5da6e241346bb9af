"""`cdcsync failures`: the chunks that could not be embedded, and what is to become of them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, Invocation, JsonOption
from cdcsync.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cdcsync.config import Config
    from cdcsync.index.failures import Failure

EPILOG = """What failed, and why: `cdcsync failures articles list`

    After the provider was mended: `cdcsync failures articles retry`

    Live without them: `cdcsync failures articles discard`"""


class Action(StrEnum):
    """What to do with the failures."""

    list = "list"
    retry = "retry"
    discard = "discard"


def failures(
    context: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index's name in the configuration.")],
    action: Annotated[Action, typer.Argument(help="Show them, have them tried again now, or give them up.")],
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to list.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List the chunks that could not be embedded, have them tried again, or give them up.

    A text that the embedder refuses does not hold up others: it waits here with its error, never shown itself. Other
    failures are tried again by themselves, at growing intervals, and wait here after some attempts. `retry` is for all
    of them; `discard` for those that nobody tries any more, whose chunks then stay without a vector until their text
    changes. A running worker notices within some seconds.
    """
    import anyio

    from cdcsync.cli import printing

    configuration = context.ensure_object(Invocation).load(config)
    if action is Action.list:
        found = anyio.run(_list, configuration, index, limit)
        if as_json:
            printing.print_json(found)
        else:
            _print(found, limit)
        return
    count = anyio.run(_change, configuration, index, action)
    if as_json:
        printing.print_json({action.value: count})
    else:
        printing.console().print(
            f"{count} to be tried again" if action is Action.retry else f"{count} given up", markup=False
        )


async def _list(config: Config, name: str, limit: int) -> list[Failure]:
    from cdcsync.index.failures import Failures
    from cdcsync.index.search import stored_spec
    from cdcsync.postgres import connect, speaking_of

    _check(config, name)
    schema = config.target.schema
    async with await connect(config.target.dsn, "target", application_name="cdcsync failures") as connection:
        spec = await stored_spec(connection, schema, name, config.indexes[name])
        with speaking_of("target", where=f"index {name}"):
            return await Failures(connection, schema, spec).list(limit)


async def _change(config: Config, name: str, action: Action) -> int:
    from cdcsync.index.failures import Failures
    from cdcsync.index.search import stored_spec
    from cdcsync.postgres import connect, speaking_of

    _check(config, name)
    schema = config.target.schema
    async with await connect(config.target.dsn, "target", application_name="cdcsync failures") as connection:
        spec = await stored_spec(connection, schema, name, config.indexes[name])
        found = Failures(connection, schema, spec)
        with speaking_of("target", where=f"index {name}"):
            return await (found.retry() if action is Action.retry else found.discard())


def _check(config: Config, name: str) -> None:
    if name not in config.indexes:
        raise UsageError(
            f"the configuration has no index {name}",
            where="INDEX",
            hint=f"there are: {', '.join(sorted(config.indexes))}",
        )


def _print(found: Sequence[Failure], limit: int) -> None:
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    if not found:
        out.print("nothing has failed")
    for failure in found:
        key = ", ".join(f"{name}={plain(value)}" for name, value in failure.key.items())
        when = failure.next_attempt_at
        out.print(
            Text.assemble(
                (key, "bold"),
                f"  chunk {failure.chunk_no}  attempts {failure.attempts}  ",
                ("waits for you", "red") if when is None else f"next attempt {when:%Y-%m-%d %H:%M:%S %Z}",
                f"\n     {plain(failure.error)}",
            )
        )
    if len(found) == limit:
        out.print(f"the first {limit}; --limit shows more", markup=False)
