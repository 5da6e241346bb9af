"""The engine between requests: how often it looks for what ended ones leave."""

from __future__ import annotations

from typing import cast

import anyio
import pytest

from cdcsync.flows.backfill.engine import PRUNE_EVERY_S, Backfills
from cdcsync.metrics import Metrics
from cdcsync.postgres.sessions import Connection
from cdcsync.target.requests.queue import Queue

pytestmark = pytest.mark.anyio


async def test_what_ended_requests_leave_is_looked_for_once_a_minute_and_only_after_one_was_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned = list[float]()

    async def prune(self: Queue, connection: Connection) -> None:
        pruned.append(anyio.current_time())

    monkeypatch.setattr(Queue, "prune", prune)
    engine = Backfills(
        source_dsn="",
        target_dsn="",
        schema="cdcsync",
        specs={},
        tables={},
        page_preparers={},
        deliveries={},
        page_rows=1,
        metrics=Metrics(),
    )
    for now, served in (
        (1_000.0, False),
        (1_001.0, True),
        (1_002.0, True),
        (1_001.0 + PRUNE_EVERY_S, False),
        (9_000.0, False),
        (9_001.0, True),
    ):
        monkeypatch.setattr(anyio, "current_time", lambda now=now: now)
        engine._to_prune |= served
        await engine._prune(cast(Connection, None))
    assert pruned == [1_001.0, 1_001.0 + PRUNE_EVERY_S, 9_001.0]
