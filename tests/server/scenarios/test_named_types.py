"""Types whose names need quotes, and look like a placeholder of a statement."""

from __future__ import annotations

import pytest

from tests.support.scenes import Followed, MakeScene

pytestmark = [pytest.mark.server]

MOOD, SHADE = '"mo{od} %s \'s"', '"public"."sha{}de {name}"'


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
