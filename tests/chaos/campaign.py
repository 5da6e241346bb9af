"""A campaign: many histories on a few pairs of servers, and what they add up to."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

import msgspec

from tests.chaos import commits
from tests.chaos.faults import FAULTS
from tests.chaos.history import History
from tests.chaos.scenes import SCENES
from tests.chaos.servers import Side

ONE_SERVER = 0.15
"""Share of histories whose source is the target too."""


class Outcome(msgspec.Struct):
    """What became of a seed."""

    seed: int
    seconds: float
    plan: list[str]
    fired: dict[str, int]
    hit: set[str]
    transactions: int
    problem: str | None = None


def plan(seed: int, faults: Sequence[str], points: Sequence[str]) -> tuple[str | None, list[str], bool]:
    """Return the crash point, the faults and whether there is one server: all from the seed.

    Every fault and every point comes once in as many seeds as there are of them; the rest is chance.
    """
    chance = random.Random(f"plan {seed}")
    chosen = [faults[seed % len(faults)], *chance.choices(faults, k=chance.randint(1, 2))]
    chance.shuffle(chosen)
    point = points[seed % len(points)] if points else None
    return point, chosen, chance.random() < ONE_SERVER


def run_seed(seed: int, source: Side, target: Side, directory: Path, only: str | None = None) -> Outcome:
    """Run one history; a property that does not hold is the outcome's problem.

    :param only: a fault or a crash point, in place of the seed's plan.
    """
    point, faults, one_server = plan(seed, sorted(FAULTS), sorted(commits.points()))
    if only is not None:
        point, faults, one_server = (None, [only], False) if only in FAULTS else (only, [], False)
    history = History(seed, source, target, directory / f"seed{seed}", one_server=one_server)
    began = time.monotonic()
    problem = None
    try:
        with history.running():
            history.writer.allow()
            history.writer.start()
            if point is not None:
                history.note(f"crash point: {point}")
                SCENES[point](history, point)
            for name in faults:
                history.note(f"fault: {name}")
                history.writer.allow()
                FAULTS[name](history)
            history.converge()
    except Exception as error:  # whatever it is, the seed has failed, and the others go on
        problem = f"{type(error).__name__}: {error}"
        history.note(f"{problem}\n{traceback.format_exc()}")
    history.note("the end")
    (history.directory / "history.txt").write_text("\n".join(history.notes))
    return Outcome(
        seed,
        time.monotonic() - began,
        [point or "", *faults],
        dict(history.fired),
        history.hit,
        history.writer.committed,
        problem,
    )


def run(
    seeds: Iterable[int], *, jobs: int, directory: Path, only: str | None = None, until_failure: bool = False
) -> list[Outcome]:
    """Run histories, several at a time, each in a process with a pair of servers that it has to itself meanwhile."""
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    wanted = list(seeds)
    count = len(wanted)
    for seed in wanted:
        waiting.put(seed)
    processes = [context.Process(target=_serve, args=(waiting, done, directory, only)) for _ in range(min(jobs, count))]
    for process in processes:
        process.start()
    outcomes: list[Outcome] = []
    while len(outcomes) < count and (any(process.is_alive() for process in processes) or not done.empty()):
        with contextlib.suppress(Empty):
            outcomes.append(msgspec.msgpack.decode(done.get(timeout=1), type=Outcome))
        if until_failure and any(outcome.problem for outcome in outcomes):
            with contextlib.suppress(Empty):
                while True:
                    waiting.get_nowait()
            break
    for process in processes:
        process.join()
    return sorted(outcomes, key=lambda outcome: outcome.seed)


def _serve(waiting: Queue[int], done: Queue[bytes], directory: Path, only: str | None) -> None:
    """Run the histories that are waiting; one that failed leaves its servers behind."""
    # A proxy's hop should not wait for another thread's time to be up.
    sys.setswitchinterval(0.0005)
    with contextlib.ExitStack() as stack:
        source, target = _pair(stack)
        while True:
            try:
                seed = waiting.get(timeout=0.5)
            except Empty:
                return
            outcome = run_seed(seed, source, target, directory, only)
            said = "ok  " if outcome.problem is None else "FAIL"
            print(
                f"{said} seed {seed:<4} {outcome.seconds:5.1f} s, {outcome.transactions} transactions;"
                f" {'; '.join(outcome.plan)}",
                flush=True,
            )
            done.put(msgspec.msgpack.encode(outcome))
            if outcome.problem is not None:
                print(f"     {outcome.problem[:1500]}\n     {directory}/seed{seed}", flush=True)
                stack.close()
                source, target = _pair(stack)


def _pair(stack: contextlib.ExitStack) -> tuple[Side, Side]:
    source = Side("source")
    stack.callback(source.close)
    target = Side("target")
    stack.callback(target.close)
    return source, target


def report(outcomes: Sequence[Outcome], *, whole: bool) -> list[str]:
    """Print what fired and what was hit; returns what fails the campaign.

    :param whole: whether every fault and every crash point has to have come.
    """
    fired: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for outcome in outcomes:
        fired.update(outcome.fired)
        hit.update(outcome.hit)
    print(f"\n{'fault':<42} fired")
    for name in sorted({*FAULTS, *fired}):
        print(f"{name:<42} {fired[name]:>5}")
    points = sorted(set(commits.points()))
    print(f"\n{'crash point':<42}   hit")
    for name in points:
        print(f"{name:<42} {hit[name]:>5}")
    failed = [f"seed {outcome.seed}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    if whole:
        failed += [f"never fired: {name}" for name in sorted(FAULTS) if not fired[name]]
        failed += [f"never hit: {name}" for name in points if not hit[name]]
    total = sum(outcome.transactions for outcome in outcomes)
    print(
        f"\n{len(outcomes)} histories, {total} transactions, {sum(fired.values())} faults fired,"
        f" {sum(1 for name in points if hit[name])} of {len(points)} crash points hit,"
        f" {sum(outcome.seconds for outcome in outcomes):.0f} s of histories; {len(failed)} failures"
    )
    for line in failed:
        print(f"FAIL {line[:300]}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many histories")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--only", metavar="NAME", help="this fault or crash point, in place of the seeds' plans")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first history that fails")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--directory", type=Path, help="where logs and histories go")
    options = parser.parse_args(arguments)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cdcsync-chaos-"))
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    began = time.monotonic()
    outcomes = run(
        seeds,
        jobs=min(options.jobs, len(seeds)),
        directory=directory,
        only=options.only,
        until_failure=options.until_failure,
    )
    failed = report(outcomes, whole=len(seeds) >= 200 and options.only is None)
    print(f"{time.monotonic() - began:.0f} s; logs are in {directory}")
    return 1 if failed else 0
