"""How many texts are embedded for nothing, after a worker was away while rows changed again and again?

5,000 rows are indexed. With the worker stopped come 20,000 updates in transactions of ten, half of which change only a
carried column. Then the worker returns. What has to be embedded are the distinct texts at the end that were not
embedded before; everything more is waste. The provider takes 20 ms a request.

Three rounds, each on a server of its own with other changes, count together; of the times the medians do. They begin
with the worker's process, its start included.

    python bench/waste.py      ROUNDS=3
"""

from __future__ import annotations

import os
import random
import statistics
import time
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import of_goal, report
else:
    from _pipeline import Pipeline, pipeline
    from report import of_goal, report

ROWS = 5_000
UPDATES = 20_000
GOAL_ROUNDS = 3
ROUNDS = int(os.environ.get("ROUNDS", str(GOAL_ROUNDS)))
ROWS_OF_TRANSACTION = 10
EMBEDDER = 'type = "hash"\ndimensions = 384\nlatency_ms = 20'


def change(made: Pipeline, round_: int) -> None:
    """Update rows at random, half of the time only their carried column."""
    chance = random.Random(round_)
    for number in range(UPDATES // ROWS_OF_TRANSACTION):
        with made.connection.transaction():
            for key in sorted(chance.sample(range(1, ROWS + 1), ROWS_OF_TRANSACTION)):
                if chance.random() < 0.5:
                    made.connection.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = %s", [key])
                else:
                    body = f"article {key} as it was written in round {number}: {' '.join(chance.choices(WORDS, k=30))}"
                    made.connection.execute("UPDATE articles SET body = %s WHERE id = %s", [body, key])


WORDS = [f"word{number}" for number in range(500)]


def measure(round_: int) -> dict[str, float]:
    """Return what had to be embedded, what was, and how long that took."""
    with pipeline(EMBEDDER) as made:
        made.load(ROWS)
        made.stop()
        made.connection.execute("CREATE TABLE known AS SELECT DISTINCT body FROM articles")
        change(made, round_)
        needed = made.value("SELECT count(DISTINCT body) FROM articles WHERE body NOT IN (SELECT body FROM known)")

        started = time.perf_counter()
        made.start()
        made.text_in_step()
        text_s = time.perf_counter() - started
        made.vectors_in_step()
        vectors_s = time.perf_counter() - started

        metrics = made.metrics()
        wrong = made.value(
            "SELECT count(*) FROM articles AS a FULL JOIN articles_index AS i USING (id)"
            " WHERE a.body IS DISTINCT FROM i.content OR a.tenant IS DISTINCT FROM i.tenant OR i.stale"
        )
        if wrong:
            raise SystemExit(f"{wrong} rows are not in step")
        made.stop()
    avoided = {
        f"avoided_{reason}_texts": metrics.get(
            f'cdcsync_embed_avoided_texts_total{{embedder="model",reason="{reason}"}}', 0.0
        )
        for reason in ("remembered", "under_way", "superseded")
    }
    return {
        "needed_texts": needed,
        "embedded_texts": metrics['cdcsync_embed_texts_total{embedder="model"}'],
        "unchanged_documents": metrics.get('cdcsync_documents_unchanged_total{index="articles"}', 0.0),
        "reused_vectors": metrics.get('cdcsync_vectors_total{index="articles",way="reused"}', 0.0),
        **avoided,
        "text_fresh_s": text_s,
        "vectors_fresh_s": vectors_s,
    }


def main() -> None:
    """Measure and report."""
    rounds = [measure(round_) for round_ in range(ROUNDS)]
    figures = {
        name: (statistics.median if name.endswith("_s") else sum)(one[name] for one in rounds) for name in rounds[0]
    }
    report(
        "waste",
        figures,
        {"needed_over_embedded": figures["needed_texts"] / figures["embedded_texts"]},
        {"needed_over_embedded": 1.0},
        "the texts of this run, counted in SQL",
        {"needed_over_embedded": of_goal(ROUNDS, GOAL_ROUNDS, "rounds")},
    )


if __name__ == "__main__":
    main()
