"""Revert and detect: puts each known fault back into a copy of the package and has it found.

`python -m tests.mutants` runs all; `--only WORDS` those whose name has these words, `--finder` those of one finder.
`--record` keeps what this run found, for docs/reliability.md, and nothing of the runs before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import msgspec

from tests.mutants.faults import FOUND, MUTANTS, Finder, Found, Mutant, Record
from tests.mutants.finding import FoundElse, NotFound, find


def _look(mutant: Mutant, minutes: float) -> Found | None:
    """Have a fault found, and print what came of it."""
    began = time.monotonic()
    found = None
    try:
        found = find(mutant, minutes)
        took, said = f"{found.seeds} seeds" if found.seeds else "found", found.said
    except NotFound:
        took, said = "NOT FOUND", ""
    except FoundElse as error:
        took, said = "ELSE", str(error)
    print(
        f"{took:>10} {time.monotonic() - began:6.1f} s  {mutant.found_by:<10} {mutant.name}\n{'':>31}{said[:500]}",
        flush=True,
    )
    return found


def record(found: Mapping[str, Found], path: Path = FOUND) -> None:
    """Keep what one run found, in place of what was kept before."""
    kept = Record(f"{datetime.now(UTC):%Y-%m-%d}", dict(found))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="words of the name")
    parser.add_argument("--finder", choices=get_args(Finder))
    parser.add_argument("--minutes", type=float, default=3.0, help="how long the simulation may look for each")
    parser.add_argument("--jobs", type=int, default=2, help="how many are looked for at a time")
    parser.add_argument("--record", action="store_true", help=f"keep what this run found in {FOUND.name}")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if options.only in one.name and options.finder in (None, one.found_by)]
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(chosen, pool.map(lambda one: _look(one, options.minutes), chosen), strict=True))
    if options.record:
        record({one.name: what for one, what in found.items() if what is not None})
    missed = sum(what is None for what in found.values())
    print(f"{missed} of {len(chosen)} faults were not found; {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
