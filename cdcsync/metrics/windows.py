"""Durations of the last quarter of an hour, kept so that their quantiles can be told at any moment.

Prometheus' histograms count since the start of the process, and only a server that scrapes them can tell what happened
lately. A window counts the same durations by time, in slots of 15 seconds. Each slot is a histogram whose buckets grow
by a fixed factor, so that a quantile is off by 5 % at most and a slot takes a few hundred bytes however much it counts.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

SLOT_S = 15
"""The width of a slot."""

SLOTS = 60
"""How many slots are kept: 15 minutes."""

PER_OCTAVE = 8
"""Buckets between a duration and its double: each is 9 % wide, so its middle is off by 5 % at most."""

LEAST_S = 1e-4
"""Shorter durations count as this one: less than the round trip to a server on the same machine."""


class Window:
    """Durations by time.

    :param clock: a clock that is never set, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slots: deque[tuple[int, dict[int, int]]] = deque(maxlen=SLOTS)

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration."""
        number = int(self._clock() // SLOT_S)
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append((number, {}))
        counts = self._slots[-1][1]
        bucket = round(math.log2(max(seconds, LEAST_S)) * PER_OCTAVE)
        counts[bucket] = counts.get(bucket, 0) + times

    def count(self) -> int:
        """Return how many durations there are."""
        return sum(sum(counts.values()) for _, counts in self._kept())

    def quantile(self, share: float) -> float | None:
        """Return the duration that this share of all is at most, in seconds; None if there are none."""
        return quantile((counts for _, counts in self._kept()), share)

    def strip(self, *shares: float) -> list[list[float] | None]:
        """Return the quantiles of each slot, the oldest first; None for a slot without durations."""
        newest = int(self._clock() // SLOT_S)
        kept = dict(self._kept())
        found: list[list[float] | None] = []
        for number in range(newest - SLOTS + 1, newest + 1):
            of_slot = [quantile([kept.get(number, {})], share) for share in shares]
            known = [one for one in of_slot if one is not None]
            found.append(known or None)
        return found

    def _kept(self) -> list[tuple[int, dict[int, int]]]:
        oldest = int(self._clock() // SLOT_S) - SLOTS + 1
        return [(number, counts) for number, counts in self._slots if number >= oldest]


def quantile(histograms: Iterable[dict[int, int]], share: float) -> float | None:
    """Return a quantile of several histograms together, in seconds to three digits; None if they are empty."""
    together: dict[int, int] = {}
    for counts in histograms:
        for bucket, count in counts.items():
            together[bucket] = together.get(bucket, 0) + count
    # The nearest rank: the least duration that so many are not above.
    rank = max(1, math.ceil(share * sum(together.values())))
    for bucket in sorted(together):
        rank -= together[bucket]
        if rank <= 0:
            return float(f"{2 ** (bucket / PER_OCTAVE):.3g}")
    return None
