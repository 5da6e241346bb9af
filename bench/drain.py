"""How fast does the worker receive and decode a slot, against programs that only receive it?

100,000 rows change in transactions of ten. Their changes are read from slots that begin at the same position: by our
connection with every message decoded, by psycopg2, which hands out undecoded messages, and by pg_recvlogical, which is
PostgreSQL's own client and writes them to /dev/null. Each round has every side once, in turns; the medians count. What
a client in this process takes of a processor is measured as well: one that takes a row's whole time sets the pace.

    python bench/drain.py      ROUNDS=5 CHANGES=100000
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import time
from typing import TYPE_CHECKING

import anyio
import psycopg
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import XLogData
from cdcsync.pgoutput.messages import Commit
from cdcsync.source.slot import SlotConnection

try:
    import psycopg2
    import psycopg2.extras
except ImportError:
    psycopg2 = None

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._recvlogical import recvlogical
    from bench.report import report
else:
    from _recvlogical import recvlogical
    from report import report

CHANGES = int(os.environ.get("CHANGES", "100000"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
ROWS = 10_000
TRANSACTION = 10

NOTE = (
    "the others decode nothing; ours makes an object of each message and a value of each column. Of `ours_us_per_row`"
    " our process works `ours_client_us_per_row`: where the two are nearly alike, Python sets the pace"
)

SOURCE = """
CREATE TABLE articles (id bigint PRIMARY KEY, tenant int NOT NULL, title text, author text, body text NOT NULL);
INSERT INTO articles SELECT i, i % 50, 'The title of article ' || i, 'some author', repeat('x', 430)
FROM generate_series(1, {rows}) AS i;
CREATE PUBLICATION drain FOR TABLE articles
"""


async def ours(dsn: str, slot: str, end: Lsn) -> int:
    """Receive and decode up to `end`; returns how many messages came."""
    connection = await SlotConnection.connect(dsn)
    try:
        await connection.start(slot, ["drain"], Lsn(0), streaming=False)
        messages = 0
        while True:
            frame = connection.poll() or await connection.receive(10)
            if isinstance(frame, XLogData):
                message = decode(frame.payload)
                messages += 1
                if type(message) is Commit and message.end_lsn >= end:
                    return messages
    finally:
        await connection.aclose()


def raw(dsn: str, slot: str, end: Lsn) -> int:
    """Receive up to `end` by psycopg2; returns how many messages came."""
    connection = psycopg2.connect(dsn, connection_factory=psycopg2.extras.LogicalReplicationConnection)
    cursor = connection.cursor()
    cursor.start_replication(
        slot_name=slot, decode=False, options={"proto_version": "4", "publication_names": "drain", "messages": "true"}
    )
    messages = 0
    try:
        while True:
            message = cursor.read_message()
            if message is None:
                select.select([cursor], [], [], 10)
                continue
            messages += 1
            if message.payload[:1] == b"C" and int.from_bytes(message.payload[10:18], "big") >= end:
                return messages
    finally:
        connection.close()


def client(dsn: str, slot: str, end: Lsn) -> None:
    """Receive up to `end` by pg_recvlogical."""
    command = [*recvlogical(dsn, slot, "drain"), "--endpos", str(end)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    """Measure and report."""
    taken: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    load = os.getloadavg()[0]
    with Cluster() as cluster:
        dsn = cluster.dsn()
        keywords = conninfo.make_conninfo(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(SOURCE.format(rows=ROWS).encode())
            connection.execute("SELECT pg_create_logical_replication_slot('first', 'pgoutput')")
            for number in range(CHANGES // TRANSACTION):
                first = number * TRANSACTION % ROWS + 1
                connection.execute(
                    "UPDATE articles SET tenant = tenant + 1 WHERE id BETWEEN %s AND %s",
                    [first, first + TRANSACTION - 1],
                )
            written = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert written is not None
            # The record of a commit ends before the next page's header may begin.
            end = Lsn.parse(written[0])
            connection.execute("SELECT pg_logical_emit_message(true, 'bench', 'the end')")
            sides = ["ours", "pg_recvlogical", *([] if psycopg2 is None else ["psycopg2"])]
            counts: dict[str, int | None] = {}
            for round_ in range(ROUNDS):
                for side in sides[round_ % len(sides) :] + sides[: round_ % len(sides)]:
                    slot = f"{side}_{round_}"
                    connection.execute("SELECT pg_copy_logical_replication_slot('first', %s)", [slot])
                    began, used_before = time.perf_counter(), time.process_time()
                    match side:
                        case "ours":
                            counts[side] = anyio.run(ours, keywords, slot, end)
                        case "psycopg2":
                            counts[side] = raw(keywords, slot, end)
                        case _:
                            client(keywords, slot, end)
                    taken.setdefault(side, []).append(time.perf_counter() - began)
                    used.setdefault(side, []).append(time.process_time() - used_before)
                    connection.execute(
                        "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
                        " WHERE slot_name = %s AND active_pid IS NOT NULL",
                        [slot],
                    )
                    connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    if psycopg2 is None:
        print("psycopg2 is not installed: that side is left out")
    elif counts["ours"] != counts["psycopg2"]:
        raise SystemExit(f"the sides received different messages: {counts}")
    medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
    others = {"psycopg2": 0.9, "pg_recvlogical": 1.0}
    figures = {"load_at_start": load}
    for side, seconds in medians.items():
        figures[f"{side}_rows_per_s"] = CHANGES / seconds
        figures[f"{side}_us_per_row"] = seconds / CHANGES * 1e6
        if side != "pg_recvlogical":
            figures[f"{side}_client_us_per_row"] = statistics.median(used[side]) / CHANGES * 1e6
    report(
        "drain",
        figures,
        {f"ours_over_{side}": medians[side] / medians["ours"] for side in others if side in medians},
        {f"ours_over_{side}": goal for side, goal in others.items() if side in medians},
        {f"ours_over_{side}": f"{side}, same run" for side in others if side in medians},
        notes={"ours": NOTE},
    )


if __name__ == "__main__":
    main()
