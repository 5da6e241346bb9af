"""Does a change cost more where there is more: rows, indexes, tables?

A worker that follows is halted (SIGSTOP), 1,000 rows change once, in transactions of ten, half of them their text, and
it goes on. That is done ten times, in a table of any size: so each size has the same changes and the same batches. The
figures are medians of the microseconds of a processor, of the worker and of the backend that writes for it, that a row
takes from before the first change is written until the index's text is in step:

- in a table of 1,000 to 1,000,000 rows;
- with 1 to 50 indexes in the configuration, each of a table of its own, of which one changes;
- with 1 to 1,000 tables in the publication, of which one is indexed.

Each size is built once, on a server of its own. All of them stand at the same time and take turns in each round, since
a machine's pace changes from minute to minute: a figure is the median of ten rounds, a ratio that of ten ratios.

    python bench/scale.py [rows] [indexes] [tables]      SIZES=1000,10000,100000,1000000 INDEXES=1,10,50
"""

from __future__ import annotations

import operator
import os
import signal
import statistics
import sys
from contextlib import ExitStack
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
GOAL_ROWS, GOAL_INDEXES, GOAL_BUILDS = 1_000_000, 50, 3
SIZES = [int(size) for size in os.environ.get("SIZES", "1000,10000,100000,1000000").split(",")]
INDEXES = [int(count) for count in os.environ.get("INDEXES", "1,10,50").split(",")]
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'

GOAL = 1.3

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


def begin(made: Pipeline) -> None:
    """Have a worker follow, and all be indexed."""
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


def in_turns(sizes: dict[int, tuple[Pipeline, int]]) -> dict[int, list[float]]:
    """Return what a changed row takes of a processor, round by round; a size has its rows beside it."""
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for round_ in range(ROUNDS):
        for size in sorted(sizes, reverse=round_ % 2 == 1):
            taken[size].append(round_us(*sizes[size], round_))
    for made, _ in sizes.values():
        made.stop()
    return taken


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


def by_rows(stack: ExitStack) -> dict[int, tuple[Pipeline, int]]:
    """Make tables of each size; a graph of few neighbours is built sooner, and text does not see it."""
    graph = '[indexes.articles.hnsw]\nm = 4\nef_construction = 16\nbuild_memory = "1GB"'
    made = {}
    for rows in SIZES:
        made[rows] = stack.enter_context(pipeline(EMBEDDER, graph, shared_buffers="1GB", max_wal_size="8GB")), rows
        fill(*made[rows])
        begin(made[rows][0])
    return made


def by_indexes(stack: ExitStack) -> dict[int, tuple[Pipeline, int]]:
    """Make configurations of so many indexes each."""
    made = {}
    for count in INDEXES:
        more = "".join(ANOTHER.format(number=number) for number in range(count - 1))
        made[count] = stack.enter_context(pipeline(EMBEDDER, more, shared_buffers="256MB")), ROWS
        fill(*made[count])
        others(made[count][0], count - 1)
        begin(made[count][0])
    return made


def by_tables(stack: ExitStack) -> dict[int, tuple[Pipeline, int]]:
    """Make publications of so many tables each."""
    made = {}
    for count in (1, 1_000):
        made[count] = stack.enter_context(pipeline(EMBEDDER, shared_buffers="256MB")), ROWS
        fill(*made[count])
        others(made[count][0], count - 1)
        made[count][0].connection.execute("CREATE PUBLICATION cdcsync FOR ALL TABLES")
        begin(made[count][0])
    return made


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["rows", "indexes", "tables"]
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios, goals, against, smaller = {}, {}, {}, {}
    for part, make in (("rows", by_rows), ("indexes", by_indexes), ("tables", by_tables)):
        if part in parts:
            with ExitStack() as stack:
                found = in_turns(make(stack))
            figures |= {f"{part}_{count}_us_per_row": statistics.median(costs) for count, costs in found.items()}
            fewest, most = min(found), max(found)
            ratio = f"{part}_{fewest}_over_{most}"
            ratios[ratio] = statistics.median(map(operator.truediv, found[fewest], found[most]))
            goals[ratio] = 1 / GOAL
            against[ratio] = f"our own with {fewest:,}, same run"
            size = {"rows": of_goal(most, GOAL_ROWS, "rows"), "indexes": of_goal(most, GOAL_INDEXES, "indexes")}
            smaller[ratio] = size.get(part) or of_goal(1, GOAL_BUILDS, "builds")
    figures["load_at_end"] = os.getloadavg()[0]
    report("scale", figures, ratios, goals, against, smaller)


if __name__ == "__main__":
    main()
