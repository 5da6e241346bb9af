"""Spans of a real worker, as a collector receives them: whose children they are, and what they tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.collectors import Collector, Span
from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
OTHER_TRACE = "1bf7651916cd43dd8448eb211c80319d"
OTHER_PARENT = "c7ad6b7169203332"


@pytest.fixture
def make(
    database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider
) -> Callable[..., Pipeline]:
    def made(*, inline: int) -> Pipeline:
        articles = {"text": "{body}", "columns": ["tenant"], "inline_budget_ms": inline}
        text = configuration(database.dsn, embedders={"hosted": hosted(provider.url)}, indexes={"articles": articles})
        pipeline = make_pipeline(text)
        pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, body text)")
        return pipeline

    return made


def environment(collector: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}


def change(pipeline: Pipeline, traceparent: str | None, statement: str) -> None:
    """Change something in one transaction, as an application that traces does."""
    with pipeline.source.transaction():
        if traceparent is not None:
            pipeline.source.execute("SELECT pg_logical_emit_message(true, 'traceparent', %s)", [traceparent])
        pipeline.source.execute(statement)


def of(collector: Collector, trace: str, name: str) -> list[Span]:
    return [span for span in collector.named(name) if span.trace == trace]


def test_what_a_traced_transaction_causes_is_in_its_trace(
    make: Callable[..., Pipeline], provider: FakeProvider, collector: Collector
) -> None:
    pipeline = make(inline=0)
    worker = pipeline.start(**environment(collector))
    pipeline.live()
    pipeline.event("tracing_on")
    change(pipeline, f"00-{TRACE}-{PARENT}-01", "INSERT INTO articles VALUES (1, 424242, 'planted secret one')")
    pipeline.in_step(vectors=False)
    until(lambda: of(collector, TRACE, "cdcsync.embed"), "the span of the embedding")
    change(pipeline, f"00-{OTHER_TRACE}-{OTHER_PARENT}-01", "UPDATE articles SET tenant = 434343")
    until(lambda: of(collector, OTHER_TRACE, "cdcsync.apply"), "the span of the second application")
    assert pipeline.stop(worker) == 0

    (applied,) = of(collector, TRACE, "cdcsync.apply")
    (embedded,) = of(collector, TRACE, "cdcsync.embed")
    assert applied.parent == embedded.parent == PARENT
    assert embedded.attributes == {"cdcsync.embedder": "hosted", "cdcsync.texts": 1}
    (batch,) = (span for span in collector.named("cdcsync.batch") if (TRACE, PARENT) in span.links)
    (call,) = (span for span in collector.named("cdcsync.call") if (TRACE, PARENT) in span.links)
    assert applied.links == ((batch.trace, batch.id),)
    assert embedded.links == ((call.trace, call.id),)
    assert batch.attributes == {"cdcsync.rows": 1, "cdcsync.transactions": 1}
    steps = {span.name: span for span in collector.spans if span.parent == batch.id}
    assert steps["cdcsync.prepare"].attributes == {"cdcsync.index": "articles"}
    assert "cdcsync.commit" in steps
    assert batch.trace != TRACE
    assert all(span.seconds >= 0 and span.service == "cdcsync" for span in collector.spans)
    # The second one changed no text: applied, and not embedded.
    assert [span.name for span in collector.spans if span.trace == OTHER_TRACE] == ["cdcsync.apply"]
    sent = b"".join(collector.bodies)
    assert not any(value in sent for value in (b"planted", b"424242", b"434343"))


def test_a_change_of_a_related_row_has_the_spans_of_the_documents_that_it_belongs_to(
    database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider, collector: Collector
) -> None:
    relation = {"table": "comments", "on": {"ticket_id": "id"}, "text": "{body}", "order_by": "id"}
    tickets = {"text": "{title} {comments}", "inline_budget_ms": 0, "related": {"comments": relation}}
    text = configuration(database.dsn, embedders={"hosted": hosted(provider.url)}, indexes={"tickets": tickets})
    pipeline = make_pipeline(text)
    pipeline.source.execute("CREATE TABLE tickets (id bigint PRIMARY KEY, title text)")
    pipeline.source.execute("CREATE TABLE comments (id bigint PRIMARY KEY, ticket_id bigint, body text)")
    pipeline.source.execute("ALTER TABLE comments REPLICA IDENTITY FULL")
    pipeline.source.execute("INSERT INTO tickets SELECT i, 'ticket ' || i FROM generate_series(1, 3) i")
    pipeline.source.execute("INSERT INTO comments VALUES (1, 1, 'planted secret one')")
    worker = pipeline.start(**environment(collector))
    pipeline.live()
    change(pipeline, f"00-{TRACE}-{PARENT}-01", "UPDATE comments SET ticket_id = 2, body = 'planted secret two'")
    pipeline.reach("tickets")
    until(lambda: of(collector, TRACE, "cdcsync.embed"), "the span of the embedding")
    # Of a ticket that is not there, and so of no document.
    change(pipeline, f"00-{OTHER_TRACE}-{OTHER_PARENT}-01", "INSERT INTO comments VALUES (424242, 434343, 'secret')")
    until(lambda: of(collector, OTHER_TRACE, "cdcsync.apply"), "the span of the second application")
    assert pipeline.stop(worker) == 0

    (applied,) = of(collector, TRACE, "cdcsync.apply")
    (embedded,) = of(collector, TRACE, "cdcsync.embed")
    assert applied.parent == embedded.parent == PARENT
    assert embedded.attributes == {"cdcsync.embedder": "hosted", "cdcsync.texts": 2}
    (batch,) = (span for span in collector.named("cdcsync.batch") if (TRACE, PARENT) in span.links)
    assert applied.links == ((batch.trace, batch.id),)
    steps = {span.name: span for span in collector.spans if span.parent == batch.id}
    assert steps["cdcsync.prepare"].attributes == {"cdcsync.index": "tickets"}
    assert [span.name for span in collector.spans if span.trace == OTHER_TRACE] == ["cdcsync.apply"]
    sent = b"".join(collector.bodies)
    assert not any(value in sent for value in (b"planted", b"424242", b"434343", b"ticket 1"))


def test_what_is_no_trace_context_is_as_if_it_were_not_there(
    make: Callable[..., Pipeline], collector: Collector
) -> None:
    pipeline = make(inline=2_000)
    worker = pipeline.start(**environment(collector))
    pipeline.live()
    bad = ("", "00-0-0-01", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "ü" * 5_000)
    for number, text in enumerate(bad):
        change(pipeline, text, f"INSERT INTO articles VALUES ({number}, 1, 'text {number}')")
    # Outside of any transaction it belongs to none; and what was rolled back was never there.
    pipeline.source.execute(f"SELECT pg_logical_emit_message(false, 'traceparent', '00-{TRACE}-{PARENT}-01')")
    pipeline.source.execute(
        f"BEGIN; SELECT pg_logical_emit_message(true, 'traceparent', '00-{TRACE}-{PARENT}-01');"
        " INSERT INTO articles VALUES (90, 1, 'gone'); ROLLBACK"
    )
    change(pipeline, None, "INSERT INTO articles VALUES (91, 1, 'without')")
    # The caller samples: what it does not record, nobody does.
    change(pipeline, f"00-{OTHER_TRACE}-{OTHER_PARENT}-00", "INSERT INTO articles VALUES (92, 1, 'not sampled')")
    pipeline.in_step(vectors=False)
    assert pipeline.stop(worker) == 0

    assert collector.named("cdcsync.batch")
    assert not of(collector, TRACE, "cdcsync.apply")
    assert not of(collector, OTHER_TRACE, "cdcsync.apply")
    assert all(link == (OTHER_TRACE, OTHER_PARENT) for span in collector.spans for link in span.links)


def test_vectors_made_inline_are_in_the_trace_too_and_failed_calls_say_their_kind(
    make: Callable[..., Pipeline], provider: FakeProvider, collector: Collector
) -> None:
    pipeline = make(inline=5_000)
    worker = pipeline.start(**environment(collector))
    pipeline.live()
    pipeline.event("embedder_ready")
    change(pipeline, f"00-{TRACE}-{PARENT}-01", "INSERT INTO articles VALUES (1, 1, 'inline')")
    pipeline.in_step(vectors=False)
    until(lambda: of(collector, TRACE, "cdcsync.embed"), "the span of the embedding")
    provider.rejects = lambda text: "poison" in text
    change(pipeline, f"00-{OTHER_TRACE}-{OTHER_PARENT}-01", "INSERT INTO articles VALUES (2, 1, 'poison')")
    until(lambda: [span for span in collector.named("cdcsync.call") if span.error], "the span of a failed call")
    assert pipeline.stop(worker) == 0

    (call,) = (span for span in collector.named("cdcsync.call") if (TRACE, PARENT) in span.links)
    (batch,) = (span for span in collector.named("cdcsync.batch") if (TRACE, PARENT) in span.links)
    assert call.trace == batch.trace
    assert {span.error for span in collector.named("cdcsync.call")} == {None, "TextRejected"}
    assert not of(collector, OTHER_TRACE, "cdcsync.embed")
    assert not any(b"poison" in body for body in collector.bodies)


def test_a_collector_that_is_away_changes_nothing_else(make: Callable[..., Pipeline], collector: Collector) -> None:
    collector.close()
    pipeline = make(inline=0)
    worker = pipeline.start(**environment(collector))
    pipeline.live()
    change(pipeline, f"00-{TRACE}-{PARENT}-01", "INSERT INTO articles VALUES (1, 1, 'one')")
    pipeline.in_step(vectors=False)
    assert pipeline.stop(worker) == 0
