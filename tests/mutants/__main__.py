"""Revert and detect: puts each known fault back into a copy of the package and has it found.

`python -m tests.mutants` runs all; `--only WORDS` those whose name has these words, `--finder` those of one finder.
`--record` keeps how many seeds each took, for docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from tests.mutants.faults import FOUND, MUTANTS, PACKAGE, Finder, Mutant, found

CHAOS_SEEDS = 6
"""Histories in which chaos has to find a fault that it is pointed at."""


def find(mutant: Mutant, minutes: float) -> tuple[int | None, str]:
    """Return the number of seeds that finding a fault took, None if it was not found, and what was seen.

    Tests have no seeds: 0.
    """
    with tempfile.TemporaryDirectory(prefix="cdcsync-mutant-") as name:
        tree = Path(name)
        shutil.copytree(PACKAGE, tree / "cdcsync", ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "tests").symlink_to(PACKAGE.parent / "tests")
        mutant.apply(tree / "cdcsync")
        command = [sys.executable, "-m"]
        if mutant.found_by == "simulation":
            command += ["tests.simulation", "--minutes", str(minutes)]
        elif mutant.found_by == "tests":
            command += ["pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", str(PACKAGE.parent / "pyproject.toml")]
            command += ["-o", f"pythonpath={tree}", str(PACKAGE.parent / mutant.fault)]
        else:
            command += ["tests.chaos", "--only", mutant.fault, "--seeds", str(CHAOS_SEEDS), "--jobs", "1"]
            command += ["--until-failure", "--directory", str(tree / "histories")]
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None, ""
    if mutant.found_by == "tests":
        if done.returncode != 1:  # neither failed nor passed
            raise RuntimeError(f"{mutant.name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        return 0, next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    # A campaign also names the histories in which nothing was wrong.
    failed = "FAIL seed" if mutant.found_by == "chaos" else "seed"
    failure = re.search(rf"{failed} (\d+)[^\n]*", done.stdout)
    if failure is None:
        raise RuntimeError(f"{mutant.name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    said = failure[0] if mutant.found_by == "simulation" else done.stdout[failure.start() :].splitlines()[1].strip()
    return int(failure[1]) + 1, said


def _look(mutant: Mutant, minutes: float) -> int | None:
    """Have a fault found, and print what came of it; returns the seeds that it took."""
    began = time.monotonic()
    seeds, said = find(mutant, minutes)
    took = "NOT FOUND" if seeds is None else f"{seeds} seeds" if seeds else "found"
    print(
        f"{took:>10} {time.monotonic() - began:6.1f} s  {mutant.found_by:<10} {mutant.name}\n{'':>31}{said[:150]}",
        flush=True,
    )
    return seeds


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="words of the name")
    parser.add_argument("--finder", choices=get_args(Finder))
    parser.add_argument("--minutes", type=float, default=3.0, help="how long the simulation may look for each")
    parser.add_argument("--jobs", type=int, default=2, help="how many are looked for at a time")
    parser.add_argument("--record", action="store_true", help=f"keep the seeds that each took in {FOUND.name}")
    options = parser.parse_args()
    chosen = [one for one in MUTANTS if options.only in one.name and options.finder in (None, one.found_by)]
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        took = dict(zip(chosen, pool.map(lambda one: _look(one, options.minutes), chosen), strict=True))
    missed = [one.name for one, seeds in took.items() if seeds is None]
    if options.record:
        now = found() | {one.name: seeds for one, seeds in took.items()}
        kept = {one.name: now[one.name] for one in MUTANTS if now.get(one.name) is not None}
        FOUND.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{len(missed)} of {len(chosen)} faults were not found; {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
