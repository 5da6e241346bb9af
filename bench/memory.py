"""How much memory does a worker take: at rest, and while one transaction of a million rows passes through it?

The model is feature hashing, so no local model is in memory. The transaction is longer than the server's
`logical_decoding_work_mem`, so it is streamed while it is open and spooled to a file. What is read is the resident size
of the worker's process: at rest, and its highest mark after the transaction is in the index and its vectors too.

- narrow: rows of some 200 bytes, of which `batch_rows` fill a batch.
- wide: rows of 2,000 bytes, of which `batch_bytes` fill one.

    python bench/memory.py [narrow] [wide]      LARGE_ROWS=1000000 WIDE_ROWS=100000
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import FIXED, of_goal, report
else:
    from _pipeline import Pipeline, pipeline
    from report import FIXED, of_goal, report

ROWS = 1_000
GOAL_ROWS, GOAL_ROUNDS = 1_000_000, 3
LARGE_ROWS = int(os.environ.get("LARGE_ROWS", str(GOAL_ROWS)))
WIDE_ROWS = int(os.environ.get("WIDE_ROWS", "100000"))
EMBEDDER = 'type = "hash"\ndimensions = 64'

LARGE_PATIENCE_S = 900.0
"""The vectors of a million rows take some minutes."""

GOAL_MB, GOAL_MORE_MB = 150.0, 100.0


def resident_mb(made: Pipeline, field: str) -> float:
    """Return VmRSS or VmHWM of the worker."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{made.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure(rows: int, text: str) -> tuple[float, float]:
    """Return the size at rest and at most, with a transaction of so many rows.

    :param text: makes a row's text of its number `i`, in SQL.
    """
    with pipeline(EMBEDDER, 'search = ""', max_wal_size="8GB") as made:
        made.load(ROWS)
        rest = resident_mb(made, "VmRSS")
        made.connection.execute(
            f"INSERT INTO articles SELECT i, i %% 50, {text} FROM generate_series(%s::int, %s::int) AS i",
            [ROWS + 1, ROWS + rows],
        )
        made.text_in_step(LARGE_PATIENCE_S)
        made.vectors_in_step(0.5, LARGE_PATIENCE_S)
        peak = resident_mb(made, "VmHWM")
        made.stop()
    return rest, peak


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["narrow", "wide"]
    figures: dict[str, float] = {}
    ratios, against, smaller = {}, {}, {}
    for part, rows, text in (
        ("narrow", LARGE_ROWS, "repeat('some words of article ' || i || ' ', 8)"),
        ("wide", WIDE_ROWS, "rpad(repeat(md5(i::text) || ' ', 61), 2000)"),
    ):
        if part not in parts:
            continue
        rest, peak = measure(rows, text)
        figures |= {f"{part}_rows": rows, f"{part}_rest_mb": rest, f"{part}_peak_mb": peak}
        ratio = f"{part}_rest_and_100_mb_over_peak"
        ratios[ratio], against[ratio] = (rest + GOAL_MORE_MB) / peak, "our own at rest + 100 MB, same run"
        smaller[ratio] = of_goal(1, GOAL_ROUNDS, "rounds")
        if part == "narrow":
            ratios["goal_over_rest"], against["goal_over_rest"] = GOAL_MB / rest, FIXED
            smaller["goal_over_rest"] = smaller[ratio]
            smaller[ratio] = of_goal(rows, GOAL_ROWS, "rows") or smaller[ratio]
    report("memory", figures, ratios, dict.fromkeys(ratios, 1.0), against, smaller)


if __name__ == "__main__":
    main()
