"""Comparing keys: by the operators that sort their type, in the order that the server itself has."""

from __future__ import annotations

from itertools import product

import pytest
from psycopg import sql

from cdcsync.postgres.comparisons import comparisons, follows, parts_after
from cdcsync.postgres.sessions import connect
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TYPES = {
    "bigint": ("-3", "0", "7"),
    "text": ("B", "a", "ä", ""),
    "varchar(3)": ("a", "b"),
    "timestamptz": ("2026-01-01", "infinity", "-infinity"),
    "other.citext": ("B", "a", "A", "ab"),
    "other.ltree": ("a", "a.b", "b"),
    "other.level": ("low", "high"),
    "other.label": ("B", "a", "A"),
    "int[]": ("{1,2}", "{2}", "{}"),
}


@pytest.fixture
def typed(database: Database) -> Database:
    """A database with types whose operators live outside pg_catalog."""
    database.execute("CREATE SCHEMA other")
    for extension in ("citext", "ltree"):
        database.execute(f"CREATE EXTENSION {extension} SCHEMA other")
    database.execute("CREATE TYPE other.level AS ENUM ('low', 'high')")
    database.execute("CREATE DOMAIN other.label AS other.citext")
    return database


async def test_only_types_with_operators_elsewhere_are_not_plain(typed: Database) -> None:
    async with await connect(typed.dsn, "target") as connection:
        found = await comparisons(connection, list(TYPES))
    plain = {name: one.plain for name, one in zip(TYPES, found, strict=True)}
    assert [name for name, is_plain in plain.items() if not is_plain] == ["other.citext", "other.ltree", "other.label"]


@pytest.mark.proof_from(4)
@pytest.mark.parametrize("types", [[name] for name in TYPES] + [["other.citext", "bigint"], ["text", "other.ltree"]])
async def test_a_key_follows_another_exactly_if_the_server_sorts_it_after(typed: Database, types: list[str]) -> None:
    columns = [sql.Identifier(f"c{at}") for at in range(len(types))]
    declared = sql.SQL(", ").join(
        sql.SQL("{} {}").format(column, sql.SQL(name)) for column, name in zip(columns, types, strict=True)
    )
    typed.execute(sql.SQL("CREATE TABLE keys ({})").format(declared))
    for key in product(*(TYPES[name] for name in types)):
        typed.execute(sql.SQL("INSERT INTO keys VALUES ({})").format(sql.SQL(", ").join(map(sql.Literal, key))))

    async with await connect(typed.dsn, "target") as connection:
        mine, others = ([sql.SQL(f"{side}.c{at}") for at in range(len(types))] for side in ("a", "b"))
        cursor = await connection.execute(
            sql.SQL(
                "WITH ranked AS (SELECT *, rank() OVER (ORDER BY {columns}) FROM public.keys)"
                " SELECT count(*) FILTER (WHERE {follows} IS DISTINCT FROM (a.rank > b.rank)), count(*)"
                " FROM ranked AS a, ranked AS b"
            ).format(
                columns=sql.SQL(", ").join(columns),
                follows=follows(mine, others, await comparisons(connection, types)),
            )
        )
        row = await cursor.fetchone()
    assert row is not None
    assert row[0] == 0
    assert row[1] >= 4


@pytest.mark.parametrize("types", [["other.citext", "bigint"], ["text", "other.ltree", "bigint"], ["bigint", "text"]])
async def test_the_parts_of_what_follows_a_key_are_all_of_it_and_come_in_order(
    typed: Database, types: list[str]
) -> None:
    columns = [sql.Identifier(f"c{at}") for at in range(len(types))]
    listed = sql.SQL(", ").join(columns)
    declared = [sql.SQL("{} {}").format(one, sql.SQL(name)) for one, name in zip(columns, types, strict=True)]
    typed.execute(sql.SQL("CREATE TABLE keys ({})").format(sql.SQL(", ").join(declared)))
    keys = list(product(*(TYPES[name] for name in types)))
    for key in keys:
        typed.execute(sql.SQL("INSERT INTO keys VALUES ({})").format(sql.SQL(", ").join(map(sql.Literal, key))))

    async with await connect(typed.dsn, "target") as connection:
        compared = await comparisons(connection, types)
        for key in keys:
            values = [
                sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(name))
                for value, name in zip(key, types, strict=True)
            ]
            found = []
            for part in [follows(columns, values, compared), *parts_after(columns, values, compared)]:
                cursor = await connection.execute(
                    sql.SQL("SELECT rank FROM (SELECT *, rank() OVER (ORDER BY {}) FROM public.keys) AS k").format(
                        listed
                    )
                    + sql.SQL(" WHERE {} ORDER BY rank").format(part)
                )
                found.append([rank for (rank,) in await cursor.fetchall()])
            whole, *parts = found
            assert [rank for part in parts for rank in part] == whole
