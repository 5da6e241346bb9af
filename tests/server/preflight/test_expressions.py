"""Functions of others that reading a table runs are told of by `check`."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import conninfo, sql

from cdcsync.postgres.sessions import connect
from cdcsync.preflight.expressions import examine_expressions
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TABLE = """
CREATE FUNCTION shop.spy(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
    $f$ BEGIN RAISE WARNING 'run by %', current_user; RETURN $1; END $f$;
CREATE TABLE shop.articles (id int, title text) PARTITION BY RANGE (id);
CREATE TABLE shop.articles_1 PARTITION OF shop.articles FOR VALUES FROM (0) TO (100);
INSERT INTO shop.articles SELECT i, 'title' FROM generate_series(1, 5) AS i;
GRANT USAGE ON SCHEMA shop TO PUBLIC;
GRANT SELECT ON shop.articles TO PUBLIC
"""

EXPRESSIONS = {
    "an index": "CREATE INDEX ON shop.articles_1 ((id + shop.spy(1)))",
    "an index with a predicate": "CREATE INDEX ON shop.articles (id) WHERE title <> shop.spy(2)::text",
    "extended statistics": "CREATE STATISTICS shop.s ON (id + shop.spy(3)) FROM shop.articles_1",
    "a constraint": "ALTER TABLE shop.articles ADD CHECK (id > shop.spy(4) - 100)",
}


@pytest.fixture
def owner(database: Database) -> Iterator[str]:
    """The role that owns the tables; it may do nothing else."""
    name = f"{database.name}_owner"
    role = sql.Identifier(name)
    database.execute(sql.SQL("CREATE ROLE {}").format(role))
    database.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(f"{name}_reader")))
    database.execute(sql.SQL("CREATE SCHEMA shop AUTHORIZATION {}").format(role))
    with database.connect() as session:
        session.execute(sql.SQL("SET ROLE {}").format(role))
        session.execute(TABLE)
    yield name
    database.execute("DROP SCHEMA shop CASCADE")
    for one in (name, f"{name}_reader"):
        database.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(one)))


async def told(database: Database, owner: str) -> list[str]:
    """Return what a role that may only read is told, and what reading the table runs as that role."""
    dsn = conninfo.make_conninfo(database.dsn, options=f"-c role={owner}_reader")
    async with await connect(dsn, "source") as session:
        cursor = await session.execute("SELECT 'shop.articles'::regclass::oid::int8")
        row = await cursor.fetchone()
        assert row is not None
        return [str(finding.message) for finding in await examine_expressions(session, "articles", [row[0]])]


@pytest.mark.parametrize("what", EXPRESSIONS)
async def test_an_expression_that_calls_a_function_of_the_tables_owner_is_warned_of(
    database: Database, owner: str, what: str
) -> None:
    assert await told(database, owner) == []
    with database.connect() as session:
        session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
        session.execute(EXPRESSIONS[what])

    found = await told(database, owner)

    assert found
    assert all(what.split(" with ")[0] in one and "shop.spy(integer)" in one and owner in one for one in found)

    database.execute(f"ALTER FUNCTION shop.spy(int) OWNER TO {database.execute('SELECT current_user')[0][0]}")
    assert await told(database, owner) == []


async def test_such_a_function_does_run_as_whoever_reads(database: Database, owner: str) -> None:
    """Should PostgreSQL ever keep it from that, the warning is in vain."""
    database.execute(EXPRESSIONS["an index"])
    warned: list[str | None] = []
    with psycopg.connect(database.dsn, options=f"-c role={owner}_reader") as session:
        session.add_notice_handler(lambda notice: warned.append(notice.message_primary))
        session.execute("SELECT id FROM shop.articles WHERE id > 2 ORDER BY id")
    assert f"run by {owner}_reader" in warned
