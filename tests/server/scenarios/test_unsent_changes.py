"""Changes that a publication did not send for a moment, or that no row event tells: they reach the index all the same.

Every edit of a publication, of each kind, undone before anyone looks, with the worker up and with it down; and every
DDL that makes other values of old rows, with and without writes beside it. Each case has a table and an index of its
own, and all of a kind share one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]  # dozens of indexes, on a machine that may be busy

CHANGES = (
    "UPDATE {t} SET title = title || ' unsent' WHERE id % 3 = 0",
    "DELETE FROM {t} WHERE id = (SELECT max(id) FROM {t})",
    "INSERT INTO {t} SELECT max(id) + 10, 'unsent' FROM {t}",
    "UPDATE {t} SET id = -id WHERE id = (SELECT min(id) FROM {t} WHERE id > 0)",
)

EDITS = {
    "table": {
        "dropped and added": ("ALTER PUBLICATION p DROP TABLE {t}", "ALTER PUBLICATION p ADD TABLE {t}"),
        "a row filter for a while": (
            "ALTER PUBLICATION p DROP TABLE {t}; ALTER PUBLICATION p ADD TABLE {t} WHERE (id > 1000)",
            "ALTER PUBLICATION p DROP TABLE {t}; ALTER PUBLICATION p ADD TABLE {t}",
        ),
        "a column list for a while": (
            "ALTER PUBLICATION p DROP TABLE {t}; ALTER PUBLICATION p ADD TABLE {t} (id)",
            "ALTER PUBLICATION p DROP TABLE {t}; ALTER PUBLICATION p ADD TABLE {t}",
        ),
        "only inserts for a while": (
            "ALTER PUBLICATION p SET (publish = 'insert')",
            "ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate')",
        ),
    },
    "all": {
        "made anew": ("DROP PUBLICATION p", "CREATE PUBLICATION p {all}"),
        "unlogged and logged": ("ALTER TABLE {t} SET UNLOGGED", "ALTER TABLE {t} SET LOGGED"),
        "moved and moved back": ("ALTER TABLE {t} SET SCHEMA attic; SET search_path = attic", "{back}"),
        "only inserts for a while": (
            "ALTER PUBLICATION p SET (publish = 'insert')",
            "ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate')",
        ),
    },
    "schema": {
        "the schema dropped and added": (
            "ALTER PUBLICATION p SET TABLES IN SCHEMA attic",
            "ALTER PUBLICATION p SET TABLES IN SCHEMA public",
        ),
        "moved and moved back": ("ALTER TABLE {t} SET SCHEMA attic; SET search_path = attic", "{back}"),
    },
}
"""By kind of publication: what has a table not sent, and what has it sent again."""

BACK = "ALTER TABLE attic.{t} SET SCHEMA public; SET search_path = public"
KINDS = {"table": "FOR TABLE beat, {tables}", "all": "FOR ALL TABLES", "schema": "FOR TABLES IN SCHEMA public"}


@pytest.fixture(autouse=True)
def needs_filters(server: Server) -> None:
    """Row filters, column lists and publications of schemas are of PostgreSQL 15."""
    with server.connect() as connection:
        if connection.info.server_version < 150000:
            pytest.skip("PostgreSQL 15 has row filters, column lists and publications of schemas")


def statements(texts: Sequence[str], name: str) -> list[str]:
    """Return single statements about one table."""
    back = BACK.format(t=name)
    whole = "; ".join(text.format(t=name, back=back, all=KINDS["all"]) for text in texts)
    return [one for one in whole.split(";") if one.strip()]


def edited(scene: Scene, name: str, edit: tuple[str, str], *, at_once: bool) -> None:
    """Have a table not sent, change it, and have it sent again."""
    run = scene.at_once if at_once else scene.execute
    run(*statements((edit[0], *CHANGES, edit[1]), name))


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("kind", EDITS)
def test_what_a_publication_did_not_send_for_a_moment_reaches_the_index(make_scene: MakeScene, kind: str) -> None:
    cases = {f"e{at}{how}": (edit, how) for at, edit in enumerate(EDITS[kind].values()) for how in ("apart", "atonce")}
    scene = make_scene(
        [
            "CREATE SCHEMA attic",
            *(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)" for name in cases),
            *(f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 12) i" for name in cases),
            f"CREATE PUBLICATION p {KINDS[kind].format(tables=', '.join(cases))}",
        ],
        {name: Followed(name) for name in cases},
        publication="p",
    )

    for name, (edit, how) in cases.items():
        edited(scene, name, edit, at_once=how == "atonce")
    scene.heals()

    scene.pipeline.stop(scene.pipeline.processes[-1])
    for name, (edit, how) in cases.items():
        edited(scene, name, edit, at_once=how == "atonce")
    scene.pipeline.start()
    scene.heals()


# -- values that change without an event -----------------------------------------------------------------------------

TABLE = """
    CREATE TYPE mood_{t} AS ENUM ('sad', 'happy');
    CREATE TYPE spot_{t} AS (x int, y int);
    CREATE TABLE {t} (id int, title text, mood mood_{t} DEFAULT 'sad', spot spot_{t} DEFAULT '(1,2)', day date,
        PRIMARY KEY (id)) {parts}
"""
ROWS = "INSERT INTO {t} (id, title) SELECT i, 'title ' || i FROM generate_series(1, 12) i"
WRITE = "UPDATE {t} SET title = title || '.' WHERE id = (SELECT min(id) FROM {t})"

REWRITES = {
    "values by USING": ["ALTER TABLE {t} ALTER title TYPE text USING upper(title)"],
    "values by USING, of another type": ["ALTER TABLE {t} ALTER title TYPE varchar(50) USING upper(title)"],
    "keys by USING": ["ALTER TABLE {t} ALTER id TYPE int USING id + 1000"],
    "keys by USING, of another type": ["ALTER TABLE {t} ALTER id TYPE bigint USING id + 1000"],
    "a column dropped and added": ["ALTER TABLE {t} DROP title", "ALTER TABLE {t} ADD title text DEFAULT 'anew'"],
    "an online migration": [
        "ALTER TABLE {t} ADD b2 text",
        "UPDATE {t} SET b2 = upper(title)",
        "ALTER TABLE {t} RENAME title TO b_old",
        "ALTER TABLE {t} RENAME b2 TO title",
    ],
    "a label renamed": ["ALTER TYPE mood_{t} RENAME VALUE 'sad' TO 'down'"],
    "an attribute added": ["ALTER TYPE spot_{t} ADD ATTRIBUTE z int"],
}
WHEN: dict[str, Callable[[Scene, str, list[str]], None]] = {
    "nothing after it": lambda scene, name, ddl: scene.execute(*ddl),
    "a write after it": lambda scene, name, ddl: scene.execute(*ddl, WRITE.format(t=name)),
    "in one transaction": lambda scene, name, ddl: scene.at_once(WRITE.format(t=name), *ddl, WRITE.format(t=name)),
}


def rewritten(make_scene: MakeScene, *, partitioned: bool, down: bool) -> None:
    cases = {
        f"w{at}{when}": (rewrite, moment)
        for at, rewrite in enumerate(REWRITES.values())
        for when, moment in enumerate(WHEN.values())
    }
    layout = []
    for name in cases:
        parts = "PARTITION BY RANGE (id)" if partitioned else ""
        layout += [one for one in TABLE.format(t=name, parts=parts).split(";") if one.strip()]
        if partitioned:
            layout.append(f"CREATE TABLE {name}_low PARTITION OF {name} FOR VALUES FROM (MINVALUE) TO (6)")
            layout.append(f"CREATE TABLE {name}_high PARTITION OF {name} DEFAULT")
        layout.append(ROWS.format(t=name))
    scene = make_scene(
        layout, {name: Followed(name, "{title} {mood} {spot}", ("mood", "day")) for name in cases}, apart=down
    )
    if down:
        scene.pipeline.stop(scene.pipeline.processes[-1])
    for name, (rewrite, moment) in cases.items():
        if partitioned and any("id TYPE" in one for one in rewrite):
            continue  # the server refuses to change the type of a partition key
        moment(scene, name, [one.format(t=name) for one in rewrite])
    if down:
        scene.pipeline.start()
    scene.heals()


@pytest.mark.proof
def test_what_ddl_makes_of_old_values_reaches_the_index(make_scene: MakeScene) -> None:
    rewritten(make_scene, partitioned=False, down=False)


@pytest.mark.proof
@pytest.mark.parametrize("down", [False, True], ids=["worker up", "worker down"])
@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
def test_what_ddl_makes_of_old_values_reaches_the_index_of_any_table_and_whenever_it_happens(
    make_scene: MakeScene, partitioned: bool, down: bool
) -> None:
    rewritten(make_scene, partitioned=partitioned, down=down)
