"""The interval of a median."""

from __future__ import annotations

import random
from statistics import median

from bench._median import interval


def test_the_interval_goes_by_the_ranks_of_the_values() -> None:
    assert interval([float(value) for value in range(24, 0, -1)]) == (7.0, 18.0)


def test_of_few_values_nothing_is_known_but_where_they_are() -> None:
    assert interval([3.0]) == (3.0, 3.0)
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_the_true_median_is_in_nineteen_of_twenty_intervals() -> None:
    chance = random.Random(1)
    samples = [[chance.expovariate(1.0) for _ in range(24)] for _ in range(1_000)]
    true = 0.6931471805599453

    inside = sum(low <= true <= high for low, high in map(interval, samples))

    assert 950 <= inside < 1_000
    assert all(low <= median(sample) <= high for sample in samples for low, high in [interval(sample)])
