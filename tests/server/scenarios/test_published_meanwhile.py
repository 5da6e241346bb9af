"""Tables that are published, or published again, while a transaction writes to them.

Releases of PostgreSQL before `source/publications.REFRESHED` then take them for unpublished for as long as a connection
lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import OTHER_VERSIONS
from tests.support.configs import NO_AUDIT
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]

NOTES = (
    "CREATE TABLE notes (id int PRIMARY KEY, title text)",
    "INSERT INTO notes SELECT i, 'title ' || i FROM generate_series(1, 9) i",
)
WRITES = (
    "INSERT INTO notes VALUES (200, 'new')",
    "UPDATE notes SET title = 'changed' WHERE id < 4",
    "DELETE FROM notes WHERE id = 5",
)


@pytest.fixture
def old(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A source that has the fault, and in which nothing else refreshes what the server knows of a table."""
    if not OTHER_VERSIONS[16].exists():
        pytest.skip("PostgreSQL 16 is not installed")
    return make_cluster(bin_dir=OTHER_VERSIONS[16], settings={"autovacuum": "off"})


@pytest.mark.proof
def test_a_new_index_follows_a_table_that_was_written_to_as_it_was_published(
    make_scene: MakeScene, old: Cluster
) -> None:
    scene = make_scene(NOTES, {}, source=old.dsn(), apart=True, worker_lines=NO_AUDIT)
    pipeline = scene.pipeline
    with psycopg.connect(old.dsn()) as writer:
        writer.execute("INSERT INTO notes VALUES (100, 'before')")
        pipeline.stop(pipeline.processes[-1])
        scene.reconfigured(lambda text: text + Followed("notes").section("notes") + "\n")
        pipeline.start()
        until(lambda: published(scene), pipeline.tail)
        scene.settle()
        writer.execute("INSERT INTO notes VALUES (101, 'after')")
    pipeline.live()

    scene.execute(*WRITES)

    scene.follows()


@pytest.mark.proof
def test_a_table_that_is_published_again_as_it_is_written_to_is_followed(make_scene: MakeScene, old: Cluster) -> None:
    scene = make_scene(NOTES, {"notes": Followed("notes")}, source=old.dsn(), apart=True, worker_lines=NO_AUDIT)
    before = scene.compared("notes")
    with psycopg.connect(old.dsn()) as writer:
        scene.execute("ALTER PUBLICATION cdcsync DROP TABLE notes")
        writer.execute("INSERT INTO notes VALUES (100, 'before')")
        with contextlib.suppress(psycopg.errors.DuplicateObject):  # the worker may have put it back already
            scene.execute("ALTER PUBLICATION cdcsync ADD TABLE notes")
        until(lambda: scene.compared("notes") > before, scene.pipeline.tail)
        scene.settle()
        writer.execute("INSERT INTO notes VALUES (101, 'after')")
    scene.settle()
    until(lambda: not comparing(scene), scene.pipeline.tail)

    scene.execute(*WRITES)

    scene.follows()


def published(scene: Scene) -> bool:
    """Say whether the publication has the table."""
    found = scene.pipeline.source.execute("SELECT FROM pg_publication_tables WHERE tablename = 'notes'")
    return found.fetchone() is not None


def comparing(scene: Scene) -> bool:
    """Say whether a comparison is still to be made."""
    found = scene.target.execute(
        "SELECT FROM cdcsync.backfills WHERE kind = 'compare' AND state IN ('requested', 'running')"
    )
    return bool(found)
