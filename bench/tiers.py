"""What do two tiers of vectors gain over one, and what do they cost?

The same work is done twice on one machine: with the tiers as they are, and with one table that has the HNSW index and
takes every change, as before there were tiers. That table is made of the fresh tier: it gets all vectors and an HNSW
index, and nothing settles. Searches of one tier are searches of the settled table alone: a plain table with HNSW.

- catch-up: 20,000 rows are indexed and change while the worker is stopped. The clock runs from the moment at which it
  streams until every vector is there. The provider takes 20 ms a request.
- steady: 1,000 text changes a second, in a table of which each row changes every 20 seconds. That is more than the
  graph takes: some vectors settle, and most change before their turn. By default none would rest for long enough
  (30 s), so `settle_after_s` is 5. The p99 of text is that of markers (`_markers.py`), forty a second; the p99 of
  vectors is the upper bound of the worker's histogram's bucket.
- hot: one row of 5,000 changes 1,000 times, without VACUUM; how much of what is nearest to it do searches find?
- search: the median of searches with nothing fresh and with 5,000 fresh vectors, in turns: by the search function,
  through the view, and among the vectors alone. Each search has a vector of its own, and the server has the memory for
  all of them. What a backend takes of a processor is reported too: on a busy machine that says more than the clock.

- upgrade: an index of the layout before there were tiers is searched without a pause by two sessions and takes changes
  while a worker divides it. How long does that take, and how long does the longest search, before it and meanwhile?

Arguments choose parts: `python bench/tiers.py catch_up hot`. Without any, all are done.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._markers import IN_INDEX, marked
    from bench._pipeline import Pipeline, bucket, percentile, pipeline, processor_ms
    from bench.report import FIXED, report
else:
    from _markers import IN_INDEX, marked
    from _pipeline import Pipeline, bucket, percentile, pipeline, processor_ms
    from report import FIXED, report

CATCH_UP_ROWS = 20_000
STEADY_ROWS = 20_000
STEADY_PER_S = 1_000
STEADY_S = int(os.environ.get("STEADY_S", "60"))
SETTLE_AFTER_S = 5
"""A quarter of the time after which a row of the steady load changes again."""
GOAL_SETTLED = 0.01
"""Of the changes: enough to show that settling goes on beside the stream, which has precedence."""
STEADY_ONE_TIER_S = 20
"""One tier cannot keep up: that shows soon."""
HOT_ROWS, HOT_CHANGES, HOT_QUERIES = 5_000, 1_000, 20
SEARCH_ROWS = int(os.environ.get("SEARCH_ROWS", "100000"))
UPGRADE_ROWS = int(os.environ.get("UPGRADE_ROWS", "50000"))
UPGRADE_BEFORE_S = 5
FRESH_ROWS, SEARCHES, SEARCH_ROUNDS, DIMENSIONS = 5_000, 50, 3, 384

PROVIDER = 'type = "hash"\ndimensions = 384\nlatency_ms = 20'
QUICK = 'type = "hash"\ndimensions = 384'
BODY = "'article ' || i || ' of round 0 tells of word' || i % 500 || ' and word' || i % 37 || ' and word' || i % 11"

ONE_TIER = """
DROP INDEX cdcsync.articles_vectors_1_hnsw;
INSERT INTO cdcsync.articles_vectors_1_fresh (chunk_id, content_hash, embedding)
    SELECT chunk_id, content_hash, embedding FROM cdcsync.articles_vectors_1_settled;
TRUNCATE cdcsync.articles_vectors_1_settled;
CREATE INDEX one_tier_hnsw ON cdcsync.articles_vectors_1_fresh USING hnsw (embedding vector_cosine_ops);
ANALYZE cdcsync.articles_vectors_1_fresh;
"""


def indexed(made: Pipeline, rows: int, *, tiers: bool, settings: str = "") -> None:
    """Index a table of so many rows, in one tier or in two, and leave the worker stopped."""
    made.connection.execute(
        f"INSERT INTO articles SELECT i, i % 50, {BODY} FROM generate_series(1, {rows}) AS i".encode()
    )
    made.start()
    made.live()
    made.text_in_step()
    made.vectors_in_step()
    made.stop()
    if not tiers:
        made.connection.execute(ONE_TIER.encode())
        settings += "\nsettle_connections = 0"
    made.configure("[worker]", f"[worker]\n{settings}")


def catch_up(*, tiers: bool) -> dict[str, float]:
    """Return how long vectors and settling take after every row has changed."""
    with pipeline(PROVIDER) as made:
        indexed(made, CATCH_UP_ROWS, tiers=tiers)
        for first in range(1, CATCH_UP_ROWS, 10):
            made.connection.execute(
                "UPDATE articles SET body = body || ' again' WHERE id BETWEEN %s AND %s", [first, first + 9]
            )
        made.start()
        made.event("streaming")
        began = time.perf_counter()
        made.text_in_step()
        text_s = time.perf_counter() - began
        made.vectors_in_step()
        vectors_s = time.perf_counter() - began
        stale = made.value("SELECT count(*) FROM articles_index WHERE stale OR content NOT LIKE '%again'")
        if stale:
            raise SystemExit(f"{stale} rows are not in step")
        made.stop()
    return {"text_s": text_s, "vectors_s": vectors_s}


def steady(*, tiers: bool) -> dict[str, float]:
    """Return freshness and backlog under a steady load."""
    seconds = STEADY_S if tiers else STEADY_ONE_TIER_S
    with pipeline(QUICK) as made:
        indexed(made, STEADY_ROWS, tiers=tiers, settings=f"settle_after_s = {SETTLE_AFTER_S}")
        made.start()
        made.event("streaming")
        made.text_in_step()
        before = made.metrics()
        began, number, backlogs, late = time.perf_counter(), 0, [], 0.0
        with (
            marked(made.dsn, made.dsn, IN_INDEX) as text_s,
            psycopg.connect(made.dsn, autocommit=True) as writer,
        ):
            while (now := time.perf_counter() - began) < seconds:
                due = number * 10 / STEADY_PER_S
                if now < due:
                    time.sleep(due - now)
                late = max(late, now - due)
                first = (number * 10) % STEADY_ROWS
                writer.execute(
                    "UPDATE articles SET body = 'change ' || %s || ' of article ' || id WHERE id > %s AND id <= %s",
                    [number, first, first + 10],
                )
                number += 1
                if number % 100 == 0:
                    backlogs.append(float(made.value("SELECT count(*) FROM cdcsync.articles_backlog")))
        after = made.metrics()
        fresh = float(made.value("SELECT count(*) FROM cdcsync.articles_vectors_1_fresh"))
        made.stop()
    settled = 'cdcsync_vectors_settled_total{index="articles"}'
    half = len(backlogs) // 2
    return {
        "text_p99_s": percentile(text_s, 0.99),
        "text_p99_by_metric_s": bucket(before, after, "text_freshness_seconds", 0.99),
        "vectors_p99_s": bucket(before, after, "vector_freshness_seconds", 0.99),
        "backlog_first_half": statistics.mean(backlogs[:half]),
        "backlog_second_half": statistics.mean(backlogs[half:]),
        "changes_per_s": number * 10 / seconds,
        "fresh_at_end": fresh,
        "settled_per_s": (after.get(settled, 0.0) - before.get(settled, 0.0)) / seconds,
    }


def hot(*, tiers: bool) -> float:
    """Return the recall of searches near a row that changed many times."""
    with pipeline(QUICK) as made:
        indexed(made, HOT_ROWS, tiers=tiers)
        for tier in ("fresh", "settled"):
            made.connection.execute(
                f"ALTER TABLE cdcsync.articles_vectors_1_{tier} SET (autovacuum_enabled = off)".encode()
            )
        made.start()
        made.event("streaming")
        for number in range(HOT_CHANGES):
            made.connection.execute(
                "UPDATE articles SET body = 'article 7 of round ' || %s || ' tells of word7 and word7 and word7'"
                " WHERE id = 7",
                [number],
            )
            if number % 10 == 0:
                made.text_in_step()
        made.text_in_step()
        made.vectors_in_step()
        made.stop()
        made.connection.execute("ANALYZE")
        near = [7, *range(507, HOT_ROWS, max(1, HOT_ROWS // HOT_QUERIES // 500 * 500 or 500))][:HOT_QUERIES]
        return statistics.mean(recall(made, key) for key in near)


def recall(made: Pipeline, key: int) -> float:
    """Return how much of the ten nearest to a row a search through the view finds, by distance."""
    vector = made.value("SELECT embedding::text FROM articles_index WHERE id = %s LIMIT 1", key)
    statement = "SELECT embedding <=> %s::vector FROM articles_index ORDER BY embedding <=> %s::vector LIMIT 10"
    with made.connection.transaction():
        found = [row[0] for row in made.connection.execute(statement, [vector, vector]).fetchall()]
        made.connection.execute("SET LOCAL enable_indexscan = off")
        exact = [row[0] for row in made.connection.execute(statement, [vector, vector]).fetchall()]
    near = sum(one <= exact[-1] + 1e-9 for one in found)
    return float(near / len(exact))


VECTOR = (
    f"(SELECT array_agg(random() - 0.5 + (g + i) * 0)::vector({DIMENSIONS}) FROM generate_series(1, {DIMENSIONS}) AS g)"
)


SEARCHED = {
    "one": "SELECT c.id FROM cdcsync.articles_chunks AS c JOIN cdcsync.articles_vectors_1_settled AS v USING (chunk_id)"
    " ORDER BY v.embedding <=> %s::vector LIMIT 10",
    "function": "SELECT id FROM cdcsync.articles_search(NULL, embedding => %s::vector, mode => 'vector')",
    "view": "SELECT id FROM articles_index ORDER BY embedding <=> %s::vector LIMIT 10",
    "leg": "SELECT chunk_id FROM cdcsync.articles_vectors_1 ORDER BY embedding <=> %s::vector LIMIT 10",
    "compared": "SELECT sum(embedding <=> %s::vector) FROM cdcsync.articles_vectors_1_fresh",
}
"""`one` is the layout that has no tiers; `compared` reads and compares the fresh vectors, and orders nothing: the least
that finding them exactly can take."""


def search() -> dict[str, float]:
    """Return the medians of searches with and without fresh vectors, in milliseconds."""
    with pipeline(QUICK, shared_buffers="1GB") as made:
        indexed(made, 10, tiers=True)
        run = made.connection.execute
        run("DROP INDEX cdcsync.articles_vectors_1_hnsw; TRUNCATE cdcsync.articles_chunks, cdcsync.articles_vectors_1")
        for tier, first, count in (("settled", 1, SEARCH_ROWS), ("fresh", SEARCH_ROWS + 1, FRESH_ROWS)):
            run(
                f"WITH c AS (INSERT INTO cdcsync.articles_chunks"
                f" (id, tenant, chunk_no, chunk_total, content, content_hash, document_hash, commit_lsn)"
                f" SELECT i, i % 50, 0, 1, 'text', int8send(i), int8send(i), '0/1'"
                f" FROM generate_series({first}, {first + count - 1}) AS i RETURNING chunk_id, id)"
                f" INSERT INTO cdcsync.articles_vectors_1_{tier} (chunk_id, content_hash, embedding)"
                f" SELECT chunk_id, int8send(id), {VECTOR.replace('g + i', 'g + c.id')} FROM c".encode()
            )
        run("SET maintenance_work_mem = '1GB'")
        run(
            "CREATE INDEX articles_vectors_1_hnsw ON cdcsync.articles_vectors_1_settled"
            " USING hnsw (embedding vector_cosine_ops)"
        )
        run("CREATE TABLE aside AS SELECT * FROM cdcsync.articles_vectors_1_fresh")
        run("VACUUM ANALYZE")
        many = f"SELECT {VECTOR}::text FROM generate_series(1, {SEARCHES * len(SEARCHED)}) AS i"
        vectors = [row[0] for row in run(many.encode())]
        taken: dict[str, list[float]] = {}
        searches(made, vectors, "", {})  # what they read is in memory from here on
        for _ in range(SEARCH_ROUNDS):
            run("TRUNCATE cdcsync.articles_vectors_1_fresh")
            searches(made, vectors, "none", taken)
            run("INSERT INTO cdcsync.articles_vectors_1_fresh SELECT * FROM aside")
            run("VACUUM ANALYZE cdcsync.articles_vectors_1_fresh")
            searches(made, vectors, "fresh", taken)
    return {name: statistics.median(one) for name, one in taken.items()}


def searches(made: Pipeline, vectors: list[str], state: str, taken: dict[str, list[float]]) -> None:
    """Add the milliseconds of each search to `taken`; the statements take turns."""
    pid = made.connection.info.backend_pid
    for at, vector in enumerate(vectors):
        name = list(SEARCHED)[(at + at // len(SEARCHED)) % len(SEARCHED)]
        used, began = processor_ms(pid), time.perf_counter()
        made.connection.execute(SEARCHED[name].encode(), [vector]).fetchall()
        elapsed, used = (time.perf_counter() - began) * 1000, processor_ms(pid) - used
        taken.setdefault(f"{name}_{state}_ms", []).append(elapsed)
        taken.setdefault(f"{name}_{state}_processor_ms", []).append(used)


EARLIER = """
DROP VIEW articles_index;
DROP TABLE cdcsync.articles_vectors_1;
CREATE TABLE cdcsync.articles_vectors_1 (
    chunk_id bigint PRIMARY KEY, content_hash bytea NOT NULL, embedding vector({dimensions}) NOT NULL);
CREATE INDEX articles_vectors_1_hash ON cdcsync.articles_vectors_1 (content_hash);
COMMENT ON TABLE cdcsync.articles_vectors_1 IS 'cdcsync index articles: vectors';
CREATE VIEW articles_index AS SELECT c.id, c.tenant, c.chunk_no, c.content, c.search, v.embedding,
    v.content_hash <> c.content_hash AS stale
    FROM cdcsync.articles_chunks AS c JOIN cdcsync.articles_vectors_1 AS v USING (chunk_id);
COMMENT ON VIEW articles_index IS 'cdcsync index articles: public.articles with its vectors';
INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, {vector} FROM cdcsync.articles_chunks AS c;
SET maintenance_work_mem = '1GB';
CREATE INDEX articles_vectors_1_hnsw ON cdcsync.articles_vectors_1 USING hnsw (embedding vector_cosine_ops);
ANALYZE cdcsync.articles_vectors_1
"""


def upgrade() -> dict[str, float]:
    """Return how long an upgrade takes, and the longest searches and writes before it and meanwhile."""
    with pipeline(QUICK, shared_buffers="1GB", max_wal_size="8GB") as made:
        indexed(made, UPGRADE_ROWS, tiers=True)
        made.connection.execute(
            EARLIER.format(dimensions=DIMENSIONS, vector=VECTOR.replace("g + i", "g + c.id")).encode()
        )
        made.connection.execute("CHECKPOINT")
        ended = threading.Event()
        longest: dict[str, float] = {"search": 0.0, "write": 0.0}
        counts = {"search": 0, "write": 0}

        def search_on() -> None:
            with psycopg.connect(made.dsn, autocommit=True) as connection:
                vector = connection.execute(f"SELECT {VECTOR.replace('+ i', '+ 1')}::text".encode()).fetchone()
                assert vector is not None
                while not ended.is_set():
                    began = time.perf_counter()
                    found = connection.execute(SEARCHED["view"].encode(), [vector[0]]).fetchall()
                    longest["search"] = max(longest["search"], time.perf_counter() - began)
                    counts["search"] += 1
                    if len(found) != 10:
                        raise SystemExit(f"a search found {len(found)} rows")

        def write_on() -> None:
            with psycopg.connect(made.dsn, autocommit=True) as connection:
                while not ended.wait(0.01):
                    began = time.perf_counter()
                    statement = "UPDATE articles SET body = body || '.' WHERE id = %s"
                    connection.execute(statement, [counts["write"] % UPGRADE_ROWS + 1])
                    longest["write"] = max(longest["write"], time.perf_counter() - began)
                    counts["write"] += 1

        threads = [threading.Thread(target=each) for each in (search_on, search_on, write_on)]
        for thread in threads:
            thread.start()
        time.sleep(UPGRADE_BEFORE_S)
        before = dict(longest)
        longest.update(search=0.0, write=0.0)
        made.start()
        began = made.event("tiers_begin")["timestamp"]
        ready = made.event("tiers_ready")["timestamp"]
        made.event("streaming")
        meanwhile = dict(longest)
        made.text_in_step()
        ended.set()
        for thread in threads:
            thread.join()
        made.text_in_step()
        made.vectors_in_step()
        stale = made.value(
            "SELECT count(*) FROM articles_index AS i JOIN articles AS a USING (id) WHERE content <> body"
        )
        if stale:
            raise SystemExit(f"{stale} rows are not in step")
        made.stop()
    seconds = (datetime.fromisoformat(ready) - datetime.fromisoformat(began)).total_seconds()
    return {
        "rows": UPGRADE_ROWS,
        "s": seconds,
        "longest_search_before_ms": before["search"] * 1000,
        "longest_search_meanwhile_ms": meanwhile["search"] * 1000,
        "longest_write_before_ms": before["write"] * 1000,
        "longest_write_meanwhile_ms": meanwhile["write"] * 1000,
        "searches": counts["search"],
        "writes": counts["write"],
    }


NOTES = {
    "search_one_tier": "the other side reads one table; ours looks into both tiers, although nothing is fresh",
    "search_function_none_over": "5,000 fresh vectors are compared one by one: `search_compared_fresh_ms` is the least"
    " that finding them exactly can take",
    "search_view_none_over": "the same comparisons, beside less other work than the search function has",
    "search_leg_none_over": "the same comparisons, beside no other work at all",
}
AGAINST = {
    "catch": "our own in one tier, same run",
    "steady": "our own changes, same run",
    "hot": "an exact search, same run",
    "search": "our own other searches, same run",
    "upgrade": "our own before it, same run",
}
"""By the part that a ratio belongs to."""


def main() -> None:
    """Measure and report."""
    parts = set(sys.argv[1:]) or {"catch_up", "steady", "hot", "search", "upgrade"}
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios: dict[str, tuple[float, float]] = {}

    def add(part: str, found: dict[str, Any]) -> None:
        figures.update({f"{part}_{name}": value for name, value in found.items()})

    if "catch_up" in parts:
        two, one = catch_up(tiers=True), catch_up(tiers=False)
        add("catch_up", two)
        add("catch_up_one_tier", one)
        ratios["catch_up_over_one_tier"] = (one["vectors_s"] / two["vectors_s"], 4.0)
    if "steady" in parts:
        two, one = steady(tiers=True), steady(tiers=False)
        add("steady", two)
        add("steady_one_tier", one)
        ratios["steady_goal_over_text_p99"] = (0.1 / two["text_p99_s"], 1.0)
        ratios["steady_goal_over_vectors_p99"] = (0.25 / two["vectors_p99_s"], 1.0)
        # A tenth of a second's changes are always under way.
        growth = (two["backlog_second_half"] + STEADY_PER_S / 10) / (two["backlog_first_half"] + STEADY_PER_S / 10)
        ratios["steady_settled_over_changed"] = (two["settled_per_s"] / two["changes_per_s"], GOAL_SETTLED)
        ratios["steady_backlog_flat"] = (1.5 / growth, 1.0)
    if "hot" in parts:
        found = {"recall": hot(tiers=True), "one_tier_recall": hot(tiers=False)}
        add("hot", found)
        ratios["hot_recall"] = (found["recall"], 0.99)
    if "search" in parts:
        found = search()
        add("search", found)
        for kind in ("_ms", "_processor_ms"):
            by = kind.removesuffix("_ms")
            ratios[f"search_one_tier_over_none_fresh{by}"] = (
                found[f"one_none{kind}"] / found[f"view_none{kind}"],
                0.95,
            )
            for way in ("function", "view", "leg"):
                ratio = found[f"{way}_none{kind}"] / found[f"{way}_fresh{kind}"]
                ratios[f"search_{way}_none_over_5000_fresh{by}"] = (ratio, 1 / 1.5)
    if "upgrade" in parts:
        found = upgrade()
        add("upgrade", found)
        # A search may have to wait for the exchange of names, for which half a second is allowed.
        longest = found["longest_search_before_ms"] + 500
        ratios["upgrade_before_and_500_ms_over_longest_search"] = (longest / found["longest_search_meanwhile_ms"], 1.0)
    figures["load_at_end"] = os.getloadavg()[0]
    report(
        "tiers",
        figures,
        {name: ratio for name, (ratio, _) in ratios.items()},
        {n: goal for n, (_, goal) in ratios.items()},
        {name: AGAINST[name.partition("_")[0]] if "goal" not in name else FIXED for name in ratios},
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
