"""Starts while an autovacuum is at work: it goes on where nothing has to change, and otherwise gives way."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.config import QualifiedName, parse
from cdcsync.demo.cluster import Cluster
from cdcsync.flows.setup.start import set_up_publication
from cdcsync.postgres.sessions import connect
from tests.support.configs import Section, configuration
from tests.support.outages import make_target
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.anyio, pytest.mark.timeout(300)]

AT_WORK = "SELECT pid FROM pg_stat_progress_vacuum WHERE relid = %s::regclass"


@pytest.fixture
def server(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A server that looks each second for something to vacuum."""
    return make_cluster(settings={"autovacuum": "on", "autovacuum_naptime": "1s"})


def vacuumed(session: psycopg.Connection, table: str) -> int:
    """Have a table vacuumed for minutes, and return by which process."""
    session.execute(
        f"ALTER TABLE {table} SET (autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0,"
        " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)".encode()
    )
    session.execute(f"UPDATE {table} SET id = id".encode())
    (pid,) = until(lambda: session.execute(AT_WORK, [table]).fetchone(), "an autovacuum") or (0,)
    return int(pid)


def started(server: Cluster, make_pipeline: Callable[[str], Pipeline], indexes: dict[str, Section]) -> Pipeline:
    """Return a pipeline that has been in step and was stopped."""
    pipeline = make_pipeline(configuration(make_target(server), indexes=indexes))
    for table in indexes:
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text, tenant int)")
        pipeline.source.execute(
            f"INSERT INTO {table} SELECT i, repeat('title ', 99), 1 FROM generate_series(1, 2000) i"
        )
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    return pipeline


@pytest.mark.proof
def test_a_start_that_changes_nothing_leaves_an_autovacuum_alone(
    server: Cluster, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = started(server, make_pipeline, {"articles": {}, "notes": {}})
    pid = vacuumed(pipeline.target, "cdcsync.articles_chunks")
    pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = 'after the start' WHERE id = 1")
    pipeline.in_step()
    assert pipeline.times("lock_waits") == 0
    assert pipeline.target.execute(AT_WORK, ["cdcsync.articles_chunks"]).fetchone() == (pid,)


@pytest.mark.proof
def test_an_autovacuum_gives_way_to_a_change_of_the_table(
    server: Cluster, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = started(server, make_pipeline, {"articles": {}, "notes": {}})
    pid = vacuumed(pipeline.target, "cdcsync.articles_chunks")
    indexes: dict[str, Section] = {"articles": {"columns": ["tenant"]}, "notes": {}}
    pipeline.configure(configuration(pipeline.target.info.dsn, indexes=indexes))
    pipeline.start()
    added = "SELECT FROM pg_attribute WHERE attrelid = 'cdcsync.articles_chunks'::regclass AND attname = 'tenant'"
    until(lambda: pipeline.target.execute(added).rowcount == 1, pipeline.tail)
    pipeline.in_step()
    assert pipeline.event("lock_waits")["table"] == "articles_chunks"
    assert pipeline.times("index_paused") == 0
    assert pipeline.target.execute(AT_WORK, ["cdcsync.articles_chunks"]).fetchone() != (pid,)


async def test_an_autovacuum_gives_way_to_the_publication(server: Cluster) -> None:
    dsn = make_target(server)
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
        session.execute("INSERT INTO articles SELECT i, repeat('title ', 99) FROM generate_series(1, 2000) i")
        vacuumed(session, "articles")
        source = await connect(dsn, "source")
        config = parse(configuration(dsn), {}, where="the test's configuration")
        await set_up_publication(source, config, [QualifiedName("public", "articles")])
        await source.close()
        published = session.execute("SELECT tablename FROM pg_publication_tables").fetchall()
    assert published == [("articles",)]
