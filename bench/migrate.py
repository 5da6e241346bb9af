"""How fast does a migration fill a generation, and what does that cost live changes?

The same rows are loaded first, by a model of the same speed: the fill is measured against that load, from the first
page to the last, without HNSW on either side. Then it is dropped and filled once more, while rows change one after the
other, and the time is taken until searches find the new vector in the live generation: alone, and beside the fill. All
of it runs on one server, which this script starts, or on that of CDCSYNC_BENCH_DSN.

    python bench/migrate.py [ROWS] [DIMENSIONS]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench.backfill import SOURCE, database, server
    from bench.report import report
else:
    from backfill import SOURCE, database, server
    from report import report

ROWS = 100_000
DIMENSIONS = 64
ALONE_S = 40.0
RATE_GOAL = 0.9
FRESHNESS_GOAL = 0.5
"""Twice the time that changes take alone."""

CONFIG = """
[source]
dsn = "{dsn}"
slot = "{name}"
publication = "{name}"
[worker]
listen = "127.0.0.1:0"
log_format = "json"
[embedders.old]
type = "hash"
dimensions = {dimensions}
[embedders.new]
type = "hash"
dimensions = {more}
[indexes.articles]
table = "articles"
text = "{{title}}\\n\\n{{body}}"
columns = ["tenant"]
embedder = "{embedder}"
"""


def freshness(connection: psycopg.Connection[Any], until: Callable[[], bool]) -> list[float]:
    """Change rows one after the other; returns the milliseconds until the live generation has each new vector."""
    taken = []
    key = 0
    while not until():
        key += 1
        connection.execute("UPDATE articles SET title = title || ' ' || clock_timestamp() WHERE id = %s", [key])
        (title,) = connection.execute("SELECT title FROM articles WHERE id = %s", [key]).fetchone() or ("",)
        started = time.perf_counter()
        while connection.execute(
            "SELECT NOT stale AND starts_with(content, %s) FROM articles_index WHERE id = %s AND chunk_no = 0",
            [title, key],
        ).fetchone() != (True,):
            time.sleep(0.001)
        taken.append((time.perf_counter() - started) * 1000)
        time.sleep(0.02)
    return taken


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def event(log: Path, name: str) -> datetime | None:
    """Return when the worker logged an event."""
    for line in log.read_text().splitlines():
        if line.startswith("{") and (one := json.loads(line))["event"] == name:
            return datetime.fromisoformat(one["timestamp"])
    return None


def wait(connection: psycopg.Connection[Any], statement: str) -> None:
    while True:
        try:
            if connection.execute(statement.encode()).fetchone() == (True,):
                return
        except psycopg.errors.UndefinedTable:
            pass
        time.sleep(0.1)


def command(path: Path, *arguments: str) -> None:
    run = [sys.executable, "-m", "cdcsync", "migrate", "articles", *arguments, "-c", str(path)]
    subprocess.run(run, check=True, capture_output=True)


def measure(dsn: str, name: str, directory: Path, rows: int, dimensions: int) -> dict[str, float]:
    path, loading, log = (directory / one for one in ("cdcsync.toml", "loading.log", "worker.log"))
    facts = {"dsn": dsn, "name": name, "dimensions": dimensions, "more": dimensions + 8}
    path.write_text(CONFIG.format(**facts, embedder="old"))
    with psycopg.connect(dsn, autocommit=True) as connection, loading.open("wb") as first, log.open("wb") as second:
        connection.execute(SOURCE.format(rows=rows).encode())
        run = [sys.executable, "-m", "cdcsync", "run", "-c", str(path)]
        with subprocess.Popen(run, stdout=first, stderr=first) as worker:
            wait(connection, "SELECT state = 'live' FROM cdcsync.indexes")
            worker.terminate()
        (load_s,) = connection.execute(
            "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM cdcsync.backfills WHERE kind = 'initial'"
        ).fetchone() or (0.0,)
        path.write_text(CONFIG.format(**facts, embedder="new"))
        with subprocess.Popen(run, stdout=second, stderr=second) as worker:
            while event(log, "streaming") is None:
                time.sleep(0.05)
            freshness(connection, iter([False, True]).__next__)  # what is slow the first time
            end = time.perf_counter() + ALONE_S
            alone = freshness(connection, lambda: time.perf_counter() > end)
            command(path, "start")
            wait(connection, "SELECT state = 'ready' FROM cdcsync.generations WHERE generation = 2")
            (filled_at,) = connection.execute(
                "SELECT filled_at FROM cdcsync.generations WHERE generation = 2"
            ).fetchone() or (None,)
            command(path, "drop", "--yes")
            command(path, "start")
            wait(connection, "SELECT cursor > 0 FROM cdcsync.generations WHERE generation = 3")
            filled = "SELECT filled_at IS NOT NULL FROM cdcsync.generations WHERE generation = 3"
            beside = freshness(connection, lambda: connection.execute(filled.encode()).fetchone() == (True,))
            worker.terminate()
    begun = event(log, "migration_fills")
    assert begun is not None
    fill_s = (filled_at - begun).total_seconds()
    return {
        "load_rows_per_s": round(rows / load_s, 1),
        "fill_rows_per_s": round(rows / fill_s, 1),
        "alone_p50_ms": round(statistics.median(alone), 2),
        "alone_p99_ms": round(p99(alone), 2),
        "beside_p50_ms": round(statistics.median(beside), 2),
        "beside_p99_ms": round(p99(beside), 2),
        "changes_alone": len(alone),
        "changes_beside": len(beside),
    }


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    dimensions = int(sys.argv[2]) if len(sys.argv) > 2 else DIMENSIONS
    with server() as admin, database(admin) as (dsn, name), tempfile.TemporaryDirectory() as directory:
        figures = measure(dsn, name, Path(directory), rows, dimensions)
    ratios = {
        "fill_of_load": figures["fill_rows_per_s"] / figures["load_rows_per_s"],
        "freshness_p99_alone_of_beside": figures["alone_p99_ms"] / figures["beside_p99_ms"],
    }
    goals = {"fill_of_load": RATE_GOAL, "freshness_p99_alone_of_beside": FRESHNESS_GOAL}
    against = {
        "fill_of_load": "our own first load, same run",
        "freshness_p99_alone_of_beside": "our own alone, same run",
    }
    report("migrate", figures, ratios, goals, against)


if __name__ == "__main__":
    main()
