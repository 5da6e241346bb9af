"""`main`: runs a command, and turns whatever it raises into lines for people and an exit status."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from enum import Enum
from typing import NoReturn

import typer
import typer.main
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from cdcsync.cli.commands import DEBUG_VARIABLE, Invocation, app
from cdcsync.cli.streams import ReaderGone, guarded
from cdcsync.cli.values import convert_here
from cdcsync.errors import EXIT_FAILED, CdcsyncError, leading
from cdcsync.process.threads import end_process

INTERRUPTED = 130
"""The status that shells report for a program that Ctrl-C ended: 128 + SIGINT."""

READER_GONE = 141
"""The status that shells report for a program that a closed pipe ended: 128 + SIGPIPE. A status of 1 would say
that the command failed, as `verify | head` does when the index differs."""

MODULES = {
    "demo": "commands",
    "init": "init",
    "check": "commands",
    "run": "commands",
    "status": "commands",
    "plan": "plan",
    "search": "search",
    "replay": "replay",
    "verify": "verify",
    "evaluate": "evaluate",
    "failures": "failures",
    "migrate": "migrate",
    "teardown": "teardown",
    "drop": "teardown",
    "serve": "serve",
    "audit": "serve",
    "config": "shipped",
    "token": "serve",  # a command # nosec B105
}
"""The module of each command, in the order in which the help lists them."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    :param arguments: without the program's name; the process's own by default.
    """
    with guarded():
        status = _status(sys.argv[1:] if arguments is None else arguments)
        end_process(status)
        sys.exit(status)


def command_line(arguments: Sequence[str] = ()) -> TyperGroup:
    """Return the command line.

    :param arguments: with the commands that these words can mean, or else with all: making all takes as long as a
        short command.
    """
    line = copy.copy(app)
    line.registered_commands, line.registered_groups = [], []
    # Help that is asked for before a command is that of all.
    words = [*arguments, "--help"][: [*arguments, "--help"].index("--help")]
    for name in [name for name in MODULES if name in words] or MODULES:
        commands: typer.Typer = importlib.import_module(f"cdcsync.cli.{MODULES[name]}").commands
        line.registered_commands += [
            one for one in commands.registered_commands if one.callback is not None and one.callback.__name__ == name
        ]
        line.registered_groups += [one for one in commands.registered_groups if one.name == name]
    command = typer.main.get_command(line)
    assert isinstance(command, TyperGroup)
    _describe_parameters(command)
    return command


def _describe_parameters(command: TyperCommand | TyperGroup, parent: typer.Context | None = None) -> None:
    """Make the help name a parameter's values as people do: `N`, not `<int range>`, and nothing for a flag."""
    # What the help option is called is a setting of the whole command line, which a context takes from its parent.
    context = typer.Context(command, parent=parent, **command.context_settings)
    for parameter in [*command.params, command.get_help_option(context)]:
        if isinstance(parameter, TyperOption) and parameter.metavar is None:
            parameter.metavar = "" if parameter.is_flag else _metavar(parameter)
        elif isinstance(parameter, TyperArgument):
            parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
        if isinstance(parameter, TyperOption | TyperArgument):
            convert_here(parameter)
    if isinstance(command, TyperGroup):
        for one in command.commands.values():
            _describe_parameters(one, context)  # type: ignore[arg-type]


def _metavar(option: TyperOption) -> str:
    kind = option.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(one.value) for one in kind)
    return "N" if kind in (int, float) else "TEXT"


def _status(arguments: Sequence[str]) -> int:
    invocation = Invocation(debug=bool(os.environ.get(DEBUG_VARIABLE)))
    try:
        try:
            words = list(arguments)
            status = command_line(words)(words, prog_name="cdcsync", standalone_mode=False, obj=invocation)
            sys.stdout.flush()
        except BaseExceptionGroup as group:
            raise leading(group) from group
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except typer.TyperException as error:
        return _report(error.format_message(), None, _help_of(error), error.exit_code)
    except ReaderGone:
        return READER_GONE
    except CdcsyncError as error:
        if invocation.debug:
            traceback.print_exception(error)
        return _report(error.message, error.where, error.hint, error.exit_code)
    except Exception as error:
        if invocation.debug:
            traceback.print_exception(error)
            return EXIT_FAILED
        first_line = str(error).partition("\n")[0]
        return _report(
            f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__,
            None,
            f"this should not happen; {DEBUG_VARIABLE}=1 shows where, and makes a report that can be acted on",
            EXIT_FAILED,
        )
    return status if isinstance(status, int) else 0


def _help_of(error: typer.TyperException) -> str:
    """Return how to find out what the command takes."""
    context = getattr(error, "ctx", None)
    taken = f"`{context.command_path if context else 'cdcsync'} --help` shows what it takes"
    if context is not None and context.info_name == "search" and hasattr(error, "option_name"):
        return f"{taken}; write -- before a text that begins with a dash: cdcsync search articles -- '-word another'"
    return taken


def _report(message: str, where: str | None, fix: str | None, status: int) -> int:
    from cdcsync.cli.printing import print_error, three_lines

    print_error(three_lines(message, where, fix))
    return status
