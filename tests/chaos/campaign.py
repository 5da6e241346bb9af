"""A campaign: many histories on a few pairs of servers, and what they add up to.

The outcome of each history is a line of `outcomes.jsonl`, and what came beside what is in `coverage.tsv`: of a campaign
that was interrupted, `--report DIRECTORY` makes both tables of the histories that ended.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

from tests.chaos.coverage import RECORD, TABLE, Outcome, forget, note, read, record, report, unseen, write_table
from tests.chaos.faults import FAULTS
from tests.chaos.history import History
from tests.chaos.scenes import SCENES, reachable
from tests.chaos.servers import Side

WHOLE = 200
"""In a campaign of so many histories, every fault has to have fired and every crash point to have been hit."""

ONE_SERVER = 0.15
"""Share of histories whose source is the target too."""

GRACE_S = 90.0
"""How long a job that was interrupted may take to end its workers and servers, on a busy machine."""

SERVERS = ("postgres", "sh")
"""Names of the processes that end by themselves if the job does: servers, and what watches over each."""


def plan(seed: int, faults: Sequence[str], points: Sequence[str]) -> tuple[str | None, list[str], bool]:
    """Return the crash point, the faults and whether there is one server: all from the seed.

    :param points: those that a history can come to.

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
    point, faults, one_server = plan(seed, sorted(FAULTS), reachable())
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
        kinds=history.writer.kinds,
        embedded=history.embedded,
        covered=history.covered,
        compared=history.compared,
    )


def run(
    seeds: Iterable[int], *, jobs: int, directory: Path, only: str | None = None, until_failure: bool = False
) -> list[Outcome]:
    """Run histories, several at a time, each in a process with a pair of servers that it has to itself meanwhile.

    Interrupted, it returns the outcomes of the histories that have ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    wanted = list(seeds)
    for seed in wanted:
        waiting.put(seed)
    directory.mkdir(parents=True, exist_ok=True)
    forget(directory, wanted)
    processes = [context.Process(target=_serve, args=(waiting, directory, only)) for _ in range(min(jobs, len(wanted)))]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            if until_failure and any(one.problem for one in read(directory, wanted)):
                with contextlib.suppress(Empty):
                    while True:
                        waiting.get_nowait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        _end_jobs([process for process in processes if process.pid is not None])
    waiting.cancel_join_thread()
    return read(directory, wanted)


def _end_jobs(processes: Sequence[BaseProcess]) -> None:
    """Ask jobs to end, and end those that do not, with what they started."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive() and process.pid is not None:
            print(f"job {process.pid} has not ended within {GRACE_S:.0f} s: killed", flush=True)
            end_with_descendants(process.pid)
            process.join()


def end_with_descendants(pid: int) -> None:
    """Kill a process and what it started, directly or not, but for servers: those see its end, and end in order."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            named, _, rest = stat.read_text(errors="replace").rpartition(") ")
            parents[int(stat.parent.name)] = int(rest.split()[1])
            names[int(stat.parent.name)] = named.partition("(")[2]
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one and names[child] not in SERVERS]
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def _serve(waiting: Queue[int], directory: Path, only: str | None) -> None:
    """Run the histories that are waiting; one that failed leaves its servers behind."""
    # A proxy's hop should not wait for another thread's time to be up.
    sys.setswitchinterval(0.0005)
    _end_once()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        source, target = _pair(stack)
        campaign = multiprocessing.parent_process()
        while campaign is None or campaign.is_alive():
            try:
                seed = waiting.get(timeout=0.5)
            except Empty:
                return
            outcome = run_seed(seed, source, target, directory, only)
            said = "ok  " if outcome.problem is None else "FAIL"
            missed = outcome.plan[0] and outcome.plan[0] not in outcome.hit
            print(
                f"{said} seed {seed:<4} {outcome.seconds:5.1f} s, {outcome.transactions} transactions;"
                f" {'; '.join(outcome.plan)}{' (not hit)' if missed else ''}",
                flush=True,
            )
            note(directory, outcome)
            if outcome.problem is not None:
                print(f"     {outcome.problem[:1500]}\n     {directory}/seed{seed}", flush=True)
                stack.close()
                source, target = _pair(stack)


def _end_once() -> None:
    """Have the first SIGINT or SIGTERM end the history at hand, and no other one disturb the taking down."""

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by what is started
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _pair(stack: contextlib.ExitStack) -> tuple[Side, Side]:
    source = Side("source")
    stack.callback(source.close)
    target = Side("target")
    stack.callback(target.close)
    return source, target


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
    parser.add_argument("--report", type=Path, metavar="DIRECTORY", help="only tell of the histories that ended there")
    parser.add_argument("--record", action="store_true", help=f"keep what came of it in {RECORD.name}")
    options = parser.parse_args(arguments)
    points = reachable()
    if options.report is not None:
        outcomes = read(options.report)
        write_table(options.report, outcomes, FAULTS, points)
        if options.record:
            record(outcomes)
        whole = len(outcomes) >= WHOLE
        failed = report(outcomes, FAULTS, points, whole=whole) + unseen(outcomes, whole=whole)
        return 1 if failed else 0
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cdcsync-chaos-"))
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    _end_once()
    began = time.monotonic()
    outcomes = run(
        seeds,
        jobs=min(options.jobs, len(seeds)),
        directory=directory,
        only=options.only,
        until_failure=options.until_failure,
    )
    write_table(directory, outcomes, FAULTS, points)
    whole = len(outcomes) >= WHOLE and options.only is None
    failed = report(outcomes, FAULTS, points, whole=whole)
    if options.only is None and len(outcomes) > 1:  # a single history may have a short middle
        failed += unseen(outcomes, whole=whole)
    if options.record:
        record(outcomes)
    if len(outcomes) < len(seeds):
        print(f"{len(seeds) - len(outcomes)} of {len(seeds)} histories did not end")
    print(f"{time.monotonic() - began:.0f} s; logs and {TABLE} are in {directory}")
    return 1 if failed or (len(outcomes) < len(seeds) and not options.until_failure) else 0
