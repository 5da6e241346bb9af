"""One row, one value, and rows in the server's own text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.postgres.queries import fetch_one, fetch_row, fetch_texts, fetch_value
from cdcsync.postgres.sessions import Connection

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ConnectTarget = Callable[[], Awaitable[Connection]]


async def test_a_statement_with_rows_gives_its_first(connect_target: ConnectTarget) -> None:
    connection = await connect_target()
    statement = "SELECT v, v + 1 FROM unnest(%s::int[]) AS v"
    assert await fetch_row(connection, statement, [[3, 4]]) == (3, 4)
    assert await fetch_one(connection, statement, [[3, 4]]) == (3, 4)
    assert await fetch_value(connection, statement, [[3, 4]]) == 3


async def test_a_statement_without_rows_gives_none_or_is_a_mistake(connect_target: ConnectTarget) -> None:
    connection = await connect_target()
    assert await fetch_row(connection, "SELECT 1 WHERE false") is None
    with pytest.raises(LookupError):
        await fetch_one(connection, "SELECT 1 WHERE false")


async def test_texts_are_what_the_server_writes_and_a_per_cent_sign_is_just_that(
    connect_target: ConnectTarget,
) -> None:
    connection = await connect_target()
    statement = """SELECT v::numeric(9, 2) AS "100 %s", NULL, true FROM unnest($1::int[]) AS v"""
    assert await fetch_texts(connection, statement, [[1, 20]]) == [("1.00", None, "t"), ("20.00", None, "t")]
