"""Filling a generation beside the one that is live."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.migrations import (
    NEW,
    OLD,
    asks_for,
    complete,
    hashed,
    loaded,
    migrate,
    of_model,
    of_the_old_model,
    ready,
    refused,
    turned,
)
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


CHANGED: dict[str, Section] = {
    "halves": {"vector_type": "halfvec"},
    "farther": {"distance": "l2"},
    "denser": {"hnsw": {"m": 24, "ef_construction": 100}},
    "signs": {"hnsw": {"quantise": "binary"}},
}


@pytest.mark.proof
def test_precision_distance_and_graph_change_without_a_text_embedded_again(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    embedders = {"fake": hashed(8)}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders, indexes={one: {} for one in CHANGED}))
    loaded(pipeline, *CHANGED, rows=50)
    asks_for(pipeline, configuration(database.dsn, embedders=embedders, indexes=CHANGED))
    for index in CHANGED:
        assert migrate(pipeline, "start", index=index)["tokens"] == 0
    ready(pipeline, 2, *CHANGED)
    embedded = [line for line in pipeline.metrics() if line.startswith("cdcsync_embed_texts_total{")]
    assert [float(line.split()[-1]) for line in embedded] in ([], [0.0])
    for index in CHANGED:
        pipeline.source.execute(f"UPDATE {index} SET title = title || ', changed' WHERE id % 7 = 0")
        assert migrate(pipeline, "activate", index=index)["quality"]["overlap"] is not None
    pipeline.in_step("farther", "denser", "signs")
    for index in CHANGED:
        pipeline.reach(index)
        complete(pipeline, 1, index)
        complete(pipeline, 2, index)

    def definition(index: str) -> str:
        row = pipeline.target.execute(
            "SELECT pg_get_indexdef(to_regclass(%s))", [f"cdcsync.{index}_vectors_2_hnsw"]
        ).fetchone()
        assert row is not None
        return str(row[0])

    assert "halfvec_cosine_ops" in definition("halves")
    assert "vector_l2_ops" in definition("farther")
    assert "m='24', ef_construction='100'" in definition("denser")
    assert "(((binary_quantize(embedding))::bit(8)) bit_hamming_ops)" in definition("signs")


@pytest.mark.proof
def test_texts_that_are_discarded_during_a_fill_do_not_begin_it_again(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    refusing: Section = {"type": "python", "class": "tests.support.turned:Refusing", "options": {"way": "b"}}
    models = {"old": turned(OLD), "refusing": refusing}
    pipeline = make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)}))
    loaded(pipeline, "articles", rows=20)
    asks_for(pipeline, configuration(database.dsn, embedders=models, indexes={"articles": {"embedder": "refusing"}}))
    migrate(pipeline, "start", "--max-rows-per-s", "2")

    def discard() -> int:
        return int(pipeline.answer("failures", "articles", "discard", PYTHONPATH=str(ROOT))["discard"])

    first = until(discard, lambda: f"a text that is refused; {pipeline.tail()}")
    assert first < 20
    migrate(pipeline, "start", "--max-rows-per-s", "1000")
    ready(pipeline, 2)
    assert "migration_incomplete" not in pipeline.log.read_text()
    rest = discard()
    assert first + rest == 20
    told = refused(pipeline, "activate")
    assert "generation 2 lacks the vectors of 20 of 20 chunks (0 failed, 0 wait, 20 discarded)" in told
    assert "cdcsync failures articles retry --discarded" in told
    assert migrate(pipeline, "activate", "--yes")["live"] == 2


HOLDS = {
    "an older snapshot": "the build waits for the open transaction of the target's session with pid {pid}; end that",
    "a writer": "cdcsync.articles_vectors_2_settled is locked by pid {pid}",
}


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("what", HOLDS)
def test_a_build_that_waits_for_a_transaction_says_for_which_and_stops_nobody(
    what: str, database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = of_the_old_model(make_pipeline, database)
    with psycopg.connect(pipeline.config.target.dsn) as holding:
        holding.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        pipeline.target.execute("CREATE TABLE cdcsync.articles_vectors_2_hnsw ()")
        migrate(pipeline, "start")
        until(lambda: migrate(pipeline, "status")[1]["reason"] is not None, pipeline.tail)
        why = HOLDS[what].format(pid=holding.info.backend_pid)

        def said() -> bool:
            return why in (migrate(pipeline, "status")[1]["reason"] or "")

        if what == "a writer":
            holding.execute("LOCK TABLE cdcsync.articles_vectors_2_settled IN ROW EXCLUSIVE MODE")
            until(said, pipeline.tail)  # no attempt that has seen the table free is under way any more
        else:
            holding.execute("SELECT")
        pipeline.target.execute("DROP TABLE cdcsync.articles_vectors_2_hnsw")
        until(said, pipeline.tail)
        told = f"index articles: generation 2 cannot be filled or built now, which is tried again: {why}"
        until(lambda: any(told in problem for problem in pipeline.answer("status")["problems"]), pipeline.tail)
        assert pipeline.answer("status")["indexes"]["articles"]["state"] == "live"
        pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
        pipeline.in_step("articles", vectors=False)
        complete(pipeline, 1)
        complete(pipeline, 2)
        of_model(pipeline, 1, OLD)
        of_model(pipeline, 2, NEW)
    ready(pipeline, 2)
    assert migrate(pipeline, "status")[1]["reason"] is None


@pytest.mark.proof
def test_a_generation_whose_graph_the_target_refuses_is_tried_again_and_stops_nobody(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = {"old": hashed(8), "new": hashed(12)}
    now: dict[str, Section] = {"articles": {"embedder": "old"}, "notes": {"embedder": "old"}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=both, indexes=now))
    loaded(pipeline, "articles", "notes", rows=20)
    wanted: dict[str, Section] = {"articles": {"embedder": "new"}, "notes": {"embedder": "old"}}
    asks_for(pipeline, configuration(database.dsn, embedders=both, indexes=wanted))
    pipeline.target.execute("CREATE TABLE cdcsync.articles_vectors_2_hnsw ()")
    migrate(pipeline, "start")

    refusal = 'relation "articles_vectors_2_hnsw" already exists'
    until(lambda: migrate(pipeline, "status")[1]["reason"] == refusal, pipeline.tail)
    assert any(refusal in problem for problem in pipeline.answer("status")["problems"])
    pipeline.source.execute("UPDATE articles SET title = title || ' changed'")
    pipeline.source.execute("UPDATE notes SET title = title || ' changed'")
    pipeline.in_step("notes")
    pipeline.target.execute("DROP TABLE cdcsync.articles_vectors_2_hnsw")
    ready(pipeline, 2)
    assert migrate(pipeline, "status")[1]["reason"] is None
    complete(pipeline, 2)
    assert pipeline.answer("plan", status=3)["generations"] == []

    asks_for(pipeline, configuration(database.dsn, embedders=both, indexes=now))
    (spare,) = pipeline.answer("plan")["generations"]
    assert (spare["generation"], spare["command"]) == (2, "cdcsync migrate articles drop"), "nobody asks for it now"
