"""Intervals: they hold the mean as often as they say, narrow with the sample, and pair the questions."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from cdcsync.flows.evaluate.intervals import FEWEST, difference, figure
from cdcsync.target.judged_runs import Figure


def ends(of: Figure) -> tuple[float, float]:
    """Return both ends of an interval that is there."""
    assert of.interval is not None
    return of.interval


def test_an_interval_holds_the_mean_and_narrows_with_the_number_of_queries() -> None:
    draw = random.Random(7)
    values = [draw.random() for _ in range(800)]
    few, many = figure(values[:20]), figure(values)
    (low, high), (lowest, highest) = ends(few), ends(many)
    assert low < few.mean < high
    assert highest - lowest < (high - low) / 4
    # For a mean of many values it agrees with the normal distribution.
    half = 1.96 * float(np.std(values)) / np.sqrt(len(values))
    assert highest - many.mean == pytest.approx(half, rel=0.1)
    assert figure(values) == many


def test_a_small_gain_on_every_query_is_seen_through_differences_between_queries() -> None:
    draw = random.Random(7)
    theirs = [draw.random() for _ in range(50)]
    ours = [value + 0.01 + draw.random() / 100 for value in theirs]
    assert ends(figure(ours))[0] < ends(figure(theirs))[1]
    assert ends(difference(ours, theirs))[0] > 0.01


def test_too_few_questions_have_no_interval() -> None:
    draw = random.Random(7)
    for number in range(1, 10):
        found = figure([draw.random() for _ in range(number)])
        assert (found.interval is None) == (number < FEWEST)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Of six, 1 in 64 by chance is above all: the interval is from the least mean of a subset to the greatest.
        ([1, 2, 3, 4, 5, 6], 1, 6),
        # Of seven, three means on each side are left out: 0, 0.5 and 1, or 6, 5.5 and 5.
        ([0, 1, 2, 3, 4, 5, 6], 1, 5),
        ([-0.1] * 6, -0.1, -0.1),
    ],
)
def test_the_ends_are_means_of_subsets(values: list[float], low: float, high: float) -> None:
    assert figure(values).interval == (low, high)


@pytest.mark.parametrize("questions", [6, 7, 10, 13, 25, 60])
@pytest.mark.parametrize(
    "differences",
    [
        lambda draw: draw.gauss(0, 0.1),
        lambda draw: draw.random() - draw.random(),
        lambda draw: draw.choice([-1, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        lambda draw: draw.choice([0.0, 0.5, 1.0]) - draw.choice([0.0, 0.5, 1.0]),
    ],
    ids=["normal", "triangular", "seldom", "ranks"],
)
def test_two_modes_that_are_equally_good_differ_as_seldom_as_the_confidence_says(
    questions: int, differences: Callable[[random.Random], float]
) -> None:
    draw = random.Random(20_260_101)
    samples = [figure([differences(draw) for _ in range(questions)]).interval for _ in range(400)]
    missed = sum(not interval[0] <= 0 <= interval[1] for interval in samples if interval is not None)
    # 5 % are 20; by chance more than 33 miss it in 1 of 500 such tests.
    assert missed <= 33
