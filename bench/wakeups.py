"""How often does a walsender miss a commit as it goes to sleep, and how long does that commit then wait?

A row of a published table is changed some microseconds after one of another table, so that the walsender is just about
to sleep, and nothing else is written. Both sides are the worker's receiver, with a status due each second; one of them
does not nudge a walsender that has fallen quiet. Blocks of one follow blocks of the other. A commit is late if it took
longer than `LATE_S`. `BIN_DIR` measures another server than the embedded one.

    python bench/wakeups.py      COMMITS=20000 BIN_DIR=/usr/lib/postgresql/15/bin
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from cdcsync.demo.cluster import Cluster
from cdcsync.flows.follow import receive
from cdcsync.flows.follow.open_batch import Limits, OpenBatch
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from cdcsync.model.progress import Progress
from cdcsync.model.transactions import Assembler, Committed
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.tracing import Tracing

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import percentile
    from bench.report import report
else:
    from _pipeline import percentile
    from report import report

BLOCKS = 10
COMMITS = max(BLOCKS, int(os.environ.get("COMMITS", "20000")))
APART_S = 0.0003
"""The second of two commits comes within this time after the first one."""

REPORT_S = 1.0
LATE_S = 0.05

NUDGES = {"without_nudges": math.inf, "with_nudges": receive.NUDGE_S}
"""How soon a quiet walsender is nudged, on each side."""


def receiver(slot: SlotConnection, start: Lsn, progress: Progress, spool: Spool) -> receive.Receiver:
    """Return the receiver of a pipeline that has no indexes."""
    lag = Lag(time.time, time.monotonic)
    lag.begin(start, 60.0)
    return receive.Receiver(
        slot,
        start,
        assembler=Assembler({}, start),
        spool=spool,
        open_batch=OpenBatch(progress, Limits(10_000, 10**6), lag, Tracing(), anyio.Event()),
        progress=progress,
        lag=lag,
        metrics=Metrics(),
        tracing=Tracing(),
        status_every_s=REPORT_S,
    )


async def block(dsn: str, name: str, changed: psycopg.Connection[Any], other: psycopg.Connection[Any]) -> list[float]:
    """Commit a block of changes, and return how long each of them took to be received, in seconds."""
    taken: list[float] = []
    slot = await SlotConnection.connect(dsn)
    with tempfile.TemporaryDirectory() as directory:
        start = await slot.create_slot(name)
        await slot.start(name, ["bench"], start, streaming=False)
        progress = Progress(start)
        received = receiver(slot, start, progress, Spool(directory, 10**6))
        async with slot, aclosing(received.events()) as events:
            while len(taken) < COMMITS // BLOCKS:
                other.execute("INSERT INTO others VALUES (1)")
                second_at = time.perf_counter() + random.random() * APART_S
                while time.perf_counter() < second_at:
                    pass
                changed.execute("UPDATE changed SET value = value + 1")
                committed = time.perf_counter()
                async for heard in events:
                    if ends := _ends(heard):
                        progress.commit(ends)
                        break
                taken.append(time.perf_counter() - committed)
    return taken


def _ends(heard: Sequence[receive.Heard]) -> Lsn | None:
    return next((one.end_lsn for one in heard if isinstance(one, Committed)), None)


async def measured(dsn: str) -> dict[str, list[float]]:
    """Return how long commits took to be received, on each side."""
    taken: dict[str, list[float]] = {name: [] for name in NUDGES}
    with psycopg.connect(dsn, autocommit=True) as changed, psycopg.connect(dsn, autocommit=True) as other:
        changed.execute("CREATE TABLE others (value int)")
        changed.execute("CREATE TABLE changed (id int PRIMARY KEY, value int)")
        changed.execute("INSERT INTO changed VALUES (1, 1)")
        changed.execute("CREATE PUBLICATION bench FOR TABLE changed")
        for number in range(BLOCKS):
            for name, receive.NUDGE_S in NUDGES.items():
                taken[name] += await block(dsn, f"{name}_{number}", changed, other)
    return taken


def main() -> None:
    """Measure and report."""
    bin_dir = os.environ.get("BIN_DIR")
    slots = {"max_replication_slots": str(2 * BLOCKS), "max_wal_senders": str(2 * BLOCKS)}
    with Cluster(bin_dir=Path(bin_dir) if bin_dir else None, settings=slots) as cluster:
        taken = anyio.run(measured, cluster.dsn())
    figures: dict[str, float] = {"commits": COMMITS // BLOCKS * BLOCKS}
    for name, of in taken.items():
        figures |= {
            f"late_{name}": sum(one > LATE_S for one in of),
            f"p50_{name}_ms": percentile(of, 0.5) * 1000,
            f"longest_{name}_ms": max(of) * 1000,
        }
    report("wakeups", figures)


if __name__ == "__main__":
    main()
