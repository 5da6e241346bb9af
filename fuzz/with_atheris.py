"""Runs one target under libFuzzer."""

from __future__ import annotations

import shlex
import sys

import atheris

with atheris.instrument_imports(include=["cdcsync"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Run the target that the first argument names; the others are libFuzzer's."""
    name = sys.argv.pop(1)
    # libFuzzer runs this again, by a shell, to merge inputs.
    sys.argv[0] = shlex.join([sys.executable, "-m", "fuzz.with_atheris", name])
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
