"""A worker that was cut off while a command did its work: it stands by, and continues once that has ended."""

from __future__ import annotations

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

    Its watch may be the first to find that what it followed has changed.
    """
    fence = "SELECT fence FROM cdcsync.pipelines"
    worker, streamed, before = pipeline.processes[-1], pipeline.times("streaming"), pipeline.target.execute(fence)
    (held,), changed = before.fetchone() or (0,), pipeline.times("tables_changed")
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
    until(lambda: pipeline.times("overtaken") or pipeline.times("tables_changed") > changed, pipeline.tail)
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    shown = "SELECT count(*) > 0 AND bool_and(content LIKE '% again') FROM articles_index"
    until(lambda: pipeline.target.execute(shown).fetchone() == (True,), pipeline.tail)
    assert worker.poll() is None
    assert pipeline.times("index_paused") == 0


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
