"""One call, however it came: its spans, from the caller's to the statement."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.to_thread
import httpx2
import psycopg
import pytest

from tests.support.collectors import Collector, Span
from tests.support.serving import Office, served
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SEARCH = "/v1/indexes/tickets/search"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def traced(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Collector:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return collector


async def ask(client: httpx2.AsyncClient, query: str, sampled: str = "01") -> httpx2.Response:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{sampled}"}
    return await client.post(SEARCH, json={"query": query}, headers=headers)


def one(collector: Collector, name: str) -> Span:
    (span,) = collector.named(name)
    return span


async def test_spans_lead_from_the_callers_to_the_models_and_the_statements(tickets: Office, traced: Collector) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        assert (await ask(client, "a secret question")).status_code == 200
        await ask(client, "printer", sampled="00")  # the caller keeps no trace of this one
    call = one(traced, "cdcsync.serve.search")
    assert (call.trace, call.parent, call.attributes) == (TRACE, PARENT, {"cdcsync.index": "tickets"})
    embedded, statement = one(traced, "cdcsync.embed_query"), one(traced, "cdcsync.statement")
    assert {(span.trace, span.parent) for span in (embedded, statement)} == {(TRACE, call.id)}
    assert embedded.attributes == {"cdcsync.embedder": "fake"}
    assert not any(b"secret" in body for body in traced.bodies)


async def test_a_refused_call_is_a_span_that_says_so(tickets: Office, traced: Collector) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        await client.post("/v1/indexes/nothing/search", json={"query": "a"})
        await client.post(SEARCH, json={"query": "a", "k": 0})
    calls = traced.named("cdcsync.serve.search")
    assert [(span.error, span.attributes) for span in calls] == [
        ("Problem", {}),
        ("Problem", {"cdcsync.index": "tickets"}),
    ]


async def test_the_statement_names_its_span_to_the_server(tickets: Office, traced: Collector) -> None:
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync serve' AND state = 'active'"
        f" AND query LIKE '%/*traceparent=''00-{TRACE}-%'"
    )
    async with served(tickets.serving(anonymous=True)) as client, anyio.create_task_group() as tasks:
        await ask(client, "printer")
        with psycopg.connect(tickets.database.dsn) as locking:
            locking.execute("LOCK TABLE cdcsync.tickets_chunks")
            tasks.start_soon(ask, client, "printer")
            seen = partial(until, lambda: tickets.database.execute(running) == [(1,)], "the statement with its span")
            await anyio.to_thread.run_sync(seen)
