"""Temporary tables of a session that lives for weeks hold no transaction ids back."""

from __future__ import annotations

import pytest

from cdcsync.postgres import temporary
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.temporary import TemporaryTables
from tests.support.ages import held_back, use_transactions
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_they_are_frozen_once_in_a_while_and_only_those_of_the_session(
    target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        await connect(target.dsn, "target", application_name="mine") as mine,
        await connect(target.dsn, "target", application_name="other") as other,
    ):
        for connection in (mine, other):
            await connection.execute('CREATE TEMP TABLE "a ""b" (body text) ON COMMIT DELETE ROWS')
        tables = TemporaryTables(mine)
        use_transactions(target)
        await tables.freeze()
        assert len(held_back(target)) == 4  # both, with their TOAST tables: an hour has not passed
        monkeypatch.setattr(temporary, "FREEZE_EVERY_S", 0.0)
        await tables.freeze()
        assert len(held_back(target)) == 2
        await TemporaryTables(other).freeze()
        assert held_back(target) == {}


async def test_a_session_without_any_has_nothing_to_do(target: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "FREEZE_EVERY_S", 0.0)
    async with await connect(target.dsn, "target", application_name="mine") as mine:
        await TemporaryTables(mine).freeze()
