"""Many equal tables in one index, under publications that somebody made: of all tables, of schemas, with row filters.

A table that appears is sent by some of these at once, and by others only after the worker has added it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

COLUMNS = "(id int PRIMARY KEY, title text, kind text, note text)"
LARGE = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 100) n)"

Filters: TypeAlias = dict[str, str]
"""What a publication sends of each table, by the table's name."""

BEGINNING: Filters = {"a_one.items": "kind <> 'draft'", "a_two.items": "id > 3", "a_three.items": "true"}
LATER: Filters = {"a_one.items": "kind <> 'public'", "a_two.items": "title <> 'unseen'", "a_new.items": "true"}


def listed(filters: Filters) -> str:
    return ", ".join(
        ["beat", "beside", *(table if row == "true" else f"{table} WHERE ({row})" for table, row in filters.items())]
    )


PUBLICATIONS: dict[str, tuple[str, list[str]]] = {
    # how the publication is made, and how it stops sending a_two.items for a while
    "all tables": (
        "CREATE PUBLICATION own FOR ALL TABLES",
        ["DROP PUBLICATION own", "CREATE PUBLICATION own FOR ALL TABLES"],
    ),
    "schemas": (
        "CREATE PUBLICATION own FOR TABLES IN SCHEMA public, a_one, a_two, a_three",
        ["ALTER PUBLICATION own DROP TABLES IN SCHEMA a_two", "ALTER PUBLICATION own ADD TABLES IN SCHEMA a_two"],
    ),
    "row filters": (
        f"CREATE PUBLICATION own FOR TABLE {listed(BEGINNING)}",
        [
            f"ALTER PUBLICATION own SET TABLE {listed(LATER | {'a_two.items': 'id < 0'})}",
            f"ALTER PUBLICATION own SET TABLE {listed(LATER)}",
        ],
    ),
}


def made(table: str) -> list[str]:
    return [
        f"CREATE SCHEMA {table.partition('.')[0]}",
        f"CREATE TABLE {table} {COLUMNS}",
        f"ALTER TABLE {table} ALTER note SET STORAGE EXTERNAL, REPLICA IDENTITY FULL",
        f"INSERT INTO {table} SELECT i, '{table} ' || i, (ARRAY['draft', 'public'])[1 + i % 2], {LARGE}"
        " FROM generate_series(1, 12) i",
    ]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.proof] * (name != "row filters")) for name in PUBLICATIONS],
)
def kind(request: pytest.FixtureRequest, server: Server) -> str:
    """The kind of publication."""
    with server.connect() as connection:
        if connection.info.server_version < 150000:
            pytest.skip("PostgreSQL 15 has row filters and publications of schemas")
    return str(request.param)


@pytest.fixture(scope="module")
def family(make_scene: MakeScene, kind: str) -> Scene:
    """A family under a publication of that kind, and an index of one table beside it."""
    scene = make_scene(
        [
            "CREATE TABLE beside (id int PRIMARY KEY, title text)",
            "INSERT INTO beside VALUES (1, 'beside')",
            *(statement for table in BEGINNING for statement in made(table)),
            expected(BEGINNING if kind == "row filters" else dict.fromkeys(BEGINNING, "true")),
            PUBLICATIONS[kind][0],
        ],
        {"beside": Followed("beside"), "items": Followed("a_*.items", "{title} {note}", ("kind",))},
        publication="own",
    )
    scene.oracle_reads("items", "expected")
    return scene


def expected(filters: Filters) -> str:
    """Return what makes the view of the rows that the index is to have."""
    rows = " UNION ALL ".join(
        f"SELECT '{table}'::text AS source_table, t.* FROM {table} AS t WHERE {row}" for table, row in filters.items()
    )
    return f"DROP VIEW IF EXISTS expected; CREATE VIEW expected AS {rows}"


def writes(table: str) -> list[str]:
    return [
        f"UPDATE {table} SET title = title || ' changed' WHERE id IN (1, 2, 5, 6)",
        f"UPDATE {table} SET kind = CASE kind WHEN 'draft' THEN 'public' ELSE 'draft' END WHERE id IN (2, 7, 8)",
        f"UPDATE {table} SET id = id + 20 WHERE id IN (3, 9)",
        f"UPDATE {table} SET id = -id WHERE id IN (10)",
        f"DELETE FROM {table} WHERE id IN (1, 4, 11)",
        f"INSERT INTO {table} VALUES (50, 'a draft', 'draft', 'x'), (51, 'public', 'public', 'x')",
        f"UPDATE {table} SET kind = 'public' WHERE id = 50",
    ]


def test_an_index_over_many_tables_is_right_under_any_publication(family: Scene, kind: str) -> None:
    def happens(*statements: str, how: Callable[..., None] = family.execute) -> None:
        how(*statements)
        family.execute("UPDATE beside SET title = title || '.'")
        family.heals("items")
        family.follows("beside")

    of_all = kind != "row filters"
    first = dict.fromkeys(BEGINNING, "true") if of_all else BEGINNING
    last = dict.fromkeys(LATER, "true") if of_all else LATER
    stop, again = PUBLICATIONS[kind][1]

    happens(*(statement for table in first for statement in writes(table)))
    happens(*(f"UPDATE {table} SET title = 'at once' WHERE id > 40" for table in first), how=family.at_once)
    happens("TRUNCATE a_two.items", *made("a_two.items")[3:], "UPDATE a_two.items SET id = 2 - id WHERE id > 8")
    happens(
        *made("a_new.items"),
        *made("a_passing.items"),
        "UPDATE a_new.items SET title = 'changed at once' WHERE id < 3",
        "UPDATE a_passing.items SET title = 'never seen'",
        "DROP SCHEMA a_passing CASCADE",
        expected(first | {"a_new.items": "true"}),
    )
    happens(*writes("a_new.items"))
    happens(
        "UPDATE a_three.items SET title = 'last words'",
        "DROP VIEW expected",
        "DROP SCHEMA a_three CASCADE",
        stop,
        "UPDATE a_two.items SET title = 'unseen' WHERE id < 5",
        "DELETE FROM a_two.items WHERE id = 6",
        again,
        expected(last),
    )
    happens(*(statement for table in last for statement in writes(table)[:2]))
    assert not family.pipeline.times("audit_found")
