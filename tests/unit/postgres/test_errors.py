"""What an error of the driver means: waiting mends it, an operator does, or it is a mistake of ours."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors
from psycopg.pq import DiagnosticField

from cdcsync.errors import CdcsyncError, SetupError, SourceUnavailable, TargetUnavailable, Unavailable
from cdcsync.postgres.errors import speaking_of, translate
from cdcsync.postgres.settings import Side


def raised(error: psycopg.Error) -> BaseException:
    """Return what leaves a block that speaks of the target."""
    with pytest.raises((psycopg.Error, CdcsyncError)) as caught, speaking_of("target", where="here"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "means", "sqlstate"),
    [
        (errors.AdminShutdown("the server ends"), TargetUnavailable, "57P01"),
        (errors.DeadlockDetected("deadlock"), TargetUnavailable, "40P01"),
        (psycopg.OperationalError("the connection is closed"), TargetUnavailable, None),
        (errors.InsufficientPrivilege("permission denied"), SetupError, "42501"),
        (errors.UndefinedTable("there is no such table"), SetupError, "42P01"),
        (psycopg.DataError("text cannot contain NUL bytes"), SetupError, None),
    ],
)
def test_an_error_of_a_server_says_whether_waiting_helps_and_keeps_its_code(
    error: psycopg.Error, means: type[CdcsyncError], sqlstate: str | None
) -> None:
    found = raised(error)
    assert type(found) is means
    assert isinstance(found, CdcsyncError)
    assert (found.where, found.sqlstate, found.__cause__) == ("here", sqlstate, error)


def test_the_side_is_that_of_the_server() -> None:
    assert type(translate(errors.AdminShutdown("the server ends"), "source")) is SourceUnavailable


def test_a_server_that_takes_only_reads_is_not_told_as_one_that_is_away() -> None:
    found = translate(errors.ReadOnlySqlTransaction("cannot execute UPDATE in a read-only transaction"), "target")
    assert type(found) is TargetUnavailable
    assert "`cdcsync check` says how" in str(found.hint)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("error", "alone"),
    [
        (errors.LockNotAvailable("locked"), True),
        (errors.DeadlockDetected("deadlock"), True),
        (errors.SerializationFailure("a conflict with recovery"), True),
        (errors.ConfigurationLimitExceeded("temporary file size exceeds the limit"), True),
        (errors.QueryCanceled("cancelled"), True),
        (errors.DiskFull("no space left"), False),
        (errors.TooManyConnections("too many clients"), False),
        (errors.AdminShutdown("the server ends"), False),
        (errors.ConnectionFailure("the connection broke"), False),
        (psycopg.OperationalError("the connection is closed"), False),
    ],
)
def test_an_error_names_the_index_whose_statement_failed_where_those_for_others_may_succeed(
    error: psycopg.Error, alone: bool, side: Side
) -> None:
    with pytest.raises(Unavailable) as caught, speaking_of(side, index="articles"):
        raise error
    assert caught.value.index == ("articles" if alone else None)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("context", "inside"),
    [
        (None, False),
        ("parallel worker", False),
        ("paralleler Arbeitsprozess", False),
        ("параллельный исполнитель", False),
        ("パラレルワーカー", False),
        ("PL/pgSQL function fits(integer) line 1 at RAISE\nparallel worker", True),
        ('SQL function "fits" statement 1', True),
        ("fonction PL/Python « fits »", True),
    ],
)
def test_an_error_of_a_parallel_worker_is_no_functions_in_whatever_language_the_server_says_so(
    context: str | None, inside: bool, side: Side
) -> None:
    said: dict[int, bytes | None] = {
        DiagnosticField.CONTEXT: None if context is None else context.encode(),
        DiagnosticField.SEVERITY_NONLOCALIZED: b"ERROR",
        DiagnosticField.SQLSTATE: b"57P01",
    }
    error = errors.AdminShutdown("terminating connection", info=said)
    with pytest.raises(Unavailable) as caught, speaking_of(side, index="articles"):
        raise error
    assert caught.value.index == ("articles" if inside else None)


@pytest.mark.parametrize(
    "error",
    [
        psycopg.ProgrammingError("the query has 2 placeholders but 1 parameters were passed"),
        psycopg.NotSupportedError("pipeline mode"),
        errors.InFailedSqlTransaction("current transaction is aborted"),
        errors.InvalidSqlStatementName("there is no such prepared statement"),
    ],
)
def test_misuse_of_the_driver_or_the_session_is_not_told_as_the_operators_mistake(error: psycopg.Error) -> None:
    assert raised(error) is error
