"""How well are judged questions answered, by words, by vectors and by both?

    python bench/judged.py DIRECTORY

The directory holds a judged collection in BEIR's layout: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl and
qrels/test.tsv. Its documents become a table, which a worker indexes with MiniLM; `cdcsync evaluate --judged` asks the
questions. Without a directory there is nothing to measure: collections have licences of their own, and none is part of
this project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import report
else:
    from _pipeline import Pipeline, pipeline
    from report import report

MODEL = 'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"'
MEASURE = "nDCG@10"

GOAL_HYBRID = float(os.environ.get("GOAL_HYBRID", "0.42"))
GOAL_WORDS = float(os.environ.get("GOAL_WORDS", "0.32"))
GAIN = 0.005
"""What hybrid search adds to its vector leg at least."""

TEXT = os.environ.get("TEXT", r"{title}\n\n{body}")
SETTINGS = os.environ.get("SETTINGS", "")
"""The template of a document, and more keys of the index's section, each as TOML has it: `vector_type = "halfvec"`,
`hnsw = { quantise = "binary" }`, or how documents are cut, which the table of docs/chunking.md compares."""

INDEX = f"""
[indexes.pages]
table = "pages"
text = "{TEXT}"
embedder = "model"
search = "english"
"""


def loaded(made: Pipeline, corpus: Path) -> None:
    """Index the documents of a collection, and leave the worker stopped and the words counted."""
    made.connection.execute("CREATE TABLE pages (id text PRIMARY KEY, title text, body text)")
    lines: list[dict[str, Any]] = [json.loads(line) for line in corpus.read_text("utf-8").splitlines() if line.strip()]
    for one in lines:
        made.connection.execute(
            "INSERT INTO pages VALUES (%s, %s, %s)", [one["_id"], one.get("title", ""), one.get("text", "")]
        )
    made._config.write_text(made._config.read_text().partition("[indexes.articles]")[0] + INDEX + SETTINGS)
    made.start()
    made.live()
    made.until(lambda: made.value("SELECT NOT EXISTS (SELECT FROM cdcsync.pages_backlog)"), "all vectors", 0.5)
    made.until(lambda: made.value("SELECT EXISTS (SELECT FROM cdcsync.pages_words)"), "counted words", 0.5)
    made.stop()


def evaluated(made: Pipeline, directory: Path) -> dict[str, Any]:
    """Return what `cdcsync evaluate --judged` measures."""
    command = [sys.executable, "-m", "cdcsync", "evaluate", "pages", "--judged", str(directory), "--json"]
    done = subprocess.run([*command, "-c", str(made._config)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    judged: dict[str, Any] = json.loads(done.stdout)["judged"]
    return judged


def main() -> None:
    """Measure and report."""
    directory = Path(sys.argv[1] if sys.argv[1:] else os.environ.get("JUDGED", "nowhere"))
    if not (directory / "corpus.jsonl").exists():
        print("bench judged: name a collection, `python bench/judged.py DIRECTORY`; nothing was measured")
        report("judged", {})
        return
    with pipeline(MODEL) as made:
        loaded(made, directory / "corpus.jsonl")
        judged = evaluated(made, directory)
        chunks = made.value("SELECT count(*) FROM cdcsync.pages_chunks")
    figures: dict[str, float] = {"queries": judged["queries"], "chunks": chunks}
    for name, mode in judged["modes"].items():
        for measure, figure in mode["figures"].items():
            figures[f"{name}_{measure}"] = figure["mean"]
        figures[f"{name}_mean_ms"] = mode["mean_ms"]
    of = {mode: figures[f"{mode}_{MEASURE}"] for mode in ("text", "vector", "hybrid")}
    ratios = {
        "hybrid_over_goal": of["hybrid"] / GOAL_HYBRID,
        "words_over_goal": of["text"] / GOAL_WORDS,
        "hybrid_over_vector_and_gain": of["hybrid"] / (of["vector"] + GAIN),
    }
    report("judged", figures, ratios, dict.fromkeys(ratios, 1.0))


if __name__ == "__main__":
    main()
