"""A command of cdcsync whose waits are shorter than a test should last: `… MODULE.CONSTANT=SECONDS … -- run -c FILE`.

Only for what would take minutes by design, such as how long an index rests before it is tried again.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Set the constants, then run the command."""
    settings, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for setting in settings:
        name, _, seconds = setting.partition("=")
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        assert isinstance(getattr(found, constant), float), name
        setattr(found, constant, float(seconds))
    from cdcsync.cli import main as command

    sys.argv[1:] = arguments
    command()


if __name__ == "__main__":
    main()
