"""How well are judged questions answered, by words, by vectors and by both?

    python bench/judged.py DIRECTORY
    python bench/judged.py DIRECTORY --chunks     the table of docs/chunking.md: other ways to cut the same documents

The directory holds a judged collection in BEIR's layout: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl and
qrels/test.tsv. Its documents become a table, which a worker indexes with MiniLM; `cdcsync evaluate --judged` asks the
questions. Without a directory there is nothing to measure: collections have licences of their own, and none is part of
this project.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcsync.flows.evaluate.intervals import difference

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import FIXED, report
else:
    from _pipeline import Pipeline, pipeline
    from report import FIXED, report

MODEL = 'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"'
MEASURE = "nDCG@10"

GOAL_HYBRID = float(os.environ.get("GOAL_HYBRID", "0.42"))
GOAL_WORDS = float(os.environ.get("GOAL_WORDS", "0.32"))
GAIN = 0.005
"""What hybrid search adds to its vector leg at least."""

TEXT = os.environ.get("TEXT", r"{title}\n\n{body}")
SETTINGS = os.environ.get("SETTINGS", "")
"""The template of a document, and more keys of the index's section, each as TOML has it: `vector_type = "halfvec"`,
`hnsw = { quantise = "binary" }`, or how documents are cut."""

INDEX = """
[indexes.{name}]
table = "pages"
text = "{text}"
embedder = "model"
search = "english"
{settings}
"""

FIRST, EACH = r"{title}\n\n{body}", "{body}"
TITLED = 'chunk_text = "{title}: {chunk}"'
SHORT = "chunking = { max_tokens = 128 }"
BASE = "first_254"
WAYS: dict[str, tuple[str, str, str]] = {
    "whole": ("whole abstracts, cut off where the model stops reading", FIRST, 'chunking = { strategy = "none" }'),
    BASE: ("up to 254 tokens, the title in the first chunk", FIRST, ""),
    "first_equal_254": ("the same in pieces of equal size", FIRST, ""),
    "first_without_32_254": ("the same without pieces of fewer than 32 tokens", FIRST, ""),
    "first_without_64_254": ("the same without pieces of fewer than 64 tokens", FIRST, ""),
    "each_254": ("up to 254 tokens, the title in each chunk", EACH, TITLED),
    "each_equal_254": ("the same in pieces of equal size", FIRST, ""),
    "each_without_32_254": ("the same without pieces of fewer than 32 tokens", FIRST, ""),
    "each_without_64_254": ("the same without pieces of fewer than 64 tokens", FIRST, ""),
    "first_128": ("up to 128 tokens, the title in the first chunk", FIRST, SHORT),
    "first_equal_128": ("the same in pieces of equal size", FIRST, ""),
    "first_without_64_128": ("the same without pieces of fewer than 64 tokens", FIRST, ""),
    "each_128": ("up to 128 tokens, the title in each chunk", EACH, f"{TITLED}\n{SHORT}"),
    "each_equal_128": ("the same in pieces of equal size", FIRST, ""),
    "each_without_64_128": ("the same without pieces of fewer than 64 tokens", FIRST, ""),
}
"""Ways to cut: by the name of an index, what it is, the document, its settings; where there are none, see `pieces`."""


def loaded(made: Pipeline, corpus: Path, indexes: Mapping[str, tuple[str, str]]) -> None:
    """Index the documents of a collection, and leave the worker running and the words counted.

    :param indexes: the template and the settings of each.
    """
    made.connection.execute("CREATE TABLE pages (id text PRIMARY KEY, title text, body text)")
    lines: list[dict[str, Any]] = [json.loads(line) for line in corpus.read_text("utf-8").splitlines() if line.strip()]
    for one in lines:
        made.connection.execute(
            "INSERT INTO pages VALUES (%s, %s, %s)", [one["_id"], one.get("title", ""), one.get("text", "")]
        )
    sections = [INDEX.format(name=name, text=text, settings=settings) for name, (text, settings) in indexes.items()]
    made._config.write_text(made._config.read_text().partition("[indexes.articles]")[0] + "".join(sections))
    made.start()
    made.live(len(indexes))
    for name in indexes:
        for what in (f"NOT EXISTS (SELECT FROM cdcsync.{name}_backlog)", f"EXISTS (SELECT FROM cdcsync.{name}_words)"):
            made.until(partial(made.value, f"SELECT {what}"), what, 0.5)


def evaluated(made: Pipeline, directory: Path, name: str) -> dict[str, Any]:
    """Return what `cdcsync evaluate --judged` measures."""
    command = [sys.executable, "-m", "cdcsync", "evaluate", name, "--judged", str(directory), "--json"]
    done = subprocess.run([*command, "-c", str(made._config)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    judged: dict[str, Any] = json.loads(done.stdout)["judged"]
    return judged


def compare_ways(directory: Path) -> None:
    """Print the table of docs/chunking.md, each way compared question by question with the default one."""
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    indexes = {
        name: (text, settings or ("" if name == BASE else f'chunking = {{ chunks = "pieces:{name}" }}'))
        for name, (_, text, settings) in WAYS.items()
    }
    with (
        pipeline('type = "python"\nclass = "pieces:Remembering"') as made,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        # The worker embeds the questions, at a port that the command knows.
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        made._config.write_text(made._config.read_text().replace("127.0.0.1:0", address))
        loaded(made, directory / "corpus.jsonl", indexes)
        runs = {name: evaluated(made, directory, name)["modes"] for name in indexes}
        counts = {name: made.value(f"SELECT count(*) FROM cdcsync.{name}_chunks") for name in indexes}
    figures: dict[str, float] = {}
    print("| chunks | number | nDCG@10 | difference | R@100 | hybrid nDCG@10 | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, modes in runs.items():
        cells = [WAYS[name][0], f"{counts[name]:,}"]
        for mode in ("vector", "hybrid"):
            ours, base = modes[mode]["scores"][MEASURE], runs[BASE][mode]["scores"][MEASURE]
            over = difference([ours[question] for question in base], list(base.values()))
            mean = modes[mode]["figures"][MEASURE]["mean"]
            ends = "" if over.interval is None else " ({:+.3f} to {:+.3f})".format(*over.interval)
            cells += [f"{mean:.3f}", "" if name == BASE else f"{over.mean:+.3f}{ends}"]
            figures |= {f"{name}_{mode}_{MEASURE}": mean, f"{name}_{mode}_over_base": over.mean}
            if mode == "vector":
                cells.append(f"{modes[mode]['figures']['R@100']['mean']:.3f}")
        print(f"| {' | '.join(cells)} |")
    report("chunks", figures)


def main() -> None:
    """Measure and report."""
    directory = Path(sys.argv[1] if sys.argv[1:] else os.environ.get("JUDGED", "nowhere"))
    if not (directory / "corpus.jsonl").exists():
        print("bench judged: name a collection, `python bench/judged.py DIRECTORY`; nothing was measured")
        report("judged", {})
        return
    if "--chunks" in sys.argv:
        compare_ways(directory)
        return
    with pipeline(MODEL) as made:
        loaded(made, directory / "corpus.jsonl", {"pages": (TEXT, SETTINGS)})
        made.stop()
        judged = evaluated(made, directory, "pages")
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
    against = dict.fromkeys(ratios, FIXED) | {"hybrid_over_vector_and_gain": "our own by vectors alone, same run"}
    report("judged", figures, ratios, dict.fromkeys(ratios, 1.0), against)


if __name__ == "__main__":
    main()
