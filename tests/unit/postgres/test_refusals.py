"""Refused connections in plain words."""

from __future__ import annotations

import pytest

from cdcsync.errors import AnotherServer, CdcsyncError, SetupError, SourceUnavailable
from cdcsync.postgres.errors import Attempt, none_of, refused
from cdcsync.postgres.refusals import explain

SERVER = 'connection failed: connection to server at "10.0.0.1", port 5433 failed: '


@pytest.mark.parametrize(
    ("text", "message", "lasting"),
    [
        (f"{SERVER}Connection refused", "no server listens on 10.0.0.1, port 5433", False),
        (f"{SERVER}timeout expired", "10.0.0.1, port 5433, does not answer", False),
        (f"{SERVER}No route to host", "there is no way to 10.0.0.1 in the network", False),
        (
            "failed to resolve host 'db.example': [Errno -2] Name or service not known",
            "the host name db.example is not known here",
            False,
        ),
        (
            "failed to resolve host 'db.example': no name server has answered for 10 s",
            "no name server answers for db.example",
            False,
        ),
        (
            'could not translate host name "db" to address: Name or service not known',
            "the host name db is not known here",
            False,
        ),
        (
            'connection is bad: connection to server on socket "/tmp/.s.PGSQL.5432" failed: No such file or directory',
            "no server listens on the socket /tmp/.s.PGSQL.5432",
            False,
        ),
        (f"{SERVER}fe_sendauth: no password supplied", "no password is given for this role", True),
        (
            f'{SERVER}FATAL: password authentication failed for user "ann"',
            "the server refuses the password of role ann",
            True,
        ),
        (f'{SERVER}FATAL: role "ann" does not exist', "there is no role ann", True),
        (f'{SERVER}FATAL: database "shop" does not exist', "there is no database shop", True),
        (
            f'{SERVER}FATAL: no pg_hba.conf entry for host "10.0.0.9", user "ann", database "shop", no encryption',
            "pg_hba.conf of the server lets nobody in from here as"
            ' host "10.0.0.9", user "ann", database "shop", no encryption',
            True,
        ),
        (
            f'{SERVER}FATAL: no pg_hba.conf entry for replication connection from host "10.0.0.9", user "ann"',
            "pg_hba.conf of the server lets nobody in from here as"
            ' replication connection from host "10.0.0.9", user "ann"',
            True,
        ),
        (
            f'{SERVER}FATAL:  pg_hba.conf rejects connection for host "10.0.0.9", user "ann", database "shop",'
            f' SSL encryption\n{SERVER}FATAL:  no pg_hba.conf entry for replication connection from host "10.0.0.9"',
            "a line in pg_hba.conf of the server rejects this connection for"
            ' host "10.0.0.9", user "ann", database "shop", SSL encryption',
            True,
        ),
        (
            f'{SERVER}FATAL:  pg_hba.conf rejects replication connection for host "10.0.0.9", user "ann"',
            'a line in pg_hba.conf of the server rejects this replication connection for host "10.0.0.9", user "ann"',
            True,
        ),
        (
            f'{SERVER}FATAL:  Peer authentication failed for user "ann"',
            "the server's Peer authentication refuses role ann",
            True,
        ),
        (
            f'{SERVER}FATAL:  OAuth bearer authentication failed for user "ann"',
            "the server's OAuth bearer authentication refuses role ann",
            False,
        ),
        (
            f'{SERVER}FATAL:  LDAP authentication failed for user "ann"',  # also if the directory is away
            "the server's LDAP authentication refuses role ann",
            False,
        ),
        ('invalid sslmode value: "fulll"', "there is no sslmode fulll", True),
        ('definition of service "shop" not found', "no service file defines the service shop", True),
        ("FATAL: the database system is starting up", "the server is starting up", False),
        ("FATAL: the database system is in recovery mode", "the server recovers and takes no connections yet", False),
        (
            f"{SERVER}server is in hot standby mode",
            "the server takes only reads, and target_session_attrs asks for one that takes writes",
            False,
        ),
        (
            f"{SERVER}server is not in hot standby mode",
            "the server takes writes, and target_session_attrs asks for one that takes none",
            False,
        ),
        ('FATAL: too many connections for role "ann"', "role ann has as many connections as it may", False),
        (
            "FATAL: number of requested standby connections exceeds max_wal_senders (currently 1)",
            "all WAL senders of the server are in use",
            False,
        ),
        (
            "bad value for connect_timeout: 'soon'",
            "connect_timeout is soon in the DSN or the environment, and must be a whole number",
            True,
        ),
        ('invalid channel_binding value: "yes"', "there is no channel_binding yes", True),
        ("FATAL: sorry, too many clients already", "all connections of the server are in use", False),
    ],
)
def test_what_libpq_says_is_told_in_plain_words(text: str, message: str, lasting: bool) -> None:
    refusal = explain(text)
    assert refusal is not None
    assert (refusal.message, refusal.lasting) == (message, lasting)


def test_a_fix_names_what_it_is_about_and_keeps_the_variable_to_type() -> None:
    refusal = explain("no password supplied")
    assert refusal is not None
    assert refusal.hint is not None
    assert "${NAME}" in refusal.hint


@pytest.mark.parametrize(("role", "written"), [("ann", "ann"), ("Ann-Marie", '"Ann-Marie"'), ("user", '"user"')])
def test_a_role_is_written_as_sql_reads_it(role: str, written: str) -> None:
    told = explain(f'role "{role}" is not permitted to log in')
    assert told is not None
    assert told.message == f"role {written} may not log in"
    assert told.hint == f"ALTER ROLE {written} LOGIN, or use another role"


def test_words_that_are_not_known_are_left_alone() -> None:
    assert explain("something else") is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (f"{SERVER}FATAL:  no more connections allowed (max_client_conn)", "the server runs, and lets nobody in"),
        (f'{SERVER}致命错误:  用户 "ann" 的密码认证失败', "the server runs, and lets nobody in"),
        (f"{SERVER}server closed the connection unexpectedly", "check that the source server runs and is reachable"),
    ],
)
def test_only_a_server_that_has_not_answered_is_told_as_one_that_may_not_run(text: str, hint: str) -> None:
    error = refused(text, "source", "source")
    assert str(error.hint).startswith(hint)


NO_ENTRY = 'FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "ann", database "shop", no encryption'
NO_ROLE = 'FATAL:  role "ann" does not exist'
NO_SENDER = "FATAL:  permission denied to start WAL sender\nDETAIL:  Only roles with REPLICATION may."
LIMIT = 'FATAL:  too many connections for role "ann"'
REFUSED = "Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?"
STANDBY = "session is read-only"
POOLER = "FATAL:  no more connections allowed (max_client_conn)"


def failed(*attempts: tuple[str, str, str]) -> CdcsyncError:
    """Return what it means that these attempts failed: host, address and words."""
    several = len({host for host, *_ in attempts}) > 1
    told = []
    for host, address, words in attempts:
        text, label = (
            f'connection failed: connection to server at "{host}", port 5432 failed: {words}',
            f"{host}, port 5432",
        )
        error = refused(text, "source", "source", host=label if several else None)
        told.append(Attempt(label, address, error))
    return none_of(told)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "message", "hint", "code"),
    [
        (LIMIT, NO_ENTRY, "role ann has as many connections as it may (host a, port 5432)", "raise its limit", "53300"),
        (REFUSED, NO_ENTRY, "no server listens on a, port 5432", "start it", None),
        (REFUSED, NO_ROLE, "no server listens on a, port 5432", "start it", None),
        (REFUSED, NO_SENDER, "no server listens on a, port 5432", "start it", None),
        (STANDBY, NO_ENTRY, "the server takes only reads, and target_session_attrs asks", "promote it", None),
        (LIMIT, REFUSED, "role ann has as many connections as it may (host a, port 5432)", "raise its limit", "53300"),
        (LIMIT, STANDBY, "role ann has as many connections as it may (host a, port 5432)", "raise its limit", "53300"),
        (REFUSED, STANDBY, "no server listens on a, port 5432", "start it", None),
        (
            POOLER,
            STANDBY,
            f'connection failed: connection to server at "a", port 5432 failed: {POOLER}',
            "the se",
            None,
        ),
        (
            POOLER,
            NO_ENTRY,
            f'connection failed: connection to server at "a", port 5432 failed: {POOLER}',
            "the se",
            None,
        ),
    ],
)
def test_of_several_hosts_one_that_may_let_us_in_later_says_why_not_now(
    one: str, other: str, message: str, hint: str, code: str | None, turned: bool
) -> None:
    error = failed(*[("a", "10.0.0.1", one), ("b", "10.0.0.2", other)][:: -1 if turned else 1])
    assert isinstance(error, SourceUnavailable)
    assert error.message.startswith(" ".join(message.split()))
    assert "Multiple" not in error.message
    assert "hostaddr" not in error.message
    assert str(error.hint).startswith(hint)
    assert error.sqlstate == code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((NO_ENTRY, NO_ROLE), 'user "ann", database "shop", no encryption (host a, port 5432)'),
        ((NO_ROLE, NO_ENTRY), "there is no role ann (host a, port 5432)"),
        ((NO_SENDER, NO_ROLE), "WAL sender DETAIL: Only roles with REPLICATION may."),
        ((NO_ROLE, NO_SENDER, NO_ENTRY), "there is no role ann (host a, port 5432)"),
    ],
)
def test_several_hosts_that_all_refuse_for_good_are_told_by_the_first(words: tuple[str, ...], message: str) -> None:
    error = failed(*[(host, f"10.0.0.{host}", said) for host, said in zip("abc", words, strict=False)])
    assert isinstance(error, SetupError)
    assert error.message.split("; ")[0].endswith(message)


@pytest.mark.parametrize("turned", [False, True])
def test_a_host_that_listens_on_one_of_its_addresses_is_told_by_what_it_says_there(turned: bool) -> None:
    tried = [("localhost", "::1", REFUSED), ("localhost", "127.0.0.1", NO_ROLE)]
    error = failed(*tried[:: -1 if turned else 1])
    assert isinstance(error, SetupError)
    assert error.message == "there is no role ann; ::1: no server listens on localhost, port 5432"


def test_each_host_and_each_address_is_told_once_with_its_reason() -> None:
    error = failed(
        ("a", "10.0.0.1", NO_ROLE), ("a", "10.0.0.2", NO_ROLE), ("b", "10.0.0.3", LIMIT), ("c", "10.0.0.4", REFUSED)
    )
    assert error.message == (
        "role ann has as many connections as it may (host b, port 5432); there is no role ann (host a, port 5432);"
        " no server listens on c, port 5432"
    )
    error = failed(("a", "10.0.0.1", LIMIT), ("a", "10.0.0.2", REFUSED), ("a", "10.0.0.3", LIMIT))
    assert error.message == ("role ann has as many connections as it may; 10.0.0.2: no server listens on a, port 5432")


def test_a_host_that_let_us_in_and_is_not_the_server_is_told_before_those_that_are_away() -> None:
    away = Attempt("a, port 1", "10.0.0.1", SourceUnavailable("away"))
    another = Attempt("b, port 1", "10.0.0.2", SourceUnavailable("a former primary"), inside=True)
    wrong = Attempt(
        "c, port 1", "10.0.0.3", AnotherServer("another cluster", server="1/1", approved=False), inside=True
    )
    assert none_of([away, another, wrong]).message == "a former primary; away; another cluster"
    # Nobody waits for a server that is there and wrong; while another host is away, it may be the right one.
    assert isinstance(none_of([wrong]), AnotherServer)
    assert isinstance(none_of([away, wrong]), SourceUnavailable)
