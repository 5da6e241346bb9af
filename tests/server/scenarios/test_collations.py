"""An index's condition holds for the rows that the source's collations say, also once a column has another one."""

from __future__ import annotations

import msgspec
import psycopg
import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = pytest.mark.server

COLUMNS = "(id int PRIMARY KEY, title text, status text{collation})"


class Way(msgspec.Struct, frozen=True):
    """Two collations that a condition holds for different rows by.

    :ivar other: the one that is not the database's.
    :ivar values: what the rows have, in turn.
    """

    where: str
    other: str
    values: tuple[str, ...]
    make: tuple[str, ...] = ()


WAYS = {
    # By "C" only the letters of ASCII have lower case.
    "the server decides": Way("lower(status) <> 'ärger'", '"C"', ("open", "ärger", "ÄRGER")),
    "the worker decides": Way(
        "status <> 'spam'",
        "public.loose",
        ("open", "spam", "SPAM"),
        ("CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",),
    ),
}


def made(table: str, way: Way, collation: str = "") -> list[str]:
    return [
        f"CREATE TABLE {table} {COLUMNS.format(collation=collation)}",
        f"INSERT INTO {table} SELECT i, 'row ' || i, (ARRAY{list(way.values)})[1 + i % 3] FROM generate_series(1, 9) i",
    ]


@pytest.fixture(scope="module", params=WAYS)
def collated(request: pytest.FixtureRequest, make_scene: MakeScene) -> tuple[Scene, Way]:
    """An index of one table, one of many of which the last has another collation, and one beside."""
    way = WAYS[request.param]
    many = [
        statement
        for schema, collation in (("m_1", ""), ("m_2", ""), ("m_3", f" COLLATE {way.other}"))
        for statement in (f"CREATE SCHEMA {schema}", *made(f"{schema}.rows", way, collation))
    ]
    try:
        scene = make_scene(
            [*way.make, *made("one", way), *made("beside", way), *many],
            {name: Followed(table, where=way.where) for name, table in INDEXES.items()},
            hurry={"cdcsync.flows.watch.WATCH_S": 0.5},
        )
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server is built without ICU, so all its collations are deterministic")
    return scene, way


INDEXES = {"one": "one", "many": "m_*.rows", "beside": "beside"}


def changed(way: Way, *tables: str) -> list[str]:
    """Return changes by which rows enter and leave, by one collation or by both."""
    first, second, third = way.values
    return [
        statement
        for table in tables
        for statement in (
            f"INSERT INTO {table} SELECT max(id) + 1, 'new', '{third}' FROM {table}",
            f"UPDATE {table} SET status = '{third}' WHERE id = 3",
            f"UPDATE {table} SET status = '{first}' WHERE id = 4",
            f"UPDATE {table} SET status = '{second}' WHERE id = 6",
        )
    ]


def test_rows_of_many_tables_are_chosen_by_the_collation_of_each(collated: tuple[Scene, Way]) -> None:
    scene, way = collated
    scene.execute(*changed(way, "m_1.rows", "m_3.rows"))
    scene.follows()


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("index", "table"), [("one", "one"), ("many", "m_2.rows")])
def test_a_column_that_gets_another_collation_has_its_rows_chosen_by_that(
    collated: tuple[Scene, Way], index: str, table: str
) -> None:
    scene, way = collated
    for collation in (way.other, '"default"'):
        compared = scene.compared(index)
        scene.execute(f"ALTER TABLE {table} ALTER status TYPE text COLLATE {collation}", *changed(way, "beside"))
        until(lambda before=compared: scene.compared(index) > before, scene.pipeline.tail)  # type: ignore[misc]
        scene.heals(index)
        scene.execute(*changed(way, table))
        scene.follows(index, "beside")
    assert not [event for event in scene.pipeline.events() if event["event"] == "index_paused"]
