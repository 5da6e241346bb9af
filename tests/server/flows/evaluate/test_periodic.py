"""The worker's own measurements of recall, and the command that tells them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
import structlog

from cdcsync.cli import main
from cdcsync.flows.evaluate import periodic
from cdcsync.flows.evaluate.periodic import evaluate_for_ever
from tests.support.configs import configuration
from tests.support.indexes import SCHEMA, register
from tests.support.indexes import until as until_true
from tests.support.recalls import crowd, indexed, stored
from tests.support.workers import until

if TYPE_CHECKING:
    from tests.support.servers import Database
    from tests.support.workers import Pipeline

pytestmark = [pytest.mark.server, pytest.mark.anyio]


def command(*arguments: str | Path) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", *map(str, arguments)])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def metrics(pipeline: Pipeline) -> dict[str, float]:
    lines = pipeline.get("/metrics")[1].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.proof
def test_the_worker_measures_by_itself_and_the_command_tells(
    database: Database, make_pipeline: Callable[[str], Pipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    for table in ("articles", "notes", "nothing"):
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, tenant int, body text)")
    words = "chr(97 + i % 26) || ' ' || chr(97 + i / 26 % 26) || ' word ' || i"
    for table in ("articles", "notes"):
        database.execute(f"INSERT INTO {table} SELECT i, i % 5, {words} FROM generate_series(1, 30) AS i")
    pipeline = make_pipeline(
        configuration(
            database.dsn,
            worker_lines="evaluate_every_s = 0.5",
            indexes={
                "articles": {"text": "{body}", "columns": ["tenant"]},
                "notes": {"text": "{body}", "inline_budget_ms": 0},
                "nothing": {"text": "{body}"},
            },
        )
    )
    pipeline.start()
    pipeline.live()

    until(lambda: metrics(pipeline).get('cdcsync_recall{index="notes"}') == 1.0, "a recall in the metrics")
    exposed = metrics(pipeline)
    assert exposed['cdcsync_recall{index="articles"}'] == 1.0
    assert 'cdcsync_recall{index="nothing"}' not in exposed
    age_s = datetime.now(UTC).timestamp() - exposed['cdcsync_recall_finished_timestamp_seconds{index="notes"}']
    assert 0 <= age_s < 600
    status = json.loads(pipeline.get("/status")[1])["indexes"]
    assert (status["notes"]["generation"], status["notes"]["recall"]["k"]) == (1, 10)
    assert status["notes"]["recall"]["queries"] == 30
    assert status["nothing"]["recall"] is None
    logged = pipeline.event("evaluated")
    assert (logged["recall"], logged["k"], logged["ef_search"]) == (1.0, 10, 100)
    assert not [event for event in pipeline.events() if event["event"].startswith("evaluation_")]

    # A change is searchable by its meaning at once, or soon after: both count, what a load brought does not.
    assert exposed["cdcsync_vector_freshness_seconds_count"] == 0
    database.execute("INSERT INTO articles VALUES (1000, 1, 'a text of its own')")
    until(lambda: metrics(pipeline)["cdcsync_vector_freshness_seconds_count"] == 1, "the freshness of an article")
    database.execute("INSERT INTO notes VALUES (1000, 1, 'a text of its own'), (1001, 1, 'and another')")
    until(lambda: metrics(pipeline)["cdcsync_vector_freshness_seconds_count"] == 3, "the freshness of notes")
    # The first one was remembered, and so came along with its text.
    from_backlog = 'cdcsync_vectors_total{index="notes",way="backlog"}'
    assert metrics(pipeline)[from_backlog] > exposed.get(from_backlog, 0)
    assert 0 < metrics(pipeline)["cdcsync_vector_freshness_seconds_sum"] < 300

    capsys.readouterr()
    config = ("-c", pipeline.path)
    assert command("articles", *config, "--queries", "20", "--ef-search", "10", "--ef-search", "40") == 0
    told = capsys.readouterr()
    assert "the 10 nearest of 20 stored vectors" in told.out
    assert re.search(r"^ *10 +1\.0000 +[\d.]+ +[\d.]+ +whole table$", told.out, re.MULTILINE)
    assert re.search(r"^ *exact +1\.0000", told.out, re.MULTILINE)
    assert "not stored" not in told.out
    assert command("articles", *config, "--json", "-k", "3", "--where", "tenant = 2") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["k"], found["where"], found["measured"][0]["recall"]) == (3, "tenant = 2", 1.0)
    assert "condition" in found["not_stored"]
    assert pipeline.target.execute(
        "SELECT k, ef_search FROM cdcsync.evaluations WHERE index_name = 'articles' ORDER BY 1, 2"
    ).fetchall() == [(10, 10), (10, 40), (10, 100)]

    for arguments, words in (
        (("artikles",), "did you mean articles?"),
        (("nothing",), "the index has no vectors to search with"),
        (("articles", "--ef-search", "5000"), "--ef-search"),
        (("articles", "--where", "nosuch = 1"), "nosuch"),
    ):
        assert command(*arguments, *config) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert words in told.err


async def test_a_failed_measurement_is_told_and_does_not_keep_others_from_theirs(database: Database) -> None:
    async with indexed(database, crowd(20)) as (index, spec):
        lost = msgspec.structs.replace(spec, name="lost")
        await register(index.connection, lost, slot="s")  # with a row and no tables
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: evaluate_for_ever(database.dsn, SCHEMA, [lost, spec], every_s=0.01))
            await until_true(lambda: stored(index.connection))
            tasks.cancel_scope.cancel()
        assert [row[:3] for row in await stored(index.connection)] == [(1, 10, 100)]


async def test_an_index_that_is_locked_in_the_middle_of_its_measurement_does_not_keep_others_from_theirs(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(periodic, "SHARED_LOCK_WAIT_MS", 200)
    async with (
        indexed(database, crowd(20), name="aaa") as (other, locked),
        indexed(database, crowd(20)) as (index, spec),
        other.connection.transaction(),
    ):
        await other.connection.execute("LOCK TABLE cdcsync.aaa_chunks IN ACCESS EXCLUSIVE MODE")
        with structlog.testing.capture_logs() as events:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: evaluate_for_ever(database.dsn, SCHEMA, [locked, spec], every_s=0.01))
                await until_true(lambda: stored(index.connection))
                tasks.cancel_scope.cancel()
        assert events[0]["event"] == "evaluation_failed"
        assert (events[0]["index"], "holds a lock" in events[0]["error"]) == ("aaa", True)
