"""How much does a worker that follows slow the source's own writes?

One writer commits single-row transactions for a second, with the worker stopped and with it following, in pairs: each
pair has both sides, and who begins alternates. What counts is the median of the pairs' ratios of the median commit. A
machine's pace changes more from second to second than the few hundredths that are looked for, so the ratio's interval
is found too (`_median.py`). If that is wider than three hundredths on either side and has the goal in it, the run
decides nothing, and says so.

A commit without fsync, as in every other bench, takes a tenth of a millisecond, so that waking the walsender is a large
part of it. A source runs with fsync, and that is what the goal is about. All of it shares one machine: a source on a
machine of its own is slowed less, and what the writer's backend takes of a processor is a figure beside the ratio.

    python bench/writes.py [on] [off]      PAIRS=24 SECONDS=1

`on` and `off` are the server's `fsync`; without a name, both.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._median import interval
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench.report import of_goal, report
else:
    from _median import interval
    from _pipeline import Pipeline, pipeline, processor_ms
    from report import of_goal, report

ROWS = 10_000
GOAL_PAIRS = 20
PAIRS = int(os.environ.get("PAIRS", "24"))
SECONDS = float(os.environ.get("SECONDS", "1"))
PAUSE_S = 0.002
"""Between two commits: a writer that never pauses measures how many processors the machine has."""
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'

GOAL = 0.97


def measure(fsync: str) -> tuple[list[float], dict[str, float]]:
    """Return the ratio of each pair, and the medians of what both sides took."""
    taken: dict[str, list[float]] = {}
    with pipeline(EMBEDDER, shared_buffers="256MB", fsync=fsync) as made:
        made.load(ROWS)
        made.stop()
        for pair in range(PAIRS):
            for side in ("alone", "followed") if pair % 2 else ("followed", "alone"):
                if side == "followed":
                    made.start()
                    made.event("streaming")
                    made.text_in_step()
                    made.vectors_in_step(0.05)
                used_ms = processor_ms(made.connection.info.backend_pid)
                each_s = written_s(made)
                used_ms = processor_ms(made.connection.info.backend_pid) - used_ms
                if side == "followed":
                    made.text_in_step()
                    made.stop()
                taken.setdefault(f"{side}_p50_ms", []).append(statistics.median(each_s) * 1000)
                taken.setdefault(f"{side}_processor_ms", []).append(used_ms / len(each_s))
                taken.setdefault(f"{side}_commits", []).append(len(each_s))
    pairs = zip(taken["alone_p50_ms"], taken["followed_p50_ms"], strict=True)
    return [alone / followed for alone, followed in pairs], {name: statistics.median(of) for name, of in taken.items()}


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
    figures: dict[str, float] = {"pairs": PAIRS}
    ratios, smaller, undecided = {}, {}, {}
    for fsync in sys.argv[1:] or ("on", "off"):
        each, medians = measure(fsync)
        low, high = interval(each)
        name = f"fsync_{fsync}"
        ratio = f"{name}_alone_over_followed"
        ratios[ratio] = statistics.median(each)
        figures |= {f"{name}_least_likely_ratio": low, f"{name}_most_likely_ratio": high}
        figures |= {f"{name}_{what}": value for what, value in medians.items()}
        smaller[ratio] = of_goal(PAIRS, GOAL_PAIRS, "pairs")
        if (high - low) / 2 > 1 - GOAL and low < GOAL <= high:
            undecided[ratio] = f"between {low:.3f} and {high:.3f}"
    goals = dict.fromkeys(ratios, GOAL)
    report("writes", figures, ratios, goals, "the source with the worker stopped, same run", smaller, undecided)


if __name__ == "__main__":
    main()
