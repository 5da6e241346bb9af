"""What one index cannot take stops that index alone, whatever it is, wherever it is met, and after a restart as before.

Source and target are two databases whose types of one name differ. Each case has a table and an index of its own, and
all share one worker with a sound index, which has to go on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial

import pytest

from cdcsync.flows.watch import WATCH_S
from tests.support.configs import NO_AUDIT
from tests.support.scenes import BEAT, Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

TYPES = {
    "label": (
        "CREATE TYPE public.mood AS ENUM ('sad', 'happy')",
        "CREATE TYPE public.mood AS ENUM ('sad', 'happy')",
        "public.mood",
        "'sad'",
        "'new'",
    ),
}
"""By name: how each side makes the type, its name, a value that both sides take, one that only the source takes."""
ROLES = ("key", "carried")
MET = {("label", "key"): ("stream",)}
"""Where each is met. A type whose labels the target lacks from the start is stored as text; a label that comes later
costs its row where it is carried, and cannot even be looked up where it is in the key."""

MANY_ROWS = 9
"""More than are left out of a batch before the index is paused."""


def layout(name: str, type_: str, role: str, value: str) -> list[str]:
    key = f"k {type_} PRIMARY KEY, v int" if role == "key" else f"k int PRIMARY KEY, v {type_}"
    return [f"CREATE TABLE {name} ({key}, title text)", insert(name, role, value, 1)]


def insert(name: str, role: str, value: str, other: int) -> str:
    k, v = (value, str(other)) if role == "key" else (str(other), value)
    return f"INSERT INTO {name} VALUES ({k}, {v}, 'title')"


@pytest.fixture(scope="module")
def refusing(make_scene: MakeScene) -> Scene:
    """Indexes of which each meets a value that the target refuses, at its load or in the stream."""
    statements, indexes = [], {}
    for type_, (here, _, sql_type, good, bad) in TYPES.items():
        statements.append(here)
        for role in ROLES:
            for met in MET.get((type_, role), ()):
                name = f"{type_}_{role}_{met}"
                statements += layout(name, sql_type, role, bad if met == "load" else good)
                indexes[name] = Followed(name, columns=("v",))
    scene = make_scene(statements, indexes, apart=True, started=False)
    for _, there, *_ in TYPES.values():
        scene.pipeline.target.execute(there)
    scene.pipeline.start()
    until(partial(followed, scene, "label_key_stream"), scene.pipeline.tail, progress=scene.steps)
    scene.execute("ALTER TYPE public.mood ADD VALUE 'new'")
    for type_, role in MET:
        name, bad = f"{type_}_{role}_stream", TYPES[type_][-1]
        until(partial(followed, scene, name), partial(scene.described, name), progress=scene.steps)
        scene.execute(insert(name, role, bad, 2))
    return scene


def followed(scene: Scene, name: str) -> bool:
    row = scene.pipeline.target.execute(
        "SELECT to_regclass('cdcsync.indexes') IS NOT NULL AND to_regclass(%s) IS NOT NULL", [f"cdcsync.{name}_chunks"]
    ).fetchone()
    return row == (True,) and scene.state(name)[0] == "live"


@pytest.mark.proof
def test_an_index_is_paused_by_a_value_that_the_target_refuses_and_a_second_one_goes_on(refusing: Scene) -> None:
    names = [name for name in refusing.pipeline.config.indexes if name != BEAT]
    for name in names:
        reason = refusing.paused(name)
        assert "refuses a value" in reason or "the target says" in reason, reason
        assert "start" not in reason
    refusing.settle()
    until(partial(refusing.healed, BEAT), refusing.pipeline.tail)

    def told() -> bool:
        reasons = json.loads(refusing.pipeline.get("/readyz")[1])["reasons"]
        return all(any(f"index {name} " in reason for reason in reasons) for name in names)

    until(told, refusing.pipeline.tail)

    refusing.pipeline.stop(refusing.pipeline.processes[-1])
    refusing.pipeline.start()
    until(partial(refusing.healed, BEAT), refusing.pipeline.tail)
    refusing.settle()
    for name in names:
        refusing.paused(name)
    assert refusing.pipeline.processes[-1].poll() is None


def with_a_new_label(make_scene: MakeScene, statements: list[str], indexes: dict[str, Followed]) -> Scene:
    """Return indexes that are live, and whose tables may hold a label of `mood` that the target's type lacks."""
    here, there, *_ = TYPES["label"]
    scene = make_scene([here, *statements], indexes, apart=True, started=False)
    scene.pipeline.target.execute(there)
    scene.pipeline.start()
    scene.pipeline.live()
    scene.execute("ALTER TYPE public.mood ADD VALUE 'new'")
    return scene


def test_an_index_resumes_by_itself_once_the_value_is_another_type(make_scene: MakeScene) -> None:
    scene = with_a_new_label(
        make_scene,
        layout("healing", "public.mood", "carried", "'sad'"),
        {"healing": Followed("healing", columns=("v",))},
    )
    scene.execute(f"INSERT INTO healing SELECT i, 'new', 'title' FROM generate_series(2, {1 + MANY_ROWS}) AS i")
    until(lambda: scene.pipeline.times("index_paused") >= 2, scene.pipeline.tail)

    scene.execute("ALTER TABLE healing ALTER v TYPE text")

    scene.heals("healing")
    assert len(scene.pipeline.processes) == 1


@pytest.mark.proof
def test_an_index_whose_value_stays_refused_is_not_read_again_and_again(make_scene: MakeScene) -> None:
    """What an attempt examined is what the looks after it find, however the index is made: none sees a change."""
    tables = ("staying", "chosen", "many_one", "many_two")
    scene = with_a_new_label(
        make_scene,
        [f"CREATE TABLE {table} (k int PRIMARY KEY, v public.mood DEFAULT 'sad', title text)" for table in tables],
        {
            "staying": Followed("staying", columns=("v",)),
            "chosen": Followed("chosen", columns=("v",), where="lower(title) <> 'none'"),
            "many": Followed("public.many_*", columns=("v",)),
        },
    )
    for table in ("staying", "chosen", "many_two"):
        scene.execute(f"INSERT INTO {table} SELECT i, 'new', 'title' FROM generate_series(1, {1 + MANY_ROWS}) AS i")

    def attempts() -> Counter[str]:
        return Counter(one["index"] for one in scene.pipeline.events() if one.get("event") == "index_paused")

    until(lambda: min(attempts()[name] for name in ("staying", "chosen", "many")) >= 2, scene.pipeline.tail)
    noted = attempts()
    time.sleep(2.5 * WATCH_S)  # two looks, each of which would try all again
    assert all(times <= noted[name] + 1 for name, times in attempts().items())


@pytest.mark.proof
def test_an_index_gives_up_a_domain_of_the_target_that_refuses_a_value(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE DOMAIN public.low AS int",
            *(line for role in ROLES for line in layout(f"low_{role}", "public.low", role, "1")),
        ],
        {f"low_{role}": Followed(f"low_{role}", columns=("v",)) for role in ROLES},
        apart=True,
    )
    scene.pipeline.stop(scene.pipeline.processes[-1])
    # As an earlier version made them.
    scene.pipeline.target.execute("CREATE DOMAIN public.low AS int CHECK (VALUE < 10)")
    for role, column in zip(ROLES, ("k", "v"), strict=True):
        scene.pipeline.target.execute(f"DROP VIEW low_{role}_index CASCADE")
        scene.pipeline.target.execute(f"DROP VIEW low_{role}_index_chunks CASCADE")
        scene.pipeline.target.execute(f"ALTER TABLE cdcsync.low_{role}_chunks ALTER {column} TYPE public.low")
    scene.pipeline.start()
    for role in ROLES:
        view = ["SELECT to_regclass(%s) IS NOT NULL", [f"public.low_{role}_index"]]
        until(lambda view=view: scene.pipeline.target.execute(*view).fetchone() == (True,), scene.pipeline.tail)  # type: ignore[misc]
    scene.heals()
    for role in ROLES:
        scene.execute(insert(f"low_{role}", role, "500", 2))
        until(lambda role=role: scene.pipeline.times("index_paused") >= 1, scene.pipeline.tail)  # type: ignore[misc]

    scene.heals()


CONVERSIONS = {
    "int to uuid": ("int", "uuid USING lpad(id::text, 32, '0')::uuid"),
    "int to date": ("int", "date USING date '2026-01-01' + id"),
    "text to int": ("text", "int USING (id::int + 100)"),
    "int to text": ("int", "text USING 'k' || id"),
}


@pytest.mark.proof
def test_a_key_that_cannot_be_converted_is_a_new_load_that_embeds_nothing_again(make_scene: MakeScene) -> None:
    names = {f"c{at}": case for at, case in enumerate(CONVERSIONS.values())}
    scene = make_scene(
        [
            statement
            for name, (type_, _) in names.items()
            for statement in (
                f"CREATE TABLE {name} (id {type_} PRIMARY KEY, title text)",
                f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 9) i",
            )
        ],
        {name: Followed(name) for name in names},
    )
    for name, (_, conversion) in names.items():
        scene.execute(f"ALTER TABLE {name} ALTER id TYPE {conversion}")

    scene.heals()

    embedded = [
        float(line.split()[-1])
        for line in scene.pipeline.get("/metrics")[1].decode().splitlines()
        if line.startswith("cdcsync_vectors_total") and 'way="reused"' not in line
    ]
    assert sum(embedded) <= 9 * len(names)


DROPPED = {
    "hnsw": "DROP INDEX cdcsync.{t}_vectors_1_hnsw",
    "keywords": "DROP INDEX cdcsync.{t}_chunks_search",
    "chunks": "DROP TABLE cdcsync.{t}_chunks CASCADE",
    "vectors": "DROP TABLE cdcsync.{t}_vectors_1 CASCADE",
    "settled": "DROP TABLE cdcsync.{t}_vectors_1_settled",
    "fresh": "DROP TABLE cdcsync.{t}_vectors_1_fresh",
    "settled as a partition": "ALTER TABLE cdcsync.{t}_vectors_1 DETACH PARTITION cdcsync.{t}_vectors_1_settled",
    "fresh as a partition": "ALTER TABLE cdcsync.{t}_vectors_1 DETACH PARTITION cdcsync.{t}_vectors_1_fresh",
    "view": "DROP VIEW {t}_index",
    "view of chunks": "DROP VIEW {t}_index_chunks",
    "function": "DROP FUNCTION cdcsync.{t}_search",
    "words": "DROP TABLE cdcsync.{t}_words",
    "b-tree": "DROP INDEX cdcsync.{t}_chunks_by_title",
}
DROPS = {what.replace(" ", "_").replace("-", "_"): drop for what, drop in DROPPED.items()}


@pytest.mark.proof
def test_what_somebody_dropped_in_the_target_comes_back_with_a_start(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            statement
            for name in DROPS
            for statement in (
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text)",
                f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 9) i",
            )
        ],
        {name: Followed(name, columns=("title",), more='indexed = ["title"]') for name in DROPS},
    )
    scene.pipeline.stop(scene.pipeline.processes[-1])
    for name, drop in DROPS.items():
        scene.pipeline.target.execute(drop.format(t=name))

    scene.pipeline.start()

    until(lambda: scene.pipeline.times("relations_missing") == len(DROPS), scene.pipeline.tail)
    scene.heals()
    for name in DROPS:
        found = scene.pipeline.target.execute(
            "SELECT count(*) FROM pg_indexes WHERE schemaname = 'cdcsync' AND indexname = ANY(%s)",
            [[f"{name}_vectors_1_hnsw", f"{name}_chunks_search"]],
        ).fetchone()
        assert found == (2,)


@pytest.mark.proof
def test_an_index_whose_table_is_gone_as_the_target_restarts_holds_up_nothing_and_is_paused_once_it_changes(
    make_scene: MakeScene,
) -> None:
    made = [
        statement
        for name in ("sound", "chosen")
        for statement in (
            f"CREATE TABLE {name} (id int PRIMARY KEY, title text)",
            f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 9) i",
        )
    ]
    scene = make_scene(
        made,
        {name: Followed(name) for name in ("sound", "chosen")},
        worker_lines=NO_AUDIT,
        hurry={"cdcsync.flows.watch.RELATIONS_S": 1e6},
    )
    scene.pipeline.target.execute("DROP TABLE cdcsync.chosen_chunks CASCADE")
    scene.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply %'",
        "UPDATE sound SET title = 'x' WHERE id = 1",
    )
    scene.follows("sound")
    assert not scene.pipeline.times("index_paused")

    scene.execute("UPDATE chosen SET title = 'x' WHERE id = 1", "UPDATE sound SET title = 'y' WHERE id = 1")
    assert "chosen_chunks" in scene.pipeline.event("index_paused")["error"]
    scene.follows("sound")
    scene.heals()
    assert len(scene.pipeline.processes) == 1


@pytest.mark.proof
def test_a_trigger_of_the_target_that_fails_with_whatever_code_pauses_its_index_alone(make_scene: MakeScene) -> None:
    codes = ("25P02", "40001", "53400", "57P01")
    names = ("sound", *(f"fails_{code.lower()}" for code in codes))
    scene = make_scene(
        [
            statement
            for name in names
            for statement in (
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text)",
                f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 9) i",
            )
        ],
        {name: Followed(name) for name in names},
        worker_lines=NO_AUDIT,
        hurry={"cdcsync.flows.follow.apply.MOST_ATTEMPTS": 3, "cdcsync.model.pauses.FIRST_DELAY_S": 2.0},
    )
    for code, name in zip(codes, names[1:], strict=True):
        scene.pipeline.target.execute(
            f"CREATE FUNCTION public.{name}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE 'no' USING ERRCODE = '{code}'; END $$;"
            f" CREATE TRIGGER failing BEFORE INSERT OR UPDATE OR DELETE ON cdcsync.{name}_chunks"
            f" EXECUTE FUNCTION public.{name}()"
        )
        scene.execute(f"UPDATE {name} SET title = 'x' WHERE id = 1", f"UPDATE sound SET title = '{name}' WHERE id = 1")
        scene.paused(name)
        scene.follows("sound")
    for name in names[1:]:
        scene.pipeline.target.execute(f"DROP FUNCTION public.{name} CASCADE")
    scene.heals()
    assert len(scene.pipeline.processes) == 1
