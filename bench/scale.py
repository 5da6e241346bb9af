"""Does a change cost more where there is more: rows, indexes, tables?

A worker that follows is halted (SIGSTOP), 1,000 rows change once, in transactions of ten, half of them their text, and
it goes on. That is done ten times, in a table of any size: so each size has the same changes and the same batches. The
figures are medians of the microseconds of a processor, of the worker and of the backend that writes for it, that a row
takes from before the first change is written until the index's text is in step:

- in a table of 1,000 to 1,000,000 rows;
- with 1 to 50 indexes in the configuration, each of a table of its own, of which one changes;
- with 1 to 1,000 tables in the publication, of which one is indexed.

Then the source's own writes: transactions a second of one writer with the worker stopped, and with it following them,
in turns. A commit without fsync, as in every other bench, takes a tenth of a millisecond, so that waking the walsender
is a large part of it; so it is measured with fsync too, as a source runs. All of it shares one machine: a source on a
machine of its own is slowed less, and what the writer's backend takes of a processor is a figure beside the ratio.

    python bench/scale.py [rows] [indexes] [tables] [writes]      MOST_ROWS=1000000
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench.report import of_goal, report
else:
    from _pipeline import Pipeline, pipeline, processor_ms
    from report import of_goal, report

CHANGES, TRANSACTION, ROUNDS = 1_000, 10, 10
ROWS = 10_000
GOAL_ROWS = 1_000_000
MOST_ROWS = int(os.environ.get("MOST_ROWS", str(GOAL_ROWS)))
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'
WRITES_S, WRITES_ROUNDS = float(os.environ.get("WRITES_S", "3")), 3

GOAL = 1.3
GOAL_SLOWER = 0.97

BUILD_PATIENCE_S = 1_200.0
"""A million rows are indexed first."""

ANOTHER = """
[indexes.other_{number}]
table = "other_{number}"
text = "{{body}}"
embedder = "model"
"""


def fill(made: Pipeline, rows: int) -> None:
    """Give the table so many rows."""
    made.connection.execute(
        "INSERT INTO articles SELECT i, i %% 50, 'article ' || i || repeat(' some more words of its text', 8)"
        " FROM generate_series(1, %s::int) AS i",
        [rows],
    )


def others(made: Pipeline, count: int) -> None:
    """Make so many tables beside the one that changes."""
    for number in range(count):
        made.connection.execute(
            f"CREATE TABLE other_{number} (id bigint PRIMARY KEY, body text NOT NULL);"
            f" INSERT INTO other_{number} VALUES (1, 'a text')".encode()
        )


def cost_us(made: Pipeline, rows: int) -> float:
    """Change rows, and return what a changed row takes of a processor until the index's text is in step."""
    made.start()
    made.until(
        lambda: (
            made.value("SELECT to_regclass('cdcsync.indexes') IS NOT NULL")
            and made.value("SELECT count(*) > 0 AND bool_and(state = 'live') FROM cdcsync.indexes")
        ),
        "live indexes",
        0.05,
        BUILD_PATIENCE_S,
    )
    made.text_in_step()
    made.vectors_in_step(0.05, BUILD_PATIENCE_S)
    made.connection.execute("VACUUM ANALYZE")
    taken = [round_us(made, rows, round_) for round_ in range(ROUNDS)]
    made.stop()
    return statistics.median(taken)


def round_us(made: Pipeline, rows: int, round_: int) -> float:
    """Halt the worker, change rows all over the table, each once, and return what one takes when the worker goes on."""
    pids = (made.pid, made.backend())
    step = rows // (CHANGES // TRANSACTION)
    os.kill(made.pid, signal.SIGSTOP)
    try:
        before_ms = sum(map(processor_ms, pids))
        for number in range(CHANGES // TRANSACTION):
            first = number * step + 1
            text = (number + round_) % 2  # of the same rows, text and carried column take turns
            what = f"body = 'round {round_} ' || substr(body, 9)" if text else "tenant = tenant + 1"
            made.connection.execute(
                f"UPDATE articles SET {what} WHERE id BETWEEN %s AND %s".encode(), [first, first + TRANSACTION - 1]
            )
    finally:
        os.kill(made.pid, signal.SIGCONT)
    made.text_in_step()
    used_ms = sum(map(processor_ms, pids)) - before_ms
    made.vectors_in_step(0.05)
    return used_ms / CHANGES * 1000


def by_rows() -> dict[int, float]:
    """Return the cost by the size of the table; a graph of few neighbours is built sooner, and text does not see it."""
    graph = '[indexes.articles.hnsw]\nm = 4\nef_construction = 16\nbuild_memory = "1GB"'
    found = {}
    for rows in [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= MOST_ROWS]:
        with pipeline(EMBEDDER, graph, shared_buffers="1GB", max_wal_size="8GB") as made:
            fill(made, rows)
            found[rows] = cost_us(made, rows)
    return found


def by_indexes() -> dict[int, float]:
    """Return the cost by the number of indexes."""
    found = {}
    for count in (1, 10, 50):
        more = "".join(ANOTHER.format(number=number) for number in range(count - 1))
        with pipeline(EMBEDDER, more, shared_buffers="256MB") as made:
            fill(made, ROWS)
            others(made, count - 1)
            found[count] = cost_us(made, ROWS)
    return found


def by_tables() -> dict[int, float]:
    """Return the cost by the number of published tables."""
    found = {}
    for count in (1, 1_000):
        with pipeline(EMBEDDER, shared_buffers="256MB") as made:
            fill(made, ROWS)
            others(made, count - 1)
            made.connection.execute("CREATE PUBLICATION cdcsync FOR ALL TABLES")
            found[count] = cost_us(made, ROWS)
    return found


def writes(fsync: str) -> dict[str, float]:
    """Return how many transactions a second one writer commits, with the worker stopped and with it following."""
    taken: dict[str, list[float]] = {}
    with pipeline(EMBEDDER, shared_buffers="256MB", fsync=fsync) as made:
        fill(made, ROWS)
        made.start()
        made.live()
        made.stop()
        for round_ in range(WRITES_ROUNDS):
            for side in ("alone", "followed") if round_ % 2 else ("followed", "alone"):
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
                made.connection.execute("CHECKPOINT")
                taken.setdefault(f"{side}_per_s", []).append(len(each_s) / sum(each_s))
                taken.setdefault(f"{side}_p50_ms", []).append(statistics.median(each_s) * 1000)
                taken.setdefault(f"{side}_processor_ms", []).append(used_ms / len(each_s))
    return {name: statistics.median(of) for name, of in taken.items()}


def written_s(made: Pipeline) -> list[float]:
    """Commit single-row transactions for a while, with pauses; return how long each took."""
    began, each_s = time.perf_counter(), list[float]()
    while time.perf_counter() - began < WRITES_S:
        started = time.perf_counter()
        made.connection.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = %s", [len(each_s) % ROWS + 1])
        each_s.append(time.perf_counter() - started)
        time.sleep(0.005)
    return each_s


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["rows", "indexes", "tables", "writes"]
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios, goals, against, smaller = {}, {}, {}, {}
    for part, measure in (("rows", by_rows), ("indexes", by_indexes), ("tables", by_tables)):
        if part in parts:
            found = measure()
            figures |= {f"{part}_{count}_us_per_row": cost for count, cost in found.items()}
            fewest, most = min(found), max(found)
            ratio = f"{part}_{fewest}_over_{most}"
            ratios[ratio], goals[ratio] = found[fewest] / found[most], 1 / GOAL
            against[ratio] = f"our own with {fewest:,}, same run"
            if part == "rows":
                smaller[ratio] = of_goal(most, GOAL_ROWS, "rows")
    for fsync in ("on", "off") if "writes" in parts else ():
        measured = writes(fsync)
        figures |= {f"writes_fsync_{fsync}_{name}": value for name, value in measured.items()}
        ratio = f"writes_fsync_{fsync}_followed_over_alone"
        ratios[ratio], goals[ratio] = measured["followed_per_s"] / measured["alone_per_s"], GOAL_SLOWER
        against[ratio] = "the source with the worker stopped, same run"
    figures["load_at_end"] = os.getloadavg()[0]
    report("scale", figures, ratios, goals, against, smaller)


if __name__ == "__main__":
    main()
