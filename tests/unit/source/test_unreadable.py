"""Rows that cannot be read are told apart from those that can, whatever their number and place."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.model.rows import Key
from cdcsync.source.unreadable import of_a_row, read_apart

KEYS = [(str(at),) for at in range(40)]


def chosen(code: str, words: str) -> psycopg.Error:
    """Return an error with a code that a function chose."""
    error = psycopg.DatabaseError(words)
    error.sqlstate = code
    return error


@given(st.sets(st.sampled_from(KEYS)))
async def test_exactly_the_rows_that_fail_are_left_out(failing: set[Key]) -> None:
    async def read(keys: Sequence[Key]) -> list[Key]:
        if failing & set(keys):
            raise psycopg.errors.DivisionByZero("division by zero")
        return list(keys)

    found, unread = await read_apart(KEYS, read)

    assert sorted(key for part in found for key in part) == sorted(set(KEYS) - failing)
    assert unread.keys() == failing
    assert all("division by zero" in why.reason for why in unread.values())


async def test_an_error_that_is_not_about_a_row_is_raised() -> None:
    async def read(keys: Sequence[Key]) -> None:
        raise psycopg.errors.InsufficientPrivilege("permission denied")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        await read_apart(KEYS, read)


async def test_nothing_to_read_is_read_once() -> None:
    calls = []

    async def read(keys: Sequence[Key]) -> None:
        calls.append(keys)

    assert await read_apart([], read) == ([None], {})
    assert calls == [[]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (psycopg.errors.InvalidTextRepresentation('invalid input syntax for type integer: "secret"'), True),
        (psycopg.errors.RaiseException("the secret is 7"), True),
        (psycopg.errors.CheckViolation('value for domain low violates check constraint "low"'), True),
        (psycopg.errors.CaseNotFound("case not found"), True),
        (psycopg.errors.FunctionExecutedNoReturnStatement("control reached end of function without RETURN"), True),
        (psycopg.errors.SyntaxError('syntax error in tsquery: "secret"'), True),
        (psycopg.errors.DataCorrupted("missing chunk number 0 for toast value 1"), True),
        (chosen("45000", "the secret is 7"), True),
        (chosen("MY001", "the secret is 7"), True),
        (chosen("55000", "materialized view has not been populated"), False),
        (psycopg.errors.UndefinedColumn("column t.x does not exist"), False),
        (psycopg.errors.QueryCanceled("canceling statement"), False),
        (psycopg.errors.DiskFull("no space left"), False),
        (psycopg.errors.OutOfMemory("out of memory"), False),
        (psycopg.errors.ConfigurationLimitExceeded("temporary file size exceeds the limit"), True),
        (psycopg.OperationalError("the connection is closed"), False),
    ],
)
async def test_a_failure_may_be_of_a_row_by_its_class_and_names_no_value(error: psycopg.Error, said: bool) -> None:
    assert of_a_row(error) is said

    async def read(keys: Sequence[Key]) -> None:
        raise error

    if said:
        ((_, why),) = (await read_apart([("1",)], read))[1].items()
        assert "secret" not in why.reason
