"""Confidence intervals by the bootstrap, paired: every mode's figures are resampled by the same draws of queries.

Queries differ far more from each other than modes of search do. Two modes are therefore compared query by query: the
interval of the mean difference says whether one is better.

Source: Sakai, "Evaluating evaluation metrics based on the bootstrap" (2006).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdcsync.target.judged_runs import Figure

RESAMPLES = 5_000
"""The ends of an interval then move by less than a tenth of its width from seed to seed."""

SEED = 20_260_101
"""Fixed, so that the same answers give the same interval."""


def figure(values: Sequence[float]) -> Figure:
    """Return the mean of one value for each query."""
    sample = np.asarray(values, np.float64)
    draws = np.random.default_rng(SEED).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return Figure(round(float(sample.mean()), 4), round(float(low), 4), round(float(high), 4))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Return the mean difference, query by query; an interval without 0 in it is a difference that is there."""
    return figure([one - other for one, other in zip(ours, theirs, strict=True)])
