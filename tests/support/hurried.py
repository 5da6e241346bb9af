"""A command of cdcsync with other constants than it has: `… MODULE.CONSTANT=NUMBER … -- run -c FILE`.

Only for what would take minutes, or gigabytes, by design, such as how long an index rests before it is tried again.
"""

from __future__ import annotations

import importlib
import sys

from cdcsync.process.stopping import take_signals_before_the_start


def main() -> None:
    """Set the constants, then run the command."""
    take_signals_before_the_start()
    settings, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for setting in settings:
        name, _, number = setting.partition("=")
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        now = getattr(found, constant)
        assert isinstance(now, int | float), name
        setattr(found, constant, type(now)(float(number)))
    from cdcsync.cli import main as command

    sys.argv[1:] = arguments
    command()


if __name__ == "__main__":
    main()
