"""The command line.

    values     from the text of an option to its value
    streams    standard output and standard error: full, closed, or without a reader
    consoles   the console that everything is printed on
    beside     asks a worker on this machine
    printing   findings, hits, statuses and errors, for people and as JSON
    figures    the figures of `evaluate`, as tables
    plans      plans, for `plan` and `check`
    queries    questions to both servers and to a model
    loads      the first load as `run` shows it on a terminal
    commands   what all commands share; `demo`, `check`, `run` and `status`
    shipped    the commands of `config`
    init       the command `init`
    plan       the command `plan`
    search     the command `search`
    teardown   the commands `teardown` and `drop`
    replay     the command `replay`
    verify     the command `verify`
    evaluate   the command `evaluate`
    failures   the command `failures`
    migrate    the command `migrate`
    serve      the commands `serve`, `token` and `audit`
    entry      `main`: runs a command and turns what it raises into an exit status

The exit status is 0 when all is well, 1 when a command ran and failed, 2 when configuration, set-up or usage is wrong
and nothing was changed, 3 when `plan` finds something to do, 130 after Ctrl-C, 141 when nobody reads the output any
more. A file here imports only from lines above its own.

Whatever costs time to import is imported in the function that needs it: `--help` must not wait for a web server or a
model.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from cdcsync.process.stopping import take_signals_before_the_start


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    :param arguments: without the program's name; the process's own by default.
    """
    if arguments is None and "run" in sys.argv:
        # A service manager may end or reload the worker while it still imports what it needs.
        take_signals_before_the_start()
    try:
        from cdcsync.cli.entry import main as run_command
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    run_command(arguments)


__all__ = ["main"]
