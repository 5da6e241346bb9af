"""The catalog as it is read: the tables that are asked about."""

from __future__ import annotations

from collections.abc import Collection

import anyio
import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.catalog import DROPPED_ATTEMPTS, Catalog, read_catalog
from cdcsync.source.relations import Table
from tests.support.publications import T, lay_out

pytestmark = pytest.mark.server


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
