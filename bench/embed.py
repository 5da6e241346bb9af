"""How near does the pipeline come to the model's own speed?

The same texts are embedded twice: by `SentenceTransformer.encode` in one call, at the best of several batch sizes, and
by a worker that gets them as one transaction of new rows, from the commit until every vector is in the index. The
model is loaded in both cases before the clock starts. Chunks are the documents, so that both embed the same texts.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

from cdcsync import config
from cdcsync.corpus import docstrings
from cdcsync.embedders.sentence_transformers import SentenceTransformersEmbedder

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import pipeline
    from bench.report import report
else:
    from _pipeline import pipeline
    from report import report

TEXTS = 600
SAMPLE = 100
"""Texts by which the best batch size is found."""
BATCH_SIZES = (16, 32, 64)
MOST_CHARACTERS = 600
"""Well within what the model reads, so that each document is one chunk."""
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def encode_per_s(texts: list[str]) -> tuple[float, int]:
    """Return how many texts a second the model embeds in one call, and the batch size that was best."""
    settings = config.SentenceTransformersEmbedder(model=MODEL)
    files = SentenceTransformersEmbedder("model", settings)._files.directory
    model = importlib.import_module("sentence_transformers").SentenceTransformer(str(files), local_files_only=True)

    def seconds(some: list[str], size: int) -> float:
        started = time.perf_counter()
        model.encode(some, batch_size=size, show_progress_bar=False)
        return time.perf_counter() - started

    seconds(texts[:32], 32)
    best = min(BATCH_SIZES, key=lambda size: seconds(texts[:SAMPLE], size))
    return len(texts) / seconds(texts, best), best


def pipeline_per_s(texts: list[str]) -> float:
    """Return how many texts a second go from commit to vector."""
    with pipeline(f'type = "sentence-transformers"\nmodel = "{MODEL}"') as made:
        made.start()
        made.live()
        made.event("embedder_ready")
        made.text_in_step()
        with made.connection.transaction(), made.connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO articles VALUES (%s, 1, %s)", [(number, text) for number, text in enumerate(texts)]
            )
        started = time.perf_counter()
        made.text_in_step()
        made.vectors_in_step()
        elapsed = time.perf_counter() - started
        found = made.value("SELECT count(*) FROM articles_index WHERE NOT stale")
        if found != len(texts):
            raise SystemExit(f"{found} vectors for {len(texts)} texts")
        made.stop()
    return len(texts) / elapsed


def main() -> None:
    """Measure and report."""
    documents = dict.fromkeys(entry.doc[:MOST_CHARACTERS].strip() for entry in docstrings())
    texts = [text for text in documents if text][:TEXTS]
    alone, best = encode_per_s(texts)
    worker = pipeline_per_s(texts)
    report(
        "embed",
        {"encode_texts_per_s": alone, "encode_best_batch_texts": best, "pipeline_texts_per_s": worker},
        {"pipeline_over_encode": worker / alone},
        {"pipeline_over_encode": 0.95},
    )


if __name__ == "__main__":
    main()
