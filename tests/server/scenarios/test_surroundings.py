"""What befalls an index by others while its worker runs is logged as `check` would tell it, once, and stops nothing."""

from __future__ import annotations

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = pytest.mark.server

AGED = "UPDATE pg_collation SET collversion = '0' WHERE collname = 'pg_c_utf8'"

HURRY = {"cdcsync.flows.watch.RELATIONS_S": 0.5}


def told(scene: Scene, *words: str) -> list[str]:
    """Return where the worker has logged warnings with one of these words."""
    logged = [one for one in scene.pipeline.events() if one["event"] == "preflight"]
    return sorted(one["where"] for one in logged if any(word in one["problem"] for word in words))


@pytest.mark.proof
def test_another_version_of_a_collation_is_logged_once_while_it_lasts(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE TABLE pages (slug text PRIMARY KEY, title text)",
            "INSERT INTO pages SELECT 'page ' || i, 'title ' || i FROM generate_series(1, 9) AS i",
        ],
        {"pages": Followed("pages")},
        hurry=HURRY,
    )
    if scene.pipeline.source.info.server_version < 170000:
        pytest.skip("before PostgreSQL 17 this server may have no collation with a version")
    scene.execute('ALTER TABLE pages ALTER slug TYPE text COLLATE "pg_c_utf8"')
    scene.heals()
    scene.execute('CREATE INDEX ON cdcsync.pages_chunks (content COLLATE "pg_c_utf8")', AGED)
    both = ["indexes.pages", "indexes.pages.table"]
    until(lambda: told(scene, "recorded in version 0") == both, scene.pipeline.tail)
    scene.follows()
    until(lambda: scene.pipeline.get("/readyz")[0] == 200, scene.pipeline.tail)

    # Another pipeline of the same worker finds the same.
    scene.execute("ALTER TABLE pages RENAME title TO headline")
    assert "title" in scene.paused("pages")
    scene.execute("ALTER TABLE pages RENAME headline TO title")
    scene.heals()
    assert told(scene, "recorded in version 0") == both


def test_readers_past_row_level_security_are_logged_once_while_they_are_there(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE TABLE held (id int PRIMARY KEY, title text)",
            "INSERT INTO held SELECT i, 'title ' || i FROM generate_series(1, 9) AS i",
            "CREATE SCHEMA shown",
            "GRANT USAGE ON SCHEMA shown TO PUBLIC",
        ],
        {"held": Followed("held", view="shown.held")},
        hurry=HURRY,
    )
    scene.execute("GRANT SELECT ON shown.held TO PUBLIC", "ALTER TABLE held ENABLE ROW LEVEL SECURITY")
    until(lambda: told(scene, "the source holds readers") == ["indexes.held.view"], scene.pipeline.tail)
    scene.execute(
        "CREATE POLICY mine ON cdcsync.held_chunks USING (id < 3)",
        "ALTER TABLE cdcsync.held_chunks ENABLE ROW LEVEL SECURITY",
    )
    until(lambda: told(scene, "past the row-level security") == ["indexes.held.view"], scene.pipeline.tail)
    until(lambda: scene.pipeline.get("/readyz")[0] == 200, scene.pipeline.tail)
    scene.follows()
