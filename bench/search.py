"""What does a search cost, by words, by vectors and by both, in an index of 100,000 chunks?

Texts are words whose frequencies follow Zipf's law; a query is eight words, of which some are rare and some are in most
texts. It is made without a filter and with one that leaves 1 of 50 tenants.

- words: the keyword leg (`mode => 'text'`), with and without the filter, against ranking every row that holds any of
  the words by `ts_rank`. What that costs among the rows of the filter alone, by an index on the tenant, is a figure.
- hybrid: its p95 against the p95 of both legs together
- long: a query of 5,000 words against one of eight
- command: `cdcsync search` beside a running worker, from its start to its end, against half a second. A bare program
  that imports the driver, connects and calls the search function is measured in turns with it, and so is the processor
  time of both, which says more than the clock while the machine is busy.

Each search of the first three is planned and executed anew, over one connection, with everything in memory.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from cdcsync.config import HashEmbedder
from cdcsync.embedders.hashing import HashEmbedder as Hashing

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.report import FIXED, report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from report import FIXED, report

ROWS = int(os.environ.get("ROWS", "100000"))
QUERIES = int(os.environ.get("QUERIES", "40"))
DIMENSIONS = 64
VOCABULARY = 20_000
WORDS_OF_A_TEXT = 60
WORDS_OF_A_QUERY = 8
WORDS_OF_A_LONG_QUERY = 5_000
TENANTS = 50
COMMANDS = 7
COMMAND_S = 0.5
"""What a person at a shell takes for at once."""

SEARCH = """
SELECT chunk_no, content, score FROM cdcsync.articles_search(%s, %s, 10, %s::jsonb, %s, headline => NULL)
"""
EVERY_ROW = """
SELECT c.chunk_id FROM cdcsync.articles_chunks AS c
WHERE c.search @@ %(any)s::tsquery {filter} ORDER BY ts_rank(c.search, %(any)s::tsquery, 1) DESC LIMIT 10
"""
FILTERS = {"": ("{}", ""), "_filtered": ('{"tenant": 7}', "AND c.tenant = 7")}


def word(number: int) -> str:
    """Return the word of a number: letters alone, which no dictionary shortens."""
    letters = []
    while True:
        letters.append("bcdfghjklmnpqrtvwxz"[number % 19])
        number //= 19
        if not number:
            return "z" + "".join(letters) + "q"


class Texts:
    """Texts and queries of one vocabulary."""

    def __init__(self) -> None:
        self._chance = np.random.default_rng(1)
        shares = 1.0 / np.arange(1, VOCABULARY + 1)
        self._shares = np.cumsum(shares / shares.sum())
        self._words = np.array([word(number) for number in range(VOCABULARY)])

    def make(self, words: int) -> str:
        """Return a text of so many words."""
        return " ".join(self._words[np.searchsorted(self._shares, self._chance.random(words))])


def indexed(made: Pipeline, texts: Texts) -> None:
    """Index a table of texts, and leave the worker stopped and the words counted."""
    made._config.write_text(made._config.read_text() + 'search = "simple"\nindexed = ["tenant"]\n')
    with made.connection.cursor() as cursor, cursor.copy("COPY articles FROM STDIN") as copy:
        for number in range(ROWS):
            copy.write_row((number, number % TENANTS, texts.make(WORDS_OF_A_TEXT)))
    made.start()
    made.live()
    made.vectors_in_step(poll_s=0.2)
    made.until(lambda: made.value("SELECT count(*) > 1000 FROM cdcsync.articles_words"), "counted words", 0.5)
    made.stop()
    made.connection.execute("VACUUM ANALYZE")


def taken_ms(connection: psycopg.Connection[Any], statement: str, arguments: Any) -> float:
    """Return how long a statement takes, its rows included."""
    started = time.perf_counter()
    connection.execute(statement.encode(), arguments).fetchall()
    return (time.perf_counter() - started) * 1000


def measure(connection: psycopg.Connection[Any], queries: list[tuple[str, str]]) -> dict[str, list[float]]:
    """Return the times of each way to search."""
    taken: dict[str, list[float]] = {}
    for text, vector in queries:
        any_word = " | ".join(f"'{one}'" for one in dict.fromkeys(text.split()))
        for name, (filter_, condition) in FILTERS.items():
            for mode in ("text", "vector", "hybrid"):
                arguments = [text, vector, filter_, mode]
                taken.setdefault(f"{mode}{name}", []).append(taken_ms(connection, SEARCH, arguments))
            every = EVERY_ROW.format(filter=condition)
            taken.setdefault(f"every_row{name}", []).append(taken_ms(connection, every, {"any": any_word}))
    return taken


BARE = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as connection:
    connection.execute("SELECT * FROM cdcsync.articles_search(%s)", [sys.argv[2]]).fetchall()
"""


def commands_s(made: Pipeline, text: str) -> dict[str, float]:
    """Return what `cdcsync search` takes beside the worker, which embeds its query, and what a bare program takes."""
    made.start()
    port = made.event("listening")["port"]
    made.text_in_step()
    config = made._config.with_name("command.toml")
    config.write_text(made._config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    taken: dict[str, list[float]] = {}
    typed = {
        "command": [sys.executable, "-m", "cdcsync", "search", "-c", str(config), "articles", text],
        "bare_program": [sys.executable, "-c", BARE, made.dsn, text],
    }
    for _ in range(COMMANDS):
        for name, arguments in typed.items():
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
            taken.setdefault(f"{name}_s", []).append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken.setdefault(f"{name}_cpu_s", []).append(cpu)
    made.stop()
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and report."""
    texts = Texts()
    hashing = Hashing("model", HashEmbedder(dimensions=DIMENSIONS))

    def queries(count: int, words: int) -> list[tuple[str, str]]:
        made = [texts.make(words) for _ in range(count)]
        vectors = ["[" + ",".join(map(str, vector)) + "]" for vector in hashing.vectors(made)]
        return list(zip(made, vectors, strict=True))

    with pipeline(f'type = "hash"\ndimensions = {DIMENSIONS}') as made:
        indexed(made, texts)
        with psycopg.connect(made.dsn, autocommit=True) as connection:
            measure(connection, queries(5, WORDS_OF_A_QUERY))
            taken = measure(connection, queries(QUERIES, WORDS_OF_A_QUERY))
            long = [
                taken_ms(connection, SEARCH, [text, None, "{}", "text"])
                for text, _ in queries(max(3, QUERIES // 8), WORDS_OF_A_LONG_QUERY)
            ]
        commands = commands_s(made, texts.make(WORDS_OF_A_QUERY))
    figures = {f"{name}_p50_ms": statistics.median(times) for name, times in taken.items()}
    figures |= {f"{name}_p95_ms": percentile(times, 0.95) for name, times in taken.items()}
    figures["long_text_p50_ms"] = statistics.median(long)
    figures |= commands
    ratios: dict[str, float] = {}
    for name in FILTERS:
        ratios[f"every_row_over_words{name}"] = figures["every_row_p50_ms"] / figures[f"text{name}_p50_ms"]
        legs = figures[f"text{name}_p95_ms"] + figures[f"vector{name}_p95_ms"]
        ratios[f"both_legs_over_hybrid_p95{name}"] = legs / figures[f"hybrid{name}_p95_ms"]
    ratios["short_over_long"] = figures["text_p50_ms"] / figures["long_text_p50_ms"]
    goals = {name: 8.0 if "every_row" in name else 1 / 1.3 if "both_legs" in name else 0.1 for name in ratios}
    ratios["half_a_second_over_command"], goals["half_a_second_over_command"] = COMMAND_S / commands["command_s"], 1.0
    against = dict.fromkeys(ratios, "our own other searches, same run") | {"half_a_second_over_command": FIXED}
    report("search", figures, ratios, goals, against)


if __name__ == "__main__":
    main()
