"""How long after a commit can a row be found by its new text, when there is little to do?

Rows change one at a time. The clock runs from the commit's return until a query sees the new text with its own vector
in the view. Each change waits for the one before it: that is light load, where the worker embeds inline, so that chunk,
vector and checkpoint commit together.

With the `hash` embedder this is the pipeline alone. With a real model, where there is one, it is compared to the time
that the model itself takes for such a text in this process, measured before the worker starts.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from cdcsync import config
from cdcsync.embedders import make_embedder
from cdcsync.errors import EmbedderSetupError

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.report import FIXED, report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from report import FIXED, report

ROWS = 1_000
CHANGES = 400
CHANGES_WITH_MODEL = 100
WARM_UP = 20
"""Changes that are not counted: plans, caches and the model's first calls."""

GOAL_P50_MS = 15.0
GOAL_P99_MS = 50.0

HASH = 'type = "hash"\ndimensions = 256'
MODEL = 'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"'

SENTENCE = "Change number {} says something new about replication slots, vectors and how fresh a search can be."


def found(reader: psycopg.Connection[Any], key: int, body: str) -> bool:
    """Say whether the view shows the text with its own vector."""
    row = reader.execute("SELECT FROM articles_index WHERE id = %s AND content = %s AND NOT stale", [key, body])
    return row.fetchone() is not None


def changes_ms(made: Pipeline, count: int) -> list[float]:
    """Change rows one at a time and return how long each took to be found."""
    taken = []
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        for number in range(count + WARM_UP):
            key, body = number % ROWS + 1, SENTENCE.format(number)
            made.connection.execute("UPDATE articles SET body = %s WHERE id = %s", [body, key])
            committed = time.perf_counter()
            made.until(partial(found, reader, key, body), "new text")
            taken.append((time.perf_counter() - committed) * 1000)
    return taken[WARM_UP:]


def measure(embedder: str, count: int) -> tuple[list[float], float]:
    """Return the times and the share of vectors that came inline."""
    with pipeline(embedder) as made:
        made.load(ROWS)
        before = made.metrics()
        taken = changes_ms(made, count)
        after = made.metrics()
        made.stop()
    came = {
        way: after.get(name, 0.0) - before.get(name, 0.0)
        for way in ("inline", "backlog", "reused")
        for name in [f'cdcsync_vectors_total{{index="articles",way="{way}"}}']
    }
    return taken, came["inline"] / max(1.0, sum(came.values()))


async def model_ms() -> float:
    """Return the median time that the model takes for one text."""
    settings = config.SentenceTransformersEmbedder(model="sentence-transformers/all-MiniLM-L6-v2")
    embedder = make_embedder("model", settings)
    await embedder.open()
    try:
        taken = []
        for number in range(WARM_UP + CHANGES_WITH_MODEL):
            started = time.perf_counter()
            await embedder.embed([SENTENCE.format(number)])
            taken.append((time.perf_counter() - started) * 1000)
        return statistics.median(taken[WARM_UP:])
    finally:
        await embedder.aclose()


def main() -> None:
    """Measure and report."""
    taken, inline = measure(HASH, CHANGES)
    p50, p99 = statistics.median(taken), percentile(taken, 0.99)
    figures = {"hash_p50_ms": p50, "hash_p99_ms": p99, "hash_inline_share": inline}
    ratios = {"goal_over_hash_p50": GOAL_P50_MS / p50, "goal_over_hash_p99": GOAL_P99_MS / p99}
    try:
        alone = anyio.run(model_ms)
    except EmbedderSetupError as error:
        print(f"without a model: {error}")
    else:
        taken, inline = measure(MODEL, CHANGES_WITH_MODEL)
        p50 = statistics.median(taken)
        figures |= {"model_alone_ms": alone, "model_p50_ms": p50, "model_inline_share": inline}
        ratios["model_alone_and_15_ms_over_p50"] = (alone + GOAL_P50_MS) / p50
    against = {ratio: "the model alone, same run" if ratio.startswith("model") else FIXED for ratio in ratios}
    report("freshness", figures, ratios, dict.fromkeys(ratios, 1.0), against)


if __name__ == "__main__":
    main()
