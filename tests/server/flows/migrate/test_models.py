"""The worker and a command may have different files: both need the model of a generation that is to become live."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.configs import configuration
from tests.support.migrations import BOTH, asks_for, filled, migrate, noted, refused, wanted
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


def only(model: str, database: Database) -> str:
    """Return a configuration that asks for the vectors of a model, and has no other."""
    return configuration(database.dsn, embedders={model: BOTH[model]}, indexes={"articles": {"embedder": model}})


def live(pipeline: Pipeline) -> tuple[int, str]:
    (row,) = pipeline.target.execute("SELECT generation, state FROM cdcsync.indexes").fetchall()
    generation, state = row
    return generation, state


@pytest.mark.proof
def test_a_generation_that_the_workers_file_has_no_embedder_for_becomes_live_with_a_yes_only(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    noted(pipeline, True, True)
    migrate(pipeline, "activate")
    asks_for(pipeline, only("new", database))
    noted(pipeline, False, True)

    assert [one["has_embedder"] for one in migrate(pipeline, "status")] == [False, True]
    shown = pipeline.command("migrate", "articles", "status").stdout
    assert "the worker has no embedder for generation 1, by old: live, it would be paused" in " ".join(shown.split())
    pipeline.configure(wanted(database))
    told = refused(pipeline, "rollback")
    assert "no [embedders] section of the configuration that the worker was last started with makes" in told
    assert "the vectors of generation 1, by python:turned:a" in told
    assert "put its section back into the worker's configuration, under any name, and start the worker again" in told
    pipeline.in_step("articles")
    assert live(pipeline) == (2, "live")

    assert migrate(pipeline, "rollback", "--yes")["live"] == 1
    until(lambda: live(pipeline) == (1, "paused"), pipeline.tail)
    asks_for(pipeline, wanted(database))
    until(lambda: live(pipeline) == (1, "live"), pipeline.tail)
    noted(pipeline, True, True)
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "rollback")["live"] == 1


@pytest.mark.proof
def test_a_paused_index_is_rolled_back_to_the_generation_that_the_worker_has_an_embedder_for(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    migrate(pipeline, "activate")
    asks_for(pipeline, only("old", database))
    until(lambda: live(pipeline) == (2, "paused"), pipeline.tail)
    noted(pipeline, True, False)

    assert migrate(pipeline, "rollback")["live"] == 1
    until(lambda: live(pipeline) == (1, "live"), pipeline.tail)
    pipeline.in_step("articles")


def test_where_no_worker_has_noted_anything_the_commands_file_decides(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    pipeline.stop(pipeline.processes[-1])
    pipeline.target.execute("UPDATE cdcsync.generations SET has_embedder = NULL")
    pipeline.configure(only("old", database))
    assert "no [embedders] section makes the vectors of generation 2" in refused(pipeline, "activate")
    pipeline.configure(wanted(database))
    assert migrate(pipeline, "activate")["live"] == 2
