"""The command line: reads arguments, calls one function of the floors below, prints what it returned.

The exit status is 0 when all is well, 1 when a command ran and failed, 2 when configuration, set-up or usage is wrong and
nothing was changed, 130 after Ctrl-C. An error is up to three lines on standard error (what, where, the fix) and never a
traceback, unless `--debug` or CDCSYNC_DEBUG asks for one.

Whatever costs time to import is imported in the command that needs it: `--help` must not wait for a web server or a model.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from cdcsync import __version__
from cdcsync.errors import EXIT_FAILED, EXIT_WRONG, CdcsyncError, SetupError, SourceUnavailable, UsageError, leading

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cdcsync.config import Config
    from cdcsync.index.search import Hit
    from cdcsync.preflight import Finding
    from cdcsync.status import Status

INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended: 128 + SIGINT."""

CONFIG_VARIABLE = "CDCSYNC_CONFIG"
DEBUG_VARIABLE = "CDCSYNC_DEBUG"
DEFAULT_CONFIG = "cdcsync.toml"

WATCH_EVERY_S = 1.0
"""How often `status --watch` looks: as often as a person can read, and a few cheap queries each time."""

SHOWN_LINES = 4
"""Lines of a chunk that `search` shows; --json has all of it."""

T = TypeVar("T")


class Mode(str, Enum):
    """How a search finds chunks."""

    hybrid = "hybrid"
    vector = "vector"
    text = "text"


class Invocation:
    """What was given before the command's name."""

    def __init__(self) -> None:
        self.config: Path | None = None
        self.debug = bool(os.environ.get(DEBUG_VARIABLE))

    def load(self, config: Path | None) -> Config:
        """Return the configuration that the command is about; a file named after the command goes first."""
        from cdcsync.config import load

        return load(config or self.config or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG), os.environ)


app = typer.Typer(
    help="""Keep a pgvector index in step with PostgreSQL tables, by logical replication.

    One worker (`cdcsync run`) follows one replication slot, for the tables and models that one configuration file names.
    The other commands look at the same file and the same databases; they need no running worker.""",
    epilog="""Start with `cdcsync demo`, or with a file: `cdcsync check -c cdcsync.toml`, then `cdcsync run -c cdcsync.toml`.

    Exit status: 0 fine, 1 failed, 2 wrong configuration, set-up or usage.""",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show the configuration in effect, or describe every key.", no_args_is_help=False)
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE",
        help=f"The configuration file; else the environment's {CONFIG_VARIABLE}, else {DEFAULT_CONFIG}.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cdcsync {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _before_the_command(
    context: typer.Context,
    config: ConfigOption = None,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show a traceback of an error; {DEBUG_VARIABLE}=1 does the same.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    invocation = _invocation(context)
    invocation.config = config
    invocation.debug = invocation.debug or debug
    if context.invoked_subcommand is None:
        _help_instead(context)


@config_app.callback(invoke_without_command=True)
def _before_the_config_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _help_instead(context)


def _help_instead(context: typer.Context) -> NoReturn:
    """Show what commands there are: none was given, which is wrong usage."""
    print(context.get_help())
    raise typer.Exit(EXIT_WRONG)


def _invocation(context: typer.Context) -> Invocation:
    return context.ensure_object(Invocation)


@app.command(
    epilog="""Watch it: `cdcsync demo`

    Look around afterwards: `cdcsync demo --stay`"""
)
def demo(
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep everything running at the end, until Ctrl-C, and print how to get at it.")
    ] = False,
    rows: Annotated[int, typer.Option(min=10, max=4000, help="How many rows of documentation to load.")] = 1200,
) -> None:
    """Show an index following its table, on a PostgreSQL server made for it.

    Starts PostgreSQL with pgvector in a temporary directory, loads the documentation of Python's standard library, runs the
    real worker with a real model, searches, then changes rows and measures how soon searches see it. Nothing is left
    behind. Needs the extra: `pip install 'cdcsync[demo]'`.
    """
    from cdcsync import demo as demonstration

    _async(lambda: demonstration.run(rows=rows, stay=stay))


@app.command(
    epilog="""Before the first run: `cdcsync check -c cdcsync.toml`

    In a deployment: `cdcsync check --json`, and look at the exit status."""
)
def check(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check everything that `run` needs, and change nothing.

    Looks at both servers (settings, privileges, slot, publication, tables, pgvector) and at the models. Every finding comes
    with its fix. The exit status is 2 when one of them would keep `run` from starting.
    """
    import msgspec

    findings = _async(lambda: _examine(_invocation(context).load(config)))
    wrong = any(finding.level == "error" for finding in findings)
    if as_json:
        _print_json({"ok": not wrong, "findings": msgspec.to_builtins(findings)})
    else:
        _print_findings(findings)
    if wrong:
        raise typer.Exit(EXIT_WRONG)


async def _examine(config: Config) -> list[Finding]:
    from cdcsync.preflight import build_embedders, examine, examine_embedders

    findings: list[Finding] = []
    embedders = build_embedders(config, findings)
    try:
        findings += await examine_embedders(config, embedders)
        report = await examine(config, embedders)
    finally:
        for embedder in embedders.values():
            await embedder.aclose()
    return findings + report.findings


@app.command(
    epilog="""In the foreground: `cdcsync run -c cdcsync.toml`

    Is it alive, is it ready: `curl http://127.0.0.1:9477/readyz`"""
)
def run(context: typer.Context, config: ConfigOption = None) -> None:
    """Run the worker: create what is missing, load the tables, then follow every change.

    Runs until SIGTERM or Ctrl-C, then finishes the batch in hand. It can be killed at any moment and started again: it goes
    on where the index is. A second worker for the same slot waits as a standby. Logs go to standard error; status, health
    and metrics are served on `worker.listen`.
    """
    from cdcsync import logs

    configuration = _invocation(context).load(config)
    logs.configure(configuration.worker.log_level, configuration.worker.log_format)
    from cdcsync import worker

    _async(lambda: worker.run(configuration))


@app.command(
    epilog="""Follow a first load: `cdcsync status --watch`

    How far behind, for a script: `cdcsync status --json | jq .lag_seconds`"""
)
def status(
    context: typer.Context,
    config: ConfigOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew each second, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far the index is, what waits, and what is wrong.

    Reads both databases, so it works whether or not a worker runs. With --watch and --json it prints one line of JSON each
    second.
    """
    configuration = _invocation(context).load(config)
    if watch:
        _async(lambda: _watch(configuration, as_json=as_json))
        return
    found = _async(lambda: _read_status_once(configuration))
    if as_json:
        _print_json(found)
    else:
        from cdcsync.status import render_table

        _console().print(render_table(found))


async def _read_status_once(config: Config) -> Status:
    from cdcsync.postgres import Session

    async with (
        Session(config.source.dsn, "source", application_name="cdcsync status") as source,
        Session(config.target.dsn, "target", application_name="cdcsync status") as target,
    ):
        return await _read_status(config, source, target)


async def _read_status(config: Config, source: Any, target: Any) -> Status:
    """Read the status; a source that does not answer is part of it, a target that does not is an error."""
    from cdcsync.status import read_status

    connected = await target.connection()
    try:
        source_connection = await source.connection()
    except SourceUnavailable:
        source_connection = None
    return await read_status(config, source_connection, connected)


async def _watch(config: Config, *, as_json: bool) -> None:
    import anyio
    from rich.live import Live

    from cdcsync.errors import Unavailable
    from cdcsync.postgres import Session
    from cdcsync.status import render_table

    async with (
        Session(config.source.dsn, "source", application_name="cdcsync status") as source,
        Session(config.target.dsn, "target", application_name="cdcsync status") as target,
    ):
        if as_json:
            while True:
                _print_json(await _read_status(config, source, target), indent=False)
                await anyio.sleep(WATCH_EVERY_S)
        with Live(console=_console(), auto_refresh=False, screen=False) as live:
            while True:
                try:
                    live.update(render_table(await _read_status(config, source, target)), refresh=True)
                except Unavailable as error:
                    # Watching is what one does while a server restarts.
                    live.update(_error_text(error), refresh=True)
                await anyio.sleep(WATCH_EVERY_S)


@app.command(
    epilog="""By meaning and by word: `cdcsync search articles "how do I reset my password"`

    Among some rows: `cdcsync search articles refund --where "tenant = 7 AND author = 'ada'"`

    The words alone, without loading a model: `cdcsync search articles '"error 1234"' --mode text`"""
)
def search(
    context: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index's name in the configuration.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")],
    config: ConfigOption = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many hits.")] = 10,
    mode: Annotated[
        Mode,
        typer.Option(help="By nearness of meaning (vector), by words (text), or by both, fused by rank (hybrid)."),
    ] = Mode.hybrid,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="A condition on key and carried columns; it is run read-only.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search an index, to see what your users would find.

    Embeds the text with the index's own model and asks the target; needs neither the source nor a running worker.
    """
    hits = _async(lambda: _search(_invocation(context).load(config), index, text, k, mode, where))
    if as_json:
        _print_json(hits)
    else:
        _print_hits(hits)


async def _search(config: Config, name: str, text: str, k: int, mode: Mode, where: str | None) -> list[Hit]:
    from cdcsync.index import search as searching
    from cdcsync.postgres import connect

    if name not in config.indexes:
        raise UsageError(
            f"there is no index {name} in the configuration",
            where=name,
            hint=_nearest(name, config.indexes),
        )
    index = config.indexes[name]
    connection = await connect(config.target.dsn, "target", application_name="cdcsync search")
    async with connection:
        spec = await searching.stored_spec(connection, config.target.schema, name, index)
        vector = None
        if mode is not Mode.text:
            vector = await _embed_query(config, index.embedder, spec.model, text)
        return await searching.search(
            connection, config.target.schema, spec, text=text, vector=vector, k=k, mode=mode.value, where=where
        )


async def _embed_query(config: Config, name: str, model: str, text: str) -> Any:
    """Return the query's vector by the model that made the index.

    :raises SetupError: the embedder cannot be used, or is of another model than the index.
    """
    import msgspec

    from cdcsync.preflight import build_embedders

    findings: list[Finding] = []
    only = msgspec.structs.replace(config, embedders={name: config.embedders[name]})
    embedder = build_embedders(only, findings).get(name)
    if embedder is None:
        finding = findings[0]
        raise SetupError(finding.message, where=finding.where, hint=finding.hint)
    try:
        if embedder.identity != model:
            raise SetupError(
                f"the index's vectors were made by {model}, this embedder is {embedder.identity}",
                where=f"embedders.{name}",
                hint="search with the configuration that the worker runs with, or with --mode text",
            )
        await embedder.open()
        return (await embedder.embed([text], kind="query"))[0]
    finally:
        await embedder.aclose()


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"


@config_app.command("show")
def config_show(context: typer.Context, config: ConfigOption = None) -> None:
    """Print the file in effect: every key with its value, defaults filled in, secrets hidden."""
    from cdcsync.config import render

    print(render(_invocation(context).load(config)), end="")


@config_app.command(
    "schema", epilog="""For completion in an editor: `cdcsync config schema > cdcsync.schema.json`"""
)
def config_schema() -> None:
    """Print the JSON schema of a configuration file, which describes every key."""
    from cdcsync.config import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
