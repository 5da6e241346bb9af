"""Schema changes in mid-stream: what an index can follow it follows, what it cannot pauses it and no other."""

from __future__ import annotations

import json

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]  # dozens of indexes, on a machine that may be busy

TABLE = (
    "CREATE TABLE {t} (id int PRIMARY KEY, title text, rating int, price numeric(6,2), label varchar(8), extra text)"
)
ROWS = "INSERT INTO {t} SELECT i, 'title ' || i, i, i * 1.5, 'l' || i, 'e' FROM generate_series(1, 12) i"
WRITE = (
    "UPDATE {t} SET title = title || ' again' WHERE id % 3 = 0",
    "UPDATE {t} SET rating = rating WHERE id % 3 = 1",
    "DELETE FROM {t} WHERE id = (SELECT max(id) FROM {t})",
)
CARRIED = ("rating", "price", "label")

HARMLESS = {
    "a column added": ["ALTER TABLE {t} ADD COLUMN more text DEFAULT 'x'"],
    "a column renamed that no index needs": ["ALTER TABLE {t} RENAME COLUMN extra TO other"],
    "a column dropped that no index needs": ["ALTER TABLE {t} DROP COLUMN other"],
    "the identity made full": ["ALTER TABLE {t} REPLICA IDENTITY FULL"],
    "the identity made an index": [
        "CREATE UNIQUE INDEX {t}_other ON {t} (id)",
        "ALTER TABLE {t} REPLICA IDENTITY USING INDEX {t}_other",
    ],
    "the identity made the primary key again": ["ALTER TABLE {t} REPLICA IDENTITY DEFAULT"],
}
"""What an index does not notice, each after the one before."""

FOLLOWED = {
    "carried columns widened": [
        "ALTER TABLE {t} ALTER COLUMN rating TYPE bigint",
        "ALTER TABLE {t} ALTER COLUMN label TYPE text",
        "ALTER TABLE {t} ALTER COLUMN price TYPE numeric(10,4)",
    ],
    "carried columns narrowed": [
        "ALTER TABLE {t} ALTER COLUMN rating TYPE smallint",
        "ALTER TABLE {t} ALTER COLUMN label TYPE varchar(3)",
        "ALTER TABLE {t} ALTER COLUMN price TYPE numeric(8,1)",
    ],
    "carried columns of other types": [
        "ALTER TABLE {t} ALTER COLUMN rating TYPE date USING date '2026-01-01' + rating",
        "ALTER TABLE {t} ALTER COLUMN price TYPE text USING 'costs ' || price",
        "ALTER TABLE {t} ALTER COLUMN label TYPE int USING length(label)",
    ],
    "the text column retyped": ["ALTER TABLE {t} ALTER COLUMN title TYPE varchar(100)"],
    "the key widened": ["ALTER TABLE {t} ALTER COLUMN id TYPE bigint"],
    "a column moved to the end": [
        "ALTER TABLE {t} ADD COLUMN title2 text",
        "UPDATE {t} SET title2 = title",
        "ALTER TABLE {t} DROP COLUMN title",
        "ALTER TABLE {t} RENAME COLUMN title2 TO title",
    ],
    "the table renamed and back": ["ALTER TABLE {t} RENAME TO {t}_away", "ALTER TABLE {t}_away RENAME TO {t}"],
    "the table moved and back": ["ALTER TABLE {t} SET SCHEMA attic", "ALTER TABLE attic.{t} SET SCHEMA public"],
    "the table dropped and made anew": [
        "DROP TABLE {t}",
        TABLE,
        "INSERT INTO {t} VALUES (5, 'anew', 5), (900, 'n', 6)",
    ],
    "the table out of the publication": ["ALTER PUBLICATION cdcsync DROP TABLE {t}"],
    "the table out of the publication for a while": [
        "ALTER PUBLICATION cdcsync DROP TABLE {t}",
        "DELETE FROM {t} WHERE id < 4",
        "ALTER PUBLICATION cdcsync ADD TABLE {t}",
    ],
}
"""What an index follows, if need be by reading its table again."""

LOST = {
    "a template column dropped": (
        ["ALTER TABLE {t} DROP COLUMN title"],
        "title",
        ["ALTER TABLE {t} ADD COLUMN title text DEFAULT 'mended'"],
    ),
    "a template column renamed": (["ALTER TABLE {t} RENAME COLUMN title TO headline"], "title", []),
    "a carried column dropped": (
        ["ALTER TABLE {t} DROP COLUMN rating"],
        "rating",
        ["ALTER TABLE {t} ADD COLUMN rating int DEFAULT 7"],
    ),
    "the key column gone": (
        ["ALTER TABLE {t} DROP COLUMN id CASCADE", "ALTER TABLE {t} REPLICA IDENTITY FULL"],
        "key",
        ["ALTER TABLE {t} ADD COLUMN id int GENERATED ALWAYS AS IDENTITY", "ALTER TABLE {t} ADD PRIMARY KEY (id)"],
    ),
    "the table renamed": (["ALTER TABLE {t} RENAME TO {t}_gone"], "{t}_gone", ["ALTER TABLE {t}_gone RENAME TO {t}"]),
    "the table moved": (["ALTER TABLE {t} SET SCHEMA attic"], "attic", ["ALTER TABLE attic.{t} SET SCHEMA public"]),
    "the table dropped": (["DROP TABLE {t}"], "dropped", [TABLE, ROWS]),
    "the identity gone": (
        ["ALTER TABLE {t} REPLICA IDENTITY NOTHING"],
        "identity",
        ["ALTER TABLE {t} REPLICA IDENTITY DEFAULT"],
    ),
    "the primary key widened": (
        ["ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", "ALTER TABLE {t} ADD PRIMARY KEY (id, rating)"],
        "key",
        ["ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", "ALTER TABLE {t} ADD PRIMARY KEY (id)"],
    ),
    "the primary key made deferrable": (
        ["ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", "ALTER TABLE {t} ADD PRIMARY KEY (id) DEFERRABLE"],
        "key",
        ["ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", "ALTER TABLE {t} ADD PRIMARY KEY (id)"],
    ),
    "the primary key dropped under a full identity": (
        ["ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", "ALTER TABLE {t} REPLICA IDENTITY FULL"],
        "key",
        ["ALTER TABLE {t} ADD PRIMARY KEY (id)"],
    ),
    "the key column renamed": (
        ["ALTER TABLE {t} RENAME id TO number"],
        "number",
        ["ALTER TABLE {t} RENAME number TO id"],
    ),
    "a table that inherits": (
        ["CREATE TABLE {t}_child () INHERITS ({t})", "INSERT INTO {t}_child VALUES (500, 'of the child')"],
        "inherit",
        ["DROP TABLE {t}_child"],
    ),
}
"""What is done to the table, a word of the reason, and what mends the table; nothing where the configuration is."""

FOLLOWERS = {f"f{at}{how}": (case, how == "i") for at, case in enumerate(FOLLOWED) for how in ("i", "o")}
LOSSES = {f"p{at}": case for at, case in enumerate(LOST)}


def described(name: str) -> str:
    case, inside = FOLLOWERS[name]
    return f"{case}, {'inside' if inside else 'outside'} a transaction"


@pytest.fixture(scope="module")
def changed(make_scene: MakeScene) -> Scene:
    """Every change has been made to a table of its own, in the middle of writes to it."""
    scene = make_scene(
        ["CREATE SCHEMA attic", *(one.format(t=name) for name in FOLLOWERS for one in (TABLE, ROWS))],
        {name: Followed(name, columns=CARRIED) for name in FOLLOWERS},
    )
    for name, (case, inside) in FOLLOWERS.items():
        write, ddl = [one.format(t=name) for one in WRITE], [one.format(t=name) for one in FOLLOWED[case]]
        if inside:
            scene.at_once(*write, *ddl, *write)
        else:
            scene.execute(*ddl)
        scene.execute(*write)
    return scene


@pytest.mark.proof_from(2)
@pytest.mark.parametrize("name", [pytest.param(name, id=described(name)) for name in FOLLOWERS])
def test_what_leaves_the_table_fit_is_followed(changed: Scene, name: str) -> None:
    changed.heals(name)


def test_what_no_index_needs_may_change_without_a_pause(make_scene: MakeScene) -> None:
    scene = make_scene(
        [one.format(t=name) for name in ("inside", "outside") for one in (TABLE, ROWS)],
        {name: Followed(name, columns=CARRIED) for name in ("inside", "outside")},
    )
    for ddl in HARMLESS.values():
        scene.at_once(*(one.format(t="inside") for one in (*WRITE, *ddl, *WRITE)))
        scene.execute(*(one.format(t="outside") for one in (*ddl, *WRITE)))
        scene.follows()

    assert not [event for event in scene.pipeline.events() if event["event"] == "index_paused"]


def all_paused(pipeline: Pipeline) -> bool:
    """Say whether readiness and metrics tell of every pause."""
    status, body = pipeline.get("/readyz")
    reasons, metrics = json.loads(body)["reasons"], pipeline.get("/metrics")[1].decode()
    return status == 503 and all(
        any(f"index {name} " in reason for reason in reasons)
        and f'cdcsync_index_state{{index="{name}",state="paused"}} 1.0' in metrics
        for name in LOSSES
    )


@pytest.mark.proof
def test_an_index_that_cannot_follow_is_paused_alone_until_its_table_is_fit_again(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        ["CREATE SCHEMA attic", *(one.format(t=name) for name in LOSSES for one in (TABLE, ROWS))],
        {name: Followed(name, columns=CARRIED) for name in LOSSES},
    )
    pipeline = scene.pipeline
    for name, case in LOSSES.items():
        scene.execute(f"UPDATE {name} SET rating = 5 WHERE id = 1", *(one.format(t=name) for one in LOST[case][0]))

    for name, case in LOSSES.items():
        assert LOST[case][1].format(t=name) in scene.paused(name)
    scene.follows("beat")
    told = json.loads(pipeline.get("/status")[1])["indexes"]
    for name in LOSSES:
        assert told[name]["state"] == "paused"
        assert told[name]["reason"] == scene.state(name)[1]
    # These two tell what was read last.
    until(lambda: all_paused(pipeline), lambda: pipeline.get("/readyz")[1].decode())

    renamed = next(name for name, case in LOSSES.items() if case == "a template column renamed")
    refused = scene.command("replay", renamed)
    assert refused.returncode == 2
    assert "resumes the index by itself" in refused.stderr

    for name, case in LOSSES.items():
        scene.execute(*(one.format(t=name) for one in LOST[case][2]))
    scene.heals(*(name for name in LOSSES if name != renamed))
    assert len(pipeline.processes) == 1

    # Where the configuration is what has to change, the worker has to be restarted, or a replay takes its place.
    pipeline.stop(pipeline.processes[-1])
    before, after = pipeline.path.read_text().split(f"[indexes.{renamed}]")
    pipeline.configure(f"{before}[indexes.{renamed}]{after.replace('{title}', '{headline}', 1)}")
    done = scene.command("replay", renamed)
    assert done.returncode == 0, done.stderr + done.stdout
    pipeline.compare_one(renamed)

    pipeline.start()
    scene.heals()
    until(lambda: pipeline.get("/readyz")[0] == 200, "the page to say so")


@pytest.mark.proof
def test_a_publication_that_stops_sending_updates_pauses_its_indexes_until_it_sends_them_again(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [*(one.format(t="told") for one in (TABLE, ROWS)), "CREATE PUBLICATION told FOR TABLE beat, told"],
        {"told": Followed("told", columns=CARRIED)},
        publication="told",
    )
    scene.execute("ALTER PUBLICATION told SET (publish = 'insert, truncate')", *(one.format(t="told") for one in WRITE))
    reason = scene.paused("told")
    assert "does not send update, delete" in reason
    assert "ALTER PUBLICATION told SET" in reason

    scene.execute("ALTER PUBLICATION told SET (publish = 'insert, update, delete, truncate')")

    scene.heals()
    assert len(scene.pipeline.processes) == 1


@pytest.mark.proof
def test_a_table_that_is_made_anew_again_and_again_is_read_again_each_time_without_a_wait(
    make_scene: MakeScene,
) -> None:
    scene = make_scene([one.format(t="nightly") for one in (TABLE, ROWS)], {"nightly": Followed("nightly")})
    for night in range(3):
        table, rows = (one.format(t="nightly_new") for one in (TABLE, ROWS))
        scene.execute(table, rows, f"UPDATE nightly_new SET title = title || ' of night {night}'")
        scene.at_once("DROP TABLE nightly", "ALTER TABLE nightly_new RENAME TO nightly")
        scene.heals("nightly")
    assert len(scene.pipeline.processes) == 1


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("down", [False, True], ids=["worker up", "worker down"])
def test_a_publication_that_somebody_drops_comes_back(make_scene: MakeScene, down: bool) -> None:
    scene = make_scene([one.format(t="bereft") for one in (TABLE, ROWS)], {"bereft": Followed("bereft")})
    if scene.pipeline.source.info.server_version < 180000:
        pytest.skip("before PostgreSQL 18 this is a gap")
    if down:
        scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("DROP PUBLICATION cdcsync", *(one.format(t="bereft") for one in WRITE))
    if down:
        checked = scene.command("check")
        assert "was dropped: run creates it again" in checked.stdout
        assert checked.returncode == 0
        scene.pipeline.start()

    scene.heals()
    scene.execute(*(one.format(t="bereft") for one in WRITE))
    scene.follows()


def test_a_check_tells_a_publication_that_has_another_name_now_from_one_that_was_dropped(
    make_scene: MakeScene,
) -> None:
    scene = make_scene([one.format(t="elsewhere") for one in (TABLE, ROWS)], {"elsewhere": Followed("elsewhere")})
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.reconfigured(lambda text: text.replace('publication = "cdcsync"', 'publication = "another"'))

    said = " ".join(scene.command("check").stdout.split())

    assert "publication another: does not exist, and the pipeline has followed cdcsync until now" in said
    assert "DROP PUBLICATION IF EXISTS cdcsync" in said
    assert "was dropped" not in said


@pytest.mark.proof
def test_writes_that_the_publication_makes_fail_are_told_until_they_succeed(make_scene: MakeScene) -> None:
    scene = make_scene([one.format(t="failing") for one in (TABLE, ROWS)], {"failing": Followed("failing")})
    if scene.pipeline.source.info.server_version < 180000:
        pytest.skip("PostgreSQL 18 has virtual generated columns")
    scene.execute(
        "ALTER TABLE failing ADD double int GENERATED ALWAYS AS (rating * 2) VIRTUAL",
        "ALTER TABLE failing REPLICA IDENTITY FULL",
    )

    def told() -> bool:
        status, body = scene.pipeline.get("/readyz")
        return status == 503 and "UPDATE and DELETE of public.failing fail" in body.decode()

    until(told, scene.pipeline.tail)
    scene.execute("ALTER TABLE failing REPLICA IDENTITY DEFAULT")
    until(lambda: scene.pipeline.get("/readyz")[0] == 200, scene.pipeline.tail)
    scene.follows("beat", "failing")


@pytest.mark.proof
def test_a_view_that_others_are_built_on_keeps_its_types_and_its_index_is_followed(make_scene: MakeScene) -> None:
    scene = make_scene(
        [one.format(t="dependent") for one in (TABLE, ROWS)], {"dependent": Followed("dependent", columns=CARRIED)}
    )
    if scene.pipeline.target.info.server_version < 160000:
        pytest.skip("before PostgreSQL 16 the column is NULL")
    scene.pipeline.target.execute("CREATE VIEW report AS SELECT id, rating FROM dependent_index")

    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("ALTER TABLE dependent ALTER rating TYPE bigint")
    planned = {one["index"]: one for one in scene.pipeline.answer("plan", status=3)["indexes"]}
    assert "public.report is built on public.dependent_index" in planned["dependent"]["remaining"][0]
    scene.pipeline.start()
    until(lambda: scene.state("dependent")[0] == "live", scene.pipeline.tail)

    scene.execute(
        "ALTER TABLE dependent ALTER rating TYPE text USING 'r' || rating",
        "UPDATE dependent SET rating = '77' WHERE id = 2",
    )

    scene.pipeline.event("view_keeps_types")
    statement = "SELECT rating FROM report WHERE id IN (2, 3) ORDER BY id"
    until(lambda: scene.pipeline.target.execute(statement).fetchall() == [(77,), (None,)], scene.pipeline.tail)
    until(lambda: scene.state("dependent")[0] == "live", scene.pipeline.tail)
    checked = scene.command("check")
    assert checked.returncode == 0

    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("ALTER TABLE dependent ALTER rating TYPE bigint USING length(rating)")
    # Once nothing is built on it, the next start gives it the new type.
    scene.pipeline.target.execute("DROP VIEW report")
    scene.pipeline.start()
    scene.heals()
