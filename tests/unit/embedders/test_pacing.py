"""Pacing: budgets, and what headers ask for; the clock is a number."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.embedders.pacing import (
    MOST_ASKED_S,
    Budget,
    Pace,
    duration_s,
    retry_after_s,
)

TODAY = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@given(st.floats(1, 10_000), st.lists(st.tuples(st.floats(0, 30), st.floats(0.01, 1.0)), min_size=1, max_size=60))
def test_no_minute_has_more_than_its_budget(per_minute: float, wishes: list[tuple[float, float]]) -> None:
    budget = Budget(per_minute, 0.0)
    now, taken = 0.0, []
    for pause, share in wishes:
        amount = share * per_minute / 6
        now += pause
        while (wait := budget.wait_s(now, amount)) > 1e-9:
            now += wait
        budget.take(now, amount)
        taken.append((now, amount))

    for start, _ in taken:
        in_a_minute = sum(amount for at, amount in taken if start <= at < start + 60)
        assert in_a_minute <= per_minute * (1 + 1e-6)


def test_a_request_larger_than_the_burst_goes_when_the_budget_is_full_and_is_paid_for() -> None:
    budget = Budget(60, 0.0)
    assert budget.wait_s(0.0, 40) == 0.0
    budget.take(0.0, 40)

    assert budget.wait_s(0.0, 1) == pytest.approx(31 / (50 / 60))
    budget.take(0.0, -40)
    assert budget.wait_s(0.0, 10) == 0.0


def test_one_request_a_minute_is_possible() -> None:
    budget = Budget(1, 0.0)
    budget.take(0.0, 1)
    assert budget.wait_s(0.0, 1) == pytest.approx(72)


def test_a_pace_waits_for_the_slowest_of_its_limits() -> None:
    pace = Pace(0.0, requests_per_minute=60, tokens_per_minute=600)
    assert pace.wait_s(0.0, 50) == 0.0
    pace.take(0.0, 100)
    assert pace.wait_s(0.0, 50) == pytest.approx(50 / (500 / 60))
    pace.correct(0.0, -100)
    assert pace.wait_s(0.0, 50) == 0.0

    pace.hold(0.0, 7.0)
    pace.hold(0.0, 3.0)
    assert pace.wait_s(2.0, 1) == 5.0
    pace.hold(10.0, 10**9)
    assert pace.wait_s(10.0, 1) == MOST_ASKED_S


def test_tokens_that_the_provider_has_left_are_used_and_no_more() -> None:
    pace = Pace(0.0, requests_per_minute=None, tokens_per_minute=None)
    pace.heard(0.0, {"x-ratelimit-remaining-tokens": "100", "x-ratelimit-reset-tokens": "30s"})

    assert pace.wait_s(0.0, 100) == 0.0
    pace.take(0.0, 60)
    assert pace.wait_s(1.0, 60) == 29.0
    assert pace.wait_s(30.0, 60) == 0.0
    pace.take(30.0, 60)
    assert pace.wait_s(30.0, 10_000) == 0.0


def test_headers_that_say_nothing_change_nothing() -> None:
    pace = Pace(0.0, requests_per_minute=None, tokens_per_minute=None)
    pace.heard(0.0, {"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "1h"})
    pace.heard(0.0, {"x-ratelimit-remaining-requests": "0"})
    pace.heard(0.0, {"x-ratelimit-remaining-tokens": "none", "x-ratelimit-reset-tokens": "soon"})
    assert pace.wait_s(0.0, 10**9) == 0.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Sun, 01 Mar 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Sun, 01 Mar 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "in a while"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, TODAY) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("20ms", 0.02),
        ("1m20ms", 60.02),
        ("12", 12.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("s", None),
    ],
)
def test_durations_are_read_as_providers_write_them(text: str | None, seconds: float | None) -> None:
    assert duration_s(text) == seconds
