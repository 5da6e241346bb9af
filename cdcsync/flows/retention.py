"""The slot on its server: how near it is to a gap, and whether the server shuts down.

How much of `max_slot_wal_keep_size` the slot holds is told while there is time. A server that shuts down waits for the
stream, so that is let go. Looking has a connection of its own and waits for nothing else: the target may not answer for
a minute.

Source: PostgreSQL, "pg_replication_slots"; "Replication" (max_slot_wal_keep_size).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.errors import SetupError, SourceUnavailable
from cdcsync.logs import Told
from cdcsync.metrics import Metrics
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.refusals import STILL_RUNS
from cdcsync.postgres.sessions import Session
from cdcsync.source.catalog import Slot, read_slot

log = structlog.get_logger()

LOOK_S = 5.0
"""How often the slot is looked at."""

AWAY_LOOK_S = 1.0
"""How soon it is looked at again at first if the source refuses to answer."""

AWAY_LOOKS = 2
"""Looks in a row that the source refuses, after which it is taken to be shutting down: the first may just have found
its session ended. That is said again after every two more: the stream may have come back between two shutdowns."""

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
        """Note what a slot holds, None if that is not known, and log a mark that was passed since the last look."""
        if slot is None:
            self._metrics.note_slot(None, math.nan, math.nan, math.nan)
            return
        share = retained_share(slot)
        safe = math.inf if slot.safe_bytes is None else slot.safe_bytes
        lost = slot.wal_status == "lost"
        self._metrics.note_slot(slot.wal_status, slot.retained_bytes or 0, 0 if lost else safe, share)
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


async def watch_slot(dsn: str, name: str, metrics: Metrics, source_ends: Callable[[], None]) -> None:
    """Look at a slot until cancelled.

    :param dsn: the source's.
    :param source_ends: called at every second look in a row that the source refuses: a server that is shut down
        waits until what it has sent is flushed here, and that may take a connection to it, or the target.
    """
    retention, told = Retention(metrics), Told()

    def failed(failure: Failure) -> None:
        error = failure.error
        if told.anew(error):
            log.warning("slot_watch_waits", error=str(error), fix=error.hint)
        retention.look_at(None)
        # A server without a free connection, for example, still sends: its stream has a place of its own.
        ends = isinstance(error, SourceUnavailable) and error.sqlstate not in STILL_RUNS
        if ends and failure.attempt % AWAY_LOOKS == 0:
            source_ends()

    backoff = Backoff(
        failed,
        first=AWAY_LOOK_S,
        most=LOOK_S,
        errors=(SourceUnavailable, SetupError),
        waits="the slot is not watched",
    )
    async with Session(dsn, "source", application_name="cdcsync slot") as source:
        while True:
            async with backoff:
                with speaking_of("source"):
                    retention.look_at(await read_slot(await source.connection(), name))
                backoff.succeeded()
                told.over()
                await anyio.sleep(LOOK_S)
