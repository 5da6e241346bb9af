"""How far the loads of indexes are, and how much time they have left.

A single reading knows how many vectors there are and not how fast they come. `Paces` remembers earlier readings, so the
worker and `status --watch`, which read again and again, also tell the time that is left.
"""

from __future__ import annotations

from collections import deque
from datetime import datetime

import msgspec

from cdcsync.status.model import IndexStatus, Progress, Status, Work

OVER_S = 30.0
"""A rate is taken over this long: it follows a change of speed soon, and does not jump with every reading."""

LEAST_S = 2.0
"""Two readings closer together than this say nothing about a rate."""


class Paces:
    """How fast each part of each load goes, from one reading to the next."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, Work], deque[tuple[datetime, int]]] = {}

    def told(self, status: Status) -> Status:
        """Return the status with the time left of each load, and remember it."""
        indexes = {name: self._told(name, index, status.read_at) for name, index in status.indexes.items()}
        return msgspec.structs.replace(status, indexes=indexes)

    def _told(self, name: str, index: IndexStatus, at: datetime) -> IndexStatus:
        # Nobody knows when a paused load will continue.
        going_on = {} if held(index) else {one.what: self._eta_s(name, one, at) for one in index.progress}
        timed = [msgspec.structs.replace(one, eta_s=going_on.get(one.what)) for one in index.progress]
        for key in [key for key in self._seen if key[0] == name and key[1] not in going_on]:
            del self._seen[key]
        return msgspec.structs.replace(index, progress=timed)

    def _eta_s(self, name: str, part: Progress, at: datetime) -> float | None:
        seen = self._seen.setdefault((name, part.what), deque())
        if seen and (part.done < seen[-1][1] or at < seen[-1][0]):  # another load, or a clock that went back
            seen.clear()
        seen.append((at, part.done))
        while len(seen) > 2 and (at - seen[1][0]).total_seconds() >= OVER_S:
            seen.popleft()
        passed, done = (at - seen[0][0]).total_seconds(), part.done - seen[0][1]
        if part.total is None or passed < LEAST_S or done <= 0:
            return part.eta_s
        return round(max(0, part.total - part.done) * passed / done, 1)


def held(index: IndexStatus) -> bool:
    """Say whether somebody paused the load of an index: it continues only when somebody resumes it."""
    return index.backfill is not None and index.backfill.state == "paused"


def progress(index: IndexStatus, hnsw: tuple[int, int] | None = None) -> list[Progress]:
    """Return how far an index's load is: nothing once everything is there.

    :param hnsw: blocks that the build of the HNSW index has read, and how many there are, while it is built.
    """
    load = index.backfill
    parts = []
    loading = index.state == "building" or load is not None
    if load is not None and load.phase == "rows" and load.kind != "verify":
        parts.append(Progress("rows", load.rows_done, load.rows_total, load.eta_s))
    elif index.state == "building" and index.documents is not None and index.chunks:
        parts.append(Progress("rows", index.documents, index.documents, 0.0))
    waiting = index.backlog - index.backlog_live
    if index.state == "building" or ((loading or waiting) and index.chunks):
        done = max(0, index.chunks - index.backlog - index.failed - index.discarded)
        parts.append(Progress("vectors", done, _chunks_in_the_end(index) if index.chunks else None))
    if hnsw is not None:
        parts.append(Progress("hnsw", *hnsw))
    return parts


def _chunks_in_the_end(index: IndexStatus) -> int | None:
    """Return how many chunks there will be; during a first load, estimated from the rows that were read."""
    load = index.backfill
    if load is None or load.kind != "initial" or load.phase != "rows":
        return index.chunks
    if load.rows_total is None or not load.rows_done:
        return None
    return max(index.chunks, round(index.chunks * load.rows_total / load.rows_done))
