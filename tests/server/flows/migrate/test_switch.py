"""Which generation may become the live one."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.migrations import (
    BOTH,
    OLD,
    asks_for,
    filled,
    loaded,
    migrate,
    noted,
    ready,
    refused,
    state,
    turned,
    wanted,
)
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


@pytest.mark.proof
def test_a_generation_that_lacks_more_vectors_becomes_live_with_a_yes_only(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    refusing: Section = {"type": "python", "class": "tests.support.turned:Refusing", "options": {"way": "b"}}
    models = {"good": turned(OLD), "refusing": refusing}
    now: dict[str, Section] = {"articles": {"embedder": "good"}, "notes": {"embedder": "refusing"}}
    later: dict[str, Section] = {"articles": {"embedder": "refusing"}, "notes": {"embedder": "good"}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=models, indexes=now))
    loaded(pipeline, "articles", "notes", rows=20)
    asks_for(pipeline, configuration(database.dsn, embedders=models, indexes=later))
    for index in later:
        migrate(pipeline, "start", index=index)
    ready(pipeline, 2, *later)
    told = refused(pipeline, "activate")
    assert "generation 2 lacks the vectors of 20 of 20 chunks (20 failed, 0 wait), and the live one of 0" in told
    assert "cdcsync failures articles list" in told
    assert refused(pipeline, "activate", "--dry-run") == refused(pipeline, "activate", "--dry-run", "--json") == told
    assert migrate(pipeline, "activate", "--dry-run", "--yes")["switched"] is False
    failed = pipeline.answer("failures", "articles", "list", PYTHONPATH=str(ROOT))
    assert [one["generation"] for one in failed] == [2] * 20
    assert pipeline.answer("failures", "articles", "retry", PYTHONPATH=str(ROOT)) == {"retry": 20}
    until(
        lambda: "20 failed" in refused(pipeline, "activate"),
        lambda: f"the texts to have failed again; {pipeline.tail()}",
    )
    assert migrate(pipeline, "activate", index="notes")["live"] == 2
    assert "generation 1 lacks the vectors of 20" in refused(pipeline, "rollback", index="notes")
    assert [one["generation"] for one in pipeline.answer("status")["indexes"].values()] == [1, 2]
    assert migrate(pipeline, "activate", "--yes")["live"] == 2
    assert migrate(pipeline, "rollback", "--yes", index="notes")["live"] == 1
    assert migrate(pipeline, "rollback")["live"] == 1


@pytest.mark.proof
def test_a_generation_whose_embedder_has_no_section_does_not_become_live(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    old, new = ({one: BOTH[one]} for one in BOTH)
    without = configuration(database.dsn, embedders=old, indexes={"articles": {"embedder": "old"}})
    pipeline.path.write_text(without)
    told = refused(pipeline, "activate")
    assert "no [embedders] section makes the vectors of generation 2, by python:turned:b" in told
    assert refused(pipeline, "activate", "--dry-run") == told
    pipeline.path.write_text(wanted(database))
    migrate(pipeline, "activate")
    asks_for(pipeline, configuration(database.dsn, embedders=new, indexes={"articles": {"embedder": "new"}}))
    told = refused(pipeline, "rollback")
    assert "no [embedders] section makes the vectors of generation 1, by python:turned:a" in told
    assert "put its section back" in told
    pipeline.in_step("articles")
    assert pipeline.answer("status")["indexes"]["articles"]["generation"] == 2
    asks_for(pipeline, wanted(database))
    noted(pipeline, True, True)
    assert migrate(pipeline, "rollback")["live"] == 1


@pytest.mark.proof
def test_a_view_that_a_transaction_has_read_is_not_waited_for_without_an_end(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    with psycopg.connect(pipeline.config.target.dsn, application_name="a dump") as reader:
        reader.execute("SELECT count(*) FROM articles_index")
        told = refused(pipeline, "activate")
        assert f"public.articles_index is locked by pid {reader.info.backend_pid}" in told
        assert state(pipeline, 1) == state(pipeline, 2) == "ready"
    assert migrate(pipeline, "activate")["live"] == 2
    assert migrate(pipeline, "rollback")["live"] == 1
