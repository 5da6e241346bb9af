"""A generation that is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest

from tests.support.migrations import (
    NEW,
    filled,
    migrate,
    ready,
    refused,
)
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server


@pytest.mark.proof
def test_a_generation_never_gets_the_number_of_one_that_was_dropped(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    migrate(pipeline, "activate")
    measured = "SELECT DISTINCT generation FROM cdcsync.evaluations ORDER BY 1"
    assert pipeline.target.execute(measured).fetchall() == [(1,), (2,)]
    migrate(pipeline, "rollback")
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 2
    assert pipeline.target.execute(measured).fetchall() == [(1,)]
    assert migrate(pipeline, "start")["generation"] == 3
    ready(pipeline, 3)
    vector = json.dumps(NEW.vectors(["article"])[0].tolist())
    with pytest.raises(psycopg.Error) as gone:
        pipeline.target.execute(
            "SELECT FROM cdcsync.articles_search('article', %s::text::vector, generation => 2)", [vector]
        )
    assert gone.value.sqlstate == "VG001"
    migrate(pipeline, "activate")
    migrate(pipeline, "drop", "--yes")
    pipeline.in_step("articles")
    assert [one["generation"] for one in migrate(pipeline, "status")] == [3]


@contextmanager
def _viewed(pipeline: Pipeline) -> Iterator[None]:
    """Build a view on the vectors of the first generation."""
    pipeline.target.execute("CREATE VIEW mine AS SELECT chunk_id FROM cdcsync.articles_vectors_1")
    yield
    pipeline.target.execute("DROP VIEW mine")


@contextmanager
def _read(pipeline: Pipeline) -> Iterator[None]:
    """Keep a transaction open that has read them, as that of a dump has."""
    with psycopg.connect(pipeline.config.target.dsn, application_name="a dump") as reader:
        reader.execute("SELECT count(*) FROM cdcsync.articles_vectors_1")
        yield


@contextmanager
def _guarded(pipeline: Pipeline) -> Iterator[None]:
    """Have the server refuse to drop tables."""
    pipeline.target.execute(
        "CREATE FUNCTION guard() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'tables are not dropped here'; END $$"
    )
    pipeline.target.execute(
        "CREATE EVENT TRIGGER guard ON sql_drop WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION guard()"
    )
    yield
    pipeline.target.execute("DROP EVENT TRIGGER guard")


Obstacle = Callable[[Pipeline], AbstractContextManager[None]]

OBSTACLES: dict[str, tuple[Obstacle, str]] = {
    "a view": (_viewed, "drop it: view public.mine depends on table cdcsync.articles_vectors_1"),
    "a reader": (_read, "cdcsync.articles_vectors_1 is locked by pid"),
    "a guard": (_guarded, "tables are not dropped here"),
}


@pytest.mark.proof
@pytest.mark.parametrize("follows", [True, False], ids=["by the worker", "by the command"])
@pytest.mark.parametrize("what", OBSTACLES)
def test_unused_vectors_that_cannot_be_dropped_stay_say_why_and_stop_nobody(
    what: str, follows: bool, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    obstacle, why = OBSTACLES[what]
    pipeline = filled(make_pipeline, database)
    migrate(pipeline, "activate")
    if not follows:
        pipeline.stop(pipeline.processes[-1])
    with obstacle(pipeline):
        told = refused(pipeline, "drop", "--yes")
        assert "generation 1 could not be dropped" in told
        assert why in told
        first, second = migrate(pipeline, "status")
        assert (first["state"], second["state"]) == ("ready", "live")
        assert why in first["refusal"]
        assert first["reason"] is None
        if follows:
            pipeline.source.execute("INSERT INTO articles VALUES (1000, 'a new one')")
            pipeline.in_step("articles")
        assert pipeline.answer("status")["indexes"]["articles"]["state"] == "live"
        assert migrate(pipeline, "rollback")["live"] == 1
        assert migrate(pipeline, "status")[0]["refusal"] is None
        migrate(pipeline, "activate")
    assert migrate(pipeline, "drop", "--yes")["dropped"] == 1
    assert pipeline.times("index_paused") == 0
