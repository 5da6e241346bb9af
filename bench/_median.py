"""How well a run knows a median: the interval in which it lies, whatever the values are distributed like."""

from __future__ import annotations

from math import comb

CERTAIN = 0.95


def interval(values: list[float]) -> tuple[float, float]:
    """Return where the median of what these are a sample of lies, with a certainty of at least `CERTAIN`.

    All that there is, if there are too few values to say so much.

    Source: the binomial interval of a median: as many values are below it as coins fall on one side.
    """
    ordered, n = sorted(values), len(values)
    left, outside = 0, 0.0
    while left < (n - 1) // 2 and (outside := outside + 2 * comb(n, left) / 2**n) <= 1 - CERTAIN:
        left += 1
    left = max(0, left - 1)
    return ordered[left], ordered[n - 1 - left]
