"""What a real server says if it lacks something that all statements need, or ends what works for one: whose that is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import IndexFault, SetupError, Unavailable
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.postgres.settings import Side
from tests.support.clusters import OTHER_VERSIONS
from tests.support.disks import LACK_MEMORY, tight_disk_or_skip
from tests.support.indexes import until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SIDES = pytest.mark.parametrize("side", ["source", "target"])
RAISING = """CREATE FUNCTION public.raising(code text) RETURNS int LANGUAGE plpgsql PARALLEL SAFE AS
$$ BEGIN RAISE 'no' USING ERRCODE = code, HINT = 'the secret is 7'; END $$"""


async def failing(connection: Connection, side: Side, statement: str) -> Unavailable:
    """Return the error of a statement for the index `articles`."""
    with pytest.raises(Unavailable) as caught, speaking_of(side, index="articles"):
        await connection.execute(statement.encode())
    return caught.value


async def in_parallel(connection: Connection) -> None:
    """Have a worker execute the next statements, as it does in a plan that is worth it."""
    name = "debug_parallel_query" if connection.info.server_version >= 160000 else "force_parallel_mode"
    await connection.execute(f"SET {name} = on".encode())


@SIDES
async def test_a_table_of_locks_that_is_full_is_the_servers_and_the_remedy_is_too(
    make_cluster: Callable[..., Cluster], side: Side
) -> None:
    cluster = make_cluster(settings={"max_locks_per_transaction": "10"})
    async with Session(cluster.dsn(), side, application_name="cdcsync test") as session:
        found = await failing(
            await session.connection(), side, "SELECT pg_advisory_xact_lock(i) FROM generate_series(1, 100000) i"
        )
    assert (found.index, found.sqlstate) == (None, "53200")
    assert "max_locks_per_transaction" in str(found.hint)


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is a program of Linux")
@pytest.mark.parametrize(("side", "index"), [("source", "articles"), ("target", None)])
async def test_memory_that_is_short_is_the_statements_on_the_source_and_the_servers_on_the_target(
    cluster: Cluster, side: Side, index: str | None
) -> None:
    async with Session(cluster.dsn(), side, application_name="cdcsync test") as session:
        connection = await session.connection()
        await connection.execute(LACK_MEMORY)
        found = await failing(connection, side, "SELECT repeat('x', 100000000)")
        assert (found.index, found.sqlstate) == (index, "53200")
        assert "work_mem" in str(found.hint)

        await connection.execute("CREATE TEMP TABLE stage (content text)")
        with pytest.raises(Unavailable) as caught, speaking_of(side, index="articles"):
            async with connection.cursor() as cursor, cursor.copy("COPY stage FROM STDIN") as copy:
                await copy.write("x" * 50_000_000)
        assert (caught.value.index, caught.value.sqlstate) == (index, "53200")


@SIDES
async def test_a_parallel_worker_that_is_ended_is_no_fault_of_the_index(cluster: Cluster, side: Side) -> None:
    async with Session(cluster.dsn(), side, application_name="cdcsync test") as session:
        connection = await session.connection()
        await in_parallel(connection)
        async with await psycopg.AsyncConnection.connect(cluster.dsn(), autocommit=True) as other:

            async def ended() -> bool:
                cursor = await other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE backend_type = 'parallel worker' AND wait_event = 'PgSleep'"
                )
                return await cursor.fetchone() is not None

            failed = asyncio.create_task(failing(connection, side, "SELECT pg_sleep(600)"))
            await until(ended)
            found = await failed
    assert (found.index, found.sqlstate) == (None, "57P01")
    assert "function" not in str(found.hint)


@pytest.mark.skipif(not OTHER_VERSIONS[16].exists(), reason="PostgreSQL 16 is not installed")
async def test_a_parallel_worker_of_a_role_that_lost_its_login_says_so_with_the_fix(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(bin_dir=OTHER_VERSIONS[16])
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE ann LOGIN")
        async with Session(cluster.dsn(user="ann"), "source", application_name="cdcsync test") as session:
            connection = await session.connection()
            await in_parallel(connection)
            admin.execute("ALTER ROLE ann NOLOGIN")
            with pytest.raises(SetupError) as caught, speaking_of("source"):
                await connection.execute("SELECT 1")
    assert (caught.value.message, caught.value.sqlstate) == ('role "ann" is not permitted to log in', "28000")
    assert str(caught.value.hint).startswith("ALTER ROLE … LOGIN")


@SIDES
@pytest.mark.parametrize("parallel", [False, True])
async def test_a_disk_that_is_full_of_temporary_files_is_the_servers_in_whatever_process(
    cluster: Cluster, side: Side, parallel: bool
) -> None:
    with tight_disk_or_skip(cluster, "postgres", ()) as disk:
        disk.fill()
        async with Session(cluster.dsn(), side, application_name="cdcsync test") as session:
            connection = await session.connection()
            await connection.execute("CREATE TABLE public.sorted AS SELECT i FROM generate_series(1, 50000) i")
            await connection.execute("SET temp_tablespaces = tight; SET work_mem = '64kB'")
            if parallel:
                await in_parallel(connection)
            found = await failing(connection, side, "SELECT i FROM public.sorted ORDER BY md5(i::text)")
            await connection.execute("DROP TABLE public.sorted")
    assert (found.index, found.sqlstate) == (None, "53100")
    assert "disk space" in str(found.hint)


@SIDES
@pytest.mark.parametrize("parallel", [False, True])
async def test_what_a_function_raises_is_its_indexs_with_whatever_code(
    cluster: Cluster, side: Side, parallel: bool
) -> None:
    async with Session(cluster.dsn(), side, application_name="cdcsync test") as session:
        connection = await session.connection()
        await connection.execute(RAISING)
        if parallel:
            await in_parallel(connection)
        for code in ("08006", "53100", "53200", "53300", "57P01"):
            found = await failing(connection, side, f"SELECT public.raising('{code}')")
            assert (found.index, found.sqlstate) == ("articles", code)
            assert "correct the function" in str(found.hint)


LONG = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, {}) i)"
"""Text that hardly becomes smaller: so many times 32 bytes."""

LIMITS = {
    "an entry of a b-tree": (
        f"INSERT INTO public.narrow VALUES ({LONG.format(200)})",
        "too long for the index narrow_pkey: index row size",
    ),
    "an entry of any index": (
        f"INSERT INTO public.narrow VALUES ({LONG.format(500)})",
        "too long for the index of a key or column: index row requires",
    ),
    "a row": (
        f"CREATE TABLE public.wider AS SELECT {', '.join(f'1::bigint AS c{at}' for at in range(1_018))}",
        "in a row too wide for a page: row is too big: size",
    ),
    "a row that is rewritten": (
        "ALTER TABLE public.wide ALTER c0 TYPE bigint",
        "in a row too wide for a page: row is too big: size",
    ),
    "a value": (
        "SELECT to_tsvector('simple', string_agg(md5(i::text), ' ')) FROM generate_series(1, 100000) i",
        "(54000): string is too long for tsvector",
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
async def test_what_is_too_large_for_a_limit_of_the_server_says_for_which(database: Database, limit: str) -> None:
    columns = ", ".join(f"c{at} {'int' if at < 2 else 'bigint'}" for at in range(1_018))
    database.execute(f"CREATE TABLE narrow (key text PRIMARY KEY); CREATE TABLE wide ({columns})")
    database.execute(f"INSERT INTO wide VALUES ({', '.join(['1'] * 1_018)})")
    statement, told = LIMITS[limit]
    async with Session(database.dsn, "target", application_name="cdcsync test") as session:
        with pytest.raises(IndexFault) as caught, speaking_of("target", index="articles"):
            await (await session.connection()).execute(statement.encode())
    assert told in str(caught.value)


async def test_the_words_that_a_function_chose_for_a_limit_are_not_passed_on(database: Database) -> None:
    database.execute(RAISING)
    async with Session(database.dsn, "target", application_name="cdcsync test") as session:
        with pytest.raises(IndexFault) as caught, speaking_of("target", index="articles"):
            await (await session.connection()).execute("SELECT public.raising('54000')")
    assert "ProgramLimitExceeded (54000)" in str(caught.value)
    assert "no" not in str(caught.value).split()
