"""Whether something grows: a line through what was measured, and how sure that line is.

Memory, files and connections of a worker may differ from one moment to the next, and do: what must not be is that they
grow for as long as the worker runs. So a line is fitted by least squares, and what it grows by over the whole run is
held against an allowance. Only growth that is certain counts: the lower end of its interval. Neighbouring measurements
are not independent (memory stays where it is for a while), so as many are taken to be worth one as their correlation
says.

Source: ordinary least squares; the effective number of an autocorrelated series, n (1 - r) / (1 + r).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

CERTAIN = 3.0
"""Standard errors: beyond so many, a growth is no accident."""

FEWEST = 12
"""Measurements that say something."""


class Trend(NamedTuple):
    """A line through measurements, over the time from the first to the last of them.

    :ivar growth: by how much the line is higher at its end than at its beginning.
    :ivar error: the standard error of that growth.
    """

    mean: float
    growth: float
    error: float

    @property
    def certain(self) -> float:
        """The least growth that there must be; negative where there may be none."""
        return self.growth - CERTAIN * self.error


class Series:
    """One thing that is measured again and again.

    :param unit: of its values.
    :param allowed: a growth, in its unit, that is none.
    :param share: and the share of its mean that is none.
    """

    def __init__(self, name: str, unit: str, *, allowed: float = 0.0, share: float = 0.05) -> None:
        self.name = name
        self.unit = unit
        self._allowed = allowed
        self._share = share
        self.points: list[tuple[float, float]] = []

    def add(self, seconds: float, value: float) -> None:
        """Note a value."""
        self.points.append((seconds, value))

    @property
    def trend(self) -> Trend:
        """The line through what was measured.

        :raises ValueError: that was too little.
        """
        return fit(self.points)

    @property
    def allowance(self) -> float:
        """The growth over the run that still counts as none."""
        return max(self._allowed, self._share * abs(self.trend.mean))

    @property
    def flat(self) -> bool:
        """Whether it does not grow for certain by more than is allowed."""
        return self.trend.certain <= self.allowance


def fit(points: Sequence[tuple[float, float]]) -> Trend:
    """Return the line through points of time and value.

    :raises ValueError: there are fewer than `FEWEST`, or all are of one moment.
    """
    n = len(points)
    if n < FEWEST:
        raise ValueError(f"{n} measurements say nothing: at least {FEWEST} are needed")
    mean_t, mean = sum(t for t, _ in points) / n, sum(value for _, value in points) / n
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    if not spread:
        raise ValueError("all measurements are of one moment")
    slope = sum((t - mean_t) * (value - mean) for t, value in points) / spread
    rest = [value - mean - slope * (t - mean_t) for t, value in points]
    squares = sum(one * one for one in rest)
    duration = points[-1][0] - points[0][0]
    if not squares:
        return Trend(mean, slope * duration, 0.0)
    together = sum(one * next_ for one, next_ in pairwise(rest)) / squares
    alike = min(max(together, 0.0), 0.99)
    effective = max(3.0, n * (1 - alike) / (1 + alike))
    error = sqrt(squares / n / (effective - 2) * n / spread)
    return Trend(mean, slope * duration, error * duration)
