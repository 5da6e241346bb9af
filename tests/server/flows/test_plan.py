"""`cdcsync plan`, and indexes that wait for an approval of what they embed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server

ROWS = 20


def plan(pipeline: Pipeline, status: int = 3) -> dict[str, Any]:
    """Return the plan, its indexes by name."""
    found: dict[str, Any] = pipeline.answer("plan", status=status)
    return found | {"indexes": {one["index"]: one for one in found.get("indexes", [])}}


def write(pipeline: Pipeline, database: Database, **indexes: Mapping[str, object]) -> None:
    """Write another configuration; the worker reads it at its next start."""
    pipeline.configure(configuration(database.dsn, indexes=indexes))


def state(pipeline: Pipeline, index: str) -> tuple[str, str | None]:
    row = pipeline.target.execute("SELECT state, reason FROM cdcsync.indexes WHERE name = %s", [index]).fetchone()
    return ("absent", None) if row is None else (row[0], row[1])


def kinds(pipeline: Pipeline, index: str) -> list[str]:
    rows = pipeline.target.execute("SELECT kind FROM cdcsync.backfills WHERE index_name = %s ORDER BY id", [index])
    return [kind for (kind,) in rows.fetchall()]


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Two tables, of which every row has a text of its own but for one pair."""
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": {}, "notes": {}}))
    for table in ("articles", "notes"):
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text, body text)")
        pipeline.source.execute(
            f"INSERT INTO {table} SELECT i, 'title ' || i, 'body ' || greatest(i, 2) FROM generate_series(1, {ROWS}) i"
        )
    return pipeline


def test_a_plan_tells_what_run_does_before_and_nothing_after(pipeline: Pipeline, database: Database) -> None:
    write(pipeline, database, articles={"text": "{body}"}, notes={})
    found = plan(pipeline)
    articles = found["indexes"]["articles"]
    assert (articles["action"], articles["rows"]) == ("created", ROWS)
    embedding = articles["embedding"]
    assert (embedding["documents"], embedding["texts"], embedding["estimated"]) == (ROWS, ROWS - 1, False)
    assert embedding["seconds"] is not None
    assert any(created.startswith("publication") for created in found["created"])
    assert any(created.startswith("slot") for created in found["created"])
    summary = pipeline.command("check")
    assert summary.returncode == 0
    assert f"+ articles: created from {ROWS} rows; embeds {ROWS - 1} texts" in summary.stdout
    shown = pipeline.command("plan")
    assert shown.returncode == 3
    assert f"+ articles: created from {ROWS} rows" in shown.stdout
    assert f"embeds {ROWS - 1} texts of {ROWS} documents" in shown.stdout
    assert state_of_target(pipeline) == []

    worker = pipeline.start()
    pipeline.live()
    assert {one["action"] for one in plan(pipeline, 0)["indexes"].values()} == {"unchanged"}
    assert "`run` would change nothing" in pipeline.command("check").stdout
    pipeline.stop(worker)
    shown = pipeline.command("plan")
    assert (shown.returncode, "nothing to do" in shown.stdout) == (0, True)


def state_of_target(pipeline: Pipeline) -> list[Any]:
    return pipeline.target.execute("SELECT FROM pg_namespace WHERE nspname = 'cdcsync'").fetchall()


def test_each_changed_key_is_named_with_its_values_and_its_cost(pipeline: Pipeline, database: Database) -> None:
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.source.execute("UPDATE articles SET body = title WHERE id <= 3")
    write(
        pipeline,
        database,
        articles={"text": "{body}", "chunking": {"max_tokens": 200}},
        notes={"columns": ["title"], "hnsw": {"m": 20}},
    )
    found = plan(pipeline)["indexes"]
    articles, notes = found["articles"], found["notes"]
    assert articles["action"] == "read again"
    assert {"key": "text", "old": "{title}", "new": "{body}"} in articles["changes"]
    assert 'text: "{title}" → "{body}"' in articles["because"]
    # Three texts have their vector already, as titles.
    assert articles["embedding"]["texts"] == ROWS - 3
    assert notes["action"] == "read again"
    assert notes["because"] == ["columns: title came"]
    assert notes["embedding"]["texts"] == 0
    assert notes["remaining"] == [
        "hnsw.m is 16 in the index and 20 in the configuration: cdcsync migrate notes start builds it again"
    ]
    assert {"key": "hnsw.m", "old": 16, "new": 20} in notes["changes"]

    pipeline.start()
    because = {
        event["index"]: event["because"]
        for event in until(lambda: [one for one in pipeline.events() if one.get("kind") == "replay"], pipeline.tail)
    }
    assert 'text: "{title}" → "{body}"' in because["articles"]
    until(pipeline.in_step_now, lambda: pipeline.difference)


def test_an_index_that_leaves_the_configuration_is_named_with_the_command_that_frees_it(
    pipeline: Pipeline, database: Database
) -> None:
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.target.execute("CREATE TABLE cdcsync.articles_vectors_7 (LIKE cdcsync.articles_vectors_1)")
    pipeline.target.execute("COMMENT ON TABLE cdcsync.articles_vectors_7 IS 'cdcsync index articles: vectors'")
    write(pipeline, database, articles={})
    found = plan(pipeline)
    ((index, since, command),) = [(one["index"], one["since"], one["command"]) for one in found["unfollowed"]]
    assert (index, since, command) == ("notes", None, "cdcsync drop notes")
    ((index, generation, command),) = [
        (one["index"], one["generation"], one["command"]) for one in found["generations"]
    ]
    assert (index, generation, command) == ("articles", 7, "cdcsync migrate articles drop")
    worker = pipeline.start()
    pipeline.event("index_unfollowed")
    pipeline.stop(worker)
    assert plan(pipeline, 0)["unfollowed"][0]["since"] is not None


def test_a_wrong_configuration_has_no_plan(pipeline: Pipeline, database: Database) -> None:
    write(pipeline, database, articles={"text": "{lost}"})
    assert any("lost" in one["message"] for one in plan(pipeline, 2)["findings"])
    assert pipeline.command("plan", "--approve", "other").returncode == 2


@pytest.mark.proof
def test_a_new_index_and_a_changed_one_wait_for_their_approval_while_another_goes_on(
    pipeline: Pipeline, database: Database
) -> None:
    guarded = {"confirm_above_texts": ROWS - 5}
    write(pipeline, database, articles=guarded, notes={})
    pipeline.start()
    pipeline.event("streaming")
    assert state(pipeline, "articles")[0] == "paused"
    assert "cdcsync plan --approve articles" in str(state(pipeline, "articles")[1])
    pipeline.in_step("notes")
    assert pipeline.target.execute("SELECT FROM cdcsync.articles_chunks").fetchall() == []
    assert plan(pipeline)["indexes"]["articles"]["approval"] == "needed"

    done = pipeline.command("plan", "--approve", "articles")
    assert (done.returncode, "articles: approved" in done.stdout) == (0, True)
    until(lambda: state(pipeline, "articles")[0] == "live", pipeline.tail)
    pipeline.in_step()
    assert kinds(pipeline, "articles") == ["initial"]

    # The approval was of that change alone.
    pipeline.stop(pipeline.processes[-1])
    write(pipeline, database, articles={"text": "{body}", **guarded}, notes={})
    pipeline.start()
    until(lambda: state(pipeline, "articles")[0] == "paused", pipeline.tail)
    reason = str(state(pipeline, "articles")[1])
    assert 'text: "{title}" → "{body}"' in reason
    pipeline.stop(pipeline.processes[-1])
    killed = pipeline.start(CDCSYNC_CRASH_AT="approvals removed")
    pipeline.in_step("notes")
    assert state(pipeline, "articles") == ("paused", reason)
    texts = pipeline.target.execute("SELECT content FROM cdcsync.articles_chunks WHERE id = 5").fetchall()
    assert texts == [("title 5",)]

    pipeline.source.execute("DELETE FROM articles WHERE id = 5")
    assert pipeline.command("plan", "--approve", "articles").returncode == 0
    # A worker that dies while it takes the approval leaves it to the next one.
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL, pipeline.tail()
    pipeline.start()
    until(lambda: state(pipeline, "articles")[0] == "live", pipeline.tail)
    pipeline.in_step()

    # Going back to what was approved once waits again, with the texts that came since.
    assert pipeline.target.execute("SELECT FROM cdcsync.approvals").fetchall() == []
    pipeline.stop(pipeline.processes[-1])
    write(pipeline, database, articles=guarded, notes={})
    assert plan(pipeline)["indexes"]["articles"]["approval"] == "needed"
    pipeline.start()
    until(lambda: state(pipeline, "articles")[0] == "paused", pipeline.tail)


@pytest.mark.proof
def test_an_approval_of_a_first_load_outlasts_a_start_that_did_not_get_to_it(
    pipeline: Pipeline, database: Database
) -> None:
    write(pipeline, database, articles={"confirm_above_texts": 1}, notes={})
    worker = pipeline.start()
    pipeline.event("streaming")
    pipeline.stop(worker)
    killed_command = pipeline.command("plan", "--approve", "articles", CDCSYNC_CRASH_AT="approval given")
    assert killed_command.returncode == -signal.SIGKILL
    killed = pipeline.start(CDCSYNC_CRASH_AT="index relations committed")
    killed.wait(30)
    assert state(pipeline, "articles") == ("building", None)

    worker = pipeline.start()
    until(lambda: state(pipeline, "articles")[0] == "live", pipeline.tail)
    pipeline.in_step()
    pipeline.stop(worker)
    pipeline.start()
    until(lambda: not pipeline.target.execute("SELECT FROM cdcsync.approvals").fetchall(), pipeline.tail)


def test_a_change_that_embeds_little_waits_for_nobody(pipeline: Pipeline, database: Database) -> None:
    write(
        pipeline, database, articles={"confirm_above_texts": ROWS}, notes={"confirm_above_texts": 0, "text": "{title}"}
    )
    pipeline.source.execute("DELETE FROM notes")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()


def test_a_change_that_awaited_an_approval_and_is_taken_back_is_named_as_the_reason_to_read_the_rows_again(
    pipeline: Pipeline, database: Database
) -> None:
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    write(pipeline, database, articles={"text": "{body}", "confirm_above_texts": 5}, notes={})
    worker = pipeline.start()
    until(lambda: state(pipeline, "articles")[0] == "paused", pipeline.tail)
    pipeline.stop(worker)
    write(pipeline, database, articles={"confirm_above_texts": 5}, notes={})
    reason = "it was paused for a change that is taken back"
    assert plan(pipeline)["indexes"]["articles"]["because"] == [reason]
    assert f"~ articles: {ROWS} rows read again: {reason}\n" in pipeline.command("plan").stdout
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
