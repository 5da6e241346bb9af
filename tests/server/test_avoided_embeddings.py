"""Every reason for which a text needs no call of the model: none is made, and it is counted which one it was."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psycopg
import pytest

from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider, slow
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server


def counted(pipeline: Pipeline) -> dict[str, float]:
    """Return the worker's counters of texts that needed no call, by what this file calls the reason."""
    names = {
        'cdcsync_documents_unchanged_total{index="articles"}': "unchanged",
        'cdcsync_vectors_total{index="articles",way="reused"}': "reused",
    }
    for reason in ("current", "shared", "superseded"):
        names[f'cdcsync_embed_avoided_texts_total{{embedder="hosted",reason="{reason}"}}'] = reason
    lines = [line.rpartition(" ") for line in pipeline.metrics()]
    found = {names[name]: float(value) for name, _, value in lines if name in names}
    return dict.fromkeys(names.values(), 0.0) | found


EMBEDDED = "SELECT count(*) FROM articles_index WHERE id BETWEEN 30 AND 49"

WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'cdcsync%' AND wait_event_type = 'Lock'
"""


def settle(pipeline: Pipeline) -> None:
    """Wait until nothing is left to apply or to embed. (The oracle would ask the provider, too.)"""
    pipeline.reach("articles")
    until(
        lambda: pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() == (0,), "vectors"
    )


def write(pipeline: Pipeline, *statements: str) -> None:
    """Commit each statement alone, and wait until the worker has applied it."""
    for statement in statements:
        pipeline.source.execute(statement)
        pipeline.reach("articles")


def test_each_reason_for_which_no_call_is_made_is_counted(
    make_pipeline: Callable[[str], Pipeline], database: Database, provider: FakeProvider
) -> None:
    pipeline = make_pipeline(
        configuration(
            database.dsn,
            worker_lines='batch_rows = 10\nlog_level = "debug"',
            embedders={"hosted": {**hosted(provider.url), "concurrency": 1, "batch_texts": 2}},
            indexes={"articles": {"text": "{body}", "columns": ["tenant"], "inline_budget_ms": 0}},
        )
    )
    pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 1, 'article ' || i FROM generate_series(1, 6) AS i")
    worker = pipeline.start()
    pipeline.live()
    settle(pipeline)
    before = counted(pipeline)

    def more(reason: str) -> float:
        return counted(pipeline)[reason] - before[reason]

    # Metadata only, and the same text again.
    write(pipeline, "UPDATE articles SET tenant = 2", "UPDATE articles SET body = body WHERE id = 1")
    # A batch is counted just after it is committed, which is what `reach` waits for.
    until(lambda: more("unchanged") == 7, "unchanged documents to be counted")

    # The text of another row, and of the same row under another key.
    write(pipeline, "INSERT INTO articles VALUES (7, 1, 'article 1')", "UPDATE articles SET id = 102 WHERE id = 2")
    until(lambda: more("reused") == 2, "reused vectors to be counted")

    # Two rows with one new text.
    write(pipeline, "INSERT INTO articles VALUES (8, 1, 'twice'), (9, 1, 'twice')")
    settle(pipeline)
    assert more("shared") == 1

    # While the provider holds the first of several calls, a text that waits its turn changes, and another comes back
    # to what has a vector.
    provider.always = slow
    held = len(provider.requests)
    write(pipeline, "INSERT INTO articles SELECT i, 1, repeat('waits ', i) FROM generate_series(11, 18) AS i")
    until(lambda: len(provider.requests) > held, "a call that is held")
    write(
        pipeline,
        "UPDATE articles SET body = 'it changed' WHERE id = 18",
        "UPDATE articles SET body = 'never embedded' WHERE id = 3",
        "UPDATE articles SET body = 'article 3' WHERE id = 3",
    )
    assert more("current") == 1
    provider.always = None
    provider.released.set()
    settle(pipeline)
    assert more("superseded") == 1

    # A replay reads every row again.
    unchanged = counted(pipeline)["unchanged"]
    assert pipeline.command("replay", "articles").returncode == 0
    until(lambda: counted(pipeline)["unchanged"] - unchanged == 17, "what is replayed to be counted")

    # The worker is killed with a transaction half applied, which is delivered again whole.
    with psycopg.connect(database.dsn) as other:
        other.execute(
            "INSERT INTO cdcsync.articles_chunks (id, chunk_no, content, content_hash, document_hash, commit_lsn)"
            " VALUES (50, 0, '', '', '', '0/0')"
        )
        pipeline.source.execute("INSERT INTO articles SELECT i, 1, 'large ' || i FROM generate_series(30, 50) AS i")
        until(
            lambda: pipeline.source.execute(WAITING).fetchone() != (0,), "the last part to wait for the other session"
        )
        # A call that is under way when the worker dies has to be made again.
        until(lambda: pipeline.target.execute(EMBEDDED).fetchone() == (20,), "the vectors of the other parts")
        pipeline.stop(worker, signal.SIGKILL)
        other.rollback()
    pipeline.start()
    settle(pipeline)
    until(lambda: counted(pipeline)["unchanged"] == 20, "what is delivered again to be counted")

    texts = {text: times for text, times in provider.embedded.items() if text != "word"}
    assert texts.keys() == {
        *(f"article {number}" for number in range(1, 7)),
        "twice",
        *(("waits " * number).strip() for number in range(11, 18)),
        "it changed",
        *(f"large {number}" for number in range(30, 51)),
    }
    assert {text: times for text, times in texts.items() if times > 1} == {}
    pipeline.compare()
