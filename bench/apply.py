"""How many row changes a second does one worker bring from the slot to the index's text?

20,000 rows are indexed. Then, each time with the worker stopped, come new rows, changes of a carried column, changes of
the text, and deletes, in transactions of a hundred; and each time the worker returns and catches up. Its time counts
from where it streams to where the text is that of everything committed. Source and target are one server here: on
machines of their own, the walsender and the target's backend do not share the worker's processors.

On a busy machine the processor time says more: that of the worker and of the backend which writes for it, one of which
waits for the other. The model is feature hashing; vectors follow from the backlog, and are not waited for. These are
figures of this machine alone: `native.py` compares the same work with PostgreSQL's own replication in one run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import report
else:
    from _pipeline import Pipeline, pipeline
    from report import report

ROWS = 20_000
CHANGED = 10_000
ROWS_OF_TRANSACTION = 100
EMBEDDER = 'type = "hash"\ndimensions = 384'

BODY = "'article ' || i || ' ' || repeat('some more words of its text ', 16) || %s"

WORKLOADS = {
    "insert": f"INSERT INTO articles SELECT i, i %% 50, {BODY} FROM generate_series(%s + {ROWS}, %s + {ROWS}) AS i",
    "column": "UPDATE articles SET tenant = tenant + 1 WHERE %s <> '' AND id BETWEEN %s AND %s",
    "text": "UPDATE articles SET body = body || %s WHERE id BETWEEN %s AND %s",
    "delete": "DELETE FROM articles WHERE %s <> '' AND id BETWEEN %s AND %s",
}


def processor_s(made: Pipeline) -> float:
    """Return how much processor time the worker and its backend have taken."""
    pid = made.value("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply %%'")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    backend_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return made.metrics()["process_cpu_seconds_total"] + backend_s


def rates(made: Pipeline, workload: str) -> tuple[float, float]:
    """Change rows while the worker is away; return how many a second, and a processor second, it catches up."""
    for first in range(1, CHANGED, ROWS_OF_TRANSACTION):
        made.connection.execute(WORKLOADS[workload], [workload, first, first + ROWS_OF_TRANSACTION - 1])
    made.start()
    made.event("streaming")
    started, used_s = time.perf_counter(), processor_s(made)
    made.text_in_step()
    elapsed, used_s = time.perf_counter() - started, processor_s(made) - used_s
    made.stop()
    return CHANGED / elapsed, CHANGED / used_s


def main() -> None:
    """Measure and report."""
    with pipeline(EMBEDDER) as made:
        made.connection.execute(
            f"INSERT INTO articles SELECT i, i %% 50, {BODY} FROM generate_series(1, %s) AS i", ["", ROWS]
        )
        made.start()
        made.live()
        made.text_in_step()
        made.stop()
        found = {workload: rates(made, workload) for workload in WORKLOADS}
        wrong = made.value(
            "SELECT count(*) FROM articles AS a FULL JOIN cdcsync.articles_chunks AS c USING (id)"
            " WHERE rtrim(a.body) IS DISTINCT FROM c.content OR a.tenant IS DISTINCT FROM c.tenant"
        )
        if wrong:
            raise SystemExit(f"{wrong} rows are not in step")
    report(
        "apply",
        {f"{workload}_rows_per_s": per_s for workload, (per_s, _) in found.items()}
        | {f"{workload}_rows_per_processor_s": per_s for workload, (_, per_s) in found.items()},
    )


if __name__ == "__main__":
    main()
