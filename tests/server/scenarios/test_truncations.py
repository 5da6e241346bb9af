"""A TRUNCATE gives a table new files, as a rewrite does: only where it may hide one are source and index compared."""

from __future__ import annotations

import signal
from functools import partial

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = pytest.mark.server

PLAIN = "CREATE TABLE {t} (id int PRIMARY KEY, title text)"
PARTED = """CREATE TABLE {t} (id int PRIMARY KEY, title text) PARTITION BY RANGE (id);
    CREATE TABLE {t}_low PARTITION OF {t} FOR VALUES FROM (MINVALUE) TO (6);
    CREATE TABLE {t}_high PARTITION OF {t} DEFAULT"""
ROWS = "INSERT INTO {t} SELECT i, 'title ' || i FROM generate_series(1, 12) i"
UPPER = "ALTER TABLE {t} ALTER title TYPE text USING upper(title)"

EXPLAINED = {
    "alone": (PLAIN, ["TRUNCATE {t}"]),
    "twice": (PLAIN, ["TRUNCATE {t}", ROWS, "TRUNCATE {t}", ROWS]),
    "with its rows": (PLAIN, ["BEGIN; TRUNCATE {t}; " + ROWS + "; COMMIT"]),
    "of a partitioned table": (PARTED, ["TRUNCATE {t}", ROWS]),
}
"""Nothing is hidden: the stream carries it."""

HIDING = {
    "VACUUM FULL": (PLAIN, ["VACUUM FULL {t}"]),
    "before a rewrite": (PLAIN, ["TRUNCATE {t}", ROWS, UPPER]),
    "before a rewrite, in one transaction": (PLAIN, ["BEGIN; TRUNCATE {t}; " + ROWS + "; " + UPPER + "; COMMIT"]),
    "of one partition": (PARTED, ["TRUNCATE {t}_low"]),
    "of all, and of one partition, in one transaction": (
        PARTED,
        ["BEGIN; TRUNCATE {t}; " + ROWS + "; TRUNCATE {t}_low; COMMIT"],
    ),
    "in a subtransaction": (PLAIN, ["BEGIN; SAVEPOINT one; TRUNCATE {t}; RELEASE one; " + ROWS + "; COMMIT"]),
}
"""A comparison is owed, or made in doubt: of a subtransaction, stream and catalog name different transactions."""


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("down", [False, True], ids=["worker up", "worker down"])
def test_a_truncate_that_the_stream_carries_has_nothing_compared_and_whatever_may_hide_a_rewrite_has(
    make_scene: MakeScene, down: bool
) -> None:
    cases = {f"t{at}": case for at, case in enumerate([*EXPLAINED.values(), *HIDING.values()])}
    scene = make_scene(
        [
            statement
            for name, (layout, _) in cases.items()
            for statement in (*layout.format(t=name).split(";"), ROWS.format(t=name))
        ],
        {name: Followed(name) for name in cases},
    )
    if down:
        scene.pipeline.stop(scene.pipeline.processes[-1])
    for name, (_, statements) in cases.items():
        for statement in statements:
            scene.execute(*(one.format(t=name) for one in statement.split("; ")))
    if down:
        scene.pipeline.start()

    scene.heals()
    for name, case in cases.items():
        until(partial(scene.noted, name), partial(scene.described, name))
        assert bool(scene.compared(name)) == (case in HIDING.values()), (name, case)
    assert scene.pipeline.times("index_paused") == 0


@pytest.mark.proof
@pytest.mark.parametrize(
    ("statements", "kinds"),
    [
        (["BEGIN; TRUNCATE t; {rows}; COMMIT"], ["initial done"]),
        (["UPDATE t SET title = title || '.' WHERE id % 7 = 0", "VACUUM FULL t"], ["initial done", "compare done"]),
    ],
    ids=["emptied", "rewritten"],
)
def test_a_first_load_ends_although_its_table_gets_new_files_again_and_again(
    make_scene: MakeScene, statements: list[str], kinds: list[str]
) -> None:
    rows = "INSERT INTO t SELECT i, 'title ' || i FROM generate_series(1, 4000) i"
    scene = make_scene([PLAIN.format(t="t"), rows], {"t": Followed("t")}, started=False)
    whole = scene.pipeline.path.read_text()
    scene.pipeline.path.write_text(whole.replace("[worker]", "[worker]\nbackfill_max_rows_per_s = 100"))
    scene.pipeline.start()
    until(partial(begun, scene), scene.pipeline.tail)

    for _ in range(3):
        for statement in statements:
            scene.execute(*statement.format(rows=rows).split("; "))
        until(partial(scene.noted, "t"), partial(scene.described, "t"))
        until(partial(read_more, scene, loaded(scene)), scene.pipeline.tail)
    assert requests(scene)[0] == "initial running"
    scene.pipeline.path.write_text(whole)
    scene.pipeline.processes[-1].send_signal(signal.SIGHUP)
    scene.heals("t")

    assert requests(scene) == kinds


def begun(scene: Scene) -> bool:
    return (
        scene.target.execute("SELECT to_regclass('cdcsync.backfills') IS NOT NULL") == [(True,)] and loaded(scene) > 0
    )


def loaded(scene: Scene) -> int:
    """Return how many rows the load of `t` has read."""
    found = scene.target.execute("SELECT coalesce(max(rows_done), 0) FROM cdcsync.backfills WHERE index_name = 't'")
    return int(found[0][0])


def read_more(scene: Scene, than: int) -> bool:
    return loaded(scene) > than


def requests(scene: Scene) -> list[str]:
    found = scene.target.execute(
        "SELECT kind || ' ' || state FROM cdcsync.backfills WHERE index_name = 't' ORDER BY id"
    )
    return [row[0] for row in found]
