"""Pace: how soon the next page may be read."""

from __future__ import annotations

import pytest

from cdcsync.flows.backfill.pace import Pace

pytestmark = pytest.mark.anyio


async def test_without_a_limit_nothing_waits() -> None:
    assert Pace(lambda: None).left_s(10**9) == 0.0


async def test_a_page_is_waited_for_as_long_as_its_rows_may_take() -> None:
    pace = Pace(lambda: 100)
    assert pace.rows_per_s == 100
    assert pace.left_s(200) == pytest.approx(2.0, abs=0.5)
    assert pace.left_s(100) == pytest.approx(3.0, abs=0.5)


async def test_a_limit_that_is_lifted_holds_no_longer() -> None:
    limits: list[int | None] = [100, None]
    pace = Pace(lambda: limits[0])
    assert pace.left_s(1_000) > 5.0
    limits.pop(0)
    assert pace.left_s(1_000) == 0.0
