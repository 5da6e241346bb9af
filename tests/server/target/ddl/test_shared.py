"""The tables that all indexes of a schema share, and wait_for over them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio
import psycopg
import pytest

from cdcsync.lsn import Lsn
from cdcsync.model.chain import Lease
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.target import SHARED
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines, waiters_lock
from tests.support.indexes import (
    SCHEMA,
    make_spec,
    register,
    until,
)
from tests.support.relations import catalog, create, rows

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_two_workers_may_create_at_the_same_time(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    others = [await connect_target() for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for other in others:
            tasks.start_soon(create, other, make_spec())
    assert len(await catalog(connection)) > 10


async def test_tables_that_stand_already_are_not_locked_against_vacuum(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await create(connection)
    before = await catalog(connection)
    tables = [
        name for (name,) in await rows(connection, "SELECT tablename FROM pg_tables WHERE schemaname = 'cdcsync'")
    ]
    assert set(tables) == set(SHARED)
    vacuum = await connect_target()
    async with vacuum.transaction():
        for table in tables:
            await vacuum.execute(f"LOCK TABLE cdcsync.{table} IN SHARE UPDATE EXCLUSIVE MODE".encode())
        async with connection.transaction():
            await connection.execute(BRIEFLY)
            await create_shared(connection, SCHEMA)
    assert await catalog(connection) == before


async def test_a_table_that_was_dropped_because_it_was_damaged_is_made_again(connection: Connection) -> None:
    await create(connection)
    before = await catalog(connection)
    restored = {"pipelines", "indexes", "generations", "backfills"}  # by a backup: docs/operations.md, Damaged tables
    for table in set(SHARED) - restored:
        await connection.execute(f"DROP TABLE cdcsync.{table}".encode())
        async with connection.transaction():
            await create_shared(connection, SCHEMA)
        assert await catalog(connection) == before, table


async def test_a_comment_of_an_older_version_is_replaced(connection: Connection) -> None:
    await create(connection)
    before = await catalog(connection)
    await connection.execute("COMMENT ON TABLE cdcsync.calls IS 'other'")
    await connection.execute("COMMENT ON COLUMN cdcsync.indexes.table_oid IS NULL")
    assert await catalog(connection) != before
    await create_shared(connection, SCHEMA)
    assert await catalog(connection) == before


async def test_tables_of_an_older_version_get_the_indexes_of_requests(connection: Connection) -> None:
    await create(connection)
    before = await catalog(connection)
    await connection.execute("DROP INDEX cdcsync.backfills_last, cdcsync.backfills_loads, cdcsync.backfills_ended")
    await create_shared(connection, SCHEMA)
    assert await catalog(connection) == before


async def followed(connection: Connection, checkpoint: Lsn | None) -> tuple[Pipelines, Lease]:
    """Set up the index `articles` and its pipeline."""
    pipelines = Pipelines(SCHEMA, "slot")
    spec = make_spec(search=None)
    await create(connection, spec)
    await pipelines.ensure(connection, "p")
    await register(connection, spec, slot="slot")
    lease = await pipelines.take_over(connection, "me")
    if checkpoint is not None:
        lease = await pipelines.begin_at(connection, lease, checkpoint, "system", 1)
    return pipelines, lease


async def test_waiting_for_what_is_reached_returns_at_once(connection: Connection) -> None:
    await followed(connection, Lsn.parse("1/10"))
    for position in ("1/10", "1/F", "0/FFFFFFFF", "0/0"):
        assert await rows(connection, "SELECT cdcsync.wait_for('articles', %s)", position) == [(True,)]


@pytest.mark.parametrize("checkpoint", [None, Lsn(0x10)])
async def test_waiting_in_vain_returns_false(connection: Connection, checkpoint: Lsn | None) -> None:
    await followed(connection, checkpoint)
    for timeout in (timedelta(), timedelta(milliseconds=20), timedelta(seconds=-1)):
        found = await rows(connection, "SELECT cdcsync.wait_for('articles', '0/11', %s)", timeout)
        assert found == [(False,)]


async def test_waiting_ends_when_the_checkpoint_gets_there(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    pipelines, lease = await followed(connection, Lsn(0x10))
    waiting = await connect_target()
    answers = []

    async def wait() -> None:
        async with waiting.transaction():
            answers.extend(await rows(waiting, "SELECT cdcsync.wait_for('articles', '0/30', '60 s')"))

    async def sleeps() -> bool:
        return (True,) in await rows(
            connection,
            "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s",
            waiting.info.backend_pid,
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await until(sleeps)
        lease, _ = await pipelines.commit(connection, lease, Lsn(0x20))
        await until(sleeps)
        assert answers == []
        await pipelines.commit(connection, lease, Lsn(0x30))
    assert answers == [(True,)]


async def test_waiting_ends_in_time_whoever_holds_the_lock_that_tells_of_it(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """Any role may take an advisory lock."""
    await followed(connection, Lsn(0x10))
    holder = await connect_target()
    await holder.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [waiters_lock(SCHEMA) + "slot"])
    await connection.execute("SET statement_timeout = '20s'")
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/11', '20 ms')") == [(False,)]


async def test_waiting_for_an_unknown_index_is_an_error_that_says_where_to_look(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    with pytest.raises(psycopg.errors.RaiseException, match="there is no index 'nosuch'") as refused:
        await connection.execute("SELECT cdcsync.wait_for('nosuch', '0/1')")
    assert "indexes" in (refused.value.diag.message_hint or "")


async def test_waiting_for_a_paused_or_an_unfollowed_index_is_an_error_with_the_reason(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'its key is gone'")
    with pytest.raises(psycopg.errors.RaiseException, match="the index 'articles' is paused") as refused:
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")
    assert refused.value.diag.message_detail == "its key is gone"
    await connection.execute("UPDATE cdcsync.indexes SET state = 'live', unfollowed_at = now()")
    with pytest.raises(psycopg.errors.RaiseException, match="'articles' is no longer followed") as refused:
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")
    assert "drop" in (refused.value.diag.message_hint or "")


@pytest.mark.parametrize(
    ("kind", "state", "there"),
    [
        ("initial", "requested", False),
        ("initial", "running", False),
        ("resync", "paused", False),
        ("initial", "done", True),
        ("replay", "running", True),
    ],
)
async def test_an_index_that_is_loading_is_not_there_yet(
    connection: Connection, kind: str, state: str, there: bool
) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('articles', %s, %s)", [kind, state]
    )
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/1', '10 ms')") == [(there,)]


@pytest.mark.parametrize(
    ("owed", "rewrite", "state", "there"),
    [
        (True, False, "requested", False),
        (True, False, "paused", False),
        (True, False, "done", True),
        (True, True, "running", True),
        (False, False, "running", True),
    ],
)
async def test_an_index_that_is_owed_rows_or_a_column_is_not_there_yet(
    connection: Connection, owed: bool, rewrite: bool, state: str, there: bool
) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state, owed, rewrite)"
        " VALUES ('articles', 'replay', %s, %s, %s)",
        [state, owed, rewrite],
    )
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/1', '10 ms')") == [(there,)]


async def test_vectors_are_waited_for_on_request_up_to_the_same_position(connection: Connection) -> None:
    await followed(connection, Lsn(0x100))
    wait = "SELECT cdcsync.wait_for('articles', '0/50', timeout => '10 ms', vectors => true)"
    assert await rows(connection, wait) == [(True,)]
    for lsn, attempts in (("0/60", 0), ("0/40", 8), ("0/40", 0)):
        assert await rows(connection, wait) == [(True,)]
        (chunk,) = (
            await rows(
                connection,
                "INSERT INTO cdcsync.articles_chunks (id, tenant, chunk_no, chunk_total, content, content_hash,"
                " document_hash, commit_lsn) SELECT count(*), 1, 0, 1, 'x', '\\x00', '\\x00', %s"
                " FROM cdcsync.articles_chunks RETURNING chunk_id",
                lsn,
            )
        )[0]
        await connection.execute(
            "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane, attempts)"
            " VALUES (1, %s, '\\x00', 0, %s)",
            [chunk, attempts],
        )
    assert await rows(connection, wait) == [(False,)]
    assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/50')") == [(True,)]


async def test_other_roles_and_row_level_security_get_a_true_answer(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await followed(connection, Lsn(0x10))
    for table in ("indexes", "pipelines", "backfills"):
        await connection.execute(f"ALTER TABLE cdcsync.{table} ENABLE ROW LEVEL SECURITY".encode())
    other = await connect_target()
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    await connection.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdcsync TO {role}".encode())
    try:
        await other.execute(f"SET ROLE {role}".encode())
        assert await rows(other, "SELECT cdcsync.wait_for('articles', '0/1')") == [(True,)]
        assert await rows(other, "SELECT cdcsync.wait_for('articles', '0/11', '0')") == [(False,)]
    finally:
        await other.close()
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


async def test_a_function_of_an_older_version_is_replaced_and_keeps_who_may_call_it(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    await connection.execute(f"CREATE ROLE {role}".encode())
    try:
        await connection.execute("DROP FUNCTION cdcsync.wait_for(text, pg_lsn, interval, boolean)")
        await connection.execute(
            "CREATE FUNCTION cdcsync.wait_for(a text, b pg_lsn, c interval DEFAULT '1 s') RETURNS boolean"
            " LANGUAGE sql AS 'SELECT true'"
        )
        await connection.execute("REVOKE ALL ON FUNCTION cdcsync.wait_for FROM PUBLIC")
        await connection.execute(f"GRANT EXECUTE ON FUNCTION cdcsync.wait_for TO {role}".encode())
        for _ in range(2):
            await create_shared(connection, SCHEMA)
            assert await rows(connection, "SELECT cdcsync.wait_for('articles', '0/1')") == [(True,)]
            assert await rows(
                connection,
                "SELECT array_agg(a.grantee::regrole::text ORDER BY 1) @> %s, bool_or(a.grantee = 0)"
                " FROM pg_proc p, aclexplode(p.proacl) a WHERE p.proname = 'wait_for'",
                [role],
            ) == [(True, False)]
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_waiting_where_every_query_sees_the_same_moment_is_refused(connection: Connection, level: str) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute(f"SET default_transaction_isolation = '{level}'".encode())
    with pytest.raises(psycopg.errors.RaiseException, match="READ COMMITTED"):
        await connection.execute("SELECT cdcsync.wait_for('articles', '0/1')")


async def test_waiting_without_a_position_or_a_limit_does_not_wait_for_ever(connection: Connection) -> None:
    await followed(connection, Lsn(0x10))
    await connection.execute("SET statement_timeout = '20s'")
    for arguments in ("'articles', NULL", "'articles', '0/11', NULL", "NULL, '0/11'"):
        assert await rows(connection, f"SELECT cdcsync.wait_for({arguments})") == [(None,)]
