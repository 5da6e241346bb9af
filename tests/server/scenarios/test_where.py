"""Indexes of some of a table's rows: rows enter and leave by their own changes, whoever decides the condition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial

import pytest

from tests.support.scenes import Followed, MakeScene, Scene

pytestmark = [pytest.mark.server]

DECIDED_HERE = "deleted_at IS NULL AND status <> 'spam' AND active IS NOT FALSE"
DECIDED_THERE = "(deleted_at IS NULL) IS NOT FALSE AND lower(status) <> 'spam' AND coalesce(active, true)"
LARGE = "(SELECT string_agg(md5(i::text || n::text), '') FROM generate_series(1, 200) n)"
TABLES = {"here": DECIDED_HERE, "there": DECIDED_THERE, "whole": "", "toasted": "note NOT IN ('') AND title <> 'spam'"}


def table(name: str, key: str = "PRIMARY KEY") -> list[str]:
    columns = f"id int {key}, title text, status text, deleted_at timestamptz, active boolean, note text"
    return [
        f"CREATE TABLE {name} ({columns})",
        f"ALTER TABLE {name} ALTER note SET STORAGE EXTERNAL",
        f"INSERT INTO {name} SELECT i, 'title ' || i, CASE i % 4 WHEN 0 THEN 'spam' ELSE 'open' END,"
        f" CASE WHEN i % 5 = 0 THEN now() END, (ARRAY[true, false, NULL])[i % 3 + 1], {LARGE}"
        " FROM generate_series(1, 40) i",
    ]


@pytest.fixture(scope="module")
def some(make_scene: MakeScene) -> Scene:
    """The same table four times, each with another way to say which rows the index has."""
    parted = [
        "CREATE TABLE parted (id int, day int, title text, status text, PRIMARY KEY (id, day)) PARTITION BY LIST (day)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1)",
        "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES IN (2)",
        "INSERT INTO parted SELECT i, i % 2 + 1, 'row ' || i, 'open' FROM generate_series(1, 9) i",
    ]
    full = [*table("entire"), "ALTER TABLE entire REPLICA IDENTITY FULL"]
    return make_scene(
        [statement for name in TABLES for statement in table(name)] + parted + full,
        {
            **{name: Followed(name, where=where) for name, where in TABLES.items()},
            "parted": Followed("parted", "{title} {day}", where="status <> 'spam' AND day IN (1, 2)"),
            "entire": Followed("entire", where=DECIDED_HERE),
        },
    )


EACH = pytest.mark.parametrize("name", ["here", "there", "entire"])


@EACH
def test_rows_enter_and_leave_as_their_values_change(some: Scene, name: str) -> None:
    some.execute(
        f"UPDATE {name} SET deleted_at = now() WHERE id % 7 = 1",
        f"UPDATE {name} SET deleted_at = NULL WHERE id % 7 = 5",
        f"UPDATE {name} SET status = 'spam' WHERE id = 2",
        f"UPDATE {name} SET status = 'open', title = 'no spam' WHERE id = 8",
        f"UPDATE {name} SET status = NULL WHERE id = 9",
        f"UPDATE {name} SET active = NOT active WHERE id % 2 = 0",
        f"UPDATE {name} SET id = id + 100, title = 'moved' WHERE id IN (3, 4, 11)",
        f"UPDATE {name} SET id = id + 200, status = 'spam' WHERE id = 13",
        f"UPDATE {name} SET id = id + 200, status = 'open', deleted_at = NULL, active = true WHERE id = 16",
        f"DELETE FROM {name} WHERE id IN (20, 21, 22)",
        f"INSERT INTO {name} VALUES (50, 'in', 'open'), (51, 'out', 'spam'), (52, 'null', NULL)",
        f"INSERT INTO {name} VALUES (53, 'out', 'open', now()), (54, 'in', 'open', NULL)",
    )
    some.follows(name)


@EACH
def test_a_row_that_changes_often_in_a_transaction_is_as_it_was_left(some: Scene, name: str) -> None:
    some.at_once(
        f"INSERT INTO {name} VALUES (60, 'comes and goes', 'open'), (61, 'comes late', 'spam')",
        f"UPDATE {name} SET status = 'spam' WHERE id = 60",
        f"UPDATE {name} SET status = 'open' WHERE id = 61",
        f"UPDATE {name} SET id = 62, status = 'open', deleted_at = NULL WHERE id = 60",
        f"UPDATE {name} SET deleted_at = now() WHERE id = 62",
        f"UPDATE {name} SET id = 60, deleted_at = NULL WHERE id = 62",
        "SAVEPOINT s",
        f"UPDATE {name} SET status = 'spam'",
        "ROLLBACK TO s",
    )
    some.follows(name)
    some.at_once(f"TRUNCATE {name}", *table(name)[2:], f"UPDATE {name} SET status = 'spam' WHERE id % 2 = 0")
    some.follows(name)


def test_a_value_in_toast_that_was_not_sent_is_read_again_to_decide(some: Scene) -> None:
    some.execute(
        "UPDATE toasted SET title = 'changed beside it' WHERE id < 9",
        "UPDATE toasted SET note = '' WHERE id IN (1, 2)",
        "UPDATE toasted SET title = 'still out' WHERE id = 1",
        "UPDATE toasted SET title = 'spam' WHERE id = 3",
    )
    some.follows("toasted")
    some.at_once(f"UPDATE toasted SET note = {LARGE.replace('i::text', 'id::text')}", "UPDATE toasted SET title = 'x'")
    some.follows("toasted")


def test_rows_of_partitions_keep_to_the_condition(some: Scene) -> None:
    some.execute(
        "UPDATE parted SET status = 'spam' WHERE id < 4",
        "UPDATE parted SET day = 3 - day, status = 'open' WHERE id IN (1, 5)",
        "UPDATE parted SET day = 3 - day, status = 'spam' WHERE id IN (6, 7)",
        "CREATE TABLE parted_3 PARTITION OF parted FOR VALUES IN (3)",
        "UPDATE parted SET day = 3 WHERE id IN (8, 9)",
        "INSERT INTO parted VALUES (20, 3, 'outside', 'open'), (21, 1, 'inside', 'open')",
    )
    some.follows("parted")


@pytest.mark.proof_from(1)
@EACH
def test_commands_keep_to_the_condition(some: Scene, name: str) -> None:
    some.execute(f"INSERT INTO {name} VALUES (70, 'in', 'open', NULL, true), (71, 'out', 'spam', now(), false)")
    some.settle()
    target, condition = some.pipeline.target, some.pipeline.config.indexes[name].where or "true"
    target.execute(f"DELETE FROM cdcsync.{name}_chunks WHERE id % 3 = 0")
    target.execute(
        f"INSERT INTO cdcsync.{name}_chunks (id, chunk_no, content, content_hash, document_hash, commit_lsn)"
        " VALUES (71, 0, 'left', '\\x00', '\\x00', '0/1') ON CONFLICT DO NOTHING"
    )
    estimate = json.loads(some.command("replay", name, "--where", "id > 10", "--dry-run", "--json").stdout)
    rows = some.pipeline.source.execute(f"SELECT count(*) FROM {name} WHERE id > 10 AND ({condition})").fetchone()
    assert (estimate["rows"],) == rows
    assert some.command("verify", name, "--repair").returncode in (0, 1)
    some.follows(name)
    for arguments in (["--where", "id > 0 OR true"], ["--key", "1", "--key", "3"], []):
        replayed = some.command("replay", name, *arguments)
        assert replayed.returncode == 0, replayed.stderr
        some.follows(name)
    verified = json.loads(some.command("verify", name, "--json").stdout)
    assert verified["equal"], verified


def with_conditions(text: str, conditions: Mapping[str, str]) -> str:
    """Return a configuration whose indexes have these conditions in place of their own."""
    head, *sections = re.split(r"(?m)^(?=\[indexes\.)", text)
    for at, section in enumerate(sections):
        first, *lines = section.splitlines()
        name = first.removeprefix("[indexes.").removesuffix("]")
        if name in conditions:
            kept = [line for line in lines if not line.startswith("where = ")]
            sections[at] = "\n".join([first, f"where = {json.dumps(conditions[name])}", *kept, ""])
    return "".join([head, *sections])


def test_a_condition_that_changes_takes_rows_in_and_out(some: Scene) -> None:
    for here, there, whole in (
        ("status <> 'spam'", "lower(status) = 'spam'", DECIDED_THERE),
        ("deleted_at IS NOT NULL", "", DECIDED_HERE),
        ("lower(status) = 'open'", "active", ""),
    ):
        some.pipeline.stop(some.pipeline.processes[-1])
        some.execute("UPDATE here SET active = NOT active")
        conditions = {"here": here, "there": there, "whole": whole}
        some.reconfigured(partial(with_conditions, conditions=conditions))
        some.pipeline.start()
        some.heals(*conditions)


def test_check_says_who_decides(some: Scene) -> None:
    said = some.command("check").stdout
    assert "where status <> 'spam' AND day IN (1, 2) (decided by the worker)" in said
