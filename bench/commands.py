"""How long do commands take: on their own, and beside a worker that has the model loaded?

    python bench/commands.py

Each is run as a person runs it, until the end of its output: Python's own start and all imports count. Ctrl-C is timed
until the worker says that it stops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline
    from bench.report import FIXED, report
else:
    from _pipeline import Pipeline, pipeline
    from report import FIXED, report

MODEL = 'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"'
ROWS, ROUNDS = 500, int(os.environ.get("ROUNDS", "5"))
QUESTIONS = 20

GOAL_S = 2.0
"""A person who searches by hand does not want to wait longer."""
GOAL_WORD_S = 0.5
"""Ctrl-C is answered before somebody presses it again."""


def took_s(arguments: list[str]) -> float:
    """Return how long a command takes."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "cdcsync", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cdcsync {' '.join(arguments)} failed:\n{done.stderr}")
    return time.perf_counter() - began


def judged(directory: Path) -> None:
    """Write questions whose answers are known."""
    (directory / "qrels").mkdir(parents=True)
    queries = [{"_id": str(i), "text": f"the text of number {i}"} for i in range(1, QUESTIONS + 1)]
    (directory / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    lines = [f"{i}\t{i}\t1\n" for i in range(1, QUESTIONS + 1)]
    (directory / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def interrupted_s(made: Pipeline) -> float:
    """Return how long a worker takes to answer Ctrl-C."""
    began = time.perf_counter()
    os.kill(made.pid, signal.SIGINT)
    made.event("stopping")
    return time.perf_counter() - began


def main() -> None:
    """Measure and report."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pipeline(MODEL) as made:
        path = made._config
        path.write_text(path.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        made.connection.execute(
            "INSERT INTO articles SELECT i, i %% 7, 'the text of number ' || i FROM generate_series(1, %s) AS i", [ROWS]
        )
        judged(path.parent / "questions")
        commands = {
            "help": ["--help"],
            "status": ["status", "-c", str(path)],
            "check": ["check", "-c", str(path)],
            "search": ["search", "articles", "number seven", "-c", str(path)],
            "evaluate": ["evaluate", "articles", "--queries", "20", "-c", str(path)],
            "judged": ["evaluate", "articles", "--judged", str(path.parent / "questions"), "-c", str(path)],
        }
        made.start()
        made.live()
        made.vectors_in_step(0.1)
        figures = {}
        for name, arguments in commands.items():
            took_s(arguments)
            figures[f"{name}_s"] = statistics.median(took_s(arguments) for _ in range(ROUNDS))
        figures["interrupted_s"] = interrupted_s(made)
    ratios = {
        **{f"goal_over_{name}": GOAL_S / figures[f"{name}_s"] for name in ("search", "evaluate", "judged", "status")},
        "goal_over_interrupted": GOAL_WORD_S / figures["interrupted_s"],
    }
    report("commands", figures, ratios, dict.fromkeys(ratios, 1.0), FIXED)


if __name__ == "__main__":
    main()
