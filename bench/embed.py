"""How near does the pipeline come to the model's own speed?

The same texts are embedded twice: by `SentenceTransformer.encode` in one call, at the best of several batch sizes, and
by a worker that gets them as one transaction of new rows, from the commit until every vector is in the index. The
model is loaded in both before the clock starts, and each document is one chunk, so that both embed the same texts.

A machine's speed changes while one looks. So the two take turns, round by round over texts of their own, who begins
alternates, and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from cdcsync import config
from cdcsync.demo.corpus import docstrings
from cdcsync.embedders.sentence_transformers import SentenceTransformersEmbedder

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import report
else:
    from _pipeline import Pipeline, pipeline
    from report import report

ROUNDS = 3
ROUND_TEXTS = 640
"""Some eight seconds on two cores: long enough that a commit and a look at the backlog do not count."""
SAMPLE = 100
"""Texts by which the best batch size is found."""
BATCH_SIZES = (8, 16, 32, 64)
MOST_CHARACTERS = 600
MOST_TOKENS = 250
"""Within what the model reads, so that each document is one chunk."""
POLL_S = 0.02
"""Each look at the backlog takes a processor from the model for a moment."""
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def load() -> Any:
    """Return the model as its own library loads it."""
    files = SentenceTransformersEmbedder("model", config.SentenceTransformersEmbedder(model=MODEL))._files.directory
    return importlib.import_module("sentence_transformers").SentenceTransformer(str(files), local_files_only=True)


def best_batch(model: Any, texts: list[str]) -> int:
    """Return the batch size with which the model is fastest."""
    encode(model, texts[:32], 32)  # what only the first call costs
    return min(BATCH_SIZES, key=lambda size: min(encode(model, texts, size) for _ in range(2)))


def encode(model: Any, texts: list[str], size: int) -> float:
    """Return how many seconds one call takes."""
    started = time.perf_counter()
    model.encode(texts, batch_size=size, show_progress_bar=False)
    return time.perf_counter() - started


def follow(made: Pipeline, first: int, texts: list[str]) -> float:
    """Return how many seconds it takes from the commit of these rows to their last vector."""
    with made.connection.cursor().copy("COPY articles FROM STDIN") as copy:
        for number, text in enumerate(texts, start=first):
            copy.write_row((number, 1, text))
    started = time.perf_counter()
    made.text_in_step()
    made.vectors_in_step(POLL_S)
    elapsed = time.perf_counter() - started
    found = made.value("SELECT count(*) FROM articles_index WHERE NOT stale")
    if found != first + len(texts):
        raise SystemExit(f"{found} vectors for {first + len(texts)} texts")
    return elapsed


def in_turns(
    made: Pipeline, model: Any, batch: int, texts: list[str], round_texts: int
) -> tuple[list[float], list[float]]:
    """Return the seconds that model and worker take, round by round over texts of their own; who begins alternates.

    :param texts: a sample first, which the worker gets before the rounds, then those of the rounds.
    """
    sample = len(texts) - ROUNDS * round_texts
    alone: list[float] = []
    worker: list[float] = []
    made.start()
    made.live()
    made.event("embedder_ready")
    follow(made, 0, texts[:sample])
    for number in range(ROUNDS):
        first = sample + number * round_texts
        part = texts[first : first + round_texts]
        turns: list[Callable[[], None]] = [
            lambda part=part: alone.append(encode(model, part, batch)),  # type: ignore[misc]
            lambda part=part, first=first: worker.append(follow(made, first, part)),  # type: ignore[misc]
        ]
        for turn in turns if number % 2 else reversed(turns):
            turn()
        print(f"round {number + 1}: encode {alone[-1]:.2f} s, pipeline {worker[-1]:.2f} s", flush=True)
    made.stop()
    return alone, worker


def main() -> None:
    """Measure and report."""
    documents = dict.fromkeys(entry.doc[:MOST_CHARACTERS].strip() for entry in docstrings())
    model = load()
    lengths = zip(documents, model.tokenizer(list(documents), verbose=False)["input_ids"], strict=True)
    texts = [text for text, tokens in lengths if text and len(tokens) <= MOST_TOKENS]
    best = best_batch(model, texts[:SAMPLE])
    with pipeline(f'type = "sentence-transformers"\nmodel = "{MODEL}"') as made:
        alone, worker = in_turns(made, model, best, texts[: SAMPLE + ROUNDS * ROUND_TEXTS], ROUND_TEXTS)
    report(
        "embed",
        {
            "encode_texts_per_s": ROUND_TEXTS / median(alone),
            "encode_best_batch_texts": best,
            "pipeline_texts_per_s": ROUND_TEXTS / median(worker),
            "rounds": ROUNDS,
        },
        {"pipeline_over_encode": median(one / other for one, other in zip(alone, worker, strict=True))},
        {"pipeline_over_encode": 0.95},
        "the model alone, same run",
    )


if __name__ == "__main__":
    main()
