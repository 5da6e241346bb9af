"""A row with very many documents: its change is a request that survives the worker, and that live changes pass by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import pytest

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.timeout(300)]

ROWS = 3_000
SECTION = """
[indexes.tickets.related.customer]
table = "customers"
on = { id = "customer_id" }
"""
REQUESTS = "SELECT state, rows_done FROM cdcsync.backfills WHERE kind = 'related' ORDER BY id"


@pytest.fixture
def tickets(make_pipeline: Callable[[str], Pipeline], database: Database) -> Pipeline:
    """One customer's tickets, read in small pages, and a view of what their documents are to be."""
    text = configuration(
        database.dsn,
        worker_lines='backfill_page_rows = 50\nlog_level = "debug"',
        indexes={"tickets": {"text": "{subject} of {customer.name}"}},
    )
    pipeline = make_pipeline(text + SECTION)
    for statement in (
        "CREATE TABLE customers (id int PRIMARY KEY, name text)",
        "CREATE TABLE tickets (id int PRIMARY KEY, subject text, customer_id int)",
        "CREATE INDEX ON tickets (customer_id)",
        "INSERT INTO customers VALUES (1, 'first'), (2, 'second')",
        f"INSERT INTO tickets SELECT i, 'subject ' || i, 1 FROM generate_series(1, {ROWS}) i",
        'CREATE VIEW expected AS SELECT t.*, c.name AS "customer.name"'
        " FROM tickets t LEFT JOIN customers c ON c.id = t.customer_id",
    ):
        pipeline.source.execute(statement)
    index = msgspec.structs.replace(pipeline.config.indexes["tickets"], table="expected")
    pipeline.config = msgspec.structs.replace(pipeline.config, indexes={"tickets": index})
    return pipeline


def done(pipeline: Pipeline) -> int:
    """Return how many rows the rebuild has read that has got farthest."""
    return max((rows for _, rows in pipeline.target.execute(REQUESTS).fetchall()), default=0)


def under_way(pipeline: Pipeline, rows: int) -> bool:
    """Say whether a rebuild has got so far."""
    return done(pipeline) >= rows


@pytest.mark.proof
def test_a_rebuild_goes_on_where_it_was_after_kill_9_and_live_changes_do_not_wait_for_it(tickets: Pipeline) -> None:
    worker = tickets.start()
    tickets.live()
    tickets.source.execute("UPDATE customers SET name = 'renamed' WHERE id = 1")
    until(partial(under_way, tickets, 200), tickets.tail)
    worker.kill()
    worker.wait()
    ((state, rows),) = tickets.target.execute(REQUESTS).fetchall()
    assert state == "running"
    assert 0 < rows < ROWS

    tickets.start()
    tickets.source.execute("UPDATE tickets SET subject = 'changed meanwhile' WHERE id = 2900")
    until(partial(says, tickets, "changed meanwhile of renamed"), tickets.tail)
    tickets.reach("tickets")

    until(tickets.in_step_now, lambda: tickets.difference)
    resumed = [
        one["resumed_at"] for one in tickets.events() if one["event"] == "backfill_started" and one["kind"] == "related"
    ]
    assert resumed[0] == 0
    assert min(resumed[1:]) >= rows


@pytest.mark.proof
def test_a_second_change_of_the_same_row_joins_the_request_that_has_not_begun(tickets: Pipeline) -> None:
    worker = tickets.start()
    tickets.live()
    worker.kill()
    worker.wait()
    # What is paused is not begun: the changes come in while it waits.
    tickets.source.execute("UPDATE customers SET name = 'once' WHERE id = 1")
    tickets.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, filter, max_rows_per_s)"
        " VALUES ('tickets', 'replay', 'id <= 100', 20)"
    )
    tickets.start()
    until(lambda: tickets.target.execute(REQUESTS).fetchall(), tickets.tail)
    for number in range(5):
        tickets.source.execute("UPDATE customers SET name = %s WHERE id = 1", [f"again {number}"])
        tickets.source.execute("UPDATE tickets SET subject = %s WHERE id = 1", [f"marks the place {number}"])
        until(partial(says, tickets, f"marks the place {number}"), tickets.tail)

    tickets.reach("tickets")

    assert [state for state, _ in tickets.target.execute(REQUESTS).fetchall()] == ["done"]
    until(tickets.in_step_now, lambda: tickets.difference)


@pytest.mark.proof
def test_a_second_change_while_a_request_is_served_asks_only_for_what_that_has_read(tickets: Pipeline) -> None:
    worker = tickets.start()
    tickets.live()
    assert tickets.stop(worker) == 0
    text = tickets.path.read_text()
    tickets.path.write_text(text.replace("[worker]", "[worker]\nbackfill_max_rows_per_s = 20"))
    slow = tickets.start()
    tickets.source.execute("UPDATE customers SET name = 'once' WHERE id = 1")
    for number in range(3):
        # A page has just been read, and the next one is due in a second: while one is read, nobody knows its end.
        until(partial(under_way, tickets, done(tickets) + 1), tickets.tail)
        tickets.source.execute("UPDATE customers SET name = %s WHERE id = 1", [f"again {number}"])
        tickets.source.execute("UPDATE tickets SET subject = %s WHERE id = 1", [f"marks the place {number}"])
        until(partial(says, tickets, f"marks the place {number}"), tickets.tail)
    slow.kill()
    slow.wait()
    bounds = tickets.target.execute(
        "SELECT state, up_to[1]::int FROM cdcsync.backfills WHERE kind = 'related' ORDER BY id"
    ).fetchall()
    assert [state for state, _ in bounds] == ["running", "requested"]
    bound = bounds[1][1]
    assert bound < ROWS
    tickets.path.write_text(text)
    tickets.start()

    tickets.reach("tickets")

    assert tickets.target.execute(REQUESTS).fetchall() == [("done", ROWS), ("done", bound)]
    until(tickets.in_step_now, lambda: tickets.difference)


def says(pipeline: Pipeline, words: str) -> bool:
    """Say whether a document begins with these words."""
    found = pipeline.target.execute(
        "SELECT FROM cdcsync.tickets_chunks WHERE position(%s in content) = 1", [words]
    ).fetchone()
    return found is not None
