"""The tokens of a day: loads stop first, and everything goes on at midnight UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cdcsync.model.embedding import DailyTokens, Problem

NOON = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
MIDNIGHT = datetime(2026, 5, 5, tzinfo=UTC)


def test_without_a_limit_nothing_waits() -> None:
    day = DailyTokens(None)
    day.use(NOON, 10**12)
    assert day.waits_until(NOON, load=True) is None


def test_loads_stop_at_four_fifths_and_changes_at_all_of_it_until_midnight() -> None:
    day = DailyTokens(1_000)
    day.use(NOON, 799)
    assert day.waits_until(NOON, load=True) is None
    day.use(NOON, 1)
    assert day.waits_until(NOON, load=True) == MIDNIGHT
    assert day.waits_until(NOON, load=False) is None
    day.use(NOON, 200)
    assert day.waits_until(NOON, load=False) == MIDNIGHT
    assert day.waits_until(MIDNIGHT, load=True) is None


def test_what_was_used_before_a_restart_counts_on_its_own_day_only() -> None:
    for ago, waits in ((timedelta(0), True), (timedelta(days=1), False)):
        day = DailyTokens(1_000)
        day.recall((NOON - ago).date(), 1_000)
        assert (day.waits_until(NOON, load=False) is not None) is waits


def test_a_problem_says_what_to_do_and_when_it_is_tried_again() -> None:
    assert str(Problem("it is away", "start it", NOON, MIDNIGHT)) == (
        "it is away (start it); tried again at 2026-05-05 00:00:00 UTC"
    )
