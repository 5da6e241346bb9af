"""The backfill's one promise: whatever is written while it reads, the index equals the source at the end.

Several writers insert, update, delete, move keys and truncate at random, some in transactions that stay open across
many pages, in two servers that sort text differently; and with commits that are delivered before they are visible.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.target.requests.queue import Queue
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.timeout(300)]

TABLE = 'CREATE TABLE notes (id text COLLATE "C" PRIMARY KEY, tenant int, body text NOT NULL)'
"""The source sorts by bytes; the target by its database's own collation, which puts `a` before `B`."""

ROWS = 300
LETTERS = "aAbBzZ_ -é"


def key(chance: random.Random) -> str:
    return "".join(chance.choice(LETTERS) for _ in range(2)) + str(chance.randint(0, 9))


def change(connection: psycopg.Connection, chance: random.Random, *, truncates: bool) -> None:
    """Make one random change."""
    match chance.randint(0, 7):
        case 0 | 1:
            connection.execute(
                "INSERT INTO notes VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                [key(chance), chance.randint(0, 9), f"body {chance.random()}"],
            )
        case 2:
            connection.execute("UPDATE notes SET tenant = tenant + 1 WHERE id = %s", [key(chance)])
        case 3:
            connection.execute(
                "UPDATE notes SET body = %s WHERE id LIKE %s", [f"body {chance.random()}", key(chance)[:2] + "%"]
            )
        case 4:
            connection.execute("DELETE FROM notes WHERE id = %s", [key(chance)])
        case 5 | 6:
            old, new = key(chance), key(chance)
            connection.execute(
                "UPDATE notes SET id = %s WHERE id = %s AND NOT EXISTS (SELECT FROM notes WHERE id = %s)",
                [new, old, new],
            )
        case 7 if truncates and chance.random() < 0.03:
            connection.execute("TRUNCATE notes")


def write(
    dsn: str, seed: int, stop: threading.Event, *, changes: int, truncates: bool, errors: list[Exception]
) -> None:
    """Write transactions of up to so many changes until told to stop; some are rolled back, some conflict."""
    chance = random.Random(seed)
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '2s'; SET deadlock_timeout = '100ms'")
            while not stop.is_set():
                with (
                    contextlib.suppress(psycopg.OperationalError, psycopg.errors.UniqueViolation),
                    connection.transaction(force_rollback=chance.random() < 0.2),
                ):
                    for _ in range(chance.randint(1, changes)):
                        change(connection, chance, truncates=truncates)
                        stop.wait(chance.random() / 30)
    except Exception as error:
        errors.append(error)


@contextlib.contextmanager
def writers(dsn: str, seed: int, *, truncates: bool = True) -> Iterator[None]:
    """Two writers of short transactions and one of long ones, for as long as the block runs."""
    stop = threading.Event()
    errors: list[Exception] = []
    threads = [
        threading.Thread(
            target=write,
            args=(dsn, 10 * seed + number, stop),
            kwargs={"changes": changes, "truncates": truncates, "errors": errors},
        )
        for number, changes in enumerate((3, 6, 60))
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def make(make_pipeline: Callable[[str], Pipeline], source: str, target: Database) -> Pipeline:
    pipeline = make_pipeline(
        configuration(
            source,
            target=target.dsn,
            slot=f"s_{target.name}",
            worker_lines='batch_rows = 50\nbackfill_page_rows = 5\nlog_level = "debug"',
            indexes={"notes": {"text": "{body}", "columns": ["tenant"]}},
        )
    )
    pipeline.source.execute(TABLE)
    chance = random.Random(0)
    with pipeline.source.transaction():
        for number in range(ROWS):
            pipeline.source.execute(
                "INSERT INTO notes VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                [key(chance), number % 7, f"body {number}"],
            )
    return pipeline


def ask(pipeline: Pipeline, kind: str, *, max_rows_per_s: int | None = None) -> int:
    """Ask for a backfill and return its number."""
    row = pipeline.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, max_rows_per_s) VALUES ('notes', %s, %s) RETURNING id",
        [kind, max_rows_per_s],
    ).fetchone()
    assert row is not None
    pipeline.target.execute("SELECT pg_notify(%s, 'notes')", [Queue("cdcsync").channel])
    return int(row[0])


def state(pipeline: Pipeline, request: int) -> str:
    """Return the state of a request."""
    row = pipeline.target.execute("SELECT state FROM cdcsync.backfills WHERE id = %s", [request]).fetchone()
    assert row is not None
    return str(row[0])


def applied(pipeline: Pipeline) -> int:
    """Return how many batches the workers have applied so far."""
    return len([event for event in pipeline.events() if event.get("event") == "batch_applied"])


def reached(pipeline: Pipeline, batches: int) -> bool:
    """Say whether the workers have applied so many batches."""
    return applied(pipeline) >= batches


def served(pipeline: Pipeline, request: int) -> None:
    until(
        lambda: state(pipeline, request) == "done",
        lambda: f"request {request}; the worker said: {pipeline.tail()}",
    )


def follow(pipeline: Pipeline) -> None:
    """Wait until the worker has applied everything committed so far; `wait_for` would also wait for a resync's end."""
    lsn = pipeline.position()
    until(
        lambda: (
            pipeline.target.execute("SELECT bool_and(checkpoint >= %s) FROM cdcsync.pipelines", [lsn]).fetchone()
            == (True,)
        ),
        lambda: f"the checkpoint {lsn}; the worker said: {pipeline.tail()}",
    )


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(3))
def test_the_index_equals_the_source_whatever_was_written_during_load_replay_and_resync(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], seed: int
) -> None:
    source = make_database()
    pipeline = make(make_pipeline, source.dsn, make_database())
    with writers(source.dsn, seed):
        pipeline.start()
        pipeline.live()
        served(pipeline, ask(pipeline, "replay"))
        resync = ask(pipeline, "resync")
        served(pipeline, resync)
    pipeline.in_step()


def test_a_resync_during_which_the_table_is_emptied_goes_on_and_ends(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, make_database().dsn, make_database())
    pipeline.start()
    pipeline.live()
    resync = ask(pipeline, "resync", max_rows_per_s=20)
    until(lambda: state(pipeline, resync) == "running", "the resync to begin")
    pipeline.source.execute("TRUNCATE notes")
    pipeline.source.execute("INSERT INTO notes VALUES ('new', 1, 'after it was emptied')")
    served(pipeline, resync)
    pipeline.in_step()


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_during_a_backfill_repeats_at_most_what_was_in_flight_and_loses_nothing(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], seed: int
) -> None:
    source = make_database()
    pipeline = make(make_pipeline, source.dsn, make_database())
    chance = random.Random(seed)
    done = "SELECT coalesce(sum(rows_done), 0) FROM cdcsync.backfills"
    with writers(source.dsn, seed, truncates=False):
        for _ in range(3):
            worker = pipeline.start()
            wanted = applied(pipeline) + chance.randint(3, 12)
            until(partial(reached, pipeline, wanted), lambda: f"batches; the worker said: {pipeline.tail()}")
            worker.kill()
            worker.wait()
        assert pipeline.target.execute(done).fetchone() is not None
        pipeline.start()
        pipeline.live()
    pipeline.in_step()
    resumed = [event["resumed_at"] for event in pipeline.events() if event.get("event") == "backfill_started"]
    assert resumed == sorted(resumed), "a backfill began anew"


@pytest.fixture
def standby_source(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A server of its own, whose settings the test changes."""
    return make_cluster()


def test_commits_that_are_delivered_before_they_are_visible_are_not_undone_by_older_rows(
    standby_source: Cluster, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    """Writers that wait for a synchronous standby: their commits arrive, and no snapshot sees them."""
    dsn = standby_source.dsn()
    pipeline = make(make_pipeline, dsn, database)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with psycopg.connect(dsn, autocommit=True) as admin, contextlib.ExitStack() as stack:
        admin.execute("SET synchronous_commit = local")
        admin.execute("INSERT INTO notes VALUES ('keep', 1, 'old'), ('drop', 1, 'old'), ('move', 1, 'old')")
        pipeline.in_step()
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nosuch'")
        admin.execute("SELECT pg_reload_conf()")
        replay = ask(pipeline, "replay", max_rows_per_s=30)
        until(lambda: state(pipeline, replay) == "running", "the replay to begin")
        hanging = []
        for statement in (
            b"UPDATE notes SET body = 'new' WHERE id = 'keep'",
            b"DELETE FROM notes WHERE id = 'drop'",
            b"UPDATE notes SET id = 'moved' WHERE id = 'move'",
            b"INSERT INTO notes VALUES ('born', 1, 'new')",
        ):
            writer = stack.enter_context(psycopg.connect(dsn, autocommit=True))
            writer.execute("SET synchronous_commit = on")
            writer.pgconn.send_query(statement)
            hanging.append(writer)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: admin.execute(waiting).fetchone() == (len(hanging),), "writers that wait for a standby")
        until(lambda: held(pipeline) == {"born": "new", "keep": "new", "moved": "old"}, "what was delivered")
        assert admin.execute("SELECT array_agg(id ORDER BY id) FROM notes WHERE body = 'old'").fetchone() == (
            ["drop", "keep", "move"],
        )

        # It reads rows that are older than the index, and does not bring them back.
        served(pipeline, replay)
        assert held(pipeline) == {"born": "new", "keep": "new", "moved": "old"}

        # What was delivered while no backfill ran has to be seen: this one waits until it is.
        resync = ask(pipeline, "resync")
        until(lambda: state(pipeline, resync) == "running", "the resync to begin")
        for tick in range(20):  # time enough for a page that did not wait
            admin.execute("UPDATE notes SET tenant = %s WHERE id = (SELECT min(id) FROM notes)", [1000 + tick])
            follow(pipeline)
        done = pipeline.target.execute("SELECT rows_done FROM cdcsync.backfills WHERE id = %s", [resync])
        assert done.fetchone() == (0,)
        assert held(pipeline) == {"born": "new", "keep": "new", "moved": "old"}
        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
        for writer in hanging:
            while writer.pgconn.get_result() is not None:
                pass
        served(pipeline, resync)
    pipeline.in_step()


def held(pipeline: Pipeline) -> dict[str, str]:
    """Return what the index holds of the rows that the waiting writers changed."""
    rows = pipeline.target.execute(
        "SELECT id, content FROM cdcsync.notes_chunks WHERE id IN ('keep', 'born', 'drop', 'move', 'moved')"
    )
    return dict(rows.fetchall())
