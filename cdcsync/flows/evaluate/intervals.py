"""Confidence intervals by typical values, paired: every mode is measured by the same draws of questions.

Questions differ far more from each other than modes of search do. Two modes are therefore compared question by
question: the interval of the mean difference says whether one is better.

The means of all subsets of the questions divide the line into parts that hold the true mean with equal probability, so
the interval holds as many of these parts as make 95 %. That is exact for any number of questions if values lie
symmetrically about the mean, as the differences of two modes do that are equally good. Too few questions have too few
subsets, and so no interval: chance alone changes five of five in the same direction once in 16 times, six once in 32.

Source: Hartigan, "Using subsample values as typical values" (1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cdcsync.target.judged_runs import Figure

OUTSIDE = 0.025
"""The probability that the true mean is below the interval, and that it is above it."""

FEWEST = 6
"""Questions that have an interval: the least of their 2^6 parts is less probable than `OUTSIDE`."""

SUBSETS = 5_000
"""Of more questions than have so few, this many at random are taken.

The ends of an interval then move by less than a tenth of its width from seed to seed.
"""

SEED = 20_260_101
"""Fixed, so that the same answers give the same interval."""


def figure(values: Sequence[float]) -> Figure:
    """Return the mean of one value for each question, with its interval if they are at least `FEWEST`."""
    sample = np.asarray(values, np.float64)
    mean = round(float(sample.mean()), 4)
    if len(sample) < FEWEST:
        return Figure(mean, None, None)
    subsets = _subsets(len(sample))
    means = np.sort(subsets @ sample / subsets.sum(axis=1))
    outside = int(OUTSIDE * (len(means) + 1))
    return Figure(mean, round(float(means[outside - 1]), 4), round(float(means[-outside]), 4))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Return the mean difference, question by question; an interval without 0 in it is a difference that is there."""
    return figure([one - other for one, other in zip(ours, theirs, strict=True)])


@lru_cache(maxsize=1)  # the figures of a run are all of the same questions
def _subsets(size: int) -> npt.NDArray[np.bool_]:
    """Return subsets that are not empty, bool[n, size]: all of them, or `SUBSETS` at random."""
    if 2**size <= SUBSETS:
        return (np.arange(1, 2**size)[:, None] >> np.arange(size) & 1).astype(bool)
    drawn = np.random.default_rng(SEED).integers(0, 2, (SUBSETS, size), dtype=bool)
    return drawn[drawn.any(axis=1)]
