"""Changes that would hold up searches are given up and tried again."""

from __future__ import annotations

import psycopg
import pytest
import structlog

from cdcsync.errors import CdcsyncError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import away, until_locked
from tests.support.virtual import in_virtual_time


def test_a_change_is_tried_again_until_nobody_is_in_its_way() -> None:
    failures: list[psycopg.Error] = [
        psycopg.errors.LockNotAvailable(),
        psycopg.errors.DeadlockDetected(),
        psycopg.errors.LockNotAvailable(),
    ]

    async def change() -> str:
        if failures:
            raise failures.pop()
        return "changed"

    assert in_virtual_time(lambda: until_locked(change, table="articles_chunks")) == "changed"
    assert failures == []


def test_any_other_failure_is_the_callers() -> None:
    tries = 0

    async def change() -> None:
        nonlocal tries
        tries += 1
        raise psycopg.errors.UndefinedTable

    with pytest.raises(psycopg.errors.UndefinedTable):
        in_virtual_time(lambda: until_locked(change, table="articles_chunks"))
    assert tries == 1


def test_the_log_says_what_a_change_waits_for() -> None:
    failures = [psycopg.errors.LockNotAvailable("the transaction of pid 7 (report)")]

    async def change() -> None:
        if failures:
            raise failures.pop()

    with structlog.testing.capture_logs() as events:
        in_virtual_time(lambda: until_locked(change, table="articles_chunks"))
    assert [(event["table"], event["error"]) for event in events] == [
        ("articles_chunks", "the transaction of pid 7 (report)")
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.errors.LockNotAvailable(), False),
        (psycopg.errors.DeadlockDetected(), False),
        (psycopg.errors.ConfigurationLimitExceeded(), False),
        (psycopg.errors.QueryCanceled(), False),
        (psycopg.errors.UndefinedTable(), False),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.DiskFull(), True),
        (psycopg.errors.OutOfMemory(), True),
        (psycopg.OperationalError("the connection is closed"), True),
    ],
)
@pytest.mark.parametrize("index", [None, "articles"])
def test_a_server_is_away_unless_an_error_came_of_a_statement_whoever_translated_it(
    error: psycopg.Error, index: str | None, expected: bool
) -> None:
    outer, inner = speaking_of("target", index="articles"), speaking_of("target", index=index)
    with pytest.raises(CdcsyncError) as caught, outer, inner:
        raise error
    assert away(caught.value, "target") is expected
