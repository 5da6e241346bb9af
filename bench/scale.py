"""Does a change cost more where there is more: rows, indexes, tables?

Up to 10,000 rows change once, in transactions of ten, half of them their text, while the worker is stopped; then it
catches up. The figures are microseconds of a processor, of the worker and of the backend that writes for it, for a row:

- in a table of 1,000 to 1,000,000 rows;
- with 1 to 50 indexes in the configuration, each of a table of its own, of which one changes;
- with 1 to 1,000 tables in the publication, of which one is indexed.

Then the source's own writes: transactions a second without a slot, and with the worker following them, in turns.

    python bench/scale.py [rows] [indexes] [tables] [writes]      MOST_ROWS=1000000
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench.report import report
else:
    from _pipeline import Pipeline, pipeline, processor_ms
    from report import report

CHANGES, TRANSACTION = 10_000, 10
ROWS = 10_000
MOST_ROWS = int(os.environ.get("MOST_ROWS", "1000000"))
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'
WRITES_S, WRITES_ROUNDS = 5.0, 3

GOAL = 1.3
GOAL_SLOWER = 0.97

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
    )
    made.text_in_step()
    made.vectors_in_step(0.05)
    made.stop()
    made.connection.execute("VACUUM ANALYZE")
    changed = min(CHANGES, rows)
    step = rows // (changed // TRANSACTION)
    for number in range(changed // TRANSACTION):
        first = number * step + 1
        what = f"body = 'round {number} ' || substr(body, 9)" if number % 2 else "tenant = tenant + 1"
        made.connection.execute(
            f"UPDATE articles SET {what} WHERE id BETWEEN %s AND %s".encode(), [first, first + TRANSACTION - 1]
        )
    made.start()
    made.event("streaming")
    pid = made.value("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply %%'")
    cpu = "process_cpu_seconds_total"
    before_s, before_ms = made.metrics()[cpu], processor_ms(pid)
    made.text_in_step()
    used_s = made.metrics()[cpu] - before_s + (processor_ms(pid) - before_ms) / 1000
    made.stop()
    return used_s / changed * 1e6


def by_rows() -> dict[int, float]:
    """Return the cost by the size of the table."""
    found = {}
    for rows in [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= MOST_ROWS]:
        with pipeline(EMBEDDER, shared_buffers="1GB", max_wal_size="8GB") as made:
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


def writes() -> dict[str, float]:
    """Return how many transactions a second one writer commits, without a slot and with a worker that follows it."""
    rates: dict[str, list[float]] = {"alone": [], "followed": []}
    with pipeline(EMBEDDER, shared_buffers="256MB") as made:
        fill(made, ROWS)
        made.start()
        made.live()
        for _ in range(WRITES_ROUNDS):
            rates["followed"].append(rate(made))
            made.text_in_step()
            made.stop()
            rates["alone"].append(rate(made))
            made.start()
            made.event("streaming")
            made.text_in_step()
            made.vectors_in_step(0.05)
        made.stop()
    return {f"writes_{name}_per_s": statistics.median(of) for name, of in rates.items()}


def rate(made: Pipeline) -> float:
    """Return how many single-row transactions are committed in a second of waiting for them, without the pauses."""
    began, count, busy = time.perf_counter(), 0, 0.0
    while time.perf_counter() - began < WRITES_S:
        started = time.perf_counter()
        made.connection.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = %s", [count % ROWS + 1])
        busy += time.perf_counter() - started
        count += 1
        time.sleep(0.005)
    return count / busy


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["rows", "indexes", "tables", "writes"]
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios, goals = {}, {}
    for part, measure in (("rows", by_rows), ("indexes", by_indexes), ("tables", by_tables)):
        if part in parts:
            found = measure()
            figures |= {f"{part}_{count}_us_per_row": cost for count, cost in found.items()}
            fewest, most = min(found), max(found)
            ratios[f"{part}_{fewest}_over_{most}"] = found[fewest] / found[most]
            goals[f"{part}_{fewest}_over_{most}"] = 1 / GOAL
    if "writes" in parts:
        found_writes = writes()
        figures |= found_writes
        ratios["writes_followed_over_alone"] = (
            found_writes["writes_followed_per_s"] / found_writes["writes_alone_per_s"]
        )
        goals["writes_followed_over_alone"] = GOAL_SLOWER
    figures["load_at_end"] = os.getloadavg()[0]
    report("scale", figures, ratios, goals)


if __name__ == "__main__":
    main()
