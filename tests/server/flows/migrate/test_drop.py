"""A generation that is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest

from tests.support.migrations import (
    NEW,
    filled,
    migrate,
    ready,
)
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server


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
