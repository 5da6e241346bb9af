"""The worker with a provider that refuses texts or is away: what can go on goes on, and no text is paid for twice."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider, Misdeed, meeting, status, wrong_dimension
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider) -> Pipeline:
    made = make_pipeline(
        configuration(
            database.dsn,
            worker_lines='log_level = "debug"',
            embedders={"hosted": {**hosted(provider.url), "api_key": "sk-very-secret-0123456789"}},
            indexes={"articles": {"text": "{body}", "columns": ["tenant"]}},
        )
    )
    made.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, body text)")
    made.source.execute(
        "INSERT INTO articles SELECT i, i % 3, 'article number ' || i FROM generate_series(1, 200) AS i"
    )
    return made


def failed(pipeline: Pipeline) -> float:
    return chunks(pipeline, "failed")


def chunks(pipeline: Pipeline, kind: str) -> float:
    _, body = pipeline.get("/metrics")
    lines = [line for line in body.decode().splitlines() if line.startswith(f"cdcsync_{kind}_chunks{{")]
    return float(lines[0].split()[-1]) if lines else -1.0


def vector_of(pipeline: Pipeline, key: int) -> Any:
    return pipeline.target.execute("SELECT embedding::text FROM articles_index WHERE id = %s", [key]).fetchone()


def test_a_refused_text_waits_with_its_error_and_all_others_go_on(pipeline: Pipeline, provider: FakeProvider) -> None:
    poison = {"article number 7", "article number 130"}
    provider.rejects = lambda text: text in poison
    pipeline.start()
    pipeline.live()
    pipeline.in_step(vectors=False)
    until(lambda: failed(pipeline) == 2, "two failures")

    found = pipeline.answer("failures", "articles", "list")

    assert [(one["key"], one["chunk_no"], one["attempts"], one["next_attempt_at"]) for one in found] == [
        ({"id": "7"}, 0, 8, None),
        ({"id": "130"}, 0, 8, None),
    ]
    assert all("400" in one["error"] and "article number" not in one["error"] for one in found)
    assert pipeline.target.execute("SELECT count(*) FROM articles_index").fetchone() == (198,)
    assert provider.embedded.keys() & poison == set()
    assert {text: count for text, count in provider.embedded.items() if count > 1 and text != "word"} == {}

    provider.rejects = lambda text: text == "article number 130"
    assert pipeline.answer("failures", "articles", "retry") == {"retry": 2}
    until(lambda: vector_of(pipeline, 7), "the vector of a text that is taken now")
    until(lambda: failed(pipeline) == 1, "one failure")
    assert pipeline.answer("failures", "articles", "discard") == {"discard": 1}
    assert pipeline.answer("failures", "articles", "list") == []
    until(lambda: (failed(pipeline), chunks(pipeline, "discarded")) == (0, 1), "no failure")

    pipeline.source.execute("UPDATE articles SET body = 'something else' WHERE id = 130")
    pipeline.in_step()
    until(lambda: chunks(pipeline, "discarded") == 0, "nothing discarded")
    log = pipeline.log.read_text()
    assert "article number" not in log
    assert "very-secret" not in log


def test_a_backlog_is_embedded_over_as_many_connections_as_are_allowed(
    pipeline: Pipeline, provider: FakeProvider
) -> None:
    together = meeting(4)
    provider.misdeeds.extend([together] * 4)
    pipeline.start()
    pipeline.live()
    until(lambda: len(provider.embedded) >= 200 and backlog(pipeline) == 0, "the vectors")

    assert provider.most_at_once == 4
    assert set(provider.embedded.values()) == {1}
    pipeline.in_step()


def waiting_for_vectors(pipeline: Pipeline, provider: FakeProvider) -> None:
    """Start a worker, and have every text of the index wait for another vector while the provider is away."""
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    provider.stop()
    pipeline.source.execute("UPDATE articles SET body = 'another ' || body")
    pipeline.in_step(vectors=False)


@pytest.mark.proof
@pytest.mark.parametrize(("table", "mode"), [("vectors_1_fresh", "SHARE"), ("backlog", "ACCESS EXCLUSIVE")])
def test_vectors_that_cannot_be_stored_are_kept_and_take_no_connection_from_another_index(
    pipeline: Pipeline, provider: FakeProvider, table: str, mode: str
) -> None:
    pipeline.source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
    notes = '\n[indexes.notes]\ntable = "notes"\ntext = "{body}"\nembedder = "hosted"\n'
    pipeline.configure(pipeline.path.read_text() + notes)
    # What is to be stored is kept by who made it, not by a memory that others fill.
    dispatcher = "cdcsync.flows.embed.dispatcher"
    pipeline.hurry = {f"{dispatcher}.REMEMBERED_BYTES": 1, f"{dispatcher}.REMEMBERED_VECTORS": 1}
    pipeline.hurry |= {"cdcsync.status.stream.LOCKED_S": 0.1}
    waiting_for_vectors(pipeline, provider)
    let, asked = threading.Event(), threading.Event()

    def late(exchange: Any, texts: Any) -> None:
        if any(text.startswith("another") for text in texts):
            asked.set()
            let.wait(60)
        exchange.embed(exchange.provider.vectors(texts))

    provider.misdeeds.extend([late] * 20)
    provider.start()
    until(asked.is_set, "a call for vectors")
    with psycopg.connect(pipeline.config.target.dsn) as holder:
        holder.execute(f"LOCK TABLE cdcsync.articles_{table} IN {mode} MODE".encode())
        provider.misdeeds.clear()
        let.set()
        until(lambda: pipeline.times("backlog_locked") > 2, pipeline.tail)
        told = f"cdcsync.articles_{table} is locked by pid {holder.info.backend_pid}"
        logged = [one for one in pipeline.events() if one["event"] == "backlog_locked"]
        assert [one["attempt"] for one in logged] == [at + 1 for at in range(len(logged))]
        assert all(any(told in lock for lock in one["locks"]) for one in logged)
        until(lambda: any(told in one for one in json.loads(pipeline.get("/readyz")[1])["reasons"]), pipeline.tail)
        pipeline.source.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 100) AS i")
        pipeline.in_step("notes")
    until(lambda: backlog(pipeline) == 0, "the vectors")
    assert {times for text, times in provider.embedded.items() if text.startswith("another")} == {1}
    pipeline.in_step()


@pytest.mark.proof
def test_rows_of_the_backlog_that_another_session_holds_are_waited_for_and_hold_up_nothing_else(
    pipeline: Pipeline, provider: FakeProvider
) -> None:
    # More rows are held than a window has.
    pipeline.hurry = {"cdcsync.flows.embed.pace.WINDOW_TEXTS": 16, "cdcsync.flows.embed.pace.MOST_WINDOWS": 4}
    waiting_for_vectors(pipeline, provider)
    refused = Counter[str]()

    def refuse(text: str) -> bool:
        refused[text] += text.endswith("7")
        return text.endswith("7")

    provider.rejects = refuse
    with psycopg.connect(pipeline.config.target.dsn) as holder:
        held = holder.execute("SELECT FROM cdcsync.articles_backlog FOR UPDATE").rowcount
        provider.start()
        until(lambda: pipeline.times("backlog_locked") > 0, pipeline.tail)
        told = f"cdcsync.articles_backlog is locked by pid {holder.info.backend_pid}"
        until(lambda: any(told in one for one in json.loads(pipeline.get("/readyz")[1])["reasons"]), pipeline.tail)
        asked = refused.total()
        pipeline.source.execute("INSERT INTO articles VALUES (1000, 1, 'as new as can be')")
        until(lambda: vector_of(pipeline, 1000) != (None,), pipeline.tail)
        until(lambda: pipeline.times("backlog_locked") > 1, pipeline.tail)
        logged = [one for one in pipeline.events() if one["event"] == "backlog_locked"]
        assert [one["attempt"] for one in logged] == [at + 1 for at in range(len(logged))]
        assert all(any(told in lock for lock in one["locks"]) for one in logged)
        assert refused.total() == asked, "what cannot be noted is not tried again"
        assert backlog(pipeline) == held
        provider.rejects = lambda text: False
    until(lambda: backlog(pipeline) == 0, "the vectors")
    assert {times for text, times in provider.embedded.items() if text.startswith("another")} == {1}
    pipeline.in_step()
    until(lambda: json.loads(pipeline.get("/readyz")[1])["reasons"] == [], pipeline.tail)


@pytest.mark.parametrize("type_", ["bigint", "numeric", "citext"])
def test_a_text_that_waits_while_its_row_gets_another_key_is_still_waited_for(
    pipeline: Pipeline, provider: FakeProvider, type_: str
) -> None:
    pipeline.source.execute("TRUNCATE articles")
    pipeline.source.execute("CREATE EXTENSION IF NOT EXISTS citext")
    pipeline.source.execute(f"ALTER TABLE articles ALTER id TYPE {type_} USING id::text::{type_}".encode())
    before, after = {"bigint": ("1", "2"), "numeric": ("1.0", "1.00"), "citext": ("a", "A")}[type_]
    pipeline.start()
    pipeline.live()
    provider.stop()
    pipeline.source.execute("INSERT INTO articles VALUES (%s, 1, 'waits')", [before])
    (there,) = pipeline.source.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or (None,)
    pipeline.in_step(vectors=False)

    pipeline.source.execute("UPDATE articles SET id = %s", [after])
    pipeline.in_step(vectors=False)

    waits = "SELECT cdcsync.wait_for('articles', %s::text::pg_lsn, '0 s', vectors => %s)"
    assert pipeline.target.execute("SELECT id::text FROM articles_index_chunks").fetchall() == [(after,)]
    assert pipeline.target.execute(waits, [there, False]).fetchone() == (True,)
    assert pipeline.target.execute(waits, [there, True]).fetchone() == (False,)


def test_an_outage_costs_vectors_their_freshness_and_nothing_else(pipeline: Pipeline, provider: FakeProvider) -> None:
    pipeline.start()
    pipeline.live()
    pipeline.in_step(vectors=False)
    until(lambda: len(provider.embedded) >= 200 and backlog(pipeline) == 0, "the first vectors")

    provider.stop()
    for number in range(30):
        with pipeline.source.transaction():
            pipeline.source.execute(
                "UPDATE articles SET body = %s WHERE id = %s", [f"changed in the outage {number}", number + 1]
            )
            pipeline.source.execute("UPDATE articles SET tenant = 9 WHERE id = %s", [number + 100])
            pipeline.source.execute("DELETE FROM articles WHERE id = %s", [number + 50])
        pipeline.source.execute(
            "INSERT INTO articles VALUES (%s, 1, %s)", [1000 + number, f"new in the outage {number}"]
        )
    pipeline.event("embedder_unavailable")
    pipeline.in_step(vectors=False)
    (end,) = pipeline.source.execute("SELECT pg_current_wal_lsn()::text").fetchone() or (None,)
    until(
        lambda: (
            pipeline.source.execute(
                "SELECT FROM pg_replication_slots WHERE slot_name = %s AND confirmed_flush_lsn >= %s",
                [pipeline.config.source.slot, end],
            ).fetchone()
            is not None
        ),
        "the slot to be let go",
    )
    hits = pipeline.answer("search", "articles", "outage", "--mode", "text", "-k", "100")
    assert len(hits) == 60
    assert pipeline.target.execute("SELECT count(*) FROM articles_index WHERE id BETWEEN 50 AND 79").fetchone() == (0,)
    assert pipeline.target.execute(
        "SELECT count(*), count(*) FILTER (WHERE tenant = 9) FROM articles_index WHERE id BETWEEN 100 AND 129"
    ).fetchone() == (30, 30)
    assert pipeline.target.execute("SELECT count(*) FROM articles_index WHERE stale").fetchone() == (30,)
    assert backlog(pipeline) == 60

    provider.start()
    until(lambda: backlog(pipeline) == 0, "the vectors to catch up", patience_s=80)

    twice = {text: count for text, count in provider.embedded.items() if count > 1}
    assert twice == {}
    assert sum("outage" in text for text in provider.embedded) == 60
    assert failed(pipeline) == 0
    pipeline.in_step()


@pytest.mark.parametrize(
    "misdeed",
    [status(401, {"error": {"message": "no such key"}}), wrong_dimension, status(429, retry_after="1800")],
    ids=["a wrong key", "another model", "no quota"],
)
def test_trouble_is_told_everywhere_and_is_that_of_one_embedder(
    pipeline: Pipeline, provider: FakeProvider, misdeed: Misdeed
) -> None:
    pipeline.path.write_text(
        pipeline.path.read_text()
        + '[embedders.words]\ntype = "hash"\n[indexes.beside]\ntable = "articles"\n'
        + 'text = "{body}"\nembedder = "words"\n'
    )
    provider.always = misdeed
    pipeline.start()
    until(lambda: "embedder hosted: " in pipeline.get("/readyz")[1].decode(), pipeline.tail)
    until(lambda: told(pipeline)["problem"] is not None, pipeline.tail)

    code, _ = pipeline.get("/readyz")
    assert code == 503
    state = told(pipeline)
    assert state["tried_again_at"] > state["since"]
    assert any("embedder hosted: " in problem for problem in json.loads(pipeline.get("/status")[1])["problems"])
    assert json.loads(pipeline.get("/status")[1])["embedders"]["words"]["problem"] is None
    metrics = pipeline.get("/metrics")[1].decode()
    assert 'cdcsync_embedder_problem{embedder="hosted"} 1.0' in metrics
    assert 'cdcsync_embedder_problem{embedder="words"} 0.0' in metrics
    pipeline.source.execute("INSERT INTO articles VALUES (900, 1, 'new')")
    until(
        lambda: pipeline.target.execute("SELECT FROM beside_index WHERE id = 900").fetchone() is not None,
        "the index beside",
    )
    assert failed(pipeline) == 0


def told(pipeline: Pipeline) -> Any:
    """Return what the status tells of the embedder `hosted`."""
    return json.loads(pipeline.get("/status")[1])["embedders"]["hosted"]


def test_texts_that_changed_while_the_worker_was_away_are_embedded_once_as_they_are_now(
    pipeline: Pipeline, provider: FakeProvider
) -> None:
    worker = pipeline.start()
    pipeline.live()
    until(lambda: len(provider.embedded) >= 200 and backlog(pipeline) == 0, "the first vectors")
    pipeline.stop(worker)
    known = set(provider.embedded)
    for number in range(25):
        with pipeline.source.transaction():
            pipeline.source.execute("UPDATE articles SET tenant = tenant + 1 WHERE id % 2 = 0")
            pipeline.source.execute("UPDATE articles SET body = %s || id WHERE id <= 40", [f"round {number} of "])
    # Equal texts, a moved key, and one that is again what it was.
    pipeline.source.execute("UPDATE articles SET body = 'the same' WHERE id BETWEEN 30 AND 35")
    pipeline.source.execute("UPDATE articles SET id = 5000 WHERE id = 150")
    pipeline.source.execute("UPDATE articles SET body = 'for a moment' WHERE id = 160")
    pipeline.source.execute("UPDATE articles SET body = 'article number 160' WHERE id = 160")
    texts = {row[0] for row in pipeline.source.execute("SELECT body FROM articles")}

    pipeline.start()
    pipeline.in_step(vectors=False)
    until(lambda: backlog(pipeline) == 0, "the vectors to catch up")

    assert set(provider.embedded) - known == texts - known
    assert {text: count for text, count in provider.embedded.items() if count > 1} == {}
    pipeline.in_step()


def backlog(pipeline: Pipeline) -> int:
    (count,) = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() or (0,)
    return int(count)
