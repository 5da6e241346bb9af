"""The commands `serve`, `token` and `audit`."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from cdcsync.cli.commands import ConfigOption, Invocation, JsonOption, print_help_instead
from cdcsync.errors import SetupError, UsageError
from cdcsync.process.stopping import interruptible
from cdcsync.process.threads import leave_name_servers_behind

EPILOG = "docs/serve.md describes the API, docs/agents.md how an agent uses it."

commands = typer.Typer()
token_commands = typer.Typer(help="Make, list and revoke the tokens of callers.")
commands.add_typer(token_commands, name="token")


@token_commands.callback(invoke_without_command=True)
def _before_a_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print_help_instead(context)


@commands.command(epilog=EPILOG)
def serve(
    context: typer.Context,
    config: ConfigOption = None,
    stdio: Annotated[
        bool, typer.Option("--stdio", help="Speak MCP over standard input and output, to the program that starts this.")
    ] = False,
) -> None:
    """Serve searches to applications (HTTP) and agents (MCP), in a process apart from the worker."""
    import anyio

    configuration = context.ensure_object(Invocation).load(config)
    run, run_stdio = _needed()
    from cdcsync.logs import configure

    configure(configuration.worker.log_level, "json" if stdio else configuration.worker.log_format)

    async def serving() -> None:
        leave_name_servers_behind()
        await (run_stdio if stdio else run)(configuration)

    anyio.run(serving)


def _needed() -> tuple[Any, Any]:
    try:
        from cdcsync.serve.run import run, run_stdio
    except ModuleNotFoundError as error:
        raise SetupError(
            f"the package {error.name} is missing", where="cdcsync serve", hint="pip install 'cdcsync[serve]'"
        ) from error
    return run, run_stdio


@token_commands.command()
def new(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="Who the token is for, as the record names it.")],
    config: ConfigOption = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="What the token claims, such as tenant=3.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="After how many days it expires; left out, never.")
    ] = None,
) -> None:
    """Make a token and print it. Only its hash is kept: it cannot be shown again."""
    from cdcsync.serve.identity import new_token

    claims: dict[str, Any] = {}
    for one in claim or []:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise UsageError(f"{one!r} is not a claim", where="--claim", hint="write NAME=VALUE, such as tenant=3")
        claims[name] = value
    print(new_token(_file(context, config), subject, claims, days))


@token_commands.command(name="list")
def list_(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List tokens: who they are for, what they claim, when they expire. Never the tokens themselves."""
    from cdcsync.cli.printing import print_json, print_line
    from cdcsync.serve.identity import read_tokens

    tokens = read_tokens(_file(context, config)).tokens
    if as_json:
        fields = ("subject", "claims", "expires", "revoked")
        print_json([{name: getattr(one, name) for name in fields} for one in tokens])
        return
    for one in tokens:
        until = "revoked" if one.revoked else f"until {one.expires:%Y-%m-%d}" if one.expires else "does not expire"
        print_line(one.subject, json.dumps(one.claims, ensure_ascii=False), until)


@token_commands.command()
def revoke(
    context: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="Whose tokens.")],
    config: ConfigOption = None,
) -> None:
    """Revoke all tokens of a subject. Running servers notice at the next call."""
    from cdcsync.serve.identity import revoke_tokens

    print(f"revoked {revoke_tokens(_file(context, config), subject)}")


def _file(context: typer.Context, config: Path | None) -> Path:
    serve = context.ensure_object(Invocation).load(config).serve
    if serve.tokens_file is None:
        raise UsageError(
            "no file of tokens is configured", where="serve.tokens_file", hint="set it, then run this again"
        )
    return Path(serve.tokens_file)


@commands.command()
def audit(
    context: typer.Context,
    config: ConfigOption = None,
    subject: Annotated[str | None, typer.Option(help="Only calls of this subject.")] = None,
    tool: Annotated[str | None, typer.Option(help="Only this tool: search, fetch, list_indexes, embed.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, max=1_000_000, help="How far back.")] = 24.0,
    empty: Annotated[bool, typer.Option("--empty", help="Only searches that found nothing.")] = False,
    slowest: Annotated[bool, typer.Option("--slowest", help="The slowest first, not the latest.")] = False,
    limit: Annotated[int, typer.Option("-n", min=1, max=100_000, help="How many.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Read the record of calls of the tool server."""
    import anyio

    from cdcsync.cli.printing import print_json, print_line
    from cdcsync.postgres.errors import speaking_of
    from cdcsync.postgres.sessions import connect
    from cdcsync.target.calls import Call, read_calls

    configuration = context.ensure_object(Invocation).load(config)

    async def ask() -> list[Call]:
        async with await connect(configuration.target.dsn, "target") as target:
            with speaking_of("target"):
                return await read_calls(
                    target,
                    configuration.target.schema,
                    subject=subject,
                    tool=tool,
                    since=timedelta(hours=hours),
                    empty=empty,
                    order="slowest" if slowest else "latest",
                    limit=limit,
                )

    calls = anyio.run(interruptible, ask)
    if as_json:
        print_json(calls)
        return
    for call in calls:
        what = call.query if call.query is not None else f"query {call.query_hash}" if call.query_hash else ""
        hits = "" if call.hits is None else f"{call.hits} hits"
        parts = (f"{call.at:%Y-%m-%d %H:%M:%S}", call.subject, call.tool, call.index_name or "", call.outcome)
        print_line(*parts, hits, f"{call.ms:.0f} ms", what)
