"""Does the rolling audit delay changes? Freshness of text beside 1,000 changes a second, without and with the audit.

A writer changes ten rows a transaction at a steady rate. Beside it, single rows are changed and looked for: the clock
runs from the commit's return until a query sees the new text.

A worker begins its audit a minute after its start, and by then the servers vacuum what the writer has left. So each of
three workers is measured at the same age, one with an audit between two without: what changes with time falls on both.
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
BEGUN_S = 65.0
"""The age of a worker that is measured; the audit begins when it is 60."""
MEASURED_S = 30.0
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


NO_AUDIT = 'log_format = "json"\naudit_max_rows_per_s = 0'


def measured(made: Pipeline, round_: int, *, audit: bool) -> tuple[list[float], int, int]:
    """Return how long changes took to be seen, how many transactions were late, and how many rows were audited."""
    made.start()
    made.event("streaming")
    began = time.monotonic()
    with writer(made.dsn) as late:
        made.text_in_step()
        time.sleep(max(0.0, began + BEGUN_S - time.monotonic()))
        if audit:
            made.until(lambda: made.value(AUDITED), "audit", 0.1)
        before = made.value(AUDITED) or 0
        taken = probes_ms(made, f"of round {round_}")
        audited = (made.value(AUDITED) or 0) - before
    made.stop()
    return taken, late[0], audited


def main() -> None:
    """Measure and report."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    late = audited = 0
    with pipeline(HASH) as made:
        made.load(ROWS + 100)
        made.stop()
        for round_, audit in enumerate((False, True, False)):
            if not audit:
                made.configure('log_format = "json"', NO_AUDIT)
            found, were_late, rows = measured(made, round_, audit=audit)
            if not audit:
                made.configure(NO_AUDIT, 'log_format = "json"')
                if rows:
                    raise SystemExit("the worker has audited though it was told not to")
            taken[audit] += found
            late, audited = late + were_late, audited + rows
    figures = {
        "late_transactions": float(late),
        "audited_rows_per_s": audited / MEASURED_S,
        "without_p50_ms": statistics.median(taken[False]),
        "without_p99_ms": percentile(taken[False], 0.99),
        "beside_p50_ms": statistics.median(taken[True]),
        "beside_p99_ms": percentile(taken[True], 0.99),
    }
    ratios = {"without_over_beside_p99": figures["without_p99_ms"] / figures["beside_p99_ms"]}
    report("audit", figures, ratios, dict.fromkeys(ratios, GOAL), "our own without it, same run")


if __name__ == "__main__":
    main()
