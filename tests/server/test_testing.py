"""Workers for the tests of applications."""

from __future__ import annotations

import pytest

from cdcsync.config import HashEmbedder
from cdcsync.errors import SetupError
from cdcsync.testing import Work, cdcsync_worker
from tests.support.articles import read
from tests.support.configs import configuration
from tests.support.servers import Database

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
