"""Workers for the tests of applications."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.config import HashEmbedder
from cdcsync.errors import SetupError
from cdcsync.testing import Work, cdcsync_worker
from tests.support.articles import articles, live_articles, read
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline

__all__ = ["cdcsync_worker"]

pytestmark = pytest.mark.server


def test_the_worker_of_a_test_takes_no_model_and_leaves_nothing_behind(
    database: Database, cdcsync_worker: Work
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    model = {"type": "sentence-transformers", "model": "no/such-model"}
    config = read(configuration(database.dsn, embedders={"minilm": model}))
    with cdcsync_worker(config) as worker:
        assert isinstance(worker.config.embedders["minilm"], HashEmbedder)
    with pytest.raises(ZeroDivisionError), cdcsync_worker(config):
        raise ZeroDivisionError  # what a test raises comes out
    left = database.execute(
        "SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()),"
        " (SELECT count(*) FROM pg_publication), to_regnamespace('cdcsync') IS NULL"
    )
    assert left == [(0, 0, True)]


def test_a_table_that_is_not_there_is_told_as_run_tells_it(database: Database, cdcsync_worker: Work) -> None:
    config = read(configuration(database.dsn))
    with pytest.raises(SetupError, match="articles"), cdcsync_worker(config):
        pass


def test_a_pipeline_that_exists_is_refused_and_left_as_it_is(
    make_pipeline: Callable[[str], Pipeline], database: Database, cdcsync_worker: Work
) -> None:
    pipeline = live_articles(make_pipeline(articles(database)), rows=3)
    text, slot = pipeline.path.read_text(), pipeline.config.source.slot
    with pytest.raises(SetupError, match="did not make"), cdcsync_worker(read(text)):
        pass  # beside its worker
    pipeline.stop(pipeline.processes[0])
    for configured in (
        text,
        text.replace("{title}", "{titel}"),
        text.replace("[target]", '[target]\nschema = "tests"'),
    ):
        with pytest.raises(SetupError, match=f"the slot {slot}"), cdcsync_worker(read(configured)):
            pass
    pipeline.compare()
    assert database.execute("SELECT slot_name::text FROM pg_replication_slots WHERE slot_name = %s", [slot]) == [
        (slot,)
    ]


@pytest.mark.proof
def test_what_a_killed_test_run_left_goes_by_the_command_that_the_refusal_names(
    make_pipeline: Callable[[str], Pipeline], database: Database, cdcsync_worker: Work
) -> None:
    pipeline = live_articles(make_pipeline(articles(database)), rows=3)
    pipeline.processes[0].kill()
    pipeline.processes[0].wait()
    with pytest.raises(SetupError, match="did not make") as refused, cdcsync_worker(pipeline.config):
        pass
    command = str(refused.value.hint).rpartition("cdcsync ")[2].split()
    assert pipeline.command(*command, answer="y\n").returncode == 0
    with cdcsync_worker(pipeline.config) as worker:
        assert worker.index("articles").search("title")
