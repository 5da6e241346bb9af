"""Markers time a change under load alike wherever it arrives: in our index, or in the table of a subscription.

Row 0 of `articles` gets a new number at an even pace, whether or not the one before it has arrived: a pause that delays
many changes delays many markers. Meanwhile the row is read at the other end, again and again. A number has arrived when
it, or a later one, is read there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg

EVERY_S = 0.025
LOOK_S = 0.002
"""Each look takes a processor from what is measured: so two milliseconds are the resolution."""
PATIENCE_S = 120.0

MARK = "INSERT INTO articles VALUES (0, 0, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body"
IN_INDEX = "SELECT content FROM cdcsync.articles_chunks WHERE id = 0"
IN_SUBSCRIPTION = "SELECT body FROM articles WHERE id = 0"


@contextmanager
def marked(source: str, target: str, statement: str) -> Iterator[list[float]]:
    """Yield a list, which is empty until the block ends: then it holds the seconds that each marker took.

    :param statement: reads row 0 in the database `target`.
    :raises TimeoutError: the last marker does not arrive.
    """
    run, ended = str(time.time_ns()), threading.Event()
    committed: list[float] = []
    arrived: list[tuple[int, float]] = []

    def write() -> None:
        with psycopg.connect(source, autocommit=True) as connection:
            due = time.perf_counter()
            while not ended.wait(max(0.0, due - time.perf_counter())):
                connection.execute(MARK, [f"marker {run} {len(committed)}"])
                committed.append(time.perf_counter())
                due += EVERY_S

    def read() -> None:
        with psycopg.connect(target, autocommit=True) as connection:
            last, deadline = -1, float("inf")
            while not (writing.done() and last == len(committed) - 1):
                row = connection.execute(statement.encode()).fetchone()
                now = time.perf_counter()
                words = row[0].split() if row else []
                if words[:2] == ["marker", run] and int(words[2]) > last:
                    last = int(words[2])
                    arrived.append((last, now))
                if writing.done():
                    deadline = min(deadline, now + PATIENCE_S)
                if now > deadline:
                    raise TimeoutError(f"marker {len(committed) - 1} does not arrive; {last} did")
                time.sleep(LOOK_S)

    taken: list[float] = []
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        reading = pool.submit(read)
        try:
            yield taken
        finally:
            ended.set()
        writing.result()
        reading.result()
    first = 0
    for last, at in arrived:
        # The reader may see a marker before its writer hears that it is committed.
        taken += [max(0.0, at - one) for one in committed[first : last + 1]]
        first = last + 1
