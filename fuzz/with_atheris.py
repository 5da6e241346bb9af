"""Runs one target under libFuzzer."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cdcsync"]):
    from fuzz.targets import TARGETS


def main() -> None:
    """Run the target that the first argument names; the others are libFuzzer's."""
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
