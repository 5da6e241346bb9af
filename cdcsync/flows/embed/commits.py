"""When the source committed what waits for a vector, so that a stored vector tells how fresh it is."""

from __future__ import annotations

from bisect import bisect_right
from datetime import datetime

KEPT = 1_024
"""So many batches are remembered at least: minutes under load, some 100 kB."""


class Commits:
    """Commit times of batches, by their place in the source's WAL."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._times: list[datetime] = []
        self._after = 0
        """Commits before this position are unknown, or no longer known."""

    def note(self, after: int, end: int, committed: datetime) -> None:
        """Note a batch: all transactions that end after one LSN and up to another, the first committed at that time."""
        if not self._ends or after < self._ends[-1]:  # the first one, or of another history
            self._ends, self._times, self._after = [], [], after
        self._ends.append(end)
        self._times.append(committed)
        if len(self._ends) >= 2 * KEPT:
            self._after = self._ends[KEPT - 1]
            del self._ends[:KEPT], self._times[:KEPT]

    def of(self, commit_lsn: int) -> datetime | None:
        """Return when the transaction whose commit record begins there was committed; None where that is not known."""
        place = bisect_right(self._ends, commit_lsn)
        return self._times[place] if commit_lsn >= self._after and place < len(self._times) else None
