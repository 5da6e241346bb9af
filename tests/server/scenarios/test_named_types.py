"""Types whose names need quotes, and look like a placeholder of a statement; types that get other names."""

from __future__ import annotations

import psycopg
import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]

MOOD, SHADE = '"mo{od} %s \'s"', '"public"."sha{}de {name}"'


@pytest.mark.proof
def test_an_index_whose_key_and_columns_have_types_of_odd_names_follows_its_table(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            f"CREATE TYPE {MOOD} AS ENUM ('low', 'high', 'other')",
            f"CREATE DOMAIN {SHADE} AS text CHECK (VALUE <> '')",
            f"CREATE TABLE odd (mood {MOOD}, at int, shade {SHADE}, title text, PRIMARY KEY (mood, at))",
            "CREATE TABLE plain (id int PRIMARY KEY, title text)",
            "INSERT INTO odd VALUES ('low', 1, 'red', 'one'), ('high', 1, 'blue', 'two')",
        ],
        {
            "odd": Followed("odd", columns=("shade",), more='indexed = ["shade"]\nsearch = "simple"\n'),
            "plain": Followed("plain"),
        },
    )
    scene.execute("INSERT INTO odd VALUES ('other', 2, 'green', 'three')", "INSERT INTO plain VALUES (1, 'one')")
    scene.execute("UPDATE odd SET shade = 'dark', title = 'twice' WHERE mood = 'high'")
    scene.execute("UPDATE odd SET mood = 'high', at = 3 WHERE mood = 'low'; DELETE FROM odd WHERE mood = 'other'")
    scene.follows()
    assert scene.command("verify", "odd").returncode == 0
    scene.command("replay", "odd", "--key", "high,1")
    scene.execute(f"ALTER TABLE odd ALTER COLUMN at TYPE {SHADE}, ALTER COLUMN shade TYPE {MOOD} USING 'low'")
    scene.heals()
    found = scene.command("search", "odd", "twice", "--mode", "text", "--filter", "shade=low", "--json")
    assert found.returncode == 0, found.stderr
    assert '"twice"' in found.stdout


def searched(scene: Scene, filter_: str = "{}") -> bool:
    """Whether the index can be searched by words and by vector."""
    statement = "SELECT FROM cdcsync.t_search('title', (SELECT embedding FROM t_index LIMIT 1), filter => %s)"
    try:
        return scene.pipeline.target.execute(statement, [filter_]).fetchall() != []
    except (psycopg.errors.UndefinedObject, psycopg.errors.InvalidParameterValue):
        return False


RENAMES = {
    "pgvector moved": "CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions",
    "a carried type renamed": "ALTER TYPE status RENAME TO state",
}
"""Each after the one before."""

OPEN = '{"status": "open"}'

TYPES = "CREATE TYPE status AS ENUM ('open', 'done'); CREATE TYPE grade AS ENUM ('low', 'high', 'other')"

GRADED = [
    TYPES,
    "CREATE TABLE t (grade grade PRIMARY KEY, status status, title text)",
    "INSERT INTO t VALUES ('low', 'open', 'title one'), ('high', 'open', 'title two')",
]


def test_searches_know_types_by_their_new_names_within_the_next_look_and_no_row_is_read_again(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        GRADED,
        {"t": Followed("t", columns=("status",), more='search = "english"')},
        apart=True,
        started=False,
        hurry={"cdcsync.flows.watch.RELATIONS_S": 1.0, "cdcsync.flows.watch.WATCH_S": 1.0},
    )
    scene.target.execute(TYPES)
    scene.pipeline.start()
    scene.pipeline.live()
    loads = scene.pipeline.times("backfill_requested")
    assert searched(scene, OPEN)
    for at, change in enumerate(RENAMES.values(), start=1):
        scene.target.execute(change)
        scene.execute(f"UPDATE t SET title = 'a new title {at}' WHERE grade = 'low'")
        scene.follows()
        until(lambda: searched(scene, OPEN), scene.pipeline.tail)
    assert scene.pipeline.times("index_paused") == 0
    assert scene.pipeline.times("backfill_requested") == loads


def test_a_write_that_comes_before_the_next_look_finds_the_key_by_the_new_name_of_its_type(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(GRADED, {"t": Followed("t")}, apart=True, started=False)
    scene.target.execute(TYPES)
    scene.pipeline.start()
    scene.pipeline.live()
    loads = scene.pipeline.times("backfill_requested")
    scene.target.execute("ALTER TYPE grade RENAME TO mark")
    scene.execute("UPDATE t SET title = 'title three' WHERE grade = 'low'")
    scene.follows()
    assert scene.pipeline.times("index_paused") == 0
    assert scene.pipeline.times("backfill_requested") == loads


@pytest.mark.proof
def test_a_text_search_configuration_that_was_renamed_needs_its_new_name_and_a_start(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE TEXT SEARCH CONFIGURATION plain (COPY = simple)",
            "CREATE TABLE t (id int PRIMARY KEY, title text)",
            "INSERT INTO t SELECT i, 'title ' || i FROM generate_series(1, 9) i",
        ],
        {"t": Followed("t", more='search = "public.plain"')},
    )
    loads = scene.pipeline.times("backfill_requested")
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("ALTER TEXT SEARCH CONFIGURATION plain RENAME TO ours")
    scene.reconfigured(lambda text: text.replace("public.plain", "public.ours"))
    scene.pipeline.start()
    until(lambda: searched(scene), scene.pipeline.tail)
    assert scene.pipeline.times("index_paused") == 0
    assert scene.pipeline.times("backfill_requested") == loads
