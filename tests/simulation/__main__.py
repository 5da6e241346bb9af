"""Simulate from the command line: `python -m tests.simulation --minutes 1`, or `--seed 17` for one history again."""

from __future__ import annotations

import argparse
import itertools
import os
import time

from tests.simulation.history import run, schedule, shrink


def main() -> int:
    """Run histories until the time is up or one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one alone")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else itertools.count(options.first)
    began, used, count = time.monotonic(), time.process_time(), 0
    for seed in seeds:
        steps = schedule(seed)
        count += 1
        if (problem := run(seed, steps)) is not None:
            smaller = shrink(seed, steps)
            print(f"seed {seed}: {problem}\nas well after {len(smaller)} steps: {run(seed, smaller)}")
            print("\n".join(f"  {number}: {name}" for number, name in smaller))
            return 1
        if time.monotonic() - began > 60 * options.minutes:
            break
    used = time.process_time() - used
    print(
        f"{count} histories, {os.cpu_count()} processors, one used: {used:.1f} s of it,"
        f" {3600 * count / used:,.0f} histories an hour; no failure"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
