"""How often does a walsender miss a commit as it goes to sleep, and how long does that commit then wait?

A row that a publication has is changed some microseconds after one that it has not, so that the walsender is just about
to sleep, and nothing else is written. Both readers are our own connection to a slot. One reports its position once a
second; the other one nudges the walsender as the worker does, at growing pauses after the last news. Blocks of one
follow blocks of the other. A commit is late if it took longer than `LATE_S`.

    python bench/wakeups.py      COMMITS=20000
"""

from __future__ import annotations

import math
import os
import random
import time
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from cdcsync.demo.cluster import Cluster
from cdcsync.flows.follow.receive import NUDGE_GROWTH, NUDGE_S
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.frames import XLogData
from cdcsync.source.slot import SlotConnection

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import percentile
    from bench.report import report
else:
    from _pipeline import percentile
    from report import report

COMMITS = int(os.environ.get("COMMITS", "20000"))
BLOCKS = 10
APART_S = 0.0003
"""The second of two commits comes within this time after the first one."""

REPORT_S = 1.0
LATE_S = 0.05


class Reader:
    """A connection to a slot whose source is seldom told how far it is read, or is nudged."""

    def __init__(self, slot: SlotConnection, *, nudges: bool) -> None:
        self._slot = slot
        self._nudges = nudges
        self._read = Lsn(0)

    async def until_commit(self) -> None:
        """Read until a transaction that the publication has is whole."""
        pause_s = NUDGE_S if self._nudges else REPORT_S
        while True:
            frame = await self._slot.receive(pause_s)
            if frame is None:
                await self._slot.send_status(self._read, self._read)
                pause_s *= NUDGE_GROWTH if self._nudges else 1
            elif isinstance(frame, XLogData) and frame.payload[:1] == b"C":
                self._read = max(self._read, frame.wal_end)
                return


async def block(reader: Reader, changed: psycopg.Connection[Any], other: psycopg.Connection[Any]) -> list[float]:
    """Commit so often, and return how long each commit took to be read, in seconds."""
    taken = []
    for _ in range(COMMITS // BLOCKS):
        other.execute("INSERT INTO others VALUES (1)")
        second_at = time.perf_counter() + random.random() * APART_S
        while time.perf_counter() < second_at:
            pass
        changed.execute("UPDATE changed SET value = value + 1")
        committed = time.perf_counter()
        await reader.until_commit()
        taken.append(time.perf_counter() - committed)
    return taken


async def measured(dsn: str) -> dict[str, list[float]]:
    """Return how long commits took to be read, by the way of reading."""
    taken: dict[str, list[float]] = {"quiet": [], "nudged": []}
    with psycopg.connect(dsn, autocommit=True) as changed, psycopg.connect(dsn, autocommit=True) as other:
        changed.execute("CREATE TABLE others (value int)")
        changed.execute("CREATE TABLE changed (id int PRIMARY KEY, value int)")
        changed.execute("INSERT INTO changed VALUES (1, 1)")
        changed.execute("CREATE PUBLICATION bench FOR TABLE changed")
        for number in range(2 * BLOCKS):
            name = list(taken)[number % 2]
            slot = await SlotConnection.connect(dsn)
            try:
                start = await slot.create_slot(f"bench_{number}")
                await slot.start(f"bench_{number}", ["bench"], start, streaming=False)
                taken[name] += await block(Reader(slot, nudges=name == "nudged"), changed, other)
            finally:
                await slot.aclose()
    return taken


def main() -> None:
    """Measure and report."""
    with Cluster(settings={"max_replication_slots": str(2 * BLOCKS), "max_wal_senders": str(2 * BLOCKS)}) as cluster:
        taken = anyio.run(measured, cluster.dsn())
    figures: dict[str, float] = {"commits": math.floor(COMMITS / BLOCKS) * BLOCKS}
    for name, of in taken.items():
        figures |= {
            f"{name}_late": sum(one > LATE_S for one in of),
            f"{name}_p50_ms": percentile(of, 0.5) * 1000,
            f"{name}_longest_ms": max(of) * 1000,
        }
    ratio = "quiet_longest_over_nudged"
    against = "a reader that reports once a second, same run"
    report("wakeups", figures, {ratio: max(taken["quiet"]) / max(taken["nudged"])}, {ratio: 1.0}, against)


if __name__ == "__main__":
    main()
