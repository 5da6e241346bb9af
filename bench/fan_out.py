"""One row of a related table is in very many documents and changes: what does that do to everything else?

One customer has almost all tickets. The name changes, while tickets of another customer change one at a time for some
time, each after the one before it was found. The same row changes twice more before its request begins, and half-way
the worker is killed with SIGKILL and started again. The bench tells how many documents a second are rebuilt, how long
the other changes took before and beside it, how much more memory than at rest the worker took, what `cdcsync status`
said of the progress, where the second worker resumed, and how many requests there were.

    python bench/fan_out.py [ROWS]
"""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import PATIENCE_S, Pipeline, percentile, pipeline
    from bench.report import report
else:
    from _pipeline import PATIENCE_S, Pipeline, percentile, pipeline
    from report import report

ROWS = 200_000
OTHERS = 20_000
"""Tickets of another customer, whose own request is served first: meanwhile the large one has not begun."""
ALONE = 200
"""Changes that are timed before."""
BESIDE = 300
"""Changes that are timed beside each half of the request: after them the request has the servers to itself."""
PAUSE_S = 0.02
"""Between two changes: some 30 a second come in."""

SLOWEST_PER_S = 500
"""So many documents a second are loaded and rebuilt at least, or the bench gives up."""

GOAL_MORE_MB = 100.0
GOAL_P99 = 1 / 3
"""At most three times as long as before."""

EMBEDDER = 'type = "hash"\ndimensions = 8'
TICKETS = """
[indexes.tickets]
table = "tickets"
text = "{customer.name}: {subject}"
embedder = "model"
hnsw = { m = 4, ef_construction = 8 }
[indexes.tickets.related.customer]
table = "customers"
on = { id = "customer_id" }
"""
TABLES = (
    "CREATE TABLE customers (id int PRIMARY KEY, name text)",
    "CREATE TABLE tickets (id bigint PRIMARY KEY, customer_id int NOT NULL, subject text NOT NULL)",
    "CREATE INDEX ON tickets (customer_id)",
    "INSERT INTO customers VALUES (1, 'the large one'), (2, 'another'), (3, 'a third')",
)
LOAD = (
    "INSERT INTO tickets SELECT i, CASE WHEN i <= %s THEN 1 WHEN i <= %s THEN 2 ELSE 3 END, 'subject ' || i"
    " FROM generate_series(1, %s) AS i"
)
REQUESTS = "FROM cdcsync.backfills WHERE index_name = 'tickets' AND kind = 'related'"


class Live:
    """Changes tickets of the third customer, one at a time, and times each until it is found."""

    def __init__(self, made: Pipeline, keys: range) -> None:
        self._dsn = made.dsn
        self._keys = keys
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = 0
        self.taken_ms: list[float] = []

    def one(self, connection: psycopg.Connection) -> None:
        """Make one change and wait until it is found."""
        self._number += 1
        key, word = self._keys[self._number % len(self._keys)], f"change {self._number}."
        connection.execute("UPDATE tickets SET subject = %s WHERE id = %s", [word, key])
        committed = time.perf_counter()
        found = "SELECT FROM cdcsync.tickets_chunks WHERE id = %s AND position(%s in content) > 0"
        while connection.execute(found, [key, word]).fetchone() is None:
            time.sleep(0.001)
        self.taken_ms.append((time.perf_counter() - committed) * 1000)

    def some(self, count: int) -> list[float]:
        """Make so many changes and return how long each took."""
        self.taken_ms = []
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            for _ in range(count):
                self.one(connection)
                time.sleep(PAUSE_S)
        return self.taken_ms

    def begin(self) -> None:
        """Make `BESIDE` changes, or fewer if `end` comes before."""
        until = len(self.taken_ms) + BESIDE

        def run() -> None:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while len(self.taken_ms) < until and not self._stopping.wait(PAUSE_S):
                    self.one(connection)

        self._stopping.clear()
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def end(self) -> None:
        """Stop, once the change in hand is found."""
        self._stopping.set()
        assert self._thread is not None
        self._thread.join()


def memory_mb(made: Pipeline, field: str) -> float:
    """Return VmRSS or VmHWM of the worker."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{made.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def rows_done(made: Pipeline, others: int) -> int:
    """Return how far the large request is."""
    return int(made.value(f"SELECT coalesce(max(rows_done), 0) {REQUESTS} AND rows_total > %s", others * 2))


def told(made: Pipeline, at_least: int) -> float:
    """Return which share of the large request is done, as `cdcsync status` says."""
    backfill = made.status()["indexes"]["tickets"]["backfill"]
    if backfill is None or backfill["kind"] != "related" or backfill["rows_done"] < at_least or not backfill["eta_s"]:
        raise SystemExit(f"status shows no progress of the request: {backfill}")
    return float(backfill["rows_done"] / backfill["rows_total"])


def main() -> None:
    """Measure and report."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    others = min(OTHERS, rows // 4)
    last = rows + others + 1_000
    patience_s = max(PATIENCE_S, last / SLOWEST_PER_S)
    with pipeline(EMBEDDER, TICKETS, max_wal_size="8GB") as made:
        for statement in TABLES:
            made.connection.execute(statement)
        made.connection.execute(LOAD, [rows, rows + others, last])
        made.connection.execute("ANALYZE")
        made.start()
        made.live(2, patience_s)
        live = Live(made, range(rows + others + 1, last + 1))
        live.some(20)
        alone = live.some(ALONE)
        rest = memory_mb(made, "VmRSS")
        Path(f"/proc/{made.pid}/clear_refs").write_text("5")

        live.taken_ms = []
        live.begin()
        made.connection.execute("UPDATE customers SET name = 'renamed' WHERE id = 2")
        for name in ("once", "twice", "thrice"):
            made.connection.execute("UPDATE customers SET name = %s WHERE id = 1", [name])
            time.sleep(0.1)
        made.until(lambda: rows_done(made, others) > rows // 2, "half of the documents", 0.05, patience_s)
        shares = [told(made, rows // 2)]
        live.end()
        half = rows_done(made, others)
        took_s = made.value(f"SELECT extract(epoch FROM clock_timestamp() - min(started_at))::float8 {REQUESTS}")
        peak = memory_mb(made, "VmHWM")
        made.kill()
        at_kill = rows_done(made, others)
        made.start()
        made.event("streaming")
        resumed = made.event("backfill_started")["resumed_at"]
        live.begin()
        done = f"SELECT NOT EXISTS (SELECT {REQUESTS} AND state <> 'done')"
        again = time.perf_counter()
        made.until(lambda: rows_done(made, others) > rows * 3 // 4, "three quarters of the documents", 0.05, patience_s)
        shares.append(told(made, rows * 3 // 4))
        made.until(lambda: made.value(done), "the end of the requests", 0.1, patience_s)
        again_s = time.perf_counter() - again
        live.end()
        peak = max(peak, memory_mb(made, "VmHWM"))
        requests = made.value(f"SELECT count(*) {REQUESTS}")
        wrong = made.value(
            "SELECT count(*) FROM cdcsync.tickets_chunks WHERE id <= %s AND position('thrice: ' in content) <> 1", rows
        )
        if wrong or at_kill > resumed or at_kill < half:
            raise SystemExit(f"{wrong} documents are wrong; resumed at {resumed}, killed at {at_kill} after {half}")
        made.stop()
    before, beside = percentile(alone, 0.99), percentile(live.taken_ms, 0.99)
    report(
        "fan_out",
        {
            "rows": rows,
            "documents_per_s": (rows + others) / (took_s + again_s),
            "requests": requests,
            "resumed_at_rows": resumed,
            "status_said_at_half": shares[0],
            "status_said_at_three_quarters": shares[1],
            "live_changes": len(live.taken_ms),
            "live_p50_before_ms": percentile(alone, 0.5),
            "live_p50_beside_ms": percentile(live.taken_ms, 0.5),
            "live_p99_before_ms": before,
            "live_p99_beside_ms": beside,
            "live_longest_beside_ms": max(live.taken_ms),
            "rest_mb": rest,
            "peak_mb": peak,
        },
        {"live_p99_before_over_beside": before / beside, "rest_and_100_mb_over_peak": (rest + GOAL_MORE_MB) / peak},
        {"live_p99_before_over_beside": GOAL_P99, "rest_and_100_mb_over_peak": 1.0},
        {
            "live_p99_before_over_beside": "our own before it, same run",
            "rest_and_100_mb_over_peak": "our own at rest + 100 MB, same run",
        },
        notes={"live": "a change waits for the page that is being written: one session writes both"},
    )


if __name__ == "__main__":
    main()
