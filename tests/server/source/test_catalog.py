"""The catalog as it is read: the tables that are asked about, and the transactions that are open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import cast

import anyio
import psycopg
import pytest
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.catalog import (
    DROPPED_ATTEMPTS,
    Catalog,
    blockers,
    current_snapshot,
    read_catalog,
    running_transactions,
)
from cdcsync.source.relations import Table
from tests.support.clusters import OTHER_VERSIONS
from tests.support.publications import T, lay_out
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_the_newest_open_transaction_is_among_those_that_run(database: Database) -> None:
    """A snapshot alone does not list it: its id is above all that have finished."""
    with database.connect() as writer, writer.transaction():
        row = writer.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        async with await connect(database.dsn, "source") as connection:
            assert not (await current_snapshot(connection)).sees(row[0])
            assert row[0] in await running_transactions(connection)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("version", [None, *OTHER_VERSIONS])
async def test_transactions_of_other_databases_are_not_waited_for_whatever_the_role(
    make_cluster: Callable[..., Cluster], version: int | None
) -> None:
    """They cannot have written here. What waits for the whole server still tells of them."""
    if version is not None and not OTHER_VERSIONS[version].exists():
        pytest.skip(f"PostgreSQL {version} is not installed")
    cluster = make_cluster(**({} if version is None else {"bin_dir": OTHER_VERSIONS[version]}))
    with psycopg.connect(cluster.dsn(), autocommit=True) as administrator:
        administrator.execute("CREATE ROLE follower LOGIN REPLICATION")
        administrator.execute("CREATE DATABASE elsewhere")
    with contextlib.ExitStack() as stack:
        here, there = (
            [opened(stack, cluster.dsn(name), "open"), opened(stack, cluster.dsn(name), "prepared")]
            for name in ("postgres", "elsewhere")
        )
        async with await connect(cluster.dsn(user="follower"), "source") as connection:
            running = await running_transactions(connection)
            anywhere = await running_transactions(connection, anywhere=True)

    assert running >= set(here)
    assert running.isdisjoint(there)
    assert anywhere >= {*here, *there}


def opened(stack: contextlib.ExitStack, dsn: str, how: str) -> int:
    """Open a transaction that has written, in a subtransaction too, or prepare it; returns its id."""
    session = stack.enter_context(psycopg.connect(dsn, autocommit=True))
    session.execute("BEGIN")
    row = session.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
    assert row is not None
    session.execute("SAVEPOINT a")
    session.execute(sql.SQL("CREATE TABLE {} ()").format(sql.Identifier(how)))
    if how == "prepared":
        session.execute(sql.SQL("PREPARE TRANSACTION {}").format(f"{row[0]}"))
    return cast(int, row[0])


async def test_a_prepared_transaction_that_is_in_the_way_is_named(database: Database) -> None:
    gid = f"{database.name} it's"
    with database.connect() as writer:
        if writer.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("max_prepared_transactions is 0 on this server")
        writer.execute("CREATE TABLE t (id int)")
        writer.execute("BEGIN")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.execute(sql.SQL("PREPARE TRANSACTION {}").format(gid))
        async with await connect(database.dsn, "source") as connection:
            xids = await running_transactions(connection)
            described = await blockers(connection, xids)
        writer.execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))

    mine = [one for one in described if f"prepared transaction '{database.name} it''s'" in str(one)]
    assert [one.ending for one in mine] == [
        f"COMMIT PREPARED or ROLLBACK PREPARED '{database.name} it''s' in database {database.name}"
    ]


async def test_nothing_is_read_of_other_tables_whatever_they_are(source: Connection) -> None:
    await lay_out(source, "all")
    await source.execute(
        "CREATE SCHEMA odd; CREATE TABLE odd.t (); CREATE TABLE odd.child () INHERITS (public.nothing)"
    )
    await source.execute('CREATE TABLE odd."a.b""c" (id int PRIMARY KEY, "%s" text)')
    try:
        catalog = await read_catalog(source, "p", [T, QualifiedName("public", "absent")])
    finally:
        await source.execute("DROP SCHEMA odd CASCADE")

    assert set(catalog.tables) == {T}
    assert catalog.publication is not None
    assert set(catalog.publication.tables) == {T}


async def test_a_table_without_columns_is_read_like_any_other(source: Connection) -> None:
    await lay_out(source, "all")
    nothing = QualifiedName("public", "nothing")

    catalog = await read_catalog(source, "p", [nothing])

    assert catalog.tables[nothing].columns == {}
    assert catalog.publication is not None
    assert catalog.publication.tables[nothing].columns == ()


async def test_a_table_is_found_by_its_oid_under_the_name_that_it_has_now(source: Connection) -> None:
    await lay_out(source)
    catalog = await read_catalog(source, "p", [T])
    oid = catalog.tables[T].oid
    await source.execute("ALTER TABLE public.t SET SCHEMA attic")
    try:
        moved = await read_catalog(source, "p", [T], [oid])
    finally:
        with psycopg.connect(source.info.dsn, autocommit=True) as admin:
            admin.execute("DROP TABLE attic.t")

    assert moved.tables == {}
    assert moved.called == {oid: QualifiedName("attic", "t")}


async def test_a_statement_that_locks_a_table_before_its_partitions_is_not_failed_by_a_look_at_the_catalog(
    source: Connection,
) -> None:
    await source.execute("CREATE TABLE public.parted (id bigint PRIMARY KEY) PARTITION BY LIST (id)")
    await source.execute("CREATE TABLE public.part_1 PARTITION OF public.parted FOR VALUES IN (1)")
    name = QualifiedName("public", "parted")
    async with (
        await connect(source.info.dsn, "source", application_name="catalog") as looking,
        await connect(source.info.dsn, "source", application_name="application") as application,
        anyio.create_task_group() as tasks,
        application.transaction(),
    ):
        looked = anyio.Event()

        async def look() -> None:
            catalog = await read_catalog(looking, "none", [name])
            assert catalog.tables[name].leaves
            looked.set()

        await application.execute("LOCK TABLE ONLY public.parted IN ACCESS EXCLUSIVE MODE")
        tasks.start_soon(look)
        await looked.wait()  # nothing of what is asked waits for the lock
        await application.execute("LOCK TABLE ONLY public.part_1 IN ACCESS EXCLUSIVE MODE")
        await look()

    assert (await read_catalog(source, "none", [name])).tables[name].leaves
    await source.execute("DROP TABLE public.parted")


async def test_a_partition_that_is_dropped_while_its_bounds_are_asked_for_is_not_there(
    source: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is taken after the statement has looked for locks, and before it asks for the bounds."""
    name = QualifiedName("public", "parted")
    await source.execute("CREATE TABLE public.parted (id int PRIMARY KEY) PARTITION BY LIST (id)")
    await source.execute("CREATE TABLE public.part_1 PARTITION OF public.parted FOR VALUES IN (1)")
    monkeypatch.setattr("cdcsync.source.relations.LOCKED", "'{}'::oid[]")
    found: list[Catalog] = []
    async with (
        await connect(source.info.dsn, "source", application_name="catalog") as looking,
        await connect(source.info.dsn, "source", application_name="application") as application,
        anyio.create_task_group() as tasks,
    ):

        async def look() -> None:
            found.append(await read_catalog(looking, "none", [name]))

        async with application.transaction():
            await application.execute("DROP TABLE public.part_1")
            tasks.start_soon(look)
            waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND NOT granted)"
            while not await fetch_value(source, waiting, [looking.info.backend_pid]):  # noqa: ASYNC110 - the server's
                await anyio.sleep(0.01)
    await source.execute("DROP TABLE public.parted")

    assert found[0].tables[name].leaves == ()


async def test_an_internal_error_that_stays_is_raised(source: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    async def damaged(connection: Connection, names: Collection[QualifiedName]) -> dict[QualifiedName, Table]:
        nonlocal attempts
        attempts += 1
        raise psycopg.errors.InternalError_("cache lookup failed for type 0")

    monkeypatch.setattr("cdcsync.source.catalog.read_tables", damaged)
    monkeypatch.setattr("cdcsync.source.catalog.backoff_s", lambda attempt, *, first, most: 0.0)
    with pytest.raises(psycopg.errors.InternalError_):
        await read_catalog(source, "none", [T])
    assert attempts == DROPPED_ATTEMPTS
