"""What attacks without a record of their own came to when they last ran, for docs/reliability.md.

    make simulate MINUTES=10 | python -m tests.chaos.runs "make simulate MINUTES=10"

passes on what the command prints, and keeps its last line with the day.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

RUNS = Path(__file__).with_name("runs.json")


class Run(msgspec.Struct, frozen=True):
    """The last run of a command.

    :ivar day: when it ran, in UTC.
    :ivar said: the last line that it printed.
    """

    day: str
    said: str


class Figures(msgspec.Struct, frozen=True):
    """The last line of a benchmark."""

    figures: dict[str, float]


def runs(path: Path = RUNS) -> dict[str, Run]:
    """Return the runs that are kept, by their commands."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Run])


def keep(command: str, lines: Iterable[str], path: Path = RUNS) -> None:
    """Print these lines, and keep the last one that is not empty as what a command came to.

    :raises ValueError: there is none.
    """
    said = ""
    for line in lines:
        print(line, end="", flush=True)
        said = line.strip() or said
    if not said:
        raise ValueError(f"{command} printed nothing")
    kept = {**runs(path), command: Run(f"{datetime.now(UTC):%Y-%m-%d}", said)}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(dict(sorted(kept.items()))), indent=1) + b"\n")


def table(path: Path = RUNS) -> list[str]:
    """Return what the commands came to that say so in words, as rows of a table."""
    kept = runs(path).items()
    return [f"| `{command}` | {one.day} | {one.said} |" for command, one in kept if not one.said.startswith("{")]


def peers(path: Path = RUNS) -> list[str]:
    """Return what the same kills did to each side of a benchmark of peers, as rows of a table; nothing if none ran."""
    rows = []
    for one in runs(path).values():
        if one.said.startswith("{"):
            figures = msgspec.json.decode(one.said, type=Figures).figures
            sides: dict[str, dict[str, float]] = {}
            for name, value in figures.items():
                side, found, what = name.partition("_kills_")
                if found:
                    sides.setdefault(what, {})[side] = value
            rows += [
                f"| {what.replace('_', ' ')} | {' | '.join(_figure(by.get(side)) for side in SIDES)} |"
                for what, by in sides.items()
            ]
    return rows


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"


SIDES = ("cdcsync", "pgai")
"""The sides of bench/peers.py, in the order of the table's columns."""

if __name__ == "__main__":
    keep(sys.argv[1], sys.stdin)
