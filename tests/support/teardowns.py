"""Pipelines that are torn down, and what is left of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

from cdcsync.source.publications import MADE
from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline

OF_WORKER = f"COMMENT ON PUBLICATION cdcsync IS '{MADE}'"
ANOTHER_SLOT = "SELECT pg_create_logical_replication_slot('another_' || current_database(), 'pgoutput')"


def make(
    make_pipeline: Callable[[str], Pipeline],
    source: Database,
    target: Database,
    *,
    slot: str | None = None,
    index: str = "articles",
) -> Pipeline:
    indexes = {index: {"table": "articles"}}
    return make_pipeline(configuration(source.dsn, target=target.dsn, slot=slot, indexes=indexes))


def fill(database: Database) -> None:
    database.execute("CREATE TABLE articles (id bigint PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 20) AS i")


def run_and_stop(pipeline: Pipeline) -> None:
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0


def set_up(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> tuple[Database, Pipeline]:
    """Return a database that is source and target, and its pipeline, which has loaded its index and was stopped."""
    database = make_database()
    fill(database)
    pipeline = make(make_pipeline, database, database)
    run_and_stop(pipeline)
    return database, pipeline


def two_indexes(source: Database, target: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Return a stopped pipeline with the indexes articles and notes, which nobody follows any more."""
    fill(source)
    source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, title text)")
    source.execute("INSERT INTO notes VALUES (1, 'one')")
    indexes: dict[str, Section] = {"articles": {}, "notes": {}}
    pipeline = make_pipeline(configuration(source.dsn, target=target.dsn, indexes=indexes))
    run_and_stop(pipeline)
    pipeline.released()
    return pipeline


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return {step["what"]: step["outcome"] for step in json.loads(done.stdout)}


def slots(database: Database) -> list[str]:
    return [
        name
        for (name,) in database.execute(
            "SELECT slot_name::text FROM pg_replication_slots WHERE database = %s", [database.name]
        )
    ]


def publications(database: Database) -> list[str]:
    return [name for (name,) in database.execute("SELECT pubname::text FROM pg_publication")]


def relations(database: Database) -> list[str]:
    """Return everything that is in the database and was not there at first."""
    return [
        name
        for (name,) in database.execute(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE relkind IN ('r', 'v')"
            " AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema') ORDER BY 1"
        )
    ]


def sent(database: Database) -> list[str]:
    """Return the tables in the publication."""
    return [name for (name,) in database.execute("SELECT tablename::text FROM pg_publication_tables ORDER BY 1")]
