"""How much of `max_slot_wal_keep_size` the slot holds, told before that is a gap.

Source: PostgreSQL, "pg_replication_slots"; "Replication" (max_slot_wal_keep_size).
"""

from __future__ import annotations

import structlog

from cdcsync.metrics import Metrics
from cdcsync.source.catalog import Slot

log = structlog.get_logger()

MARKS = (0.5, 0.8)
"""Shares of `max_slot_wal_keep_size` that are worth a word: half, while there is time; four fifths, while there is
still some."""

SLACK = 0.05
"""How far below a mark the share must fall before the next crossing counts: WAL comes and goes by whole segments."""


class Retention:
    """Tells of each mark that the slot's share passes, once for each crossing."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._passed = 0

    def look_at(self, slot: Slot | None) -> None:
        """Note the slot's share, and log a mark that it has passed since the last look."""
        if slot is None:
            return
        share = retained_share(slot)
        self._metrics.slot_retained_share.set(share)
        if (mark := self.crossed(share)) is not None:
            tell = log.warning if mark < MARKS[-1] else log.error
            tell(
                "slot_retention",
                slot=slot.name,
                percent=round(100 * share),
                retained_bytes=slot.retained_bytes,
                safe_bytes=slot.safe_bytes,
                fix="let the index catch up: see why it is behind; or raise max_slot_wal_keep_size on the source",
            )

    def crossed(self, share: float) -> float | None:
        """Return the highest mark that was passed since the last call; None if none was."""
        above = sum(share >= mark for mark in MARKS)
        if above > self._passed:
            self._passed = above
            return MARKS[above - 1]
        while self._passed and share < MARKS[self._passed - 1] - SLACK:
            self._passed -= 1
        return None


def retained_share(slot: Slot) -> float:
    """Return how much of the WAL that it may hold a slot holds: 0.0 without a limit, from 1.0 on it may be lost."""
    if slot.wal_status == "lost":
        return 1.0
    if slot.safe_bytes is None or slot.retained_bytes is None:
        return 0.0
    # Beyond the limit, what is safe is negative, and retained and safe together are still the limit.
    limit = slot.retained_bytes + slot.safe_bytes
    return slot.retained_bytes / limit if limit > 0 else 1.0
