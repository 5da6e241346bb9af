"""Does a change cost more where there is more: rows, indexes, tables?

A worker that follows is halted (SIGSTOP), 1,000 rows change once, in transactions of ten, half of them their text, and
it goes on. That is done ten times, in a table of any size: so each size has the same changes and the same batches. The
figures are medians of the microseconds of a processor, of the worker and of the backend that writes for it, that a row
takes from before the first change is written until the index's text is in step:

- in a table of 1,000 to 1,000,000 rows;
- with 1 to 50 indexes in the configuration, each of a table of its own, of which one changes;
- with 1 to 1,000 tables in the publication, of which one is indexed.

Each size is built once, and its figure is the median of those ten rounds.

    python bench/scale.py [rows] [indexes] [tables]      SIZES=1000,10000,100000,1000000 INDEXES=1,10,50
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
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
    for rows in SIZES:
        with pipeline(EMBEDDER, graph, shared_buffers="1GB", max_wal_size="8GB") as made:
            fill(made, rows)
            found[rows] = cost_us(made, rows)
    return found


def by_indexes() -> dict[int, float]:
    """Return the cost by the number of indexes."""
    found = {}
    for count in INDEXES:
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


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["rows", "indexes", "tables"]
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
            size = {"rows": of_goal(most, GOAL_ROWS, "rows"), "indexes": of_goal(most, GOAL_INDEXES, "indexes")}
            smaller[ratio] = size.get(part) or of_goal(1, GOAL_BUILDS, "builds")
    figures["load_at_end"] = os.getloadavg()[0]
    report("scale", figures, ratios, goals, against, smaller)


if __name__ == "__main__":
    main()
