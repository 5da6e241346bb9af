"""How much does a worker that follows slow the source's own writes?

One writer commits single-row transactions for half a second, alone, with a worker that follows, and with pg_recvlogical
in the worker's place, which throws away what it receives: what any consumer of the same changes costs. Each round has
all three, in another order. What counts is the median of the rounds' ratios of the median commit. A machine's pace
changes more from second to second than the few hundredths that are looked for, so the ratio's interval is found too
(`_median.py`). If that is wider than three hundredths on either side and has the goal in it, the run decides nothing,
and says so.

A source has a machine of its own as a rule. Here it has the first processor, with the writer; the target, the worker
and pg_recvlogical have the others, if there are any. What is left are the walsender, which decodes on the source, and
the few other sessions that a worker has there.

A commit without fsync, as in every other bench, takes a tenth of a millisecond, so that waking the walsender is a large
part of it. A source runs with fsync, and that is what the goal is about. What the writer's backend takes of a processor
is a figure beside the ratio.

    python bench/writes.py [on] [off]      ROUNDS=18 SECONDS=0.5

`on` and `off` are the server's `fsync`; without a name, both.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._median import interval
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench._recvlogical import recvlogical
    from bench.report import of_goal, report
else:
    from _median import interval
    from _pipeline import Pipeline, pipeline, processor_ms
    from _recvlogical import recvlogical
    from report import of_goal, report

ROWS = 10_000
GOAL_ROUNDS = 18
ROUNDS = int(os.environ.get("ROUNDS", str(GOAL_ROUNDS)))
SECONDS = float(os.environ.get("SECONDS", "0.5"))
PAUSE_S = 0.002
"""Between two commits: a writer that never pauses measures how many processors the machine has."""
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'
ORDERS = list(permutations(("alone", "followed", "drained")))

GOAL = 0.97
NOTE = (
    "what any consumer of these changes costs is `drained`: the server wakes a process at each commit, and that decodes"
    " the commit on a processor of the source, which the writer has too here"
)

PROCESSORS = os.sched_getaffinity(0)

PROCESSES = "SELECT pid FROM pg_stat_activity UNION SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int"
"""Those of the server; what it starts later is confined as its first process is."""


def measure(fsync: str) -> dict[str, list[float]]:
    """Return what was measured, by side and unit, a value for each round."""
    taken: dict[str, list[float]] = {}
    own = {min(PROCESSORS)}
    others = PROCESSORS - own or own
    os.sched_setaffinity(0, others)
    with pipeline(EMBEDDER, apart=True, shared_buffers="256MB", fsync=fsync) as made:
        made.load(ROWS)
        made.stop()
        made.connection.execute("SELECT pg_create_logical_replication_slot('drained', 'pgoutput')")
        for connection, processors in ((made.connection, own), (made.target, others)):
            for (pid,) in connection.execute(PROCESSES).fetchall():
                with contextlib.suppress(ProcessLookupError):  # autovacuum's come and go
                    os.sched_setaffinity(pid, processors)
        for round_ in range(ROUNDS):
            for side in ORDERS[round_ % len(ORDERS)]:
                os.sched_setaffinity(0, others)
                with consumer(made, side):
                    os.sched_setaffinity(0, own)
                    used_ms = processor_ms(made.connection.info.backend_pid)
                    each_s = written_s(made)
                    used_ms = processor_ms(made.connection.info.backend_pid) - used_ms
                taken.setdefault(f"{side}_p50_ms", []).append(statistics.median(each_s) * 1000)
                taken.setdefault(f"{side}_processor_ms", []).append(used_ms / len(each_s))
                taken.setdefault(f"{side}_commits", []).append(len(each_s))
    return taken


@contextlib.contextmanager
def consumer(made: Pipeline, side: str) -> Iterator[None]:
    """Have the changes followed by the worker, by pg_recvlogical or by nobody; whoever it is has nothing left to do."""
    match side:
        case "followed":
            made.start()
            made.event("streaming")
            made.text_in_step()
            made.vectors_in_step(0.05)
            yield
            made.text_in_step()
            made.stop()
        case "drained":
            made.connection.execute("SELECT pg_replication_slot_advance('drained', pg_current_wal_insert_lsn())")
            command = recvlogical(made.dsn, "drained", "cdcsync")
            with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
                try:
                    made.slot_is(True, "drained")
                    yield
                finally:
                    process.terminate()
            made.slot_is(False, "drained")
        case _:
            yield


def written_s(made: Pipeline) -> list[float]:
    """Commit single-row transactions for a while, with pauses; return how long each took."""
    began, each_s = time.perf_counter(), list[float]()
    while time.perf_counter() - began < SECONDS:
        started = time.perf_counter()
        made.connection.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = %s", [len(each_s) % ROWS + 1])
        each_s.append(time.perf_counter() - started)
        time.sleep(PAUSE_S)
    return each_s


def main() -> None:
    """Measure and report."""
    figures: dict[str, float] = {"rounds": ROUNDS}
    ratios, against, smaller, undecided = {}, {}, {}, {}
    for fsync in sys.argv[1:] or ("on", "off"):
        taken = measure(fsync)
        figures |= {f"fsync_{fsync}_{what}": statistics.median(of) for what, of in taken.items()}
        for other, what in (("alone", "the source with nobody who follows"), ("drained", "pg_recvlogical")):
            ratio = f"fsync_{fsync}_{other}_over_followed"
            pairs = zip(taken[f"{other}_p50_ms"], taken["followed_p50_ms"], strict=True)
            each = [one / followed for one, followed in pairs]
            low, high = interval(each)
            ratios[ratio], against[ratio] = statistics.median(each), f"{what}, same run"
            figures |= {f"{ratio}_at_least": low, f"{ratio}_at_most": high}
            smaller[ratio] = of_goal(ROUNDS, GOAL_ROUNDS, "rounds")
            if (high - low) / 2 > 1 - GOAL and low < GOAL <= high:
                undecided[ratio] = f"between {low:.3f} and {high:.3f}"
    goals = dict.fromkeys(ratios, GOAL)
    report("writes", figures, ratios, goals, against, smaller, undecided, notes={"fsync": NOTE})


if __name__ == "__main__":
    main()
