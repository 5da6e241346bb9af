"""Reading many equal tables: page by page; rows that cannot be read, and tables that go, cost themselves alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.flows.audit.digests import source_digests
from cdcsync.model.conditions import Where
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.many import SourceTables
from tests.support.indexes import make_spec
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TABLES = [QualifiedName("public", f"t{at}") for at in range(3)]


def spec_of(where: str | None = None) -> IndexSpec:
    spec = make_spec(key={"source_table": "text", "id": "integer", "part": "integer"}, carried={}, text="{title}")
    return msgspec.structs.replace(
        spec,
        shape=msgspec.structs.replace(spec.shape, many=True),
        members=dict.fromkeys(TABLES),
        where=None if where is None else Where(where),
    )


@pytest.fixture
async def source(database: Database) -> AsyncIterator[Connection]:
    """A session on a source with three tables of three rows each."""
    async with await connect(database.dsn, "source") as connection:
        for name in TABLES:
            columns = "(id int, part int DEFAULT 1, title text, n int DEFAULT 1, PRIMARY KEY (id, part))"
            await connection.execute(f"CREATE TABLE {name} {columns}".encode())
            rows = f"INSERT INTO {name} (id, title) SELECT i, 'title ' || i FROM generate_series(1, 3) i"
            await connection.execute(rows.encode())
            # Of a small table the server reads all rows, and asks the cheaper one of two conditions first.
            await connection.execute(f"ANALYZE {name}".encode())
        yield connection


@pytest.mark.parametrize("bad", [("t0", 1), ("t1", 3), ("t2", 2)])
@pytest.mark.parametrize("limit", [2, 3, 10])
async def test_pages_come_to_their_end_behind_a_row_that_cannot_be_read(
    source: Connection, bad: tuple[str, int], limit: int
) -> None:
    table, row = bad
    await source.execute(f"UPDATE public.{table} SET n = 0 WHERE id = {row}".encode())
    tables = SourceTables(spec_of("10 / n > 0"))
    read: list[Key] = []
    unread: list[Key] = []
    after: Key | None = None
    for _ in range(20):
        assert await tables.fitting(source, after, limit, 10**6) == limit
        page = await tables.page(source, after, limit)
        read += [tables.shape.key_of(one) for one in page.rows]
        unread += page.unread
        after = page.last or (tables.shape.key_of(page.rows[-1]) if page.rows else after)
        if len(page.rows) < limit and not page.more:
            break
    else:
        pytest.fail(f"the pages have no end: the next one begins after {after}")
    every = [(str(name), str(at), "1") for name in TABLES for at in (1, 2, 3)]
    assert unread == [(f"public.{table}", str(row), "1")]
    assert sorted(read + unread) == every


async def everything(source: Connection, spec: IndexSpec) -> list[Any]:
    """Return what each way of reading finds."""
    tables = SourceTables(spec)
    keys: list[Key] = [(str(name), "1", "1") for name in TABLES]
    found: list[Any] = []
    reads: list[Callable[[], Awaitable[Any]]] = [
        lambda: tables.page(source, None, 1),
        lambda: tables.by_keys(source, keys),
        lambda: tables.absent(source, keys),
        lambda: tables.count(source),
        lambda: source_digests(source, spec, None, 10),
        lambda: source_digests(source, spec, None, 10, keys=keys),
    ]
    for read in reads:
        try:
            found.append(await read())
        except psycopg.errors.UndefinedTable:
            found.append("error")
    return found


async def test_a_table_that_was_dropped_has_no_rows(source: Connection) -> None:
    await source.execute("DROP TABLE public.t0")
    page, by_keys, (_, absent), count, digests, of_keys = await everything(source, spec_of())
    assert [row[:2] for row in page.rows] == [("public.t1", "1")]
    assert sorted(row[:2] for row in by_keys.rows) == [("public.t1", "1"), ("public.t2", "1")]
    assert (absent, count) == ([("public.t0", "1", "1")], 6)
    assert list(digests.by_key) == [("public.t1", str(at), "1") for at in (1, 2, 3)]
    assert sorted(of_keys.by_key) == [("public.t1", "1", "1"), ("public.t2", "1", "1")]


@pytest.mark.parametrize("missing", ["TABLE aside.shown", "SCHEMA aside CASCADE"])
async def test_a_condition_that_misses_a_table_of_its_own_is_not_taken_for_tables_without_rows(
    source: Connection, missing: str
) -> None:
    await source.execute("CREATE SCHEMA aside")
    await source.execute("CREATE TABLE aside.shown AS SELECT 1 AS id")
    await source.execute(
        "CREATE FUNCTION public.shown(id int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql"
        " AS $$ BEGIN RETURN EXISTS (SELECT FROM aside.shown AS s WHERE s.id = $1); END $$"
    )
    spec = spec_of("public.shown(id)")
    assert "error" not in await everything(source, spec)

    await source.execute(f"DROP {missing}".encode())

    assert await everything(source, spec) == ["error"] * 6


OF_SCHEMAS = ("B.items", "a.items", "b.items", "ä.items")
"""Their names' order by code points is another one than that of most languages."""


async def keys_of(table: SourceTables, connection: Connection, where: str | None = None) -> list[Key]:
    """Read all tables, page after page, as a backfill does."""
    found: list[Key] = []
    after: Key | None = None
    while True:
        page = await table.page(connection, after, 4, where)
        found += [table.shape.key_of(row) for row in page.rows]
        if len(page.rows) < 4 and not page.more:
            return found
        after = found[-1]


async def test_rows_up_to_a_key_are_those_before_it_in_the_order_of_pages(
    database: Database, source: Connection
) -> None:
    for name in OF_SCHEMAS:
        schema, _, table = name.partition(".")
        database.execute(
            f'CREATE SCHEMA "{schema}"; CREATE TABLE "{schema}".{table} (id bigint PRIMARY KEY, tenant int, body text);'
            f" INSERT INTO \"{schema}\".{table} SELECT i, 1, 'x' FROM generate_series(1, 6) i"
        )
    spec = make_spec(key={"source_table": "text", "id": "bigint"})
    members = {QualifiedName(*name.split(".")): None for name in OF_SCHEMAS}
    family = SourceTables(
        msgspec.structs.replace(spec, shape=msgspec.structs.replace(spec.shape, many=True), members=members)
    )
    every = await keys_of(family, source)
    assert len(every) == 6 * len(OF_SCHEMAS)

    for at, key in enumerate(every):
        assert await keys_of(family, source, await family.up_to(source, key)) == every[: at + 1]
    gone = "b.a_table_that_is_gone"
    before = [key for key in every if key[0] < gone]
    assert await keys_of(family, source, await family.up_to(source, (gone, "3"))) == before
