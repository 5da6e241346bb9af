"""The record of calls: kept for its time, bounded while the database is away, and stored when the server stops."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from prometheus_client import Counter

from cdcsync.serve import calls
from cdcsync.serve.calls import Recorder
from cdcsync.target.calls import Call
from tests.support.serving import Office, served
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def _emptied(tickets: Office) -> Iterator[None]:
    tickets.database.execute("TRUNCATE cdcsync.calls")
    yield
    tickets.database.execute("TRUNCATE cdcsync.calls")


def recorder(office: Office, days: int = 30, **changes: Any) -> Recorder:
    dropped = Counter("dropped", "Dropped.", registry=None)
    return Recorder(changes.get("dsn", office.database.dsn), "cdcsync", days, dropped)


def call(subject: str) -> Call:
    return Call(datetime.now(UTC), subject, None, "search", "tickets", "ok", 1, "aa", None, [], 1.0, None)


def subjects(office: Office) -> list[str]:
    return [row[0] for row in office.database.execute("SELECT subject FROM cdcsync.calls ORDER BY 1")]


async def test_calls_older_than_their_days_are_deleted_by_the_server_itself(tickets: Office) -> None:
    for subject, days in [("old", 31), ("young", 29)]:
        tickets.database.execute(
            "INSERT INTO cdcsync.calls (at, subject, tool, outcome, ms)"
            " VALUES (now() - %s * interval '1 day', %s, 'search', 'ok', 1)",
            [days, subject],
        )
    async with served(tickets.serving(anonymous=True, audit_days=30)) as client:
        await client.get("/v1/indexes")
        kept = ["anonymous", "young"]
        await anyio.to_thread.run_sync(until, lambda: subjects(tickets) == kept, "the old call to be deleted")


async def test_nothing_is_recorded_where_calls_are_kept_for_no_day(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True, audit_days=0)) as client:
        assert (await client.get("/v1/indexes")).status_code == 200
    assert subjects(tickets) == []


async def test_calls_that_wait_when_the_server_stops_are_stored(tickets: Office) -> None:
    made = recorder(tickets)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        await anyio.lowlevel.checkpoint()
        for number in range(calls.BATCH + 1):
            made.record(call(f"{number:04}"))
        tasks.cancel_scope.cancel()
    assert len(subjects(tickets)) == calls.BATCH + 1


async def test_while_the_database_is_away_so_many_wait_and_the_rest_is_counted(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MOST", 3)
    made = recorder(tickets, dsn="host=127.0.0.1 port=1 dbname=nothing")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        for number in range(5):
            made.record(call(str(number)))
        assert (len(made._waiting), made._dropped._value.get()) == (3, 2)
        tasks.cancel_scope.cancel()
