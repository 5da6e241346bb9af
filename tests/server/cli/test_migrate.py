"""`cdcsync migrate`: the walk of docs/migration.md as it is written, and what the command refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.configs import configuration
from tests.support.migrations import WATCHFUL
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

PAGE = (ROOT / "docs" / "migration.md").read_text()


def blocks(kind: str, section: str = "The walk") -> list[str]:
    """Return the blocks of a section of the page in a language, without their indentation."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def written(pipeline: Pipeline, database: Database, sections: str) -> None:
    """Write a configuration with the sections of the page."""
    pipeline.configure(configuration(database.dsn, embedders={}, indexes={}) + sections)


def loaded(make_pipeline: Callable[[str], Pipeline], database: Database) -> Pipeline:
    """Return a pipeline whose worker has loaded the index of the walk."""
    before, _ = blocks("toml")
    pipeline = make_pipeline(configuration(database.dsn, embedders={}, indexes={}) + before)
    pipeline.hurry = {"cdcsync.flows.watch.WATCH_S": 0.5}
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'article ' || i, 'of old' FROM generate_series(1, 60) i")
    pipeline.hurry |= WATCHFUL
    pipeline.start()
    pipeline.live()
    return pipeline


@pytest.mark.timeout(180)
def test_the_walk_works_as_it_is_written(database: Database, make_pipeline: Callable[[str], Pipeline]) -> None:
    pipeline = loaded(make_pipeline, database)
    written(pipeline, database, blocks("toml")[1])
    checked = pipeline.command("check")
    assert (checked.returncode, "cdcsync migrate articles start" in checked.stdout) == (0, True)
    pipeline.stop(pipeline.processes[-1])
    pipeline.start()
    commands = [shlex.split(line)[1:] for block in blocks("sh") for line in block.splitlines()]
    assert [command[2] for command in commands] == [
        *("start", "status", "activate", "activate", "rollback", "activate", "drop")
    ]
    said = []
    for command in commands:
        done = pipeline.command(*command)
        assert done.returncode == 0, done.stderr + done.stdout
        said.append(done.stdout)
        if command[2] == "start":
            state = "SELECT state = 'ready' FROM cdcsync.generations WHERE generation = 2"
            until(lambda: pipeline.target.execute(state).fetchone() == (True,), pipeline.tail)  # noqa: B023
        if command[2] == "activate" and "is live" in done.stdout and "--dry-run" not in command:
            repeated = pipeline.command(*command)
            assert (repeated.returncode, "generation 2 is live already" in repeated.stdout) == (0, True)
    start, status, measured, activated, back, again, dropped = said
    assert "generation 2, by new" in start
    assert "embeds 60 chunks" in start
    assert ("live" in status, "ready" in status, "vector(64)" in status) == (True, True, True)
    assert "nothing was switched; generation 1 stays live" in measured
    assert "overlap@10" in measured
    assert "generation 2 is live" in activated
    assert "generation 1 is live again" in back
    assert "generation 2 is live" in again
    assert "generation 1 is dropped" in dropped
    shown = pipeline.answer("status")["indexes"]["articles"]
    assert (shown["generation"], shown["dimensions"], shown["embedder"]) == (2, 64, "new")
    pipeline.in_step()


@pytest.mark.proof
@pytest.mark.timeout(180)
def test_the_walk_to_other_chunks_works_as_it_is_written(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = loaded(make_pipeline, database)
    written(pipeline, database, blocks("toml", "Other chunks")[0])
    commands = [shlex.split(line)[1:] for block in blocks("sh", "Other chunks") for line in block.splitlines()]
    assert [command[2] for command in commands] == ["start", "status", "activate", "rollback", "activate", "drop"]
    said = []
    for command in commands:
        if command[2] == "status":
            state = "SELECT state = 'ready' FROM cdcsync.generations WHERE generation = 2"
            until(lambda: pipeline.target.execute(state).fetchone() == (True,), pipeline.tail)  # noqa: B023
            until(
                lambda: (
                    pipeline.target.execute("SELECT bool_and(state = 'live') FROM cdcsync.indexes").fetchone()
                    == (True,)
                ),
                pipeline.tail,
            )
        done = pipeline.command(*command)
        assert done.returncode == 0, done.stderr + done.stdout
        said.append(done.stdout)
        if command[2] == "start":
            pipeline.stop(pipeline.processes[-1])
            planned = pipeline.command("plan")  # while nobody fills it
            assert "has chunks of its own" in planned.stdout, planned.stdout + planned.stderr
            pipeline.start()
    start, status, activated, back, again, dropped = said
    assert "with chunks of its own: text" in start
    assert "reads the table, and embeds 60 texts" in start
    assert ("live" in status, "ready" in status, "vector(64)" in status) == (True, True, True)
    assert "generation 2 has chunks of its own: text" in status
    assert "overlap@10" in activated
    assert "generation 2 is live" in activated
    assert "generation 1 is live again" in back
    assert "generation 2 is live" in again
    assert "generation 1 is dropped" in dropped
    shown = pipeline.answer("status")["indexes"]["articles"]
    assert (shown["generation"], shown["dimensions"], shown["embedder"], shown["chunks"]) == (2, 64, "new", 60)
    pipeline.source.execute("UPDATE articles SET body = 'of new' WHERE id = 7")
    seventh = "SELECT content FROM articles_index_chunks WHERE id = 7"
    until(lambda: pipeline.target.execute(seventh).fetchone() == ("article 7\n\nof new",), pipeline.tail)


@pytest.mark.proof
def test_what_cannot_begin_is_refused_with_what_to_do(
    database: Database, make_pipeline: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    pipeline = loaded(make_pipeline, database)

    def refused(*arguments: str) -> str:
        done = pipeline.command("migrate", "articles", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        return " ".join(done.stderr.split())

    assert "has the vectors that [indexes.articles] asks for" in refused("start")
    assert "only one generation of vectors, 1" in refused("activate")
    assert "only one generation of vectors, 1" in refused("drop", "--yes")
    assert "--min belongs to activate" in refused("start", "--min", "recall=0.9")
    assert "--judged DIR" in refused("activate", "--not-worse")
    before = blocks("toml")[0]
    written(pipeline, database, before.replace('"{title}"', '"a {titel}"'))
    assert "titel" in refused("start")
    written(pipeline, database, blocks("toml")[1].replace('[embedders.old]\ntype = "hash"\ndimensions = 32\n', ""))
    assert "keep the old section beside the new one" in refused("start")
    written(pipeline, database, blocks("toml")[1] + "confirm_above_texts = 59\n")
    assert "this embeds 60 chunks" in refused("start")
    written(pipeline, database, blocks("toml")[1])
    pipeline.stop(pipeline.processes[-1])
    pipeline.answer("migrate", "articles", "start")
    assert "is filling: searches would find less with it" in refused("activate")
    pipeline.target.execute("CREATE VIEW mine AS SELECT id, embedding FROM articles_index")
    pipeline.start()
    state = "SELECT state = 'ready' FROM cdcsync.generations WHERE generation = 2"
    until(lambda: pipeline.target.execute(state).fetchone() == (True,), pipeline.tail)
    (tmp_path / "judgments.jsonl").write_text(
        "".join(
            json.dumps({"query": f"q{i}", "text": f"which is article {i}", "document": str(i), "grade": 1}) + "\n"
            for i in range(7, 50, 7)
        )
    )
    judged = ("--judged", str(tmp_path))
    outcome = pipeline.answer(
        "migrate", "articles", "activate", "--dry-run", *judged, "--min", "nDCG@10=0.1", "--not-worse"
    )
    assert (outcome["switched"], [one["passed"] for one in outcome["gates"]]) == (False, [True] * 4)
    assert [one["generation"] for one in outcome["judged"].values()] == [1, 2]
    assert "nDCQ@10 is not a measure" in refused("activate", *judged, "--min", "nDCQ@10=0.1")
    assert "mine" in refused("activate")
    assert pipeline.answer("status")["indexes"]["articles"]["generation"] == 1
    assert "drop removes generation 2 of articles (new, vector(64), ready) with all its vectors." in refused("drop")
    # The worker has nothing to do with an index that is paused: the command does not wait for it without an end.
    streamed = pipeline.times("streaming")
    pipeline.source.execute("ALTER TABLE articles RENAME TO away")
    paused = "SELECT state = 'paused' FROM cdcsync.indexes"
    until(lambda: pipeline.target.execute(paused).fetchone() == (True,), pipeline.tail)
    # It begins again without the index; until it has, it may still drop what it is asked to.
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    assert "the worker drops generation 2 once it follows the index again" in refused("drop", "--yes")
    pipeline.source.execute("ALTER TABLE away RENAME TO articles")
    gone = "SELECT count(*) = 0 FROM cdcsync.generations WHERE generation = 2"
    until(lambda: pipeline.target.execute(gone).fetchone() == (True,), pipeline.tail)
