"""The connections that embed loops share: how many there are, and what becomes of those that break."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio
import psycopg
import pytest

from cdcsync.flows.embed import BacklogPool
from cdcsync.postgres import temporary
from cdcsync.postgres.errors import passing
from cdcsync.target.backlog import SESSIONS_EACH, SESSIONS_MOST
from tests.support.ages import held_back, use_transactions
from tests.support.expiries import EXPIRIES, expire
from tests.support.indexes import SCHEMA, LiveIndex, changes, document
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

OURS = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'cdcsync embed'"


def opened(target: Database) -> int:
    ((count,),) = target.execute(f"SELECT count(*) {OURS}")
    return int(count)


@pytest.mark.parametrize(("generations", "most"), [(1, SESSIONS_EACH), (3, 3 * SESSIONS_EACH), (50, SESSIONS_MOST)])
async def test_as_many_are_lent_as_the_generations_are_worth_and_no_more(
    index: LiveIndex, target: Database, generations: int, most: int
) -> None:
    pool = BacklogPool(target.dsn, SCHEMA, generations)
    try:
        async with AsyncExitStack() as stack:
            for _ in range(most):
                await stack.enter_async_context(pool.backlog(index.spec))
            assert opened(target) == most
            with anyio.move_on_after(0.05) as waited:
                async with pool.backlog(index.spec):
                    pass
            assert waited.cancelled_caught
        async with pool.backlog(index.spec) as backlog:
            assert await backlog.window(10) == []
        assert opened(target) == most
    finally:
        await pool.aclose()


async def test_none_is_open_before_it_is_needed_or_after_the_end(index: LiveIndex, target: Database) -> None:
    await index.apply(changes(document("1", "a")))
    pool = BacklogPool(target.dsn, SCHEMA, 4)
    assert opened(target) == 0
    for _ in range(3):
        async with pool.backlog(index.spec) as backlog:
            assert [one.text for one in await backlog.window(10)] == ["a"]
    assert opened(target) == 1
    await pool.aclose()
    assert await _all_closed(target)


async def test_their_stages_hold_no_transaction_ids_back_not_even_of_those_that_few_need(
    index: LiveIndex, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = BacklogPool(target.dsn, SCHEMA, 2)
    try:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(pool.backlog(index.spec))
        use_transactions(target)
        old = held_back(target)
        monkeypatch.setattr(temporary, "FREEZE_EVERY_S", 0.0)
        for _ in range(3):
            async with pool.backlog(index.spec):
                pass
        left = held_back(target)
        # The index' own session has stages of its own.
        assert len([table for table in old if "made" in table]) >= len([table for table in left if "made" in table]) + 3
    finally:
        await pool.aclose()


async def test_when_one_breaks_the_idle_ones_are_closed_too_and_others_opened(
    index: LiveIndex, target: Database
) -> None:
    pool = BacklogPool(target.dsn, SCHEMA, 2)
    try:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(pool.backlog(index.spec))
        target.execute(f"SELECT pg_terminate_backend(pid, 10000) {OURS}")

        with pytest.raises(psycopg.OperationalError):
            async with pool.backlog(index.spec) as backlog:
                await backlog.window(10)

        async with pool.backlog(index.spec) as backlog:
            assert await backlog.window(10) == []
        assert opened(target) == 1
    finally:
        await pool.aclose()


async def test_one_that_is_given_back_within_a_transaction_is_not_lent_again(
    index: LiveIndex, target: Database
) -> None:
    pool = BacklogPool(target.dsn, SCHEMA, 1)
    try:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await _fail_within_a_transaction(pool, index)
        async with pool.backlog(index.spec) as backlog:
            assert await backlog.window(10) == []
    finally:
        await pool.aclose()


async def _fail_within_a_transaction(pool: BacklogPool, index: LiveIndex) -> None:
    async with pool.backlog(index.spec) as backlog:
        connection: Any = backlog._connection
        await connection.execute("BEGIN")
        await connection.execute("SELECT 1 / 0")


async def _all_closed(target: Database) -> bool:
    with anyio.fail_after(60):
        while opened(target):
            await anyio.lowlevel.checkpoint()
    return True


@pytest.mark.parametrize("code", EXPIRIES)
async def test_one_that_a_time_limit_ended_is_replaced(index: LiveIndex, target: Database, code: str) -> None:
    await index.apply(changes(document("1", "a")))
    pool = BacklogPool(target.dsn, SCHEMA, 1)
    async with pool.backlog(index.spec) as backlog:
        await expire(backlog._connection, code)
        with pytest.raises(psycopg.Error) as raised:
            await backlog.window(10)
    assert passing(raised.value)
    async with pool.backlog(index.spec) as backlog:
        assert [one.text for one in await backlog.window(10)] == ["a"]
    await pool.aclose()
