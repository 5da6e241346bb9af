"""Which transactions are open, and which may be delivered already although no snapshot shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import psycopg
import pytest
from psycopg import sql

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import connect
from cdcsync.source.transactions import blockers, current_snapshot, in_doubt, running_transactions
from tests.support.clusters import OTHER_VERSIONS
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

MINE = "SELECT pg_current_xact_id()::xid::text::int8"


def begun(dsn: str) -> tuple[psycopg.Connection, int]:
    """Return a session with an open transaction that has an id, and the id."""
    session = psycopg.connect(dsn, autocommit=True)
    session.execute("BEGIN")
    session.execute("SELECT pg_logical_emit_message(true, 'test', '')")  # a commit of nothing waits for nobody
    (xid,) = session.execute(MINE).fetchone() or (0,)
    return session, int(xid)


@pytest.fixture
def served(make_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = make_cluster(settings={"synchronous_commit": "local"})
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE cdc LOGIN REPLICATION")
    return cluster


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("user", ["postgres", "cdc"])
async def test_an_open_transaction_is_in_doubt_only_if_a_standby_is_waited_for_and_we_may_not_see_by_whom(
    served: Cluster, user: str
) -> None:
    open_, xid = begun(served.dsn())
    source = await connect(served.dsn(user=user), "source")
    with psycopg.connect(served.dsn(), autocommit=True) as admin:
        assert await in_doubt(source) == set()
        with served.standby() as standby:
            assert standby.running
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            admin.execute("SELECT pg_reload_conf()")
            confirmed = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: admin.execute(confirmed).fetchone() == (True,), "the standby to be synchronous")
            assert await in_doubt(source) == set()
        # Nobody confirms any more.
        waiting, late = begun(served.dsn())
        waiting.execute("SET synchronous_commit = on")
        waiting.pgconn.send_query(b"COMMIT")
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: admin.execute(waits).fetchone() == (True,), "the commit to wait")
        assert await in_doubt(source) == ({late} if user == "postgres" else {late, xid})
        assert await (await source.execute("SELECT 1")).fetchone() == (1,)
        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
        while waiting.pgconn.get_result() is not None:
            pass
    for session in (open_, waiting):
        session.close()
    await source.close()


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
        f"COMMIT PREPARED '{database.name} it''s' or ROLLBACK PREPARED '{database.name} it''s'"
        f" in database {database.name}"
    ]
