"""Runs the tests that kill at the crash points that no history comes to, proofs among them, and counts the deaths.

    python -m tests.chaos.elsewhere --record

What dies notes where (`cdcsync/process/crashpoints.py`). A point at which nothing died fails the run, as a test does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from cdcsync.process.crashpoints import NOTES
from tests import ROOT
from tests.chaos.coverage import commit
from tests.chaos.killing_tests import killing
from tests.chaos.scenes import ELSEWHERE

DEATHS = Path(__file__).with_name("deaths.json")


class Deaths(msgspec.Struct, frozen=True):
    """What the last run that was recorded came to.

    :ivar commit: as that of `coverage.Record`.
    :ivar at: how often something died at each point.
    """

    day: str
    commit: str
    at: dict[str, int]


def killers(elsewhere: Mapping[str, str] = ELSEWHERE) -> list[str]:
    """Return the tests that kill at these points, as pytest names them."""
    found = {
        f"{file}::{test}"
        for file in set(elsewhere.values())
        for test, points in killing((ROOT / file).read_text()).items()
        if any(elsewhere.get(point) == file for point in points)
    }
    return sorted(found)


def never(deaths: Mapping[str, int], elsewhere: Mapping[str, str] = ELSEWHERE) -> list[str]:
    """Return the points at which nothing died."""
    return sorted(point for point in elsewhere if not deaths.get(point))


def recorded(path: Path = DEATHS) -> Deaths:
    """Return what the last run that was recorded came to."""
    return msgspec.json.decode(path.read_bytes(), type=Deaths)


def counted(notes: str) -> dict[str, int]:
    """Return how often each point was noted."""
    return dict(sorted(Counter(notes.splitlines()).items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.elsewhere", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="how many tests at a time")
    parser.add_argument("--record", action="store_true", help=f"keep what came of it in {DEATHS.name}")
    options = parser.parse_args(arguments)
    with tempfile.NamedTemporaryFile("r") as notes:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            str(options.jobs),
            "-m",
            "proof or not proof",
            *killers(),
        ]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, NOTES: notes.name}, check=False).returncode
        at = {point: times for point, times in counted(notes.read()).items() if point in ELSEWHERE}
    for point in never(at):
        print(f"FAIL nothing died at: {point}")
    print(f"{sum(at.values())} deaths at {len(at)} of {len(ELSEWHERE)} crash points that no history comes to")
    if options.record:
        kept = Deaths(f"{datetime.now(UTC):%Y-%m-%d}", commit(), at)
        DEATHS.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    return 1 if status or never(at) else 0


if __name__ == "__main__":
    sys.exit(main())
