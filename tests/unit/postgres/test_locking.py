"""Changes that would hold up searches are given up and tried again."""

from __future__ import annotations

import psycopg
import pytest

from cdcsync.postgres.locking import until_locked
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
