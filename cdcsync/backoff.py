"""How long to wait after a failure."""

from __future__ import annotations

import random

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 300.0


def backoff_s(attempt: int, *, first: float = FIRST_DELAY_S, most: float = MAX_DELAY_S) -> float:
    """Return how long to wait after failure number `attempt` (from 0), in seconds.

    The bound doubles up to `most`; the wait is a random part of its upper half, so that callers spread out.
    """
    bound = min(most, first * 2.0 ** min(attempt, 30))
    return bound * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, guards nothing
