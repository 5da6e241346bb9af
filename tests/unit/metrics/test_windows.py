"""Quantiles of the last quarter of an hour."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.metrics.windows import LEAST_S, SLOT_S, SLOTS, Window


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_measured_is_no_figure() -> None:
    window = Window(Clock())
    assert window.count() == 0
    assert window.quantile(0.5) is None
    assert window.strip(0.5) == [None] * SLOTS


@given(st.lists(st.floats(LEAST_S, 10_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_off_by_five_percent_at_most(durations: list[float], share: float) -> None:
    window = Window(Clock())
    for one in durations:
        window.add(one)
    rank = max(1, -int(-share * len(durations) // 1))
    assert window.quantile(share) == pytest.approx(sorted(durations)[rank - 1], rel=0.05)


def test_the_median_of_many_is_that_of_the_standard_library() -> None:
    window, chance = Window(Clock()), random.Random(7)
    figures = [chance.lognormvariate(-4, 1) for _ in range(2_001)]
    for one in figures:
        window.add(one)
    assert window.quantile(0.5) == pytest.approx(statistics.median(figures), rel=0.05)
    assert window.count() == 2_001


def test_a_duration_can_count_many_times() -> None:
    window = Window(Clock())
    window.add(1.0, times=99)
    window.add(100.0)
    assert window.quantile(0.99) == pytest.approx(1.0)
    assert window.quantile(1.0) == pytest.approx(100.0, rel=0.05)


def test_a_strip_has_a_slot_for_each_time_the_newest_last() -> None:
    clock = Clock()
    window = Window(clock)
    window.add(0.25)
    clock.now += 2 * SLOT_S
    window.add(2.0)
    assert window.strip(0.5, 0.99)[-4:] == [None, [0.25, 0.25], None, [2.0, 2.0]]


def test_what_is_older_than_a_quarter_of_an_hour_does_not_count() -> None:
    clock = Clock()
    window = Window(clock)
    window.add(0.25)
    clock.now += SLOTS * SLOT_S
    assert window.count() == 0
    assert window.quantile(0.5) is None
    window.add(4.0)
    assert window.quantile(0.01) == pytest.approx(4.0)
