"""Conditions against a model: whatever transactions come, an index has the rows that its condition holds for.

Random conditions, half of them of forms that the worker decides; each has a table and an index of its own, and the same
transactions change all of them. PostgreSQL says what each index is to hold.
"""

from __future__ import annotations

import secrets
from functools import partial
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = pytest.mark.server

TABLES = 10
DECIDED_HERE = (
    *("gone_at IS NULL", "gone_at IS NOT NULL", "active", "NOT active", "active IS NOT TRUE", "active IS NOT FALSE"),
    *("status = 'a'", "status <> 'a'", "status IN ('a', '')", "status NOT IN ('a', 'ä')", "n = 1", "n <> -1"),
    *("status IS DISTINCT FROM 'a'", "n IN (0, 1)", "large IS NULL", "large <> 'x'", "large IS NOT NULL"),
)
DECIDED_THERE = (
    *("n > 0", "lower(status) = 'a'", "length(large) > 10", "coalesce(active, true)", "title LIKE '%1%'"),
    *("status < 'b'", "n % 2 = 0", "(n, status) IN ((1, 'a'), (-1, ''))", "gone_at > '2026-06-01'", "large LIKE 'y%'"),
)


def condition(chance: Random, *, here: bool) -> str:
    """Return a random condition, of forms that the worker decides or not."""
    terms = chance.sample(DECIDED_HERE if here else DECIDED_HERE + DECIDED_THERE, chance.randint(1, 3))
    if here:
        return " AND ".join(f"({term})" if chance.random() < 0.3 else term for term in terms)
    joined = terms[0]
    for term in terms[1:]:
        joined = f"{joined} {chance.choice(('AND', 'OR'))} {term}"
    return chance.choice((joined, f"({joined}) IS NOT FALSE", f"NOT ({joined})"))


class Change(msgspec.Struct, frozen=True):
    """One statement, for every table."""

    kind: str
    id: int
    other: int
    values: dict[str, str]

    def sql(self, table: str) -> str:
        """Return it for one table."""
        listed = ", ".join(f"{name} = {value}" for name, value in self.values.items())
        match self.kind:
            case "put":
                names, values = ", ".join(self.values), ", ".join(self.values.values())
                return (
                    f"INSERT INTO {table} (id{', ' if names else ''}{names}) VALUES"
                    f" ({self.id}{', ' if values else ''}{values}) ON CONFLICT (id) DO UPDATE SET id = excluded.id"
                    + (f", {listed}" if listed else "")
                )
            case "update":
                return f"UPDATE {table} SET {listed or 'title = title'} WHERE id IN ({self.id}, {self.other})"
            case "move":
                with_values = f", {listed}" if listed else ""
                return (
                    f"UPDATE {table} SET id = {self.other}{with_values} WHERE id = {self.id}"
                    f" AND NOT EXISTS (SELECT FROM {table} WHERE id = {self.other})"
                )
            case "delete":
                return f"DELETE FROM {table} WHERE id = {self.id}"
            case "all":
                return f"UPDATE {table} SET {listed or 'title = title'}"
            case _:
                return f"TRUNCATE {table}"


VALUES = {
    "title": ("'one'", "'two 1'", "NULL"),
    "status": ("'a'", "'A'", "'ä'", "''", "NULL", "'b'"),
    "n": ("0", "1", "-1", "2", "NULL"),
    "active": ("true", "false", "NULL"),
    "gone_at": ("NULL", "'2026-01-01'", "'2026-12-31'"),
    "large": ("NULL", "'x'", "repeat('y', 3000)", "repeat('z', 3000)", "''"),
}
KINDS = ("put", "put", "put", "update", "update", "move", "delete", "all", "truncate")


@st.composite
def changes(draw: st.DrawFn) -> Change:
    chosen = draw(st.lists(st.sampled_from(list(VALUES)), unique=True, max_size=4))
    return Change(
        draw(st.sampled_from(KINDS)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        {name: draw(st.sampled_from(VALUES[name])) for name in chosen},
    )


class Transaction(msgspec.Struct, frozen=True):
    """Changes that commit together.

    :ivar undone: changes that are rolled back to a savepoint.
    :ivar applied: whether they are applied before the next transaction begins.
    """

    changes: list[Change]
    undone: list[Change]
    applied: bool = True


transactions = st.builds(
    Transaction, st.lists(changes(), min_size=1, max_size=5), st.lists(changes(), max_size=2), st.booleans()
)


@pytest.fixture(scope="module")
def scene(make_scene: MakeScene) -> Scene:
    """Tables of random conditions; the seed is in each condition's name."""
    seed = secrets.randbits(32)
    chance = Random(seed)
    conditions = {f"t{at}": condition(chance, here=at % 2 == 0) for at in range(TABLES)}
    statements = []
    for at, name in enumerate(conditions):
        statements += [
            f"CREATE TABLE {name} (id int PRIMARY KEY, title text, status text, n int, active boolean,"
            " gone_at timestamptz, large text)",
            f"ALTER TABLE {name} ALTER large SET STORAGE EXTERNAL",
        ]
        if at % 4 == 1:
            statements.append(f"ALTER TABLE {name} REPLICA IDENTITY FULL")
    return make_scene(
        statements, {name: Followed(name, "{title} {n}", ("status",), where=one) for name, one in conditions.items()}
    )


@pytest.mark.proof
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(history=st.lists(transactions, min_size=1, max_size=6))
@example(
    history=[
        Transaction([Change("put", 1, 1, {"large": VALUES["large"][2], "status": "'a'", "active": "true"})], []),
        Transaction([Change("update", 1, 1, {"n": "1"}), Change("move", 1, 2, {"status": "'b'"})], []),
        Transaction([Change("update", 2, 2, {"n": "2"})], [Change("all", 1, 1, {"active": "false"})]),
    ]
)
def test_an_index_has_the_rows_that_its_condition_holds_for(scene: Scene, history: list[Transaction]) -> None:
    names = [name for name in scene.pipeline.config.indexes if name.startswith("t")]
    for name in names:
        note(f"{name}: {scene.pipeline.config.indexes[name].where}")
    session = scene.pipeline.source
    session.execute(f"TRUNCATE {', '.join(names)}")
    for transaction in history:
        with session.transaction():
            for name in names:
                run(session, [one.sql(name) for one in transaction.changes])
            if transaction.undone:
                with session.transaction(force_rollback=True):
                    for name in names:
                        run(session, [one.sql(name) for one in transaction.undone])
        if transaction.applied:
            scene.settle()
    scene.settle()
    for name in names:
        until(partial(equal, scene, name), scene.pipeline.tail, patience_s=10)


def run(session: Any, statements: list[str]) -> None:
    for statement in statements:
        session.execute(statement)


def equal(scene: Scene, name: str) -> bool:
    assert scene.state(name)[0] == "live", scene.state(name)
    try:
        scene.pipeline.compare_one(name, vectors=False)
    except AssertionError as error:
        scene.pipeline.difference = f"{name}: {error}"
        return False
    return True
