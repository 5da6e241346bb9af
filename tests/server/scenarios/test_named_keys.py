"""Tables without a primary key: rows are named by columns that a unique index proves to be a key."""

from __future__ import annotations

import json

import pytest

from tests.support.scenes import Followed, MakeScene, Scene

pytestmark = [pytest.mark.server]

COLUMNS = "station text NOT NULL, taken int NOT NULL, title text, note text"
LARGE = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 200) n)"
TABLES = ("full_identity", "by_index", "wider", "parted")
PARTS = {"parted": ("parted_1", "parted_rest")}
EACH = pytest.mark.parametrize("name", TABLES)


@pytest.fixture(scope="module")
def keyless(make_scene: MakeScene) -> Scene:
    """Tables without a primary key, whose rows look alike but for their key."""
    statements = []
    for name in TABLES:
        unique, how = "station" if name == "wider" else "taken, station", "FULL"
        if name == "by_index":
            how = "USING INDEX by_index_key"
        statements += [
            f"CREATE TABLE {name} ({COLUMNS}){' PARTITION BY LIST (taken)' if name in PARTS else ''}",
            f"ALTER TABLE {name} ALTER note SET STORAGE EXTERNAL",
            *(f"CREATE TABLE {one} PARTITION OF {name} DEFAULT" for one in PARTS.get(name, ())[1:]),
            *(f"CREATE TABLE {one} PARTITION OF {name} FOR VALUES IN (1, 2)" for one in PARTS.get(name, ())[:1]),
            f"CREATE UNIQUE INDEX {name}_key ON {name} ({unique})",
            *(f"ALTER TABLE {one} REPLICA IDENTITY {how}" for one in (name, *PARTS.get(name, ()))),
            f"INSERT INTO {name} SELECT 's' || i, i % 4, 'the same', {LARGE} FROM generate_series(1, 30) i",
        ]
    return make_scene(
        statements, {name: Followed(name, "{title} {note}", more='key = ["station", "taken"]') for name in TABLES}
    )


@EACH
def test_rows_that_look_alike_are_told_apart_by_the_named_key(keyless: Scene, name: str) -> None:
    keyless.execute(
        f"UPDATE {name} SET title = 'changed' WHERE station = 's1'",
        f"UPDATE {name} SET station = station || 'x' WHERE taken = 1",
        f"UPDATE {name} SET taken = taken + 10 WHERE station = 's2'",
        f"UPDATE {name} SET station = 'moved', title = 'moved' WHERE station = 's3'",
        f"DELETE FROM {name} WHERE station = 's4'",
        f"INSERT INTO {name} VALUES ('s4', 4, 'the same', NULL), ('s-new', 9, 'the same', NULL)",
    )
    keyless.follows(name)


@EACH
def test_keys_that_are_exchanged_in_one_transaction_keep_their_rows(keyless: Scene, name: str) -> None:
    keyless.at_once(
        f"UPDATE {name} SET title = 'first' WHERE station = 's10'",
        f"UPDATE {name} SET title = 'second' WHERE station = 's11'",
        f"UPDATE {name} SET station = 'aside' WHERE station = 's10'",
        f"UPDATE {name} SET station = 's10' WHERE station = 's11'",
        f"UPDATE {name} SET station = 's11' WHERE station = 'aside'",
        f"DELETE FROM {name} WHERE station = 's12'",
        f"INSERT INTO {name} SELECT 's12', taken, 'back', note FROM {name} WHERE station = 's10'",
    )
    keyless.follows(name)
    keyless.at_once(f"TRUNCATE {name}", f"INSERT INTO {name} SELECT 't' || i, i % 4 FROM generate_series(1, 9) i")
    keyless.follows(name)


def test_a_large_transaction_and_a_killed_worker_lose_no_row(keyless: Scene) -> None:
    worker = keyless.pipeline.processes[-1]
    for name in TABLES:
        keyless.at_once(
            f"INSERT INTO {name} SELECT 'big' || i, i % 4, 'the same' FROM generate_series(1, 2000) i",
            f"UPDATE {name} SET station = station || '-' WHERE station LIKE 'big%'",
        )
    worker.kill()
    worker.wait()
    keyless.execute(*(f"DELETE FROM {name} WHERE station LIKE 'big1%'" for name in TABLES))
    keyless.pipeline.start()
    keyless.settle()
    keyless.heals(*TABLES)


def test_replay_and_verify_know_the_named_key(keyless: Scene) -> None:
    keyless.execute("INSERT INTO full_identity VALUES ('kept', 5, 'kept')")
    keyless.settle()
    replayed = keyless.command("replay", "full_identity", "--key", json.dumps(["5", "kept"]))
    assert replayed.returncode == 0, replayed.stderr
    verified = json.loads(keyless.command("verify", "full_identity", "--json").stdout)
    assert verified["equal"], verified


@pytest.mark.proof
def test_an_index_is_paused_while_nothing_proves_its_key(keyless: Scene) -> None:
    keyless.execute("DROP INDEX wider_key")
    assert "(station, taken) is not known to identify a row" in keyless.paused("wider")
    keyless.execute("UPDATE wider SET title = 'meanwhile'")
    keyless.follows("full_identity")
    keyless.execute("CREATE UNIQUE INDEX wider_key ON wider (station)")
    keyless.heals("wider")


NOTHING_PROVES = "(taken, station) is not known to identify a row"
CHANGES: dict[str, tuple[str, list[str], str, list[str]]] = {
    "duplicates": (
        "FULL",
        ["DROP INDEX {t}_key", "INSERT INTO {t} SELECT * FROM {t} WHERE station IN ('s1', 's2')"],
        NOTHING_PROVES,
        [
            "DELETE FROM {t} a USING {t} b WHERE a.ctid > b.ctid AND a.station = b.station",
            "CREATE UNIQUE INDEX {t}_key ON {t} (taken, station)",
        ],
    ),
    "no_longer_unique": (
        "FULL",
        ["DROP INDEX {t}_key", "CREATE INDEX {t}_key ON {t} (taken, station)"],
        NOTHING_PROVES,
        ["DROP INDEX {t}_key", "CREATE UNIQUE INDEX {t}_key ON {t} (taken, station)"],
    ),
    "partly_unique": (
        "FULL",
        ["DROP INDEX {t}_key", "CREATE UNIQUE INDEX {t}_key ON {t} (taken, station) WHERE taken > 0"],
        NOTHING_PROVES,
        ["DROP INDEX {t}_key", "CREATE UNIQUE INDEX {t}_key ON {t} (taken, station)"],
    ),
    "may_be_null": (
        "FULL",
        ["ALTER TABLE {t} ALTER station DROP NOT NULL", "INSERT INTO {t} VALUES (NULL, 1, 'a'), (NULL, 1, 'b')"],
        "NULL",
        ["DELETE FROM {t} WHERE station IS NULL", "ALTER TABLE {t} ALTER station SET NOT NULL"],
    ),
    "identity_index_dropped": (
        "INDEX",
        ["DROP INDEX {t}_key", "INSERT INTO {t} VALUES ('only inserts work', 1)"],
        NOTHING_PROVES,
        [
            "CREATE UNIQUE INDEX {t}_key ON {t} (taken, station)",
            "ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_key",
        ],
    ),
    "identity_of_another_index": (
        "INDEX",
        [
            "ALTER TABLE {t} ADD other int GENERATED ALWAYS AS IDENTITY UNIQUE",
            "ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_other_key",
            "UPDATE {t} SET station = station || 'x' WHERE taken = 1",
        ],
        "replica identity",
        ["ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_key"],
    ),
    "identity_nothing": (
        "FULL",
        ["ALTER TABLE {t} REPLICA IDENTITY NOTHING", "INSERT INTO {t} VALUES ('only inserts work', 1)"],
        "replica identity",
        ["ALTER TABLE {t} REPLICA IDENTITY FULL"],
    ),
    "widened": (
        "FULL",
        ["ALTER TABLE {t} ALTER taken TYPE bigint", "INSERT INTO {t} VALUES ('wide', 5000000000, 'wide')"],
        "",
        [],
    ),
    "widened_index": (
        "INDEX",
        ["ALTER TABLE {t} ALTER taken TYPE bigint", "UPDATE {t} SET taken = taken + 5000000000"],
        "",
        [],
    ),
    "to_text": ("FULL", ["ALTER TABLE {t} ALTER taken TYPE text", "UPDATE {t} SET taken = 'n' || taken"], "", []),
    "full_to_index": (
        "FULL",
        ["ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_key", "UPDATE {t} SET station = station || 'x'"],
        "",
        [],
    ),
    "index_to_full": (
        "INDEX",
        ["ALTER TABLE {t} REPLICA IDENTITY FULL", "UPDATE {t} SET station = station || 'x'"],
        "",
        [],
    ),
    "index_replaced": (
        "FULL",
        ["CREATE UNIQUE INDEX {t}_new ON {t} (station, taken)", "DROP INDEX {t}_key", "UPDATE {t} SET title = 'r'"],
        "",
        [],
    ),
    "primary_key_added": (
        "FULL",
        [
            "ALTER TABLE {t} ADD PRIMARY KEY (station, taken)",
            "ALTER TABLE {t} REPLICA IDENTITY DEFAULT",
            "UPDATE {t} SET station = station || 'x' WHERE taken = 1",
        ],
        "",
        [],
    ),
}
"""What happens to a table whose index names its key: how it is identified, the statements, why the index is paused for
it, if it is, and what heals it."""

HOW = pytest.mark.parametrize("how", ["up", pytest.param("down", marks=pytest.mark.proof)])
"""Whether the worker runs meanwhile."""


@pytest.fixture(scope="module")
def changing(make_scene: MakeScene) -> Scene:
    """A table for each change, twice, and one that nothing happens to."""
    statements = ["CREATE TABLE beside (id int PRIMARY KEY, title text)", "INSERT INTO beside VALUES (1, 'beside')"]
    indexes = {"beside": Followed("beside")}
    for change, (identity, *_) in CHANGES.items():
        for how in ("up", "down"):
            name = f"{change}_{how}"
            statements += [
                f"CREATE TABLE {name} ({COLUMNS})",
                f"CREATE UNIQUE INDEX {name}_key ON {name} (taken, station)",
                f"ALTER TABLE {name} REPLICA IDENTITY {'FULL' if identity == 'FULL' else f'USING INDEX {name}_key'}",
                f"INSERT INTO {name} SELECT 's' || i, i % 4, 'the same' FROM generate_series(1, 9) i",
            ]
            indexes[name] = Followed(name, more='key = ["station", "taken"]')
    return make_scene(statements, indexes)


@pytest.mark.proof
@HOW
def test_an_index_goes_by_its_named_key_or_is_paused_whatever_becomes_of_the_table(changing: Scene, how: str) -> None:
    if how == "down":
        changing.pipeline.stop(changing.pipeline.processes[-1])
    for change, (_, statements, _, _) in CHANGES.items():
        changing.execute(*(one.format(t=f"{change}_{how}") for one in statements))
    changing.execute("UPDATE beside SET title = title || '.'")
    if how == "down":
        changing.pipeline.start()
    for change, (_, _, reason, healing) in CHANGES.items():
        if reason:
            said = changing.paused(f"{change}_{how}")
            assert reason in said, said
        changing.execute(*(one.format(t=f"{change}_{how}") for one in healing))
    changing.heals()
    paused = {event["index"] for event in changing.pipeline.events() if event["event"] == "index_paused"}
    assert "beside" not in paused
