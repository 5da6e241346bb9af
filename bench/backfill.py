"""How fast is the initial load, to a built HNSW index, against the fastest way there is to put the same rows there?

The other side is COPY of the same chunks and vectors into tables without indexes, then CREATE INDEX of all that the
index has, with the same memory. It knows nothing of chunking, hashing, embedding, checkpoints or restarts, so the goal
is a part of its speed. Both run on one server, which this script starts, or on that of CDCSYNC_BENCH_DSN. Each round
has a database of its own, and the medians of the rounds count. Our side comes first in each: the other copies its rows.

Then `cdcsync verify` reads both sides, makes the documents of the rows and compares them with the chunks. Beside it
stands what the two servers take to read the same columns and to make a digest of them, which compares nothing.

    python bench/backfill.py [ROWS] [DIMENSIONS]      ROUNDS=3
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import conninfo, sql

from cdcsync.demo.cluster import Cluster

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench.report import of_goal, report
else:
    from report import of_goal, report

ROWS = 200_000
DIMENSIONS = 64
"""Enough for HNSW to work as it does, few enough that its build does not hide everything else."""
ROUNDS = int(os.environ.get("ROUNDS", "3"))
GOAL_ROUNDS = 3
GOAL = 0.9
BUILD_MEMORY = "512MB"
NOTES = {
    "load_vs_copy_and_build": "the other side copies finished rows: nobody reads a table, chunks, hashes or embeds for"
    " it. Worker and server share the processors here, so that this work delays the build of the index"
}
DIGESTS = (
    "SELECT sum(hashtextextended(id || title || body || tenant, 0)) FROM articles",
    "SELECT sum(hashtextextended(id || content || tenant || content_hash::text, 0)) FROM cdcsync.articles_chunks",
)

CONFIG = """
[source]
dsn = "{dsn}"
slot = "{name}"
publication = "{name}"
[worker]
listen = "127.0.0.1:0"
log_level = "warning"
log_format = "json"
[embedders.words]
type = "hash"
dimensions = {dimensions}
[indexes.articles]
table = "articles"
text = "{{title}}\\n\\n{{body}}"
columns = ["tenant"]
embedder = "words"
[indexes.articles.hnsw]
build_memory = "{memory}"
"""

# Each text is another one, of words as running text has them: few that are frequent, many that are rare.
SOURCE = """
CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL, body text NOT NULL);
INSERT INTO articles
SELECT i, i % 50, 'Article ' || i,
       (SELECT string_agg('w' || (20000 * power(random(), 4))::int, ' ') FROM generate_series(1, 40 + i % 20))
FROM generate_series(1, {rows}) AS i;
ANALYZE articles
"""

INDEXES = """
ALTER TABLE {chunks} ADD PRIMARY KEY (chunk_id);
ALTER TABLE {chunks} ADD UNIQUE (id, chunk_no);
CREATE INDEX ON {chunks} USING gin (search);
ALTER TABLE {vectors} ADD PRIMARY KEY (chunk_id);
CREATE INDEX ON {vectors} (content_hash);
CREATE INDEX ON {vectors} USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64)
"""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Yield the DSN of the server to measure on."""
    if dsn := os.environ.get("CDCSYNC_BENCH_DSN"):
        yield dsn
        return
    with Cluster() as cluster:
        yield cluster.dsn()


@contextlib.contextmanager
def database(dsn: str) -> Iterator[tuple[str, str]]:
    """Yield the DSN and the name of a database that goes away afterwards, with its slot."""
    name = f"cdcsync_bench_{secrets.token_hex(4)}"
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield conninfo.make_conninfo(dsn, dbname=name), name
        finally:
            admin.execute(
                "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active_pid IS NOT NULL",
                [name],
            )
            admin.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [name]
            )
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def load(connection: psycopg.Connection[Any], path: Path) -> float:
    """Return how many seconds a worker takes from its start until the index is live and nothing waits."""
    ready = (
        "SELECT coalesce((SELECT state = 'live' FROM cdcsync.indexes), false)"
        " AND NOT EXISTS (SELECT FROM cdcsync.articles_backlog)"
    )
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "cdcsync", "run", "-c", str(path)]) as worker:
        try:
            while True:
                if worker.poll() is not None:
                    raise RuntimeError(f"the worker ended with {worker.returncode}")
                with contextlib.suppress(psycopg.errors.UndefinedTable):
                    if connection.execute(ready).fetchone() == (True,):
                        return time.perf_counter() - started
                time.sleep(0.05)
        finally:
            worker.terminate()


def copy(connection: psycopg.Connection[Any], directory: Path) -> float:
    """Return how many seconds it takes to copy the same rows into bare tables and to build the same indexes."""
    columns = "chunk_id, id, tenant, chunk_no, content, content_hash, document_hash, commit_lsn, applied_at"
    parts = {"chunks": columns, "vectors": "chunk_id, content_hash, embedding"}
    tables = {"chunks": "articles_chunks", "vectors": "articles_vectors_1"}
    for part, listed in parts.items():
        statement = f"COPY (SELECT {listed} FROM cdcsync.{tables[part]}) TO STDOUT"
        with (directory / part).open("wb") as file, connection.cursor().copy(statement) as source:
            for block in source:
                file.write(block)
        connection.execute(f"CREATE TABLE public.{part} (LIKE cdcsync.{tables[part]} INCLUDING GENERATED)")
    # Vectors in a bare table have no tiers, and no time of their own.
    connection.execute("ALTER TABLE public.vectors DROP COLUMN tier, DROP COLUMN stored_at")
    connection.execute("CHECKPOINT")
    started = time.perf_counter()
    for part, listed in parts.items():
        with (
            (directory / part).open("rb") as file,
            connection.cursor().copy(f"COPY public.{part} ({listed}) FROM STDIN") as target,
        ):
            while block := file.read(1 << 18):
                target.write(block)
    connection.execute(f"SET maintenance_work_mem = '{BUILD_MEMORY}'")
    for statement in INDEXES.format(chunks="public.chunks", vectors="public.vectors").split(";"):
        connection.execute(statement)
    connection.execute("ANALYZE public.chunks; ANALYZE public.vectors")
    return time.perf_counter() - started


def verify(path: Path) -> float:
    """Return how many seconds a comparison of the whole index takes, by its own clock: a program's start aside."""
    done = subprocess.run(
        [sys.executable, "-m", "cdcsync", "verify", "articles", "--json", "-c", str(path)],
        check=True,
        stdout=subprocess.PIPE,
    )
    return float(json.loads(done.stdout)["seconds"])


def digest(connection: psycopg.Connection[Any]) -> float:
    """Return how many seconds the servers take to read both sides, one after the other."""
    started = time.perf_counter()
    for statement in DIGESTS:
        connection.execute(statement.encode()).fetchone()
    return time.perf_counter() - started


def once(dsn: str, rows: int, dimensions: int) -> dict[str, float]:
    """Return the seconds of both sides and of a comparison, and the number of chunks."""
    with (
        database(dsn) as (ours, name),
        tempfile.TemporaryDirectory() as made,
        psycopg.connect(ours, autocommit=True) as connection,
    ):
        directory = Path(made)
        path = directory / "cdcsync.toml"
        path.write_text(CONFIG.format(dsn=ours, name=name, dimensions=dimensions, memory=BUILD_MEMORY))
        connection.execute(SOURCE.format(rows=rows))
        connection.execute("CHECKPOINT")
        load_s = load(connection, path)
        verify_s, digest_s = verify(path), digest(connection)
        copy_s = copy(connection, directory)
        counted = connection.execute("SELECT count(*) FROM cdcsync.articles_chunks").fetchone()
        assert counted is not None
        return {
            "chunks": counted[0],
            "load_s": load_s,
            "copy_and_build_s": copy_s,
            "verify_s": verify_s,
            "digest_s": digest_s,
        }


def main() -> None:
    """Measure and report."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    dimensions = int(sys.argv[2]) if len(sys.argv) > 2 else DIMENSIONS
    with server() as dsn:
        rounds = [once(dsn, rows, dimensions) for _ in range(ROUNDS)]
    figures = {"rows": float(rows), **{name: statistics.median(one[name] for one in rounds) for name in rounds[0]}}
    for name in ("load", "copy_and_build", "verify", "digest"):
        figures[f"{name}_rows_per_s"] = rows / figures[f"{name}_s"]
    report(
        "backfill",
        figures,
        {"load_vs_copy_and_build": statistics.median(one["copy_and_build_s"] / one["load_s"] for one in rounds)},
        {"load_vs_copy_and_build": GOAL},
        "COPY and CREATE INDEX, same run",
        {"load_vs_copy_and_build": of_goal(ROUNDS, GOAL_ROUNDS, "rounds")},
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
