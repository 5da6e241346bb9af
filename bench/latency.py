"""How long after a commit is a change there, under load, and against PostgreSQL's own logical replication?

- light: rows change one at a time, each after the one before it was found. Ours is timed until a query of the view
  finds the new text with its own vector; native replication until a query of the subscriber's table finds the new text.
  Both look every half millisecond; a round of one side follows a round of the other. What the worker and the backend
  that writes for it take of a processor for a change is measured with it: one waits for the other.
- load: for some seconds so many single-row transactions a second change the text of 20,000 rows, and forty markers a
  second come on top. Both sides are timed by the same markers (`_markers.py`): read in the index's table of chunks, and
  in the subscriber's table. The figures are the medians of three rounds, and who begins alternates. What the worker's
  own histograms say is named `by_metric`: upper bounds of their buckets. The share of a processor is that of the worker
  and of the backend that writes for it; of the apply worker on the other side.

    python bench/latency.py [light] [load]      SECONDS=15 ROUNDS=3 RATES=100,500,1000,2000
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import conninfo

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._markers import IN_INDEX, IN_SUBSCRIPTION, marked
    from bench._pipeline import Pipeline, bucket, percentile, pipeline, processor_ms
    from bench.report import FIXED, of_goal, report
else:
    from _markers import IN_INDEX, IN_SUBSCRIPTION, marked
    from _pipeline import Pipeline, bucket, percentile, pipeline, processor_ms
    from report import FIXED, of_goal, report

EMBEDDER = 'type = "hash"\ndimensions = 256'
ROWS = 20_000
CHANGES, WARM_UP = 100, 20
ROUNDS = int(os.environ.get("ROUNDS", "3"))
GOAL_SECONDS, GOAL_ROUNDS = 15, 3
SECONDS = float(os.environ.get("SECONDS", str(GOAL_SECONDS)))
RATES = [int(rate) for rate in os.environ.get("RATES", "100,500,1000,2000").split(",")]
LOOK_S = 0.0005

SENTENCE = "Change number {} says something new about replication slots, vectors and how fresh a search can be."

P50_MORE_MS, P99_MORE_MS = 6.0, 15.0
"""What documents, hashes and a vector may take more than a row."""
NOTES = {
    "light": "a change is two look-ups and a transaction of five messages to the target, each answered before the next"
    " is sent. All that the worker does in that time takes `light_worker_processor_ms` of a processor a change, and its"
    " backend `light_backend_processor_ms`",
    "at": "worker, backend, writer, reader and the source's own processes share this machine's processors, of which the"
    " first two take `processors`",
}
TEXT_P99_S = {100: 0.05, 500: 0.05, 1000: 0.1, 2000: 0.25}


def subscribe(made: Pipeline) -> psycopg.Connection[Any]:
    """Have a table in another database of the same server follow the articles."""
    made.connection.execute("CREATE DATABASE peer")
    made.connection.execute("CREATE PUBLICATION peer FOR TABLE articles")
    made.connection.execute("SELECT pg_create_logical_replication_slot('peer', 'pgoutput')")
    peer = psycopg.connect(conninfo.make_conninfo(made.dsn, dbname="peer"), autocommit=True)
    peer.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int NOT NULL, body text NOT NULL)")
    with (
        made.connection.cursor().copy("COPY articles (id, tenant, body) TO STDOUT") as source,
        peer.cursor().copy("COPY articles (id, tenant, body) FROM STDIN") as target,
    ):
        for block in source:
            target.write(block)
    subscription = (
        f"CREATE SUBSCRIPTION peer CONNECTION '{made.dsn}' PUBLICATION peer"
        " WITH (slot_name = 'peer', create_slot = false, copy_data = false, enabled = false)"
    )
    peer.execute(subscription.encode())
    return peer


def enable(peer: psycopg.Connection[Any], *, on: bool) -> None:
    """Start or stop the subscription, and wait until it is so."""
    peer.execute(b"ALTER SUBSCRIPTION peer " + (b"ENABLE" if on else b"DISABLE"))
    running = "SELECT FROM pg_stat_subscription WHERE pid IS NOT NULL"
    until(lambda: (peer.execute(running.encode()).fetchone() is not None) == on)


def until(there: Callable[[], bool]) -> None:
    """Return once it is there."""
    deadline = time.perf_counter() + 60
    while not there():
        if time.perf_counter() > deadline:
            raise SystemExit("nothing came for a minute")
        time.sleep(LOOK_S)


def found(reader: psycopg.Connection[Any], statement: str, *arguments: object) -> bool:
    """Say whether a statement has a row."""
    return reader.execute(statement.encode(), arguments).fetchone() is not None


def one_by_one(made: Pipeline, reader: psycopg.Connection[Any], statement: str, first: int) -> list[float]:
    """Change rows one at a time; return the milliseconds that each took to be found."""
    taken = []
    for number in range(first, first + CHANGES + WARM_UP):
        key, body = number % ROWS + 1, SENTENCE.format(number)
        made.connection.execute("UPDATE articles SET body = %s WHERE id = %s", [body, key])
        committed = time.perf_counter()
        until(partial(found, reader, statement, key, body))
        taken.append((time.perf_counter() - committed) * 1000)
    return taken[WARM_UP:]


def light(made: Pipeline, peer: psycopg.Connection[Any]) -> dict[str, float]:
    """Return the percentiles of both sides under light load, and what of a processor ours takes for a change."""
    taken: dict[str, list[float]] = {"native": [], "ours": []}
    used: dict[str, list[float]] = {"worker": [], "backend": []}
    first = 0
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        for _ in range(ROUNDS):
            enable(peer, on=True)
            taken["native"] += one_by_one(made, peer, "SELECT FROM articles WHERE id = %s AND body = %s", first)
            enable(peer, on=False)
            first += CHANGES + WARM_UP
            made.start()
            made.event("streaming")
            made.text_in_step()
            made.vectors_in_step()
            statement = "SELECT FROM articles_index WHERE id = %s AND content = %s AND NOT stale"
            pids = {"worker": made.pid, "backend": made.backend()}
            before = {name: processor_ms(pid) for name, pid in pids.items()}
            taken["ours"] += one_by_one(made, reader, statement, first)
            for name, pid in pids.items():
                used[name].append((processor_ms(pid) - before[name]) / (CHANGES + WARM_UP))
            made.stop()
            first += CHANGES + WARM_UP
    percentiles = {
        f"light_{side}_{name}_ms": percentile(one, share)
        for side, one in taken.items()
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return percentiles | {f"light_{name}_processor_ms": statistics.median(of) for name, of in used.items()}


def changing(dsn: str, per_s: int) -> int:
    """Change single rows at a rate for some seconds; return how many were changed."""
    began, number = time.perf_counter(), 0
    with psycopg.connect(dsn, autocommit=True) as writer:
        while (now := time.perf_counter() - began) < SECONDS:
            if now < number / per_s:
                time.sleep(number / per_s - now)
            body = f"{SENTENCE.format(number)} {began}"
            writer.execute("UPDATE articles SET body = %s WHERE id = %s", [body, number * 7 % ROWS + 2])
            number += 1
    return number


def load_native(made: Pipeline, peer: psycopg.Connection[Any], per_s: int) -> dict[str, float]:
    """Return how late native replication is under load, and its share of a processor."""
    enable(peer, on=True)
    row = peer.execute("SELECT pid FROM pg_stat_subscription WHERE pid IS NOT NULL").fetchone()
    assert row is not None
    with marked(made.dsn, peer.info.dsn, IN_SUBSCRIPTION) as late:
        used = processor_ms(row[0])
        done = changing(made.dsn, per_s)
        used = processor_ms(row[0]) - used
    enable(peer, on=False)
    return {
        "native_changes_per_s": done / SECONDS,
        "native_p50_s": statistics.median(late),
        "native_p99_s": percentile(late, 0.99),
        "native_processors": used / 1000 / SECONDS,
    }


def load_ours(made: Pipeline, per_s: int) -> dict[str, float]:
    """Return how late text and vectors are under load, and the share of a processor."""
    made.start()
    made.event("streaming")
    made.text_in_step()
    made.vectors_in_step()
    pids = (made.pid, made.backend())
    before = made.metrics()
    with marked(made.dsn, made.dsn, IN_INDEX) as late:
        used = sum(map(processor_ms, pids))
        done = changing(made.dsn, per_s)
        used = sum(map(processor_ms, pids)) - used
    after = made.metrics()
    made.text_in_step()
    made.vectors_in_step()
    made.stop()
    return {
        "changes_per_s": done / SECONDS,
        "text_p50_s": statistics.median(late),
        "text_p99_s": percentile(late, 0.99),
        "text_p99_by_metric_s": bucket(before, after, "text_freshness_seconds", 0.99),
        "vectors_p99_by_metric_s": bucket(before, after, "vector_freshness_seconds", 0.99),
        "processors": used / 1000 / SECONDS,
    }


def load(made: Pipeline, peer: psycopg.Connection[Any], per_s: int) -> dict[str, float]:
    """Return the medians of the rounds for both sides; who begins alternates."""
    taken: dict[str, list[float]] = {}
    for round_ in range(ROUNDS):
        sides = [partial(load_native, made, peer, per_s), partial(load_ours, made, per_s)]
        for side in sides if round_ % 2 else reversed(sides):
            for name, value in side().items():
                taken.setdefault(name, []).append(value)
    return {name: statistics.median(of) for name, of in taken.items()}


def main() -> None:
    """Measure and report."""
    parts = set(sys.argv[1:]) or {"light", "load"}
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios, goals, against, smaller = {}, {}, {}, {}
    with pipeline(EMBEDDER, shared_buffers="256MB") as made:
        made.load(ROWS)
        made.stop()
        peer = subscribe(made)
        if "light" in parts:
            figures |= light(made, peer)
            for name, more in (("p50", P50_MORE_MS), ("p99", P99_MORE_MS)):
                ratio = f"light_native_and_{more:g}_ms_over_{name}"
                ratios[ratio] = (figures[f"light_native_{name}_ms"] + more) / figures[f"light_ours_{name}_ms"]
                goals[ratio], against[ratio] = 1.0, f"native replication + {more:g} ms, same run"
                smaller[ratio] = of_goal(ROUNDS, GOAL_ROUNDS, "rounds")
        for per_s in RATES if "load" in parts else ():
            measured = load(made, peer, per_s)
            figures |= {f"at_{per_s}_{name}": value for name, value in measured.items()}
            if per_s in TEXT_P99_S:
                ratio = f"at_{per_s}_goal_over_text_p99"
                ratios[ratio] = TEXT_P99_S[per_s] / measured["text_p99_s"]
                goals[ratio], against[ratio] = 1.0, FIXED
                seconds = of_goal(int(SECONDS), GOAL_SECONDS, "seconds a round")
                smaller[ratio] = seconds or of_goal(ROUNDS, GOAL_ROUNDS, "rounds")
        peer.close()
    figures["load_at_end"] = os.getloadavg()[0]
    report("latency", figures, ratios, goals, against, smaller, notes=NOTES)


if __name__ == "__main__":
    main()
