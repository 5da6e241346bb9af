"""Does the rolling audit delay changes? Freshness of text beside 1,000 changes a second, without and with the audit.

One worker, one run: a worker begins its audit a minute after its start, so the same writer is measured before and
after. A writer changes ten rows a transaction at a steady rate. Beside it, single rows are changed and looked for: the
clock runs from the commit's return until a query sees the new text.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.report import report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from report import report

ROWS = 50_000
CHANGES_PER_S = 1_000
ROWS_A_TRANSACTION = 10
MEASURED_S = 40.0
PROBE_EVERY_S = 0.02

GOAL = 1 / 1.2
"""At most 1.2 times as late."""

HASH = 'type = "hash"\ndimensions = 64'
AUDITED = "SELECT documents FROM cdcsync.audits WHERE index_name = 'articles'"


@contextmanager
def writer(dsn: str) -> Iterator[list[int]]:
    """Change rows at a steady rate; yields how many transactions were late by more than a second."""
    done, late = threading.Event(), [0]

    def write() -> None:
        pause_s = ROWS_A_TRANSACTION / CHANGES_PER_S
        with psycopg.connect(dsn, autocommit=True) as connection:
            due = time.monotonic()
            for number in range(10**9):
                if done.is_set():
                    return
                first = (number * 7919 * ROWS_A_TRANSACTION) % (ROWS - ROWS_A_TRANSACTION) + 1
                connection.execute(
                    "UPDATE articles SET body = 'text ' || id || ' as of change ' || %s WHERE id BETWEEN %s AND %s",
                    [number, first, first + ROWS_A_TRANSACTION - 1],
                )
                due += pause_s
                late[0] += time.monotonic() > due + 1
                time.sleep(max(0.0, due - time.monotonic()))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield late
    finally:
        done.set()
        thread.join()


def seen(reader: psycopg.Connection[Any], key: int, body: str) -> bool:
    """Say whether the index has a text."""
    row = reader.execute("SELECT FROM cdcsync.articles_chunks WHERE id = %s AND content = %s", [key, body])
    return row.fetchone() is not None


def probes_ms(made: Pipeline, series: str) -> list[float]:
    """Change single rows for a while and return how long each took to be seen."""
    taken: list[float] = []
    ends = time.monotonic() + MEASURED_S
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        while time.monotonic() < ends:
            key, body = ROWS + 1 + len(taken) % 100, f"probe {len(taken)} {series}"
            made.connection.execute("UPDATE articles SET body = %s WHERE id = %s", [body, key])
            committed = time.perf_counter()
            made.until(partial(seen, reader, key, body), "new text", 0.001)
            taken.append((time.perf_counter() - committed) * 1000)
            time.sleep(PROBE_EVERY_S)
    return taken


def main() -> None:
    """Measure and report."""
    with pipeline(HASH) as made:
        made.connection.execute(
            "INSERT INTO articles SELECT i, i %% 50, 'the first text of ' || i FROM generate_series(1, %s) AS i",
            [ROWS + 100],
        )
        made.start()
        made.live()
        made.vectors_in_step(0.05)
        made.stop()
        made.start()
        made.event("streaming")
        with writer(made.dsn) as late:
            made.text_in_step()
            without = probes_ms(made, "without")
            if made.value(AUDITED):
                raise SystemExit("the audit has begun already: the machine is too slow for this bench")
            made.until(lambda: made.value(AUDITED), "audit", 0.1)
            before = made.value(AUDITED)
            beside = probes_ms(made, "beside")
            audited = made.value(AUDITED) - before
        made.stop()
    figures = {
        "late_transactions": float(late[0]),
        "audited_rows_per_s": audited / MEASURED_S,
        "without_p50_ms": statistics.median(without),
        "without_p99_ms": percentile(without, 0.99),
        "beside_p50_ms": statistics.median(beside),
        "beside_p99_ms": percentile(beside, 0.99),
    }
    ratios = {"without_over_beside_p99": figures["without_p99_ms"] / figures["beside_p99_ms"]}
    report("audit", figures, ratios, dict.fromkeys(ratios, GOAL))


if __name__ == "__main__":
    main()
