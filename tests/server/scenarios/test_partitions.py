"""Partitioned tables: as one table, partition by partition, and while partitions come and go."""

from __future__ import annotations

import psycopg
import pytest

from tests.support.configs import NO_AUDIT
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Server
from tests.support.workers import until

pytestmark = [pytest.mark.server]

KEYED = "(id int, day date NOT NULL, title text, PRIMARY KEY (id, day))"
YEARS = (2024, 2025, 2026)


def year(table: str, number: int, kind: str = "PARTITION OF") -> str:
    return f"CREATE TABLE {table}_{number} {kind} {table} FOR VALUES FROM ('{number}-01-01') TO ('{number + 1}-01-01')"


def rows(table: str, first: int = 1) -> str:
    return (
        f"INSERT INTO {table} SELECT i, date '2024-06-01' + (i % 9) * 80, 'row ' || i"
        f" FROM generate_series({first}, {first + 8}) i"
    )


@pytest.fixture(scope="module")
def parted(make_scene: MakeScene) -> Scene:
    """A table for each scenario, partitioned by year; sent as one table."""
    names = ("moving", "attached", "nested", "emptied", "created")
    return make_scene(
        [
            statement
            for table in names
            for statement in (
                f"CREATE TABLE {table} {KEYED} PARTITION BY RANGE (day)",
                *(year(table, number) for number in YEARS),
                rows(table),
            )
        ],
        {table: Followed(table, "{title} {day}") for table in names},
    )


def test_rows_keep_their_document_when_they_move_between_partitions(parted: Scene) -> None:
    parted.execute(
        rows("moving", 20),
        "UPDATE moving SET day = '2025-12-12' WHERE id = 1",
        "UPDATE moving SET title = 'moved', day = '2024-12-12' WHERE id = 20",
        "UPDATE moving SET id = id + 100 WHERE id = 2",
        "DELETE FROM moving WHERE id = 3",
        "INSERT INTO moving_2025 VALUES (50, '2025-05-05', 'into the partition itself')",
        "UPDATE moving_2026 SET title = 'in the partition itself'",
    )
    parted.follows("moving")
    parted.execute("TRUNCATE moving", rows("moving", 30))
    parted.follows("moving")


def test_a_partition_that_is_created_is_followed_from_its_first_row_on(parted: Scene) -> None:
    parted.at_once(
        year("created", 2027),
        "INSERT INTO created VALUES (70, '2027-01-01', 'first')",
    )
    parted.execute(
        "CREATE TABLE created_rest PARTITION OF created DEFAULT", "INSERT INTO created VALUES (71, '2030-01-01', 'far')"
    )

    parted.follows("created")


def test_rows_come_with_a_partition_that_is_attached_and_go_with_one_that_is_detached(parted: Scene) -> None:
    parted.execute(
        f"CREATE TABLE older {KEYED}",
        rows("older", 200).replace("2024-06-01", "2000-01-01"),
        "ALTER TABLE attached ATTACH PARTITION older FOR VALUES FROM ('2000-01-01') TO ('2010-01-01')",
        "UPDATE attached SET title = 'changed since' WHERE id = 201",
        "ALTER TABLE attached DETACH PARTITION attached_2024",
        "UPDATE attached_2024 SET title = 'nobody sees'",
        "DROP TABLE attached_2026",
    )
    parted.heals("attached")
    requests = parted.pipeline.target.execute(
        "SELECT kind, rows_done FROM cdcsync.backfills WHERE index_name = 'attached' AND kind <> 'initial' ORDER BY id"
    ).fetchall()
    # Only what came was read, and of the others only whether they are there.
    assert ("replay", 9) in requests
    assert not [event for event in parted.pipeline.events() if event["event"] == "index_paused"]

    parted.at_once(
        "ALTER TABLE attached DETACH PARTITION older",
        "UPDATE older SET title = 'while it was away' WHERE id > 203",
        "DELETE FROM older WHERE id = 202",
        "ALTER TABLE attached ATTACH PARTITION older FOR VALUES FROM ('2000-01-01') TO ('2010-01-01')",
    )
    parted.heals("attached")


@pytest.mark.proof
def test_a_transaction_of_another_database_keeps_no_partition_from_being_read(
    make_scene: MakeScene, server: Server
) -> None:
    scene = make_scene(
        [f"CREATE TABLE beside {KEYED} PARTITION BY RANGE (day)", *(year("beside", one) for one in YEARS)],
        {"beside": Followed("beside", "{title}")},
    )
    scene.pipeline.stop(scene.pipeline.processes[-1])
    with psycopg.connect(server.dsn) as elsewhere:
        elsewhere.execute("SELECT pg_current_xact_id()")
        scene.pipeline.start()
        scene.execute(
            f"CREATE TABLE far {KEYED}",
            rows("far", 200).replace("2024-06-01", "2000-01-01"),
            "ALTER TABLE beside ATTACH PARTITION far FOR VALUES FROM ('2000-01-01') TO ('2010-01-01')",
        )

        scene.heals("beside")


@pytest.mark.proof
def test_a_partition_may_be_emptied_by_itself(parted: Scene) -> None:
    parted.execute("TRUNCATE emptied_2025", "INSERT INTO emptied VALUES (300, '2025-02-03', 'came after')")
    parted.heals("emptied")
    # The worker knew why it compared, so what it found is no error.
    assert {event["level"] for event in parted.pipeline.events() if event["event"] == "index_differed"} == {"warning"}
    parted.execute("VACUUM FULL emptied_2024")
    parted.heals("emptied")


def test_partitions_may_be_partitioned_themselves(parted: Scene) -> None:
    parted.execute(
        "CREATE TABLE nested_deep (LIKE nested INCLUDING ALL) PARTITION BY HASH (id)",
        *(
            f"CREATE TABLE nested_deep_{at} PARTITION OF nested_deep FOR VALUES WITH (MODULUS 2, REMAINDER {at})"
            for at in range(2)
        ),
        rows("nested_deep", 400).replace("2024-06-01", "2030-01-01"),
        "ALTER TABLE nested ATTACH PARTITION nested_deep FOR VALUES FROM ('2030-01-01') TO ('2040-01-01')",
        "DELETE FROM nested WHERE id = 401",
    )
    parted.heals("nested")
    parted.execute("TRUNCATE nested_deep", rows("nested", 500))
    parted.heals("nested")


def test_what_happened_to_partitions_while_no_worker_ran_is_made_up_for(make_scene: MakeScene) -> None:
    scene = make_scene(
        [f"CREATE TABLE away {KEYED} PARTITION BY RANGE (day)", *(year("away", one) for one in YEARS), rows("away")],
        {"away": Followed("away", "{title}")},
    )
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute(
        "TRUNCATE away_2025",
        "DROP TABLE away_2024",
        f"CREATE TABLE back {KEYED}",
        rows("back", 100).replace("2024-06-01", "2010-01-01"),
        "ALTER TABLE away ATTACH PARTITION back FOR VALUES FROM ('2010-01-01') TO ('2020-01-01')",
    )

    scene.pipeline.start()

    scene.heals("away")


def test_partitions_that_are_sent_under_their_own_names_can_be_indexed_one_by_one(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            f"CREATE TABLE own {KEYED} PARTITION BY RANGE (day)",
            *(year("own", number) for number in YEARS),
            rows("own"),
            "CREATE PUBLICATION leaves FOR TABLE own, beat WITH (publish_via_partition_root = false)",
        ],
        {f"own_{number}": Followed(f"own_{number}", "{title} {day}") for number in YEARS},
        publication="leaves",
    )
    scene.execute(
        "UPDATE own SET day = day + 300 WHERE id IN (1, 2, 3)",
        "UPDATE own SET title = 'another' WHERE id = 5",
        "DELETE FROM own WHERE id = 6",
        "TRUNCATE own_2026",
        "INSERT INTO own VALUES (60, '2026-06-06', 'came after')",
    )
    scene.follows()
    scene.execute("TRUNCATE own", rows("own", 10))
    scene.follows()
    assert until(lambda: scene.equal("own_2024"), scene.pipeline.tail)

    refused = make_scene(
        [
            f"CREATE TABLE own {KEYED} PARTITION BY RANGE (day)",
            "CREATE PUBLICATION leaves FOR TABLE own, beat WITH (publish_via_partition_root = false)",
        ],
        {"own": Followed("own")},
        publication="leaves",
        started=False,
    ).command("run")
    assert refused.returncode == 2
    assert "SET (publish_via_partition_root = true)" in refused.stderr


PASSING = {
    "attached_and_detached": [
        "CREATE TABLE {t}_apart (LIKE {t} INCLUDING ALL)",
        "ALTER TABLE {t} ATTACH PARTITION {t}_apart FOR VALUES FROM ('2030-01-01') TO ('2031-01-01')",
        "INSERT INTO {t} VALUES (100, '2030-02-02', 'passing by'), (101, '2030-03-03', 'too')",
        "UPDATE {t} SET title = 'stays' WHERE id = 1",
        "ALTER TABLE {t} DETACH PARTITION {t}_apart",
    ],
    "created_and_dropped": [
        "CREATE TABLE {t}_new PARTITION OF {t} DEFAULT",
        "INSERT INTO {t} VALUES (100, '2031-02-02', 'passing by')",
        "DROP TABLE {t}_new",
    ],
    "at_once": [
        "BEGIN; CREATE TABLE {t}_new PARTITION OF {t} DEFAULT; INSERT INTO {t} VALUES (100, '2031-02-02', 'unseen');"
        " COMMIT",
        "UPDATE {t} SET title = 'seen' WHERE id = 100; DROP TABLE {t}_new",
    ],
    "moved_there": [
        "CREATE TABLE {t}_new PARTITION OF {t} DEFAULT",
        "UPDATE {t} SET day = day + 3650 WHERE id IN (2, 3)",
        "ALTER TABLE {t} DETACH PARTITION {t}_new",
    ],
    "nested": [
        "CREATE TABLE {t}_deep PARTITION OF {t} DEFAULT PARTITION BY RANGE (id)",
        "CREATE TABLE {t}_deeper PARTITION OF {t}_deep DEFAULT",
        "INSERT INTO {t} VALUES (100, '2031-02-02', 'deep')",
        "DROP TABLE {t}_deeper",
    ],
    "twice": [
        "CREATE TABLE {t}_new PARTITION OF {t} DEFAULT; INSERT INTO {t} VALUES (100, '2031-02-02', 'once')",
        "DROP TABLE {t}_new",
        "CREATE TABLE {t}_new PARTITION OF {t} DEFAULT; INSERT INTO {t} VALUES (101, '2031-02-02', 'twice')",
        "DROP TABLE {t}_new",
    ],
    "and_stays": [
        "CREATE TABLE {t}_new PARTITION OF {t} DEFAULT",
        "INSERT INTO {t} VALUES (100, '2031-02-02', 'stays')",
    ],
}
RELATED = """[indexes.NAME.related.parts]
table = "parts"
on = { item_id = "id" }
text = "{name}"
"""


@pytest.fixture(scope="module")
def passing(make_scene: MakeScene) -> Scene:
    """A table for each way in which a partition comes and goes; nothing but the stream and the watch sees that."""
    made = make_scene(
        [
            *(
                statement
                for table in (*PASSING, "behind", "killed")
                for statement in (
                    f"CREATE TABLE {table} {KEYED} PARTITION BY RANGE (day)",
                    *(year(table, number) for number in YEARS),
                    rows(table),
                )
            ),
            "CREATE TABLE items (id int PRIMARY KEY, title text)",
            "INSERT INTO items SELECT i, 'item ' || i FROM generate_series(1, 9) i",
            "CREATE TABLE parts (item_id int, name text) PARTITION BY RANGE (item_id)",
            "CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (1) TO (5)",
            "ALTER TABLE parts REPLICA IDENTITY FULL; ALTER TABLE parts_low REPLICA IDENTITY FULL",
            "CREATE INDEX ON parts (item_id)",
            "CREATE VIEW expected_items AS SELECT i.*, p.name AS parts FROM items i LEFT JOIN parts p ON item_id = id",
            "CREATE TABLE beside (id int PRIMARY KEY, title text)",
        ],
        {
            "beside": Followed("beside"),
            "items": Followed("items", "{title} {parts}", more=RELATED),
            **{table: Followed(table, "{title} {day}") for table in (*PASSING, "behind", "killed")},
        },
        hurry={"cdcsync.flows.audit.rolling.FIRST_S": 3600.0},
    )
    made.oracle_reads("items", "expected_items")
    return made


@pytest.mark.proof
def test_a_partition_that_comes_and_goes_between_two_looks_leaves_nothing_behind(passing: Scene) -> None:
    for table, statements in PASSING.items():
        passing.execute(*(statement.format(t=table) for statement in statements))
    passing.execute("INSERT INTO beside VALUES (1, 'beside')")
    passing.heals(*PASSING)
    passing.follows("beside")
    assert not passing.pipeline.times("index_paused")


def test_a_partition_of_a_related_table_that_comes_and_goes_leaves_nothing_in_documents(passing: Scene) -> None:
    passing.execute(
        "CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (5) TO (10);"
        " ALTER TABLE parts_high REPLICA IDENTITY FULL",
        "INSERT INTO parts VALUES (3, 'low'), (7, 'passing by'), (8, 'too')",
    )
    until(lambda: "passing by" in content(passing, "items", 7), passing.pipeline.tail)
    passing.execute("DROP TABLE parts_high")
    passing.heals("items")
    passing.follows("beside")


def content(scene: Scene, index: str, id_: int) -> str:
    row = scene.pipeline.target.execute(f"SELECT content FROM cdcsync.{index}_chunks WHERE id = %s", [id_]).fetchone()
    return "" if row is None else str(row[0])


def test_rows_of_a_partition_that_went_before_they_arrived_leave_the_index(passing: Scene) -> None:
    locked, seen = passing.pipeline.target, passing.pipeline.times("partitions_changed")
    with locked.transaction():
        locked.execute("LOCK TABLE cdcsync.behind_chunks IN SHARE MODE")
        passing.execute(
            "UPDATE behind SET title = 'waits' WHERE id = 1",
            "INSERT INTO behind VALUES (100, '2025-02-02', 'arrives late')",
            "UPDATE behind SET title = 'arrives late' WHERE day >= '2025-01-01' AND day < '2026-01-01'",
            "DROP TABLE behind_2025",
        )
        until(lambda: passing.pipeline.times("partitions_changed") > seen, passing.pipeline.tail)
    passing.heals("behind")
    passing.follows("beside")


@pytest.mark.proof
def test_a_worker_that_is_killed_before_it_looks_finds_what_came_and_went(passing: Scene) -> None:
    pipeline = passing.pipeline
    pipeline.stop(pipeline.processes[-1])
    # This one looks at nothing after its start.
    pipeline.hurry |= {"cdcsync.flows.watch.WATCH_S": 3600.0}
    worker, streamed = pipeline.start(), pipeline.times("streaming")
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    passing.settle()
    passing.execute(*(statement.format(t="killed") for statement in PASSING["created_and_dropped"]))
    passing.settle()
    worker.kill()
    worker.wait()
    del pipeline.hurry["cdcsync.flows.watch.WATCH_S"]
    pipeline.start()
    passing.heals("killed")
    passing.follows("beside")


LARGE = "(SELECT string_agg(md5(i::text || j::text), '') FROM generate_series(1, 300) i)"
OWN = [
    "CREATE TABLE {t} (id int PRIMARY KEY, code int NOT NULL, title text, UNIQUE (id, code)) PARTITION BY RANGE (id)",
    "CREATE TABLE {t}_leaf PARTITION OF {t} DEFAULT",
    "ALTER TABLE {t}_leaf ALTER title SET STORAGE EXTERNAL",
    f"INSERT INTO {{t}} SELECT j, j, {LARGE} FROM generate_series(1, 6) j",
]
NOTED = [
    "CREATE TABLE {t} (id int PRIMARY KEY, title text)",
    "INSERT INTO {t} SELECT i, 'title ' || i FROM generate_series(1, 6) i",
    "CREATE TABLE {t}_notes (no int PRIMARY KEY, item_id int NOT NULL, body text, UNIQUE (no, item_id))"
    " PARTITION BY RANGE (no)",
    "CREATE TABLE {t}_leaf PARTITION OF {t}_notes DEFAULT",
    "INSERT INTO {t}_notes SELECT i, i, 'body ' || i FROM generate_series(1, 6) i",
]
NOTES = """[indexes.NAME.related.notes]
table = "{t}_notes"
on = {{ item_id = "id" }}
text = "{{body}}"
"""
MOVED = ["UPDATE {t} SET id = id + 100 WHERE id < 4", "DELETE FROM {t} WHERE id = 5"]
GONE = ["UPDATE {t}_notes SET no = no + 100, item_id = 1 WHERE no = 4", "DELETE FROM {t}_notes WHERE no < 3"]
BOTH_FULL = ["ALTER TABLE {t}{root} REPLICA IDENTITY FULL", "ALTER TABLE {t}_leaf REPLICA IDENTITY FULL"]
BOTH_INDEX = [
    "ALTER TABLE {t}_notes REPLICA IDENTITY USING INDEX {t}_notes_no_item_id_key",
    "ALTER TABLE {t}_leaf REPLICA IDENTITY USING INDEX {t}_leaf_no_item_id_key",
]
LEAF_LESS = ["ALTER TABLE {t}_leaf REPLICA IDENTITY DEFAULT"]

LOGGED_LESS: dict[str, tuple[list[str], list[str]]] = {
    "own": (
        [*OWN, *(one.format(t="{t}", root="") for one in BOTH_FULL)],
        [*LEAF_LESS, *MOVED, "ALTER TABLE {t}_leaf REPLICA IDENTITY FULL"],
    ),
    "own_root": (
        OWN,
        ["ALTER TABLE {t} REPLICA IDENTITY FULL", *MOVED, "ALTER TABLE {t} REPLICA IDENTITY DEFAULT"],
    ),
    "related": (
        [*NOTED, *(one.format(t="{t}", root="_notes") for one in BOTH_FULL)],
        [*LEAF_LESS, *GONE, "ALTER TABLE {t}_leaf REPLICA IDENTITY FULL"],
    ),
    "related_index": ([*NOTED, *BOTH_INDEX], [*LEAF_LESS, *GONE, BOTH_INDEX[1]]),
}
"""Tables whose partition logs less of old rows for a while than the root promises: as made, and what happens then."""


@pytest.mark.proof
def test_what_a_partition_did_not_log_of_old_rows_for_a_while_is_not_taken_for_null(make_scene: MakeScene) -> None:
    cases = {f"{case}_{how}": one for case, one in LOGGED_LESS.items() for how in ("once", "apart", "down")}
    scene = make_scene(
        [
            "CREATE TABLE beside (id int PRIMARY KEY, title text)",
            *(one.format(t=name) for name, (made, _) in cases.items() for one in made),
        ],
        {
            "beside": Followed("beside"),
            **{
                name: Followed(name, "{title}: {notes}", more=NOTES.format(t=name))
                if "related" in name
                else Followed(name)
                for name in cases
            },
        },
        worker_lines=NO_AUDIT,
    )
    for name in cases:
        if "related" in name:
            scene.execute(
                f"CREATE VIEW {name}_expected AS SELECT id, title, (SELECT string_agg(body, E'\n' ORDER BY no) FROM"
                f" {name}_notes WHERE item_id = i.id) AS notes FROM {name} AS i"
            )
            scene.oracle_reads(name, f"{name}_expected")

    def happen(*hows: str) -> None:
        for name, (_, statements) in cases.items():
            if name.endswith(hows):
                run = scene.at_once if name.endswith("once") else scene.execute
                run(*(one.format(t=name) for one in statements))
        scene.execute("INSERT INTO beside SELECT 1 + count(*), 'beside' FROM beside")

    happen("once", "apart")
    scene.heals()
    scene.follows("beside")
    scene.pipeline.stop(scene.pipeline.processes[-1])
    happen("down")
    scene.pipeline.start()
    scene.heals()
    scene.follows("beside")
    assert not [one for one in scene.pipeline.events() if one["event"] == "index_paused" and one["index"] == "beside"]
