"""The commands, their options and their help."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, TypeVar

import typer

from cdcsync import __version__
from cdcsync.errors import EXIT_FAILED, EXIT_WRONG, UsageError

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.worker.state import WorkerState

CONFIG_VARIABLE = "CDCSYNC_CONFIG"
DEBUG_VARIABLE = "CDCSYNC_DEBUG"
DEFAULT_CONFIG = "cdcsync.toml"

T = TypeVar("T")


class Mode(StrEnum):
    """How a search finds chunks."""

    hybrid = "hybrid"
    vector = "vector"
    text = "text"


class Invocation:
    """The settings of the whole command line: options before the command's name, and the environment's."""

    def __init__(self, *, debug: bool) -> None:
        self.debug = debug
        self.config: Path | None = None

    def load(self, config: Path | None) -> Config:
        """Return the configuration that a command is about.

        :param config: the file named after the command, which goes before one named ahead of it.
        :raises ConfigError: there is no such file, or it is wrong.
        """
        from cdcsync.config import load
        from cdcsync.postgres.passfile import take_credential

        take_credential(os.environ)
        return load(config or self.config or Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG), os.environ)


app = typer.Typer(
    name="cdcsync",
    help="""Keep a pgvector index in step with PostgreSQL tables, by logical replication.

    One worker (`cdcsync run`) follows one replication slot, for the tables and models that one configuration file
    names. The other commands read the same file and ask the same databases; they need no running worker.""",
    epilog="""Try it: `cdcsync demo`

    Your own tables: `cdcsync check -c cdcsync.toml`, then `cdcsync run -c cdcsync.toml`

    Exit status: 0 fine, 1 failed, 2 wrong configuration, set-up or usage, 3 `plan` has found something that a start
    would do, 130 ended by Ctrl-C.""",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
commands = typer.Typer()


def index_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the indexes of the configuration that a word can be completed to; none where it cannot be read."""
    import tomllib

    named = next((found for one in (context, context.parent) if one and (found := one.params.get("config"))), None)
    try:
        data = tomllib.loads(Path(named or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    indexes = data.get("indexes")
    return [name for name in indexes if name.startswith(incomplete)] if isinstance(indexes, dict) else []


IndexArgument = Annotated[
    str,
    typer.Argument(metavar="INDEX", help="The index's name in the configuration.", autocompletion=index_names),
]

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        metavar="FILE",
        help=f"The configuration file; else {CONFIG_VARIABLE} of the environment, else {DEFAULT_CONFIG}.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def judged_option(help_: str) -> Any:
    """Return the option that names a directory of judged questions."""
    return typer.Option("--judged", metavar="DIR", help=help_, show_default=False)


def least_option(metavar: str, help_: str) -> Any:
    """Return the option for the least value of a measure."""
    return typer.Option("--min", metavar=metavar, help=help_, show_default=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cdcsync {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _before_a_command(
    context: typer.Context,
    config: ConfigOption = None,
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show the traceback of an error; {DEBUG_VARIABLE}=1 does the same.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    invocation = context.ensure_object(Invocation)
    invocation.config = config
    invocation.debug = invocation.debug or debug
    if context.invoked_subcommand is None:
        print_help_instead(context)


def print_help_instead(context: typer.Context) -> NoReturn:
    """Show what commands there are, for someone who named none."""
    print(context.get_help())
    raise typer.Exit(EXIT_WRONG)


def _load(context: typer.Context, config: Path | None) -> Config:
    return context.ensure_object(Invocation).load(config)


def named(context: typer.Context, config: Path | None) -> str:
    """Return what follows a command's name so that it reads the same file."""
    file = config or context.ensure_object(Invocation).config
    return "" if file is None else f" -c {shlex.quote(str(file))}"


def _wait_for(function: Callable[[], Awaitable[T]]) -> T:
    import anyio

    from cdcsync.process.stopping import interruptible

    return anyio.run(interruptible, function)


@commands.command(
    epilog="""Watch it: `cdcsync demo`

    Look around in it afterwards: `cdcsync demo --stay`"""
)
def demo(
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep it all running at the end, until Ctrl-C, and say how to get at it.")
    ] = False,
    rows: Annotated[int, typer.Option(min=20, max=3000, help="How many rows of documentation to load.")] = 1050,
) -> None:
    """Watch an index follow its table, on a PostgreSQL server made for it.

    Starts PostgreSQL with pgvector in a temporary directory, loads the documentation of Python's standard library, runs
    the real worker with a real model, searches, then changes rows and measures how soon searches see it. Nothing is
    left behind. Needs the extra `demo`: `pip install 'cdcsync[demo]'`.
    """
    from cdcsync import demo as demonstration

    _wait_for(lambda: demonstration.run(rows=rows, stay=stay))


@commands.command(
    epilog="""Before the first run: `cdcsync check -c cdcsync.toml`

    In a deployment, by its exit status: `cdcsync check --json`"""
)
def check(
    context: typer.Context,
    config: ConfigOption = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Load local models and rerankers too, and try each with a word: some 10 s a model."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything that `run` needs, and change nothing.

    Looks at both servers (settings, privileges, slot, publication, tables, pgvector), asks remote models to embed a
    word and remote rerankers to score one, and reads the files of local models. --deep loads those as well. Each
    finding comes with its fix. A summary of what `run` would do ends it, which `plan` tells in full. The exit status is
    2 if a finding would keep `run` from starting, or if a model does not work: `run` starts without its provider, and
    asks it until it answers.
    """
    import msgspec

    from cdcsync import logs
    from cdcsync.cli import printing, queries
    from cdcsync.cli.plans import print_summary

    configuration = _load(context, config)
    logs.configure("error", configuration.worker.log_format)
    with printing.waiting("checking models, servers and tables"):
        findings, plan = _wait_for(lambda: queries.examine_all(configuration, deep=deep))
    wrong = any(finding.level == "error" for finding in findings)
    if as_json:
        printing.print_json({"ok": not wrong, "findings": msgspec.to_builtins(findings), "plan": plan})
    else:
        printing.print_findings(findings)
        if plan is not None:
            print_summary(plan)
        printing.print_verdict(findings, named(context, config))
    if wrong:
        raise typer.Exit(EXIT_WRONG)


@commands.command(
    epilog="""In the foreground: `cdcsync run -c cdcsync.toml`

    Is it ready, at the address that `worker.listen` names: `curl http://127.0.0.1:9477/readyz`"""
)
def run(context: typer.Context, config: ConfigOption = None) -> None:
    """Run the worker: create what is missing, load the tables, then follow every change.

    Runs until SIGTERM or Ctrl-C, then finishes the current batch. It can be killed at any moment and started again: it
    resumes from where the index is. A second worker for the same slot waits as a standby. SIGHUP has it read its
    configuration again. Logs go to standard error; health, metrics and status are served at `worker.listen`.
    """
    from cdcsync import logs
    from cdcsync.config.embedders import HashEmbedder, RayEmbedder, RemoteEmbedder
    from cdcsync.process import collector
    from cdcsync.process.memory import share_arena
    from cdcsync.process.stopping import ends_with_its_terminal

    collector.own()
    configuration = _load(context, config)
    # A model in this process has threads of its own, which allocate all the time.
    if all(isinstance(one, HashEmbedder | RayEmbedder | RemoteEmbedder) for one in configuration.embedders.values()):
        share_arena()
    settings = configuration.worker
    shown: Callable[[WorkerState], Coroutine[Any, Any, None]] | None = None
    stream: TextIO | None = None
    if sys.stderr.isatty() and settings.log_format != "json":
        from cdcsync.cli import loads, printing

        console = printing.console(errors=True)
        stream = loads.log_stream(console)
        shown = partial(loads.show_loads, console=console, host=settings.listen_address[0])
    logs.configure(settings.log_level, settings.log_format, stream)
    from cdcsync.worker import run as worker

    # From a terminal, SIGHUP says that the terminal is gone, and ends the worker as it ends everything there.
    reread = None if ends_with_its_terminal() else lambda: _load(context, config)
    _wait_for(lambda: worker.run(configuration, reread=reread, shown=shown))


@commands.command(
    epilog="""Follow the first load: `cdcsync status --watch`

    How far behind, for a script: `cdcsync status --json | jq .lag_seconds`

    For monitoring, by its exit status: `cdcsync status --check`"""
)
def status(
    context: typer.Context,
    config: ConfigOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew each second, until Ctrl-C.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if there is a problem, or more lag than ready_max_lag_s.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far the index is, what waits, and what is wrong.

    Asks both databases, so it works whether or not a worker runs. With both --watch and --json it prints a line of JSON
    each second. The exit status is 0 whenever the status could be read, also if it tells of problems; --check makes
    that 1. It is 1 too if the target does not answer, and 2 if configuration or privileges are wrong.
    """
    from cdcsync.cli import printing, queries

    if watch and check:
        raise UsageError("--watch and --check cannot be combined", where="status", hint="leave one of them out")
    configuration = _load(context, config)
    if watch:
        _wait_for(lambda: queries.watch_status(configuration, as_json=as_json))
        return
    found = _wait_for(lambda: queries.read_status_once(configuration))
    if as_json:
        printing.print_json(found)
    else:
        printing.print_status(found)
    if check and (found.problems or (found.lag_seconds or 0) > configuration.worker.ready_max_lag_s):
        raise typer.Exit(EXIT_FAILED)
