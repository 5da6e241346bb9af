"""The set-up of indexes in the target, beside sessions that use them."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.mark.proof
@pytest.mark.parametrize("prepares", [False, True], ids=["a session", "a prepared transaction"])
def test_a_transaction_that_uses_a_view_keeps_neither_searches_nor_other_indexes_from_going_on(
    database: Database, make_pipeline: Callable[[str], Pipeline], prepares: bool
) -> None:
    before: dict[str, Section] = {"articles": {}, "notes": {}}
    pipeline = make_pipeline(configuration(database.dsn, indexes=before))
    for table in before:
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text, tenant int)")
        pipeline.source.execute(f"INSERT INTO {table} SELECT i, 'title ' || i, i % 2 FROM generate_series(1, 9) i")
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    pipeline.configure(configuration(database.dsn, indexes={**before, "articles": {"columns": ["tenant"]}}))
    pipeline.hurry = {
        "cdcsync.flows.setup.indexes.LOCK_ATTEMPTS": 3,
        "cdcsync.model.pauses.FIRST_DELAY_S": 5.0,
        "cdcsync.model.pauses.MOST_DELAY_S": 5.0,
    }
    search = "SELECT count(*) FROM articles_index"
    with psycopg.connect(database.dsn) as application:
        if prepares and application.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("this server allows no prepared transactions (max_prepared_transactions = 0)")
        # It has searched, and its transaction stays open.
        assert application.execute(search).fetchone() == (9,)
        ending = f"SELECT pg_terminate_backend({application.info.backend_pid})"
        if prepares:
            ending = f"ROLLBACK PREPARED '{database.name}'"
            application.execute(f"PREPARE TRANSACTION '{database.name}'".encode())
        pipeline.start()
        assert pipeline.event("lock_waits")["table"] == "articles_chunks"
        with psycopg.connect(database.dsn, autocommit=True) as other:
            assert other.execute("SET statement_timeout = '60 s'").rowcount == -1
            assert other.execute(search).fetchone() == (9,)
        reason = "SELECT reason FROM cdcsync.indexes WHERE name = 'articles' AND state = 'paused'"
        (paused,) = until(lambda: pipeline.target.execute(reason).fetchone(), pipeline.tail) or ("",)
        assert "does not let go" in paused
        pipeline.source.execute("UPDATE notes SET title = 'meanwhile' WHERE id = 1")
        pipeline.in_step("notes")
        assert ending in paused
        if prepares:
            pipeline.target.execute(ending.encode())
    until(
        lambda: pipeline.target.execute("SELECT bool_and(state = 'live') FROM cdcsync.indexes").fetchone() == (True,),
        pipeline.tail,
    )
    pipeline.in_step()
