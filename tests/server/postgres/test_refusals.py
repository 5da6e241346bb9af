"""Why a real server that runs lets nobody in, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from tests.support.clusters import OTHER_VERSIONS
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


RULES = """\
host all postgres,absent,closed,"Ann-Marie" all trust
host all rejected all reject
host all identified all ident
host all asked all scram-sha-256
"""
"""The lines of pg_hba.conf: for the role `unlisted` there is none, and `absent` is no role."""

LOGIN = 'host "127.0.0.1", user "{}", database "postgres", no encryption'

LOGINS = {
    "rejected": (
        {"user": "rejected"},
        f"a line in pg_hba.conf of the server rejects this connection for {LOGIN.format('rejected')}",
        "change that line, or put one that allows this login above it, and reload the server",
    ),
    "unlisted": (
        {"user": "unlisted"},
        f"pg_hba.conf of the server lets nobody in from here as {LOGIN.format('unlisted')}",
        "add a line to pg_hba.conf and reload the server",
    ),
    "identified": (
        {"user": "identified"},
        "the server's Ident authentication refuses role identified",
        "its log says why: correct that, or the line of pg_hba.conf for this login",
    ),
    "without a password": (
        {"user": "asked"},
        "no password is given for this role",
        "set PGPASSWORD, add a line to /dev/null, or put ${NAME} into the DSN",
    ),
    "with a wrong password": (
        {"user": "asked", "password": "wrong"},
        "the server refuses the password of role asked",
        "correct it in the DSN, PGPASSWORD or /dev/null",
    ),
    "absent": (
        {"user": "absent"},
        "there is no role absent",
        "create it (`cdcsync init` and `cdcsync config roles` print the SQL), or correct the role in the DSN",
    ),
    "closed": ({"user": "closed"}, "role closed may not log in", "ALTER ROLE closed LOGIN, or use another role"),
    "closed, and quoted": (
        {"user": "Ann-Marie"},
        'role "Ann-Marie" may not log in',
        'ALTER ROLE "Ann-Marie" LOGIN, or use another role',
    ),
    "no such database": (
        {"dbname": "absent"},
        "there is no database absent",
        "create it, or correct the database name in the DSN",
    ),
}
"""What a login is refused for, by its parameters, and what is told of that with the fix."""


def guard(cluster: Cluster) -> None:
    """Make the roles and let them in by `RULES` alone."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE rejected LOGIN; CREATE ROLE unlisted LOGIN; CREATE ROLE identified LOGIN")
        admin.execute("CREATE ROLE closed; CREATE ROLE \"Ann-Marie\"; CREATE ROLE asked LOGIN PASSWORD 'right'")
    (cluster.data / "pg_hba.conf").write_text(RULES)
    cluster.restart()


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A server with `RULES`."""
    with Cluster() as cluster:
        guard(cluster)
        yield cluster


@pytest.fixture(scope="module")
def translated() -> Iterator[Cluster]:
    """The same server, speaking Russian."""
    if not OTHER_VERSIONS[15].exists():
        pytest.skip("PostgreSQL 15 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANGUAGE", "ru")  # in place of the messages of a locale that is not installed
        with Cluster(bin_dir=OTHER_VERSIONS[15]) as cluster:
            guard(cluster)
            with psycopg.connect(cluster.dsn()) as admin, pytest.raises(psycopg.errors.DivisionByZero) as told:
                admin.execute("SELECT 1 / 0")
            if "division" in str(told.value):
                pytest.skip("this PostgreSQL 15 speaks English only")
            yield cluster


@pytest.fixture
def no_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """No password is taken from this machine."""
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", "/dev/null")


@pytest.mark.usefixtures("no_passwords")
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("login", LOGINS)
async def test_a_login_that_is_refused_for_good_is_told_with_the_fix(guarded: Cluster, login: str, side: Side) -> None:
    parameters, message, hint = LOGINS[login]
    error = await refused(conninfo.make_conninfo(guarded.dsn(), **parameters), side)
    assert isinstance(error, SetupError)
    assert (error.message, error.hint) == (message, hint)


@pytest.mark.usefixtures("no_passwords")
@pytest.mark.parametrize("login", LOGINS)
async def test_a_server_that_speaks_another_language_is_told_as_one_that_runs(translated: Cluster, login: str) -> None:
    """libpq passes on no code of a refused login, and the words are known in English alone, but for a file's name."""
    parameters, message, hint = LOGINS[login]
    error = await refused(conninfo.make_conninfo(translated.dsn(), **parameters))
    assert isinstance(error.__cause__, psycopg.Error)
    assert error.__cause__.sqlstate is None
    if login == "without a password":  # in libpq's words
        assert (error.message, error.hint) == (message, hint)
    elif login in ("rejected", "unlisted"):
        assert isinstance(error, SetupError)
        assert error.hint == "allow this login in pg_hba.conf and reload the server"
    else:
        assert isinstance(error, Unavailable)
        assert str(error.hint).startswith("the server runs, and lets nobody in for this reason")


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
    beside = f"there is no role ann (host 127.0.0.1, port {other.port})"
    for dsn in dsns:
        error = await refused(dsn, side)
        assert isinstance(error, Unavailable)
        assert error.message == f"role ann has as many connections as it may (host {at}); {beside}"
        assert error.sqlstate == TOO_MANY_CONNECTIONS
    primary.stop()
    for dsn in dsns:
        error = await refused(dsn, side)
        assert isinstance(error, Unavailable)
        assert error.message == f"no server listens on {at}; {beside}"


@pytest.mark.parametrize("value", ["database", "true"])
async def test_a_dsn_for_replication_serves_for_statements_as_well(
    database: Database, roles: Roles, value: str
) -> None:
    """Others write it there; a session with it takes no parameters, and needs a role that may replicate."""
    dsn = conninfo.make_conninfo(roles.dsn(database, roles.create("reader")), replication=value)
    async with await connect(dsn, "target") as connection:
        cursor = await connection.execute("SELECT %s::int", [7])
        assert await cursor.fetchone() == (7,)
