"""Large transactions that the server streams while they are open: in bounded memory, and with the source's result."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import OTHER_VERSIONS
from tests.support.outages import MakeSimple, make_target
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.streaming, pytest.mark.faults]

BIG_ROWS = int(os.environ.get("CDCSYNC_TEST_BIG_ROWS", "100000"))
"""Rows of the big transaction, some 600 bytes each: kept in memory, these alone would take what is allowed."""

BIG_PATIENCE_S = 100 + BIG_ROWS / 1000

MAX_GROWTH_BYTES = 100 * 1024**2

SMALLEST_WORK_MEM = {"logical_decoding_work_mem": "64kB", "wal_sender_timeout": "3s"}


@pytest.fixture
def pipeline(make_cluster: Callable[..., Cluster], make_simple: MakeSimple, tmp_path: Path) -> Pipeline:
    """A pipeline on a server that streams nearly everything, and that waits no longer than 3 s for a word."""
    cluster = make_cluster(settings=SMALLEST_WORK_MEM)
    spool = tmp_path / "spool"
    spool.mkdir()
    return make_simple(
        cluster.dsn(),
        make_target(cluster),
        source_lines=f'spool_directory = "{spool}"\nspool_bytes = 10_000_000_000',
    )


def insert(first: int, last: int, *, words: int = 20) -> str:
    """Return a statement whose changes are several times what the server keeps before it streams."""
    rows = f"generate_series({first}, {last}) AS i"
    return f"INSERT INTO articles SELECT i, 1, 'title ' || i || repeat(' word', {words}) FROM {rows}"


def streamed(pipeline: Pipeline) -> int:
    """Return how many blocks of open transactions the server has streamed; a session inside of one would not see it."""
    row = pipeline.target.execute("SELECT stream_count FROM pg_stat_replication_slots").fetchone()
    return row[0] if row else 0


def until_streamed(pipeline: Pipeline, more_than: int = 0) -> None:
    until(lambda: streamed(pipeline) > more_than, lambda: f"a streamed transaction; {pipeline.tail()}")


def spool_files(pid: int) -> int:
    """Return how many spool files a process holds open; they have no names."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += "/spool/" in os.readlink(entry)
    return found


def memory(pid: int, kind: str) -> int:
    """Return bytes of a process's resident memory: `VmRSS` now, `VmHWM` at most since it began."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def senders(pipeline: Pipeline) -> list[tuple[object, ...]]:
    return pipeline.source.execute("SELECT pid, backend_start FROM pg_stat_replication").fetchall()


@pytest.mark.proof
@pytest.mark.timeout(3 * BIG_PATIENCE_S)
def test_a_big_transaction_takes_little_memory_and_the_server_always_hears_of_the_worker(pipeline: Pipeline) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    worker = pipeline.start()
    pipeline.live()
    # What any work takes, before that of this transaction is measured.
    pipeline.source.execute(insert(1_000, 3_000))
    pipeline.in_step()
    before, connection = memory(worker.pid, "VmRSS"), senders(pipeline)

    pipeline.source.execute(
        "INSERT INTO articles SELECT i, i %% 7, 'title ' || i || repeat(md5(i::text) || ' ', 17)"
        " FROM generate_series(10001, 10000 + %s) i",
        [BIG_ROWS],
    )
    lsn = pipeline.position()
    until(lambda: pipeline.reached("articles", lsn), pipeline.tail, patience_s=BIG_PATIENCE_S)

    grown = memory(worker.pid, "VmHWM") - before
    print(f"{BIG_ROWS} rows: memory grew by {grown / 1024**2:.1f} MiB")  # shown by -rP
    assert grown <= MAX_GROWTH_BYTES
    assert senders(pipeline) == connection
    assert streamed(pipeline) > BIG_ROWS / 1000
    source = pipeline.source.execute(DIGEST.format("title", "articles")).fetchall()
    assert pipeline.target.execute(DIGEST.format("content", "cdcsync.articles_chunks")).fetchall() == source
    until(lambda: spool_files(worker.pid) == 0, "the file to be closed")


DIGEST = "SELECT count(*), sum(hashtextextended(id::text || ' ' || tenant || ' ' || rtrim({}), 0)) FROM {}"
"""What tells two tables apart that are too large to be fetched; a chunk ends without white space."""


def loads(pipeline: Pipeline) -> list[str]:
    """Return the kinds of backfills that have begun."""
    return [event["kind"] for event in pipeline.events() if event.get("event") == "backfill_started"]


def test_what_happens_inside_streamed_transactions_arrives_as_it_was_committed(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.live()
    other = psycopg.connect(pipeline.config.source.dsn, autocommit=False)
    mine = pipeline.source

    # Rolled back to savepoints, nested and released ones too; then DDL, after which rows look otherwise.
    with mine.transaction():
        mine.execute(insert(1_001, 2_000))
        mine.execute("SAVEPOINT a")
        mine.execute(insert(2_001, 3_000))
        mine.execute("SAVEPOINT b")
        mine.execute("DELETE FROM articles WHERE id < 1500")
        mine.execute("RELEASE b")
        until_streamed(pipeline)
        mine.execute("ROLLBACK TO a")
        mine.execute("UPDATE articles SET tenant = 8 WHERE id % 3 = 0")
        mine.execute("ALTER TABLE articles ADD COLUMN more text DEFAULT 'x'")
        mine.execute("ALTER TABLE articles ALTER COLUMN more TYPE varchar(500)")
        mine.execute("INSERT INTO articles SELECT i, 1, 'title ' || i, 'm' FROM generate_series(3001, 4000) AS i")
        mine.execute("UPDATE articles SET title = 'short' WHERE id % 50 = 0")
    pipeline.in_step()
    assert "resync" not in loads(pipeline), pipeline.tail()

    # A column that the index reads gets another type after a part was streamed: the table is read again.
    before = streamed(pipeline)
    with mine.transaction():
        mine.execute(insert(30_001, 31_000))
        until_streamed(pipeline, before)
        mine.execute("ALTER TABLE articles ALTER COLUMN title TYPE varchar(500)")
        mine.execute(insert(31_001, 32_000))
    until(pipeline.in_step_now, lambda: f"the table to be read again; the worker said: {pipeline.tail()}")
    pipeline.in_step()
    assert "resync" in loads(pipeline), pipeline.tail()

    # The second to begin commits first; what both wrote must be of the last to commit.
    before = streamed(pipeline)
    other.execute(insert(5_001, 6_000))
    with mine.transaction():
        mine.execute(insert(7_001, 8_000))
        mine.execute("DELETE FROM articles WHERE id = 1")
        mine.execute("UPDATE articles SET title = 'first' WHERE id BETWEEN 2 AND 9")
        until_streamed(pipeline, before + 1)
        other.execute(insert(6_001, 7_000))
    other.execute("INSERT INTO articles VALUES (1, 3, 'again')")
    other.execute("UPDATE articles SET title = 'second' WHERE id BETWEEN 2 AND 5")
    other.execute("UPDATE articles SET id = id + 100000 WHERE id BETWEEN 6 AND 8")
    other.commit()
    pipeline.in_step()

    # Rolled back as a whole, after it was streamed; and one that takes two steps to commit.
    before = streamed(pipeline)
    other.execute(insert(10_001, 12_000))
    until_streamed(pipeline, before)
    other.rollback()
    for number, end in enumerate(("COMMIT", "ROLLBACK")):
        mine.execute("BEGIN")
        mine.execute(insert(20_001 + 2_000 * number, 22_000 + 2_000 * number))
        mine.execute(f"PREPARE TRANSACTION 'p{number}'")
        mine.execute(f"{end} PREPARED 'p{number}'")
    with mine.transaction():
        mine.execute("TRUNCATE articles")
        mine.execute(insert(1, 1_500))
    pipeline.in_step()
    other.close()


def test_a_transaction_with_very_many_subtransactions_is_applied_but_for_those_rolled_back(pipeline: Pipeline) -> None:
    pipeline.start()
    pipeline.live()
    # Each round of a block that catches errors is a subtransaction; every fifth is rolled back.
    pipeline.source.execute("""
        DO $$
        BEGIN
            FOR i IN 1001..6000 LOOP
                BEGIN
                    INSERT INTO articles VALUES (i, 1, 'title ' || i);
                    IF i % 5 = 0 THEN
                        INSERT INTO articles VALUES (i, 1, 'twice');
                    END IF;
                EXCEPTION WHEN unique_violation THEN
                    UPDATE articles SET tenant = tenant + 1 WHERE id = i - 1;
                END;
            END LOOP;
        END $$
    """)
    pipeline.in_step()
    assert streamed(pipeline) > 0


@pytest.mark.proof
def test_what_was_spooled_goes_with_the_connection_and_with_the_worker(pipeline: Pipeline) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are read from /proc")
    directory = Path(pipeline.config.source.spool_directory)
    worker = pipeline.start()
    pipeline.live()
    with pipeline.source.transaction():
        pipeline.source.execute(insert(1_001, 3_000))
        until(lambda: spool_files(worker.pid) == 1, "a file of the open transaction")

        with psycopg.connect(pipeline.config.source.dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_replication")
        until(lambda: pipeline.times("streaming") > 1, "the worker to connect again")
        pipeline.source.execute(insert(3_001, 5_000))
        until(lambda: spool_files(worker.pid) == 1, "a file of what was streamed again")

        pipeline.stop(worker, signal.SIGKILL)
        assert list(directory.iterdir()) == []
        connections = pipeline.times("streaming")
        worker = pipeline.start()
        until(lambda: pipeline.times("streaming") > connections, pipeline.tail)
        pipeline.source.execute(insert(5_001, 6_000))
        until(lambda: spool_files(worker.pid) == 1, "a file of what was streamed to the next worker")
    pipeline.in_step()
    until(lambda: spool_files(worker.pid) == 0, "the file to be closed")


def test_a_transaction_too_large_for_the_spool_is_kept_by_the_source_and_the_worker_says_so(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings=SMALLEST_WORK_MEM)
    pipeline = make_simple(cluster.dsn(), make_target(cluster), source_lines="spool_bytes = 1_048_576")
    worker = pipeline.start()
    pipeline.live()
    pipeline.source.execute(insert(1_001, 5_000, words=80))

    said = pipeline.event("spool_unusable")
    assert "open transactions need more than 1,048,576 bytes of spool" in said["error"]
    assert "source.spool_bytes" in said["fix"]
    pipeline.in_step()
    row = pipeline.source.execute("SELECT spill_txns > 0 FROM pg_stat_replication_slots").fetchone()
    assert row == (True,)
    assert worker.poll() is None


def test_a_worker_without_descriptors_for_its_spool_goes_on_without_one(pipeline: Pipeline) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are read from /proc")
    worker = pipeline.start()
    pipeline.live()
    with pipeline.source.transaction():
        # What it has open it keeps, and gets no more.
        limits = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        pipeline.source.execute(insert(1_001, 3_000))
        until(lambda: "Too many open files" in pipeline.tail(), pipeline.tail)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, limits)
    pipeline.in_step()
    assert "open transactions cannot be kept on disk" in pipeline.event("spool_unusable")["error"]
    assert worker.poll() is None


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("version", [None, *OTHER_VERSIONS])
def test_columns_join_a_list_beside_a_transaction_that_is_streamed(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple, version: int | None
) -> None:
    """PostgreSQL 16.2 does not describe the table again after a commit that brought the older description."""
    if version is not None and not OTHER_VERSIONS[version].exists():
        pytest.skip(f"there is no PostgreSQL {version} here")
    cluster = make_cluster(
        settings={"logical_decoding_work_mem": "64kB"}, **({"bin_dir": OTHER_VERSIONS[version]} if version else {})
    )
    pipeline = make_simple(cluster.dsn(), database.dsn, create=False)
    source = pipeline.source
    source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, extra text, title text NOT NULL)")
    source.execute("INSERT INTO articles SELECT i, 1, 'extra', 'title ' || i FROM generate_series(1, 20) i")
    source.execute("CREATE PUBLICATION cdcsync FOR TABLE articles (id, tenant, title)")
    pipeline.start()
    pipeline.live()
    with psycopg.connect(cluster.dsn()) as writer:
        writer.execute("INSERT INTO articles SELECT i, 1, 'x', repeat('word ', 50) FROM generate_series(1000, 2000) i")
        streamed = "SELECT coalesce(sum(stream_count), 0) > 0 FROM pg_stat_replication_slots"
        until(lambda: source.execute(streamed).fetchone() == (True,), pipeline.tail)
        source.execute("ALTER PUBLICATION cdcsync SET TABLE articles (id, tenant, extra, title)")
        source.execute("INSERT INTO articles VALUES (100, 1, 'EXTRA', 'hundred')")
        writer.commit()
    source.execute("INSERT INTO articles VALUES (101, 1, 'EXTRA', 'one hundred and one')")
    pipeline.in_step()
    source.execute("UPDATE articles SET title = 'again' WHERE id = 5")
    pipeline.in_step()
