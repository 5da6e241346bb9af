"""An index whose `search` was changed in the configuration: queries are read as the stored words were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
import pytest

from tests.support.configs import NO_AUDIT, configuration
from tests.support.migrations import migrate, ready
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

ROWS = [(1, "The runners were running", "en"), (2, "東京都の天気", None), (3, "Die Häuser am Fluss", "german")]
WRITTEN_LATER = (4, "Running for parties", "en")

QUERIES = ("run", "running", "haus", "京")

FOUND: Mapping[str, list[set[int]]] = {
    "english": [{1, 4}, {1, 4}, set(), set()],
    "simple": [set(), {1, 4}, set(), set()],
    "public.exact": [set(), {1, 4}, set(), set()],
    "{language}": [{1, 4}, {1, 4}, {3}, set()],
    "cjk": [set(), {1, 4}, set(), {2}],
}
"""The rows that each query finds, once all are written."""

PAIRS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "a configuration": {
        "to_simple": ("english", "simple"),
        "spelled": ("english", "pg_catalog.english"),
        "unchanged": ("english", "english"),
        "to_none": ("english", ""),
        "from_none": ("", "english"),
    },
    "of the user's": {"to_own": ("english", "public.exact"), "from_own": ("public.exact", "english")},
    "characters": {"to_cjk": ("english", "cjk"), "from_cjk": ("cjk", "simple")},
    "languages": {
        "to_language": ("simple", "{language}"),
        "from_language": ("{language}", "english"),
        "to_characters": ("{language}", "cjk"),
    },
}
"""Indexes, and their `search` before and after."""


def write(pipeline: Pipeline, database: Database, searches: Mapping[str, str]) -> None:
    indexes = {
        name: {"search": search, "columns": ["language"], "table": "articles", "view": f"public.{name}"}
        for name, search in searches.items()
    }
    pipeline.configure(configuration(database.dsn, indexes=indexes, worker_lines=NO_AUDIT))


def by_function(pipeline: Pipeline, name: str) -> list[set[int]]:
    """Return what the search function finds for each query."""
    statement = f"SELECT array_agg(id) FROM cdcsync.{name}_search(%s, NULL, mode => 'text')"
    rows = [pipeline.target.execute(statement, [query]).fetchone() for query in QUERIES]
    return [set(row[0] or []) if row else set() for row in rows]


def by_command(pipeline: Pipeline, name: str) -> set[int]:
    """Return what the command finds for a word; with a condition, it makes a search function of its own."""
    found = pipeline.answer("search", name, "running", "--mode", "text", "--where", "true")
    return {one["key"]["id"] for one in found}


def plans(pipeline: Pipeline, status: int) -> dict[str, Any]:
    return {one["index"]: one for one in pipeline.answer("plan", status=status)["indexes"]}


def remedy(said: str) -> str:
    found = re.search("ALTER TABLE .* CASCADE", said)
    assert found is not None, said
    return found[0]


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    pipeline = make_pipeline(configuration(database.dsn, worker_lines=NO_AUDIT))
    pipeline.source.execute("CREATE TEXT SEARCH CONFIGURATION public.exact (COPY = simple)")
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, language text)")
    insert(pipeline, *ROWS)
    return pipeline


def insert(pipeline: Pipeline, *rows: tuple[int, str, str | None]) -> None:
    for row in rows:
        pipeline.source.execute("INSERT INTO articles VALUES (%s, %s, %s)", row)


@pytest.mark.parametrize("pairs", [pytest.param(pairs, id=one) for one, pairs in PAIRS.items()])
@pytest.mark.proof
def test_keyword_search_stays_what_it_is_until_its_column_is_made_again_and_plan_says_so(
    pipeline: Pipeline, database: Database, pairs: Mapping[str, tuple[str, str]]
) -> None:
    wanted = {name: after for name, (_, after) in pairs.items()}
    # Another spelling is no change, and an index without keyword search has no column to be made again.
    changed = {name: before for name, (before, after) in pairs.items() if name != "spelled" and before and after}
    changed = {name: before for name, before in changed.items() if before != wanted[name]}
    write(pipeline, database, {name: before for name, (before, _) in pairs.items()})
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    assert {one["action"] for one in plans(pipeline, 0).values()} == {"unchanged"}

    write(pipeline, database, wanted)
    before = plans(pipeline, 3)
    worker = pipeline.start()
    pipeline.live()
    insert(pipeline, WRITTEN_LATER)
    for name in pairs:
        pipeline.reach(name)
    finds(pipeline, wanted | changed)
    after, checked = plans(pipeline, 3), pipeline.answer("check")["findings"]
    warned = {one["where"]: one["hint"] for one in checked if one["where"].endswith(".search")}
    assert warned.keys() == {f"indexes.{name}.search" for name in changed}
    for name, has in changed.items():
        for one in (before[name], after[name]):
            assert {"key": "search", "old": has, "new": wanted[name]} in one["changes"]
            (said,) = one["remaining"]
            assert f'asks for keyword search by "{wanted[name]}"; the index keeps that by "{has}"' in said
            assert remedy(said) == remedy(warned[f"indexes.{name}.search"])
    assert {name for name, one in after.items() if one["action"] != "unchanged"} == changed.keys()
    pipeline.stop(worker)

    for name in changed:
        pipeline.target.execute(remedy(after[name]["remaining"][0]))
    worker = pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = title")  # which only the new worker applies
    pipeline.in_step()
    finds(pipeline, wanted)
    assert {one["action"] for one in plans(pipeline, 0).values()} == {"unchanged"}


def finds(pipeline: Pipeline, searches: Mapping[str, str]) -> None:
    """See that each index finds what its `search` finds, and nothing by words if it has none."""
    for name, search in searches.items():
        if not search:
            with pytest.raises(psycopg.Error, match="no keyword search"):
                by_function(pipeline, name)
            continue
        assert (name, by_function(pipeline, name)) == (name, FOUND[search.removeprefix("pg_catalog.")])
    name = next(iter(searches))
    assert by_command(pipeline, name) == {1, 4}


def test_a_language_that_is_no_longer_carried_stays_in_force_for_the_words_made_by_it(
    pipeline: Pipeline, database: Database
) -> None:
    section = {"search": "{language}", "columns": ["language"]}
    pipeline.configure(configuration(database.dsn, indexes={"articles": section}))
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"search": "english"}}))
    worker = pipeline.start()
    insert(pipeline, WRITTEN_LATER)
    pipeline.reach("articles")
    # The row written later has no language, so its words are as they are written.
    assert by_function(pipeline, "articles") == [{1}, {1, 4}, {3}, set()]
    (said,) = plans(pipeline, 3)["articles"]["remaining"]
    pipeline.stop(worker)
    pipeline.target.execute(remedy(said))
    pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = title")  # which only the new worker applies
    pipeline.in_step()
    finds(pipeline, {"articles": "english"})


@pytest.mark.proof
def test_other_chunks_have_the_keyword_search_of_the_file_and_those_that_are_live_keep_theirs(
    pipeline: Pipeline, database: Database
) -> None:
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"search": "english"}}))
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    pipeline.configure(configuration(database.dsn, indexes={"articles": {"search": "simple", "text": "a {title}"}}))
    assert migrate(pipeline, "start")["begun"] is True
    pipeline.start()
    ready(pipeline, 2)
    insert(pipeline, WRITTEN_LATER)
    pipeline.reach("articles")
    finds(pipeline, {"articles": "english"})
    migrate(pipeline, "activate")
    pipeline.reach("articles")
    finds(pipeline, {"articles": "simple"})
    assert {one["action"] for one in plans(pipeline, 0).values()} == {"unchanged"}
    migrate(pipeline, "rollback")
    finds(pipeline, {"articles": "english"})
