"""A worker that was cut off while a command did its work: it stands by, and continues once that has ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.support.configs import configuration
from tests.support.migrations import filled, loaded, migrate, ready
from tests.support.outages import MakeSimple
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


@contextmanager
def cut_off(pipeline: Pipeline, *databases: Database) -> Iterator[None]:
    """Have the running worker stand still, without sessions; afterwards it finds that it was overtaken.

    Its watch may be the first to find that what it followed has changed. If it stood still in a set-up, it begins that
    anew.
    """
    fence = "SELECT fence FROM cdcsync.pipelines"
    worker, streamed, before = pipeline.processes[-1], pipeline.times("streaming"), pipeline.target.execute(fence)
    (held,) = before.fetchone() or (0,)
    found = {event: pipeline.times(event) for event in ("overtaken", "tables_changed", "set_up_waits")}
    worker.send_signal(signal.SIGSTOP)
    for database in databases:
        database.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"
            " AND datname = current_database()"
        )
    try:
        yield
        (raised,) = pipeline.target.execute(fence).fetchone() or (0,)
        assert raised > held
    finally:
        worker.send_signal(signal.SIGCONT)
    until(lambda: any(pipeline.times(event) > times for event, times in found.items()), pipeline.tail)
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    shown = "SELECT count(*) > 0 AND bool_and(content LIKE '% again') FROM articles_index"
    until(lambda: pipeline.target.execute(shown).fetchone() == (True,), pipeline.tail)
    assert worker.poll() is None
    assert pipeline.times("index_paused") == 0


@pytest.mark.proof
def test_a_worker_that_a_repair_overtook_stands_by_and_continues(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, rows=50)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with cut_off(pipeline, source, target):
        target.execute("DELETE FROM cdcsync.articles_chunks WHERE id = 7")
        assert pipeline.answer("verify", "articles", "--repair", "--json")["repaired"]
    assert pipeline.times("overtaken") == 1
    pipeline.in_step()


@pytest.mark.proof
def test_a_worker_whose_vectors_were_dropped_meanwhile_stands_by_and_continues(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = filled(make_pipeline, database)
    migrate(pipeline, "activate")
    pipeline.in_step("articles")
    with cut_off(pipeline, database):
        assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    pipeline.in_step("articles")


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("action", ["activate", "drop"])
def test_a_worker_whose_chunks_were_exchanged_or_dropped_meanwhile_stands_by_and_continues(
    action: str, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": {}}))
    loaded(pipeline, "articles", rows=20)
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"text": "about: {title}"}}))
    migrate(pipeline, "start")
    ready(pipeline, 2)
    with cut_off(pipeline, database):
        migrate(pipeline, action, *(["--yes"] if action == "drop" else []))
    shown = "SELECT count(*) FROM articles_index WHERE content LIKE 'about: % again'"
    assert pipeline.target.execute(shown).fetchone() == (20 if action == "activate" else 0,)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("purged", [False, True], ids=["", "purged meanwhile"])
def test_nothing_of_a_frozen_worker_comes_late(
    purged: bool, make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    """It is frozen in a load with all its sessions; the one with the lock is ended, as a standby does after a while."""
    database = make_database()
    slowly = "backfill_max_rows_per_s = 100\nbackfill_page_rows = 10"
    first = configuration(database.dsn, worker_lines=slowly, indexes={"articles": {}})
    pipeline = make_pipeline(first)
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 400) AS i")
    overtaken = pipeline.start()
    pipeline.event("backfill_started")
    until(lambda: database.execute("SELECT FROM cdcsync.backfills WHERE rows_done > 20"), pipeline.tail)
    held = database.execute(ADMITTED)
    overtaken.send_signal(signal.SIGSTOP)
    try:
        database.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database()"
            " AND (application_name LIKE 'cdcsync apply %' OR backend_type = 'walsender')"
        )
        if purged:
            assert pipeline.command("teardown", "--purge", "--yes").returncode == 0
        # What the frozen worker was made for is gone: whatever it does next fails, and it would say so in our tables.
        database.execute("ALTER TABLE articles RENAME COLUMN title TO headline")
        pipeline.configure(first.replace("{title}", "{headline}"))
        pipeline.start()
        until(lambda: pipeline.times("streaming") > 1, pipeline.tail)
        assert len(held) > 3
        assert not set(held) & set(database.execute(ADMITTED))
    finally:
        overtaken.send_signal(signal.SIGCONT)
    until(lambda: pipeline.times("overtaken"), pipeline.tail)
    pipeline.live()
    pipeline.in_step()
    assert pipeline.times("overtaken_sessions_ended") == (0 if purged else 1)  # else the command has done it
    assert pipeline.times("index_paused") == 0
    assert not database.execute("SELECT FROM cdcsync.backfills WHERE state = 'failed'")
    assert overtaken.poll() is None


def impatient(make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Return a pipeline of two indexes in another database, whose sessions are soon taken for dead."""
    source, target = make_database(), make_database()
    dsn = f"{target.dsn} tcp_user_timeout=2000"
    pipeline = make_pipeline(configuration(source.dsn, target=dsn, indexes={"articles": {}, "others": {}}))
    loaded(pipeline, "articles", "others", rows=20)
    return pipeline


@pytest.mark.proof
def test_a_command_ends_the_session_of_a_frozen_worker_that_has_the_lock(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = impatient(make_database, make_pipeline)
    pipeline.processes[-1].send_signal(signal.SIGSTOP)
    try:
        until(lambda: pipeline.command("drop", "articles", "--yes").returncode == 0, pipeline.tail)
        assert pipeline.target.execute("SELECT name FROM cdcsync.indexes").fetchall() == [("others",)]
    finally:
        pipeline.processes[-1].send_signal(signal.SIGCONT)
    until(lambda: pipeline.times("overtaken"), pipeline.tail)
    pipeline.in_step("others")


@pytest.mark.proof
def test_a_worker_that_stands_by_shows_nothing_that_has_gone_stale(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    """An alert that it fired as the worker would fire for as long as it stands by, whatever the next worker heals."""
    pipeline = impatient(make_database, make_pipeline)
    pipeline.source.execute("ALTER TABLE others RENAME COLUMN title TO headline")
    until(lambda: b'{index="others",state="paused"} 1.0' in pipeline.get("/metrics")[1], pipeline.tail)
    pipeline.processes[-1].send_signal(signal.SIGSTOP)
    port, streamed = pipeline.event("listening")["port"], pipeline.times("streaming")
    try:
        pipeline.start()
        until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    finally:
        pipeline.processes[0].send_signal(signal.SIGCONT)
    until(lambda: pipeline.times("standby"), pipeline.tail)
    pipeline.source.execute("ALTER TABLE others RENAME COLUMN headline TO title")
    until(lambda: b'{index="others",state="live"} 1.0' in pipeline.get("/metrics")[1], pipeline.tail)

    def ask(path: str) -> bytes:
        return pipeline.get(path, port=port)[1]

    until(lambda: b"cdcsync_standby 1.0" in ask("/metrics"), pipeline.tail)
    exposed = ask("/metrics").decode()
    assert "cdcsync_slot_retained_bytes NaN" in exposed
    assert "cdcsync_index_state{" not in exposed
    until(lambda: json.loads(ask("/readyz?standby=ok&loaded=1"))["ready"], lambda: ask("/readyz?loaded=1").decode())
    assert json.loads(ask("/readyz"))["reasons"] == ["standby: another worker holds the pipeline"]


ADMITTED = (
    "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
"""The sessions that are admitted under a fence."""

READERS = ("cdcsync status", "cdcsync liveness")
"""The sessions of a worker with the target that only read. The one with the lock has a fence of its own."""


def test_every_session_of_a_worker_with_the_target_is_admitted(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    source, target = make_database(), make_database()
    often = "evaluate_every_s = 60\nverify_every_s = 60"
    pipeline = make_pipeline(configuration(source.dsn, target=target.dsn, worker_lines=often, indexes={"articles": {}}))
    pipeline.hurry |= {f"cdcsync.flows.audit.rolling.{name}": 0.3 for name in ("FIRST_S", "REST_S", "NOT_LIVE_S")}
    loaded(pipeline, "articles", rows=20)
    pipeline.get("/status")
    seen: set[str] = set()

    def all_seen() -> bool:
        names: dict[int, str] = dict(
            target.execute(
                "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND application_name LIKE 'cdcsync %' AND state <> 'active'"
            )
        )
        admitted = {pid for (pid,) in target.execute(ADMITTED)}
        for pid, name in names.items():
            if name not in READERS and not name.startswith("cdcsync apply "):
                assert pid in admitted or not target.execute(f"SELECT FROM pg_stat_activity WHERE pid = {pid}"), name
                seen.add(name.partition(" s_")[0])
        return seen >= {
            f"cdcsync {flow}" for flow in ("embed", "settle", "words", "backfill", "compare", "audit", "watch")
        }

    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    until(all_seen, lambda: f"{sorted(seen)} {pipeline.tail()}")


def test_a_set_up_that_loses_the_pipelines_lock_writes_nothing_more(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    database = make_database()
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": {}}))
    loaded(pipeline, "articles", rows=20)
    pipeline.stop(pipeline.processes[-1])
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"text": "about: {title}"}, "others": {}}))
    pipeline.source.execute("CREATE TABLE others (id int PRIMARY KEY, title text)")
    written = "SELECT to_jsonb(i) || jsonb_build_object('others', to_regclass('cdcsync.others_chunks')) FROM {} AS i"
    with psycopg.connect(database.dsn) as holder, psycopg.connect(database.dsn, autocommit=True) as successor:
        before = holder.execute(written.format("cdcsync.indexes") + " FOR UPDATE").fetchone()
        pipeline.start()
        until(lambda: pipeline.times("lock_waits"), pipeline.tail)  # the set-up waits for the index's row
        name = f"cdcsync pipeline cdcsync {pipeline.config.source.slot}"
        successor.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks JOIN pg_stat_activity USING (pid), hashtextextended"
            "(%s, 0) AS key WHERE locktype = 'advisory' AND (classid::int8 << 32) + objid::int8 = key",
            [name],
        )
        taken = successor.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [name]).fetchone()
        assert taken == (True,)
        holder.rollback()
        until(lambda: pipeline.times("standby"), pipeline.tail)
        assert successor.execute(written.format("cdcsync.indexes")).fetchall() == [before]
    pipeline.live()
    pipeline.in_step("articles", "others")
    assert pipeline.times("index_paused") == 0


@pytest.mark.proof
def test_a_worker_whose_pipeline_begins_anew_is_no_standby_of_its_own_last_session(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline = make_simple(make_database().dsn, make_database().dsn, rows=5)
    pipeline.hurry |= {
        "cdcsync.target.locked_session.OLD_SESSION_S": 90.0,
        "cdcsync.target.locked_session.LOCK_WAIT_MS": 90_000,
    }
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    stages = (
        "SELECT format('%I.%I', nspname, relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE relpersistence = 't' AND relkind = 'r' AND nspname LIKE 'pg\\_temp%'"
    )
    waits = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with psycopg.connect(pipeline.config.target.dsn) as holder:
        # The server drops the temporary tables of a session before it frees the session's locks.
        for (stage,) in pipeline.target.execute(stages.encode()).fetchall():
            holder.execute(f"LOCK TABLE {stage} IN ACCESS SHARE MODE".encode())
        pipeline.source.execute("ALTER PUBLICATION cdcsync SET TABLE articles WHERE (id > 0)")
        until(
            lambda: pipeline.target.execute(waits).fetchone() == (True,) or pipeline.times("standby"),
            pipeline.tail,
        )
    until(lambda: pipeline.times("streaming") == 2, pipeline.tail)
    assert pipeline.times("standby") == 0
    pipeline.in_step()
