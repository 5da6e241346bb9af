"""What was altered and altered back, and what only a condition on the whole row sees: no index keeps the other meaning.

Each case has tables and an index of its own, once for a worker that is down meanwhile and once for one that follows.
All share a worker with an index of a table that nothing happens to.
"""

from __future__ import annotations

import pytest

from tests.support.configs import NO_AUDIT
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

TABLE = (
    "CREATE TABLE {t} (id int PRIMARY KEY, title text, extra text, mood {t}_mood DEFAULT 'sad',"
    " place {t}_place DEFAULT '(1,2)', status text DEFAULT 'open')"
)
MADE = [
    "CREATE TYPE {t}_mood AS ENUM ('sad', 'happy')",
    "CREATE TYPE {t}_place AS (x int, y int)",
    TABLE,
    "INSERT INTO {t} (id, title, extra) SELECT i, 'title ' || i, 'extra ' || i FROM generate_series(1, 8) i",
]

# The condition of the index, and what happens to its table.
ALTERED: dict[str, tuple[str, list[str]]] = {
    "swapped": (
        "",
        [
            "ALTER TABLE {t} RENAME title TO aside",
            "ALTER TABLE {t} RENAME extra TO title",
            "ALTER TABLE {t} RENAME aside TO extra",
            "UPDATE {t} SET title = title || ' while away', extra = extra || ' meanwhile' WHERE id < 4",
            "ALTER TABLE {t} RENAME extra TO aside",
            "ALTER TABLE {t} RENAME title TO extra",
            "ALTER TABLE {t} RENAME aside TO title",
        ],
    ),
    "label": (
        "",
        [
            "ALTER TYPE {t}_mood RENAME VALUE 'happy' TO 'merry'",
            "UPDATE {t} SET mood = 'merry' WHERE id < 4",
            "ALTER TYPE {t}_mood RENAME VALUE 'merry' TO 'happy'",
        ],
    ),
    "attribute": (
        "coalesce((to_jsonb(place) ->> 'x')::int, 0) = 1",
        ["ALTER TYPE {t}_place RENAME ATTRIBUTE x TO abscissa", "UPDATE {t} SET extra = 'x' WHERE id = 1"],
    ),
    "attribute_undone": (
        "coalesce((to_jsonb(place) ->> 'x')::int, 0) = 1",
        [
            "ALTER TYPE {t}_place RENAME ATTRIBUTE x TO abscissa",
            "UPDATE {t} SET extra = 'x' WHERE id = 1",
            "ALTER TYPE {t}_place RENAME ATTRIBUTE abscissa TO x",
        ],
    ),
    "row_renamed": (
        "to_jsonb(t) ->> 'status' = 'open'",
        ["ALTER TABLE {t} RENAME status TO state"],
    ),
    "row_more": ("to_jsonb(t.*) ->> 'more' IS NULL", ["ALTER TABLE {t} ADD more text DEFAULT 'x'"]),
    "row_less": ("(to_jsonb(t) ->> 'status') IS NOT NULL", ["ALTER TABLE {t} DROP status"]),
}  # fmt: skip

EXCHANGED = [
    "ALTER TABLE {t} RENAME TO {t}_aside",
    "ALTER TABLE {t}_other RENAME TO {t}",
    "ALTER TABLE {t}_aside RENAME TO {t}_other",
]
"""Two followed tables change names; it undoes itself."""

FAMILY = [
    "ALTER SCHEMA {t}__a RENAME TO aside",
    "ALTER SCHEMA {t}__b RENAME TO {t}__a",
    "ALTER SCHEMA aside RENAME TO {t}__b",
]

RENUMBER = "UPDATE {t} SET id = CASE id WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE id + 1 END"
"""Two rows change keys, and each of the others takes that of the next: two rows have the same key for a moment."""

RENUMBERED: dict[str, tuple[str, str, str]] = {
    "renumbered": ("", "ALTER TABLE {t} ADD PRIMARY KEY (id)", "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey"),
    "renumbered_named": ('key = ["id"]', "CREATE UNIQUE INDEX {t}_key ON {t} (id)", "DROP INDEX {t}_key"),
}
"""What an index says of its key, and the statements that keep the key unique, and no longer."""

MOVED: dict[str, list[str]] = {
    "tables": [*EXCHANGED, "UPDATE {t} SET title = 'of the other' WHERE id = 1", "DELETE FROM {t}_other WHERE id = 2",
               *EXCHANGED],
    "schemas": [*FAMILY, "UPDATE {t}__a.items SET title = 'of the other' WHERE id = 1",
                "DELETE FROM {t}__b.items WHERE id = 2", *FAMILY],
    "family_row": ["ALTER TABLE {t}__a.items RENAME status TO state"],
    "family_key": [one.format(t="{t}__a.items") for one in (
        "ALTER TABLE {t} REPLICA IDENTITY FULL", "ALTER TABLE {t} DROP CONSTRAINT items_pkey", RENUMBER,
        "ALTER TABLE {t} ADD PRIMARY KEY (id)", "ALTER TABLE {t} REPLICA IDENTITY DEFAULT")],
}  # fmt: skip

RELATED = """
[indexes.NAME.related.notes]
table = "{t}_notes"
on = {{ item_id = "id" }}
text = "{{body}}"
where = "{where}"
order_by = "place"
"""
NOTES = [
    "CREATE TABLE {t} (id int PRIMARY KEY, title text)",
    "INSERT INTO {t} SELECT i, 'title ' || i FROM generate_series(1, 4) i",
    "CREATE TABLE {t}_notes (no int PRIMARY KEY, item_id int, body text, place int, other int NOT NULL UNIQUE,"
    " status text DEFAULT 'open', unused text)",
    "INSERT INTO {t}_notes SELECT i, 1 + i % 4, 'body ' || i, 1, 100 - i FROM generate_series(1, 16) i",
    "ALTER TABLE {t}_notes REPLICA IDENTITY FULL",
]
OF_NOTES: dict[str, tuple[str, list[str]]] = {
    "primary_key": (
        "body <> 'body 3'",
        ["ALTER TABLE {t}_notes DROP CONSTRAINT {t}_notes_pkey", "ALTER TABLE {t}_notes ADD PRIMARY KEY (other)"],
    ),
    "related_row": ("to_jsonb(t) ->> 'status' = 'open'", ["ALTER TABLE {t}_notes RENAME status TO state"]),
    "unused": ("body <> 'body 3'", ["ALTER TABLE {t}_notes DROP unused"]),
}
"""The condition on the related rows, and what happens to their table."""

FAMILIES = {"schemas": "", "family_row": "to_jsonb(t) ->> 'status' = 'open'", "family_key": ""}
"""Indexes over the tables of two schemas, with their conditions."""

HOW = ("down", "up")


@pytest.fixture(scope="module")
def undone(make_scene: MakeScene) -> Scene:
    """Everything happens to the tables of `down` while no worker runs, and to those of `up` in one transaction."""
    statements = ["CREATE TABLE beside (id int PRIMARY KEY, title text)", "INSERT INTO beside VALUES (1, 'beside')"]
    indexes = {"beside": Followed("beside")}
    for how in HOW:
        for case, (where, _) in ALTERED.items():
            name = f"{case}_{how}"
            statements += [one.format(t=name) for one in MADE]
            indexes[name] = Followed(name, "{title}", ("mood",), where=where)
        for case, (keyed, proven, _) in RENUMBERED.items():
            name = f"{case}_{how}"
            statements += [
                f"CREATE TABLE {name} (id int NOT NULL, title text)",
                f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 8) i",
                f"ALTER TABLE {name} REPLICA IDENTITY FULL",
                proven.format(t=name),
            ]
            indexes[name] = Followed(name, more=keyed)
        for name in (f"tables_{how}", f"tables_{how}_other"):
            statements.append(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)")
            statements.append(f"INSERT INTO {name} SELECT i, '{name} ' || i FROM generate_series(1, 4) i")
            indexes[name] = Followed(name)
        for kind, condition in FAMILIES.items():
            indexes[f"{kind}_{how}"] = Followed(f"{kind}_{how}__*.items", where=condition)
            for member in ("a", "b"):
                items = f"{kind}_{how}__{member}.items"
                statements += [
                    f"CREATE SCHEMA {kind}_{how}__{member}",
                    f"CREATE TABLE {items} (id int PRIMARY KEY, title text, status text DEFAULT 'open')",
                    f"INSERT INTO {items} SELECT i, '{member} ' || i FROM generate_series(1, 4) i",
                ]
        for case, (where, _) in OF_NOTES.items():
            name = f"{case}_{how}"
            statements += [one.format(t=name) for one in NOTES]
            indexes[name] = Followed(name, "{title}: {notes}", more=RELATED.format(t=name, where=where))
    scene = make_scene(statements, indexes, worker_lines=NO_AUDIT)
    scene.pipeline.stop(scene.pipeline.processes[-1])
    happen(scene, "down", at_once=False)
    scene.pipeline.start()
    scene.settle()
    happen(scene, "up", at_once=True)
    for case, (where, _) in OF_NOTES.items():
        for how in HOW:
            name, key = f"{case}_{how}", "other" if case == "primary_key" else "no"
            scene.execute(
                f"CREATE VIEW {name}_expected AS SELECT id, title, (SELECT string_agg(body, E'\n' ORDER BY place,"
                f" {key}) FROM {name}_notes AS t WHERE item_id = i.id AND {where}) AS notes FROM {name} AS i"
            )
            scene.oracle_reads(name, f"{name}_expected")
    return scene


def happen(scene: Scene, how: str, *, at_once: bool) -> None:
    cases = {f"{case}_{how}": statements for case, (_, statements) in ALTERED.items()}
    cases |= {f"{case}_{how}": [dropped, RENUMBER, proven] for case, (_, proven, dropped) in RENUMBERED.items()}
    cases |= {f"{kind}_{how}": statements for kind, statements in MOVED.items()}
    cases |= {f"{case}_{how}": statements for case, (_, statements) in OF_NOTES.items()}
    for name, statements in cases.items():
        (scene.at_once if at_once else scene.execute)(*(one.format(t=name) for one in statements))
    scene.execute("UPDATE beside SET title = title || '!'")


CASES = [f"{case}_{how}" for case in ALTERED for how in HOW]
CASES += [f"{case}_{how}" for case in (*RENUMBERED, *OF_NOTES) for how in HOW]
CASES += [f"{kind}_{how}" for kind in MOVED for how in HOW] + [f"tables_{how}_other" for how in HOW]


@pytest.mark.proof_from(4)
@pytest.mark.parametrize("name", CASES)
def test_an_index_equals_its_table_after_what_was_altered_and_altered_back(undone: Scene, name: str) -> None:
    undone.settle()
    undone.heals(name)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["beside", *(f"unused_{how}" for how in HOW)])
def test_an_index_that_it_does_not_concern_is_neither_compared_nor_read_again_nor_paused(
    undone: Scene, name: str
) -> None:
    undone.heals()
    undone.follows(name)
    assert undone.compared(name) == 0
    assert undone.rereads()[name] == 0
    assert not [one for one in undone.pipeline.events() if one["event"] == "index_paused" and one["index"] == name]
    until(lambda: all(undone.state(name)[0] == "live" for name in CASES), undone.pipeline.tail)
