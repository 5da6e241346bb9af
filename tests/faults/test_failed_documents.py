"""Rows that no document can be made of, with real workers: listed exactly, through kills, and shown by the commands."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

CONFIG = """
[source]
dsn = "{source}"
slot = "s_{name}"
feedback_every_s = 1
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
batch_rows = 11
backfill_page_rows = 13
log_level = "debug"
[embedders.fake]
type = "hash"
dimensions = 8
[indexes.coded]
table = "notes"
documents = "failing_documents:document"
document_columns = ["title", "body"]
embedder = "fake"
[indexes.cut]
table = "notes"
text = "{{body}}"
embedder = "fake"
[indexes.cut.chunking]
max_tokens = 8
overlap_tokens = 0
max_chunks = 3
"""

FUNCTION = """
from pathlib import Path

MENDED = Path(__file__).with_name("mended")

def document(row):
    if row["body"].startswith("bad") and not MENDED.exists():
        raise ValueError(row["title"])
    return row["body"]

document.version = 1
"""

BODIES = ("good", "bad", "bad too", "many words " * 20, "bad and " + "long " * 60, "")


class Notes:
    """A table of which each index has reasons of its own to leave rows out."""

    def __init__(self, pipeline: Pipeline, directory: Path) -> None:
        self.pipeline = pipeline
        self.directory = directory
        pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, title text NOT NULL, body text NOT NULL)")

    def fill(self, rows: int) -> None:
        self.pipeline.source.execute(
            "INSERT INTO notes SELECT i, 'planted' || i, (%s::text[])[1 + i %% 6] FROM generate_series(1, %s) AS i",
            [list(BODIES), rows],
        )

    def start(self) -> forked.Process:
        return self.pipeline.start(PYTHONPATH=str(self.directory))

    def write(self, seed: int, transactions: int) -> None:
        """Change rows at random, so that documents begin and cease to fail, and failing rows move and go."""
        chance = random.Random(seed)
        source = self.pipeline.source
        for _ in range(transactions):
            with source.transaction():
                for _ in range(chance.randint(1, 5)):
                    key = chance.randint(1, 80)
                    match chance.randint(0, 9):
                        case 0 | 1:
                            source.execute(
                                "INSERT INTO notes VALUES (%s, 'new', %s) ON CONFLICT DO NOTHING",
                                [key, chance.choice(BODIES)],
                            )
                        case 2 | 3 | 4 | 5:
                            source.execute("UPDATE notes SET body = %s WHERE id = %s", [chance.choice(BODIES), key])
                        case 6:
                            source.execute("DELETE FROM notes WHERE id = %s", [key])
                        case 7 | 8:
                            source.execute(
                                "UPDATE notes SET id = id + 100 WHERE id = %s"
                                " AND NOT EXISTS (SELECT FROM notes WHERE id = %s)",
                                [key, key + 100],
                            )
                        case 9 if chance.random() < 0.1:
                            source.execute("TRUNCATE notes")

    def command(self, *arguments: str, status: int = 0) -> Any:
        """Return what a command answers as JSON."""
        return self.pipeline.answer(*arguments, status=status, PYTHONPATH=str(self.directory))


@pytest.fixture
def notes(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Notes:
    directory = tmp_path_factory.mktemp("functions")
    (directory / "failing_documents.py").write_text(FUNCTION)
    # The oracle makes documents in this process.
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "failing_documents", raising=False)
    source, target = make_database(), make_database()
    return Notes(make_pipeline(CONFIG.format(source=source.dsn, target=target.dsn, name=source.name)), directory)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_any_moment_leaves_each_index_with_exactly_the_rows_that_fail_in_its_list(
    notes: Notes, seed: int
) -> None:
    pipeline = notes.pipeline
    notes.fill(60)
    chance = random.Random(seed)
    for round_ in range(4):
        worker = notes.start()
        wanted = pipeline.times("batch_applied") + chance.randint(1, 5)
        notes.write(10 * seed + round_, 12)
        lsn = pipeline.position()
        until(
            lambda wanted=wanted, lsn=lsn: (  # type: ignore[misc]
                pipeline.times("batch_applied") >= wanted or pipeline.reached("coded", lsn)
            ),
            pipeline.tail,
        )
        assert pipeline.stop(worker, signal.SIGKILL) == -signal.SIGKILL

    worker = notes.start()
    pipeline.live()
    pipeline.source.execute("INSERT INTO notes VALUES (999, 'last', 'bad')")
    pipeline.in_step()

    assert ("999",) in pipeline.left_out("coded")
    assert ("999",) not in pipeline.left_out("cut")
    assert pipeline.stop(worker) == 0
    assert "planted" not in pipeline.log.read_text()


@pytest.mark.proof
def test_rows_that_fail_are_told_of_read_again_and_given_up(notes: Notes) -> None:
    pipeline = notes.pipeline
    notes.fill(12)
    worker = notes.start()
    pipeline.live()
    pipeline.source.execute("UPDATE notes SET body = 'bad' WHERE id = 6")
    pipeline.in_step()
    listed = {("1",), ("2",), ("4",), ("6",), ("7",), ("8",), ("10",)}
    assert pipeline.left_out("coded") == listed

    found = notes.command("failures", "coded", "list")
    assert {one["key"]["id"] for one in found} == {key for (key,) in listed}
    assert {(one["kind"], one["chunk_no"], one["next_attempt_at"]) for one in found} == {("document", None, None)}
    assert {one["error"] for one in found} == {
        "failing_documents:document failed with ValueError in failing_documents.py, line 8"
    }
    until(
        lambda: b'cdcsync_failed_documents{index="coded"} 7.0' in pipeline.get("/metrics")[1], "the gauge to be current"
    )
    status = json.loads(pipeline.get("/status")[1])
    assert status["indexes"]["coded"]["failed_documents"] == 7
    assert status["indexes"]["cut"]["failed_documents"] == 4
    assert [one for one in status["problems"] if "7 rows are left out" in one and "failures coded list" in one]
    checked = notes.command("verify", "coded", status=1)
    assert checked["differences"] == {"failed": 7}
    assert not checked["equal"]

    # Nothing has changed: all of them fail once more.
    again = notes.command("failures", "coded", "retry")
    assert (again["retry"], again["documents"]["rows"], again["documents"]["failed"]) == (7, 7, 7)
    assert {one["attempts"] for one in notes.command("failures", "coded", "list")} == {2}

    # When the list is not whole, the table is read whole.
    (notes.directory / "mended").touch()
    pipeline.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, commit_lsn)"
        " VALUES ('coded', '{}', 'no room', '0/1')"
    )
    again = notes.command("failures", "coded", "retry")
    assert (again["documents"]["state"], again["documents"]["rows"]) == ("done", 12)
    assert again["documents"]["failed"] == 0
    pipeline.in_step()
    assert notes.command("failures", "coded", "list") == []
    assert notes.command("verify", "coded")["equal"]

    # Those of the other index are given up: they still have no document.
    assert notes.command("failures", "cut", "discard") == {"discard": 4}
    assert notes.command("verify", "cut", status=1)["differences"] == {"failed": 4}
    repaired = notes.command("verify", "cut", "--repair", status=1)
    assert (repaired["repaired"], repaired["after_repair"]["differences"]) == (0, {"failed": 4})
    assert pipeline.stop(worker) == 0


def test_without_a_worker_rows_are_read_again_by_the_command(notes: Notes) -> None:
    pipeline = notes.pipeline
    notes.fill(12)
    worker = notes.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    pipeline.source.execute("UPDATE notes SET body = 'good' WHERE id = 1")
    (notes.directory / "mended").touch()

    again = notes.command("failures", "coded", "retry")

    assert (again["documents"]["state"], again["documents"]["failed"]) == ("done", 0)
    pipeline.compare_one("coded", vectors=False)


def test_a_row_that_went_unseen_leaves_the_list_with_the_orphans(notes: Notes) -> None:
    pipeline = notes.pipeline
    notes.fill(12)
    worker = notes.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, commit_lsn)"
        " SELECT 'coded', ARRAY[i::text], 'left behind', '0/1' FROM generate_series(100, 140) AS i"
    )
    pipeline.stop(worker)
    worker = notes.start()

    pipeline.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, phase) VALUES ('coded', 'replay', 'orphans')"
    )

    until(lambda: ("140",) not in pipeline.left_out("coded"), pipeline.tail)
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
