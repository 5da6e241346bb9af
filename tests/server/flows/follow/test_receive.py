"""The receiver against a real walsender, on a server where nobody else commits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import anyio
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.flows.follow.open_batch import Limits, OpenBatch
from cdcsync.flows.follow.receive import Receiver
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from cdcsync.model.progress import Progress
from cdcsync.model.transactions import Assembler, Committed
from cdcsync.source.slot import SlotConnection
from cdcsync.source.spool import Spool
from cdcsync.tracing import Tracing

pytestmark = [pytest.mark.server, pytest.mark.anyio]

COMMITS = 4_000
"""Of so many, a walsender misses two or more, mostly."""

LOST_S = 10.0
"""A commit that has not come by then would come with the server's own next record, which it writes each 15 s."""


@pytest.mark.proof
async def test_what_a_walsender_misses_as_it_goes_to_sleep_comes_all_the_same(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    dsn = make_cluster().dsn()
    with psycopg.connect(dsn, autocommit=True) as published, psycopg.connect(dsn, autocommit=True) as other:
        published.execute("CREATE TABLE t (id int PRIMARY KEY, value int); INSERT INTO t VALUES (1, 0)")
        published.execute("CREATE TABLE others (value int); CREATE PUBLICATION p FOR TABLE t")
        async with await SlotConnection.connect(dsn) as slot:
            start = await slot.create_slot("s")
            await slot.start("s", ["p"], start, streaming=False)
            progress, lag = Progress(start), Lag(time.time, time.monotonic)
            lag.begin(start, 3_600.0)
            receiver = Receiver(
                slot,
                start,
                assembler=Assembler({}, start),
                spool=Spool(str(tmp_path), 10**6),
                open_batch=OpenBatch(progress, Limits(10_000, 10**6), lag, Tracing(), anyio.Event()),
                progress=progress,
                lag=lag,
                metrics=Metrics(),
                tracing=Tracing(),
                status_every_s=3_600.0,
            )
            async with aclosing(receiver.events()) as events:
                for number in range(COMMITS):
                    # A walsender that has nothing to send of a commit goes back to sleep.
                    other.execute("INSERT INTO others VALUES (1)")
                    again_at = time.perf_counter() + random.Random(number).random() * 0.0003
                    while time.perf_counter() < again_at:
                        pass
                    published.execute("UPDATE t SET value = value + 1")
                    with anyio.fail_after(LOST_S):
                        async for heard in events:
                            if any(isinstance(one, Committed) for one in heard):
                                break
