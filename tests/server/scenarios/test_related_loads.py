"""What comes in while documents of several tables are loaded: between the reading of a page and its application."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.configs import NO_AUDIT, Section, configuration
from tests.support.servers import Database
from tests.support.workers import ROOT, Pipeline, until

pytestmark = [pytest.mark.server]

FUNCTION = """
import pathlib

import anyio
from cdcsync.flows.backfill.engine import Backfills

HERE, send = pathlib.Path(__file__), Backfills._send

async def hold(self, pending):
    keys = [key for key, _ in pending.page.entries]
    if pending.end is not None and (HERE.with_name("held").read_text(),) in keys:
        HERE.with_name("reached").touch()
        while not HERE.with_name("go_on").exists():
            await anyio.sleep(0.01)
    return await send(self, pending)

Backfills._send = hold

def document(row):
    return f"{row['subject']} of {row['customer.name']}"

document.version = 1
"""
"""Besides, holds up the mark of the page that has a certain key, as chunking it or the page before may."""

TICKETS: Section = {
    "text": None,
    "documents": "holding:document",
    "document_columns": ["subject", "customer.name"],
    "related": {"customer": {"table": "customers", "on": {"id": "customer_id"}}},
}

TABLES = (
    "CREATE TABLE customers (id int PRIMARY KEY, name text)",
    "CREATE TABLE tickets (id int PRIMARY KEY, subject text, customer_id int)",
    "ALTER TABLE tickets REPLICA IDENTITY FULL",
    "CREATE INDEX ON tickets (customer_id)",
    "CREATE TABLE others (id int PRIMARY KEY, subject text)",
    "INSERT INTO customers VALUES (1, 'old')",
    "INSERT INTO tickets SELECT 10 * i, 'subject ' || i, 1 FROM generate_series(1, 60) i",
)

OPEN = "SELECT count(*) FROM cdcsync.backfills WHERE state IN ('requested', 'running')"

WRONG = """
    SELECT t.id, k.content FROM tickets AS t JOIN customers AS c ON c.id = t.customer_id
    FULL JOIN cdcsync.tickets_chunks AS k ON k.id = t.id
    WHERE k.content IS DISTINCT FROM t.subject || ' of ' || c.name
"""


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("number", [3, 25, 60], ids=["first page", "a page", "last page"])
def test_a_document_that_comes_between_those_of_a_page_under_way_is_rebuilt_with_them(
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    (tmp_path / "holding.py").write_text(FUNCTION)
    (tmp_path / "held").write_text(f"{10 * number}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    indexes: dict[str, Section] = {"tickets": TICKETS, "others": {"text": "{subject}"}}
    pipeline = make_pipeline(
        configuration(database.dsn, worker_lines=f"{NO_AUDIT}\nbackfill_page_rows = 10", indexes=indexes)
    )
    pipeline.hurry["cdcsync.flows.follow.related.MOST_OF_ONE"] = 2
    for statement in TABLES:
        pipeline.source.execute(statement)
    pipeline.start()
    until((tmp_path / "reached").exists, pipeline.tail)
    keys = [10 * number - 5, 10 * number + 5]
    pipeline.source.execute("INSERT INTO tickets SELECT id, 'late', 1 FROM unnest(%s::int[]) AS id", [keys])
    come = "SELECT count(*) FROM cdcsync.tickets_chunks WHERE id = ANY(%s)"
    until(lambda: pipeline.target.execute(come, [keys]).fetchone() == (2,), pipeline.tail)
    pipeline.source.execute("UPDATE customers SET name = 'new'")
    pipeline.source.execute("INSERT INTO others VALUES (1, 'another')")
    # A request of its own is committed with what follows.
    until(lambda: pipeline.target.execute("SELECT content FROM cdcsync.others_chunks").fetchone(), pipeline.tail)
    (tmp_path / "go_on").touch()
    pipeline.live()
    until(lambda: pipeline.target.execute(OPEN).fetchone() == (0,), pipeline.tail)
    pipeline.reach("tickets")
    assert pipeline.target.execute(WRONG).fetchall() == []
