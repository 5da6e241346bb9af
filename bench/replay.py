"""What does a backfill cost the changes that come in beside it?

Rows change one at a time, as in `freshness.py`, first while the whole table is being loaded and embedded, then with
nothing else to do, then while it is replayed. A change counts only while the backfill still runs. Both sides of a ratio
are of one worker on one server: the goal is that a change beside a backfill takes at most twice as long as without one.

    python bench/replay.py [ROWS]
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.freshness import HASH, found
    from bench.report import report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from freshness import HASH, found
    from report import report

ROWS = 100_000
CHANGES = 300
WARM_UP = 20
"""Changes that are not counted."""

GOAL = 0.5
"""At most twice as long."""

OPEN = "SELECT count(*) FROM cdcsync.backfills WHERE state IN ('requested', 'running')"
ROWS_SQL = """
INSERT INTO articles
SELECT i, i %% 50, 'Article ' || i || ': ' || (
    SELECT string_agg('w' || (20000 * power(random(), 3) + w)::int, ' ') FROM generate_series(1, 40) AS w WHERE i > 0)
FROM generate_series(1, %s) AS i
"""


def changes_ms(made: Pipeline, rows: int, *, beside: bool, series: int) -> list[float]:
    """Change rows one at a time and return how long each took to be found.

    :param beside: whether only those count that a backfill was running beside.
    :param series: makes the texts different from those of other series.
    """
    taken: list[float] = []
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        for number in range(CHANGES + WARM_UP):
            key, body = (number * 7919) % rows + 1, f"Change {number} of series {series} says something new."
            made.connection.execute("UPDATE articles SET body = %s WHERE id = %s", [body, key])
            committed = time.perf_counter()
            made.until(partial(found, reader, key, body), "new text")
            taken.append((time.perf_counter() - committed) * 1000)
            if beside and not made.value(OPEN):
                taken.pop()
                break
    return taken[WARM_UP:]


def main() -> None:
    """Measure and report."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with pipeline(HASH) as made:
        made.connection.execute(ROWS_SQL, [rows])
        made.connection.execute("ANALYZE articles")
        made.start()
        made.event("backfill_started")
        loading = changes_ms(made, rows, beside=True, series=1)
        made.live()
        made.vectors_in_step()
        alone = changes_ms(made, rows, beside=False, series=2)
        made.connection.execute("INSERT INTO cdcsync.backfills (index_name, kind) VALUES ('articles', 'replay')")
        made.until(lambda: made.value("SELECT count(*) FROM cdcsync.backfills WHERE state = 'running'"), "replay")
        replaying = changes_ms(made, rows, beside=True, series=3)
        started = time.perf_counter()
        made.until(lambda: not made.value(OPEN), "the end of the replay")
        left_s = time.perf_counter() - started
        made.stop()
    figures: dict[str, float] = {"rows": float(rows), "replay_left_s": left_s}
    for name, taken in {"alone": alone, "loading": loading, "replaying": replaying}.items():
        figures[f"{name}_changes"] = float(len(taken))
        figures[f"{name}_p50_ms"] = statistics.median(taken)
        figures[f"{name}_p99_ms"] = percentile(taken, 0.99)
    ratios = {
        f"alone_over_{name}_p50": figures["alone_p50_ms"] / figures[f"{name}_p50_ms"]
        for name in ("loading", "replaying")
    }
    note = "a change waits for the page that is being written: one session writes both"
    report("replay", figures, ratios, dict.fromkeys(ratios, GOAL), "our own alone, same run", notes={"alone": note})


if __name__ == "__main__":
    main()
