"""Pace: how soon the next page may be read."""

from __future__ import annotations

import pytest

from cdcsync.flows.backfill.pace import BESIDE_LIVE_MOST_ROWS, BESIDE_LIVE_ROWS, Fit, Pace

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


def applied(fit: Fit, *, of_a_page_s: float, of_a_row_s: float) -> int:
    """Apply pages until their size stays; returns that."""
    for _ in range(100):
        fit.page_took(fit.rows, of_a_page_s + fit.rows * of_a_row_s)
    return fit.rows


def test_beside_changes_a_page_gets_as_large_as_takes_as_long_as_a_change() -> None:
    fit = Fit()
    fit.change_took(0.010)
    assert applied(fit, of_a_page_s=0.0, of_a_row_s=0.0001) == 100
    assert applied(fit, of_a_page_s=0.005, of_a_row_s=0.0001) == pytest.approx(50, abs=1)


def test_changes_that_took_long_beside_pages_do_not_make_pages_larger() -> None:
    fit = Fit()
    for seconds in (0.010, 2.0, 3.0, 4.0):
        fit.change_took(seconds)
    assert applied(fit, of_a_page_s=0.0, of_a_row_s=0.0001) == 100


@pytest.mark.parametrize(
    ("of_a_row_s", "rows"),
    [
        pytest.param(1.0, BESIDE_LIVE_ROWS, id="slow rows"),
        pytest.param(1e-9, BESIDE_LIVE_MOST_ROWS, id="quick rows"),
    ],
)
def test_beside_changes_a_page_has_neither_too_few_rows_nor_too_many(of_a_row_s: float, rows: int) -> None:
    fit = Fit()
    assert applied(fit, of_a_page_s=0.0, of_a_row_s=of_a_row_s) == BESIDE_LIVE_ROWS
    fit.change_took(0.010)
    assert applied(fit, of_a_page_s=0.0, of_a_row_s=of_a_row_s) == rows
