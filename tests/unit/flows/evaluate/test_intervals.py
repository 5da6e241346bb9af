"""Intervals: they hold the mean, narrow with the sample, and pair the queries."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cdcsync.flows.evaluate.intervals import difference, figure


def test_an_interval_holds_the_mean_and_narrows_with_the_number_of_queries() -> None:
    draw = random.Random(7)
    values = [draw.random() for _ in range(800)]
    few, many = figure(values[:20]), figure(values)
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 4
    # For a mean of many values the bootstrap agrees with the normal distribution.
    half = 1.96 * float(np.std(values)) / np.sqrt(len(values))
    assert many.high - many.mean == pytest.approx(half, rel=0.1)
    assert figure(values) == many


def test_a_small_gain_on_every_query_is_seen_through_differences_between_queries() -> None:
    draw = random.Random(7)
    theirs = [draw.random() for _ in range(50)]
    ours = [value + 0.01 + draw.random() / 100 for value in theirs]
    assert figure(ours).low < figure(theirs).high
    assert difference(ours, theirs).low > 0.01
