"""Documents and chunks by functions of the user's, with a real worker: in step, verified, and failing row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.support.configs import NO_AUDIT, Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

EXAMPLES = ROOT / "examples"

FUNCTION = """
def document(row):
    if row["body"] == "bad":
        raise ValueError(row["title"])
    return row["body"].upper()

document.version = 1
"""

SLOW = """
import pathlib
import time

def document(row):
    if row["title"] == "slow":
        time.sleep(0.03)
        with pathlib.Path(__file__).with_name("called").open("a") as called:
            called.write(row["body"] + "\\n")
    return row["body"]

document.version = 1
"""
"""Takes longer for 50 rows than the server takes to write them."""

TABLE = (
    "CREATE TABLE notes (id int PRIMARY KEY, title text, tags text, body text, draft boolean NOT NULL DEFAULT false)"
)


NOTES: Section = {
    "text": None,
    "documents": "notes:document",
    "document_columns": ["title", "tags", "body", "draft"],
    "chunk_text": "{title}: {chunk}",
    "chunking": {"chunks": "notes:thoughts", "max_tokens": 16, "overlap_tokens": 0},
}
"""The example's functions."""

OWN: Section = {
    "text": None,
    "documents": "own_documents:document",
    "document_columns": ["title", "body"],
    "chunk_text": "{title}: {chunk}",
    "columns": ["draft"],
    "chunking": {"max_tokens": 8, "overlap_tokens": 0, "max_chunks": 2},
}
"""Those of `FUNCTION`."""


def make(make_pipeline: Callable[[str], Pipeline], database: Database, index: Section, *worker_lines: str) -> Pipeline:
    return make_pipeline(
        configuration(
            database.dsn,
            worker_lines="\n".join(['log_level = "debug"', NO_AUDIT, *worker_lines]),
            embedders={"fake": {"type": "hash", "dimensions": 16}},
            indexes={"notes": index},
        )
    )


def verify(pipeline: Pipeline, directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run `cdcsync verify notes --json`; returns its exit status and answer."""
    done = pipeline.command("verify", "notes", "--json", *arguments, PYTHONPATH=str(directory))
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_example_makes_an_index_that_follows_and_is_verified(
    make_pipeline: Callable[[str], Pipeline], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    pipeline = make(make_pipeline, database, NOTES)
    pipeline.source.execute(TABLE)
    pipeline.source.execute(
        "INSERT INTO notes SELECT i, 'Note ' || i, CASE WHEN i % 3 = 0 THEN 'work, slot' END,"
        " 'first ' || i || E'\\n---\\n' || repeat('second thought ', i), i % 5 = 0 FROM generate_series(1, 20) AS i"
    )
    worker = pipeline.start(PYTHONPATH=str(EXAMPLES))
    pipeline.live()
    pipeline.in_step()

    pipeline.source.execute("UPDATE notes SET title = 'renamed' WHERE id = 19")
    pipeline.source.execute("UPDATE notes SET draft = NOT draft WHERE id IN (5, 6)")
    pipeline.in_step()
    (content,) = pipeline.target.execute(
        "SELECT array_agg(content ORDER BY chunk_no) FROM cdcsync.notes_chunks WHERE id = 3"
    ).fetchone() or ([],)
    assert content == [
        "Note 3: About work, slot.",
        "Note 3: first 3",
        "Note 3: second thought second thought second thought",
    ]
    renamed = pipeline.target.execute(
        "SELECT count(*) > 3, bool_and(content LIKE 'renamed: %%') FROM cdcsync.notes_chunks WHERE id = 19"
    ).fetchone()
    assert renamed == (True, True)

    assert verify(pipeline, EXAMPLES)[0] == 0
    pipeline.target.execute("UPDATE cdcsync.notes_chunks SET document_hash = '\\x00' WHERE id = 3")
    pipeline.target.execute("DELETE FROM cdcsync.notes_chunks WHERE id = 4")
    _, found = verify(pipeline, EXAMPLES, "--repair")
    assert found["differences"] == {"stale": 1, "missing": 1}
    pipeline.in_step()
    assert verify(pipeline, EXAMPLES)[0] == 0
    assert pipeline.stop(worker) == 0


def test_a_row_that_a_function_fails_for_is_left_out_and_named_and_comes_back_with_a_better_function(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path
) -> None:
    module = tmp_path / "own_documents.py"
    module.write_text(FUNCTION)
    pipeline = make(make_pipeline, database, OWN)
    pipeline.source.execute(TABLE)
    pipeline.source.execute(
        "INSERT INTO notes (id, title, body) SELECT i, 'secret', 'good' FROM generate_series(1, 9) i"
    )
    worker = pipeline.start(PYTHONPATH=str(tmp_path))
    pipeline.live()

    def stored() -> list[tuple[int, str]]:
        rows = pipeline.target.execute("SELECT id, content FROM cdcsync.notes_chunks ORDER BY id, chunk_no").fetchall()
        return [(key, content) for key, content in rows]

    pipeline.source.execute("UPDATE notes SET body = 'bad' WHERE id = 7")
    pipeline.source.execute("UPDATE notes SET body = repeat('many words ', 40) WHERE id = 8")
    pipeline.source.execute("UPDATE notes SET body = 'better' WHERE id = 9")
    pipeline.reach("notes")

    assert stored() == [(key, "secret: GOOD") for key in range(1, 7)] + [(9, "secret: BETTER")]
    until(lambda: pipeline.times("document_failed") == 2, "both failures to be logged")
    failures = [event for event in pipeline.events() if event["event"] == "document_failed"]
    errors = [event["error"] for event in failures]
    assert errors[0] == "own_documents:document failed with ValueError in own_documents.py, line 4"
    assert "max_chunks is 2" in errors[1]
    assert all(event["failed"] == 1 and event["fix"] == "cdcsync failures notes list" for event in failures)
    assert pipeline.left_out("notes") == {("7",), ("8",)}
    assert b'cdcsync_document_failures_total{index="notes"} 2.0' in pipeline.get("/metrics")[1]
    assert verify(pipeline, tmp_path)[1]["differences"] == {"failed": 2}
    assert pipeline.stop(worker) == 0
    assert "secret" not in pipeline.log.read_text()

    # Another body under the same version is the same function; another version makes all documents anew.
    module.write_text(FUNCTION.replace('raise ValueError(row["title"])', 'return "mended"').replace("upper", "title"))
    module.write_text(module.read_text().replace("version = 1", "version = 2"))
    pipeline.path.write_text(pipeline.path.read_text() + 'on_too_many = "truncate"\n')
    worker = pipeline.start(PYTHONPATH=str(tmp_path))
    until(lambda: (7, "secret: mended") in stored(), lambda: f"the mended document; {pipeline.tail()}")
    until(lambda: (1, "secret: Good") in stored(), lambda: f"all documents anew; {pipeline.tail()}")
    until(lambda: len(stored()) == 10, lambda: f"two chunks of the long one; {stored()} {pipeline.tail()}")
    until(lambda: verify(pipeline, tmp_path)[0] == 0, "a verification without differences")
    assert pipeline.stop(worker) == 0


GATHERING = """
def document(row):
    authors = [f"{one['author']}: {one['body']}" for one in row["remarks"]]
    if any(one["author"] == "nobody" for one in row["remarks"]):
        raise ValueError("a remark has no author")
    return f"{row['title']} by {row['owner.name']} ({len(authors)}) {authors}"

document.version = 1
"""

RELATED: Section = {
    "text": None,
    "documents": "gathering:document",
    "document_columns": ["title", "remarks", "owner.name"],
    "related": {
        "remarks": {"table": "remarks", "on": {"note_id": "id"}, "columns": ["author", "body"], "order_by": "body"},
        "owner": {"table": "owners", "on": {"id": "owner_id"}},
    },
}


def test_a_function_gets_the_rows_of_related_tables_as_lists(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gathering.py").write_text(GATHERING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    pipeline = make_pipeline(configuration(database.dsn, indexes={"notes": RELATED}))
    for statement in (
        "CREATE TABLE notes (id int PRIMARY KEY, title text, owner_id int)",
        "CREATE TABLE owners (id int PRIMARY KEY, name text)",
        "CREATE TABLE remarks (id int PRIMARY KEY, note_id int, author text, body numeric)",
        "ALTER TABLE remarks REPLICA IDENTITY FULL",
        "INSERT INTO owners VALUES (1, 'Ada')",
        "INSERT INTO notes VALUES (1, 'one', 1), (2, 'two', NULL)",
        """INSERT INTO remarks VALUES (1, 1, 'Bea "B"', 2.50), (2, 1, NULL, 1.0)""",
    ):
        pipeline.source.execute(statement)

    def contents() -> list[str]:
        found = pipeline.target.execute("SELECT content FROM cdcsync.notes_chunks ORDER BY id").fetchall()
        return [str(one) for (one,) in found]

    pipeline.start()
    pipeline.live()
    assert contents() == ["""one by Ada (2) ['None: 1.0', 'Bea "B": 2.50']""", "two by None (0) []"]

    pipeline.source.execute("UPDATE remarks SET note_id = 2 WHERE id = 2")
    pipeline.reach("notes")

    assert contents() == ["""one by Ada (1) ['Bea "B": 2.50']""", "two by None (1) ['None: 1.0']"]

    pipeline.source.execute("UPDATE remarks SET author = 'nobody' WHERE id = 1")
    pipeline.reach("notes")
    assert contents() == ["two by None (1) ['None: 1.0']"]
    (failure,) = pipeline.answer("failures", "notes", "list", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (failure["key"], failure["kind"]) == ({"id": "1"}, "document")
    pipeline.source.execute("UPDATE remarks SET author = 'Bea' WHERE id = 1")
    pipeline.reach("notes")
    assert contents() == ["one by Ada (1) ['Bea: 2.50']", "two by None (1) ['None: 1.0']"]
    assert pipeline.answer("failures", "notes", "list", PYTHONPATH=f"{tmp_path}:{ROOT}") == []


def test_a_function_that_is_not_there_is_a_wrong_configuration(
    make_pipeline: Callable[[str], Pipeline], database: Database
) -> None:
    pipeline = make(make_pipeline, database, OWN)
    pipeline.source.execute(TABLE)

    done = pipeline.command("check")

    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert "own_documents:document cannot be imported" in said
    assert "PYTHONPATH" in said


@pytest.mark.proof
def test_a_function_is_called_once_for_each_row_however_long_the_rows_of_a_batch_take(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path
) -> None:
    (tmp_path / "own_documents.py").write_text(SLOW)
    pipeline = make(make_pipeline, database, OWN, "batch_rows = 50")
    pipeline.source.execute(TABLE)
    pipeline.source.execute("INSERT INTO notes (id, title, body) SELECT i, 'quick', 'a' FROM generate_series(1, 200) i")
    worker = pipeline.start(PYTHONPATH=str(tmp_path))
    pipeline.live()

    pipeline.source.execute("UPDATE notes SET title = 'slow', body = id::text")
    pipeline.reach("notes")

    assert sorted(map(int, (tmp_path / "called").read_text().split())) == list(range(1, 201))
    stored = pipeline.target.execute("SELECT count(*) FROM cdcsync.notes_chunks WHERE content = 'slow: ' || id")
    assert stored.fetchone() == (200,)
    assert pipeline.stop(worker) == 0
