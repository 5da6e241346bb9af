"""An embedder that is changed in the configuration: nothing is embedded by it until a migration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


def of_two_tables(database: Database, *, dimensions: int = 12, kept: bool = False) -> str:
    embedders = {"fake": {"type": "hash", "dimensions": 8}, "other": {"type": "hash", "dimensions": dimensions}}
    if kept:
        embedders["former"] = {"type": "hash", "dimensions": 12}
    return configuration(
        database.dsn,
        embedders=embedders,
        indexes={"articles": {"embedder": "other"}, "notes": {"embedder": "fake"}},
    )


def entry(pipeline: Pipeline, index: str) -> tuple[str, str | None]:
    row = pipeline.target.execute("SELECT state, reason FROM cdcsync.indexes WHERE name = %s", [index]).fetchone()
    assert row is not None
    return row[0], row[1]


def loaded(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Return a pipeline that has loaded both indexes and stopped."""
    pipeline = make_pipeline(of_two_tables(database))
    for table in ("articles", "notes"):
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
        pipeline.source.execute(f"INSERT INTO {table} SELECT i, 'title ' || i FROM generate_series(1, 20) i")
    pipeline.start()
    pipeline.live()
    pipeline.stop(pipeline.processes[-1])
    return pipeline


def test_a_changed_embedder_leaves_its_index_as_it_is_and_names_the_migration(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = loaded(database, make_pipeline)
    pipeline.path.write_text(of_two_tables(database, dimensions=16, kept=True))

    pipeline.start()
    assert "cdcsync migrate articles start" in pipeline.event("preflight")["fix"]
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    pipeline.in_step()  # with the vectors of the embedder that made the others
    assert entry(pipeline, "articles") == ("live", None)


@pytest.mark.proof
def test_a_changed_embedder_without_the_one_before_pauses_its_index_alone(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = loaded(database, make_pipeline)
    pipeline.path.write_text(of_two_tables(database, dimensions=16))

    pipeline.start()
    until(lambda: entry(pipeline, "articles")[0] == "paused", pipeline.tail)
    assert "cdcsync migrate articles start" in str(entry(pipeline, "articles")[1])
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    pipeline.source.execute("UPDATE notes SET title = title || ' again'")
    pipeline.in_step("notes")
    counted = pipeline.target.execute("SELECT count(DISTINCT vector_dims(embedding)) FROM articles_index").fetchone()
    assert counted == (1,)

    pipeline.stop(pipeline.processes[-1])
    pipeline.path.write_text(of_two_tables(database))
    pipeline.start()
    until(lambda: entry(pipeline, "articles") == ("live", None), pipeline.tail)
    pipeline.in_step()
