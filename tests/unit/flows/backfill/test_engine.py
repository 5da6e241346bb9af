"""The engine: how often it looks for what ended requests leave, and how it waits while pages cannot be read."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock, MagicMock

import anyio
import pytest

from cdcsync.backoff import Outages
from cdcsync.errors import SourceUnavailable
from cdcsync.flows.backfill.engine import PRUNE_EVERY_S, Backfills
from cdcsync.flows.backfill.pages import Page
from cdcsync.metrics import Metrics
from cdcsync.model.requests import Request
from cdcsync.model.rows import Key
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.target.requests.queue import Queue
from tests.support.virtual import in_virtual_time

pytestmark = pytest.mark.anyio


def make_engine() -> Backfills:
    return Backfills(
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


async def test_what_ended_requests_leave_is_looked_for_once_a_minute_and_only_after_one_was_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruned = list[float]()

    async def prune(self: Queue, connection: Connection) -> None:
        pruned.append(anyio.current_time())

    monkeypatch.setattr(Queue, "prune", prune)
    engine = make_engine()
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


@pytest.mark.parametrize(("failing_s", "told"), [(math.inf, True), (20.0, False)], ids=["all the time", "for a while"])
def test_a_source_that_lets_us_in_and_fails_each_page_is_waited_for_and_told_until_a_page_was_read(
    monkeypatch: pytest.MonkeyPatch, failing_s: float, told: bool
) -> None:
    away = SourceUnavailable("the file cannot be read", where="source")
    tried = list[float]()

    async def read(cursor: Key | None, most: int) -> Page:
        if anyio.current_time() < failing_s:
            tried.append(anyio.current_time())
            raise away
        await anyio.sleep(1.0)
        return Page(cast(Snapshot, None), [], cursor, last=False)

    request = Request(1, "articles", "initial", False, None, "running", "rows", None, 0, rows_total=9, started_at=None)
    monkeypatch.setattr(Session, "connection", AsyncMock())
    monkeypatch.setattr(Queue, "next_open", AsyncMock(return_value=request))
    monkeypatch.setattr(Queue, "start", AsyncMock(return_value=True))
    engine = make_engine()
    monkeypatch.setattr(engine, "marks", MagicMock(beside_live=False, rows_beside_live=None))
    monkeypatch.setattr(engine, "_send", AsyncMock(return_value=SimpleNamespace(wait=AsyncMock())))
    monkeypatch.setattr(engine, "_page_preparers", {"articles": SimpleNamespace(page_rows=lambda most: most)})
    for one in ("_specs", "_tables", "_deliveries"):
        monkeypatch.setattr(engine, one, MagicMock())
    monkeypatch.setattr(engine, "_locked", {"articles": MagicMock(lately=False, note=AsyncMock(return_value=False))})
    monkeypatch.setattr(engine, "_pages", {"articles": SimpleNamespace(rows=lambda filter_: read)})

    async def main() -> dict[str, list[str]]:
        outages = Outages()
        with outages.noted():
            with anyio.move_on_after(40.0):
                await engine.run()
            return outages.lasting(10.0)

    assert in_virtual_time(main) == ({away.with_fix: ["backfills wait"]} if told else {})
    assert len(tried) < 12
