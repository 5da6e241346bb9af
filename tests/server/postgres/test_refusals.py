"""Why a real server that runs lets nobody in, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import CdcsyncError, SetupError, Unavailable
from cdcsync.postgres.refusals import TOO_MANY_CONNECTIONS
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import Side
from cdcsync.source.slot import SlotConnection
from tests.support.roles import Roles
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def refused(dsn: str, side: Side = "target") -> CdcsyncError:
    """Return why no session can be had."""
    with pytest.raises(CdcsyncError) as caught:
        await connect(dsn, side)
    return caught.value


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("statement", "message", "hint", "code"),
    [
        (
            "ALTER ROLE {role} CONNECTION LIMIT 0",
            "role {role} has as many connections as it may",
            "raise its limit, ALTER ROLE {role} CONNECTION LIMIT …, or close some",
            TOO_MANY_CONNECTIONS,
        ),
        (
            "ALTER DATABASE {database} CONNECTION LIMIT 0",
            "database {database} has as many connections as it may",
            "raise its limit, ALTER DATABASE {database} CONNECTION LIMIT …, or close some",
            TOO_MANY_CONNECTIONS,
        ),
        (
            "ALTER DATABASE {database} ALLOW_CONNECTIONS false",
            "database {database} takes no connections",
            "ALTER DATABASE {database} ALLOW_CONNECTIONS true",
            "55000",
        ),
        (
            "REVOKE CONNECT ON DATABASE {database} FROM public",
            "the role may not connect to database {database}",
            "GRANT CONNECT ON DATABASE {database} to the role in the DSN",
            "42501",
        ),
        (
            "UPDATE pg_database SET datconnlimit = -2 WHERE datname = '{database}'",  # as a DROP DATABASE leaves it
            "database {database} is invalid, as a DROP DATABASE was interrupted",
            "drop it and create it again, or correct the database name in the DSN",
            None,
        ),
    ],
)
async def test_a_database_or_a_role_that_is_let_in_no_more_is_waited_for_and_the_fix_is_told(
    database: Database, roles: Roles, side: Side, statement: str, message: str, hint: str, code: str | None
) -> None:
    role = roles.create("limited")
    dsn = roles.dsn(database, role)
    with database.server.connect() as admin:
        admin.execute(statement.format(role=role, database=database.name).encode())
        error = await refused(dsn, side)
        admin.execute("UPDATE pg_database SET datconnlimit = -1 WHERE datname = %s", [database.name])
    told = [text.format(role=role, database=database.name) for text in (message, hint)]
    assert ([error.message, error.hint], error.sqlstate) == (told, code)
    assert isinstance(error, Unavailable)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"target_session_attrs": "standby"}, "remove target_session_attrs"),
        ({"target_session_attrs": "read-only"}, "remove target_session_attrs"),
        (
            {"target_session_attrs": "read-write", "options": "-c default_transaction_read_only=on"},
            "remove default_transaction_read_only",
        ),
        ({"target_session_attrs": "any of them"}, "correct it in the DSN"),
        ({"options": "-c nosuch=1"}, "the server runs, and lets nobody in for this reason"),
    ],
)
async def test_what_a_dsn_asks_for_and_a_server_is_not_is_told_with_the_fix(
    database: Database, parameters: dict[str, str], told: str
) -> None:
    error = await refused(conninfo.make_conninfo(database.dsn, **parameters))
    assert told in str(error.hint)
    assert isinstance(error, SetupError) == (parameters == {"target_session_attrs": "any of them"})


@pytest.mark.proof
async def test_a_standby_that_stands_where_the_primary_is_asked_for_is_told_as_such(
    make_cluster: Callable[..., Cluster],
) -> None:
    with make_cluster().standby() as standby:
        error = await refused(f"{standby.dsn()}?target_session_attrs=primary")
    assert error.message == "the server takes only reads, and target_session_attrs asks for one that takes writes"
    assert str(error.hint).startswith("promote it")


async def test_a_server_without_a_free_connection_or_sender_is_told_with_the_setting_to_raise(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(
        settings={"max_connections": "4", "superuser_reserved_connections": "1", "max_wal_senders": "1"}
    )
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE ann LOGIN")
    async with await SlotConnection.connect(cluster.dsn()):
        with pytest.raises(Unavailable, match="all WAL senders of the server are in use") as caught:
            await SlotConnection.connect(cluster.dsn())
        assert "max_wal_senders" in str(caught.value.hint)
    with ExitStack() as stack:
        for role, free in (("ann", 3), ("postgres", 1)):
            for _ in range(free):
                stack.enter_context(psycopg.connect(cluster.dsn(user=role)))
            error = await refused(cluster.dsn(user=role))
            assert (error.message, error.sqlstate) == ("all connections of the server are in use", TOO_MANY_CONNECTIONS)
            assert "max_connections" in str(error.hint)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_host_that_refuses_for_good_does_not_speak_for_another_that_is_full_or_away(
    make_cluster: Callable[..., Cluster], side: Side
) -> None:
    primary, other = make_cluster(), make_cluster()  # the other has no such role
    with psycopg.connect(primary.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE ann LOGIN CONNECTION LIMIT 0")
    orders = [f"{primary.port},{other.port}", f"{other.port},{primary.port}"]
    dsns = [f"host=127.0.0.1,127.0.0.1 port={ports} user=ann dbname=postgres" for ports in orders]
    at = f"127.0.0.1, port {primary.port}"
    for dsn in dsns:
        error = await refused(dsn, side)
        assert isinstance(error, Unavailable)
        assert error.message == f"role ann has as many connections as it may (host {at})"
        assert error.sqlstate == TOO_MANY_CONNECTIONS
    primary.stop()
    for dsn in dsns:
        error = await refused(dsn, side)
        assert isinstance(error, Unavailable)
        assert error.message == f"no server listens on {at}"


@pytest.mark.parametrize("value", ["database", "true"])
async def test_a_dsn_for_replication_serves_for_statements_as_well(
    database: Database, roles: Roles, value: str
) -> None:
    """Others write it there; a session with it takes no parameters, and needs a role that may replicate."""
    dsn = conninfo.make_conninfo(roles.dsn(database, roles.create("reader")), replication=value)
    async with await connect(dsn, "target") as connection:
        cursor = await connection.execute("SELECT %s::int", [7])
        assert await cursor.fetchone() == (7,)
