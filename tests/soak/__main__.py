"""Let a worker run under a steady load and see that nothing grows: `python -m tests.soak --minutes 30`.

Rows of two tables are inserted, updated, moved and deleted at an even pace, so that the tables keep their sizes; one
index has documents of both. Now and then a transaction is large enough to be streamed before it commits, and the worker
has to spool it; some of them are rolled back. Beside that the index is searched, read again (`replay`) and compared
(`verify`), and the worker's sessions are ended now and then, as in production. Every few seconds its memory, files and
threads, its sessions, the WAL that its slot holds, what lies in the spool, what the server writes to temporary files,
and the dead rows and sizes of its tables are measured. In the end source and index are compared, transactions must have
been streamed, and every series must be flat.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

from cdcsync.demo.cluster import Cluster
from tests.chaos.worker import Worker
from tests.soak.picture import draw
from tests.soak.series import Series

TICKETS, COMMENTS = 400, 2_000
"""Rows of the tables, from the beginning to the end."""
CHANGES_PER_S = 40
LARGE_EVERY = 600
"""After so many changes comes a large transaction: every 15 seconds."""
LARGE_ROWS = 500
"""Rows that it updates: some 200 kB to decode, three times `DECODED_AT_ONCE`, and each to be embedded."""
OPEN_S = 2.0
"""How long it stays open after that, in the spool of the worker."""
ROLLED_BACK = 0.25
"""Share of the large transactions that are rolled back."""
DECODED_AT_ONCE = "64kB"
"""The least logical_decoding_work_mem: larger transactions are streamed while they are open."""
WARM_UP = 0.2
"""The share of the run before anything counts: caches, pools and tables fill. The longest takes the memory of recent
vectors (`REMEMBERED_BYTES`): at 70 texts a second, 384 dimensions fill it in three minutes, 64 would in ten."""
DEAD_ROWS = 2_000
"""A growth of dead rows that is none: autovacuum comes to a table when a fifth of its rows is dead, so the dead rows of
a dozen tables of up to 2,400 rows rise and fall by as many, and a run ends somewhere on the way."""
DISTURB_S = 60.0
"""Between two disturbances."""
OPERATIONS = (("replay", "tickets"), ("verify", "tickets"), ("search", "tickets", "a question about a delivery"))

CONFIG = """
[source]
dsn = "{dsn}"
spool_directory = "{spool}"
[worker]
listen = "127.0.0.1:0"
log_format = "json"
[embedders.hash]
type = "hash"
dimensions = 384
[indexes.tickets]
table = "tickets"
text = "{{title}}\\n\\n{{comments}}"
embedder = "hash"
[indexes.tickets.related.comments]
table = "comments"
on = {{ ticket_id = "id" }}
text = "{{body}}"
order_by = "id"
[indexes.comments]
table = "comments"
text = "{{body}}"
embedder = "hash"
"""

TABLES = """
CREATE EXTENSION vector;
CREATE TABLE tickets (id bigint PRIMARY KEY, title text NOT NULL);
CREATE TABLE comments (id bigint PRIMARY KEY, ticket_id bigint NOT NULL, body text NOT NULL);
ALTER TABLE comments REPLICA IDENTITY FULL;
CREATE INDEX ON comments (ticket_id);
"""

WORDS = ["order", "delivery", "refund", "broken", "parcel", "late", "invoice", "address", "colour", "size", "return"]

SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"
RETAINED = (
    "SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), 0) / 2^20 FROM pg_replication_slots"
)
"""The WAL that no checkpoint may remove: from the oldest transaction that the slot may have to decode again."""
TEMPORARY = "SELECT coalesce(sum(temp_bytes), 0) / 2^20 FROM pg_stat_database"
"""What was written to temporary files of statements, in all; a series is made of what is added."""
SPOOL = "spool"
STREAMED = "SELECT coalesce(sum(stream_txns), 0) FROM pg_stat_replication_slots"
DEAD = "SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_all_tables WHERE schemaname = 'cdcsync'"
SIZE = (
    "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) / 2^20 FROM pg_class"
    " WHERE relnamespace = to_regnamespace('cdcsync') AND relkind = 'r'"
)


def text(chance: random.Random) -> str:
    """Return some words."""
    return " ".join(chance.choices(WORDS, k=chance.randint(3, 40)))


class Load:
    """Changes rows at an even pace in a thread, until stopped."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        self._chance = random.Random(17)
        self._next = COMMENTS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.committed = 0
        self.failure: BaseException | None = None

    def fill(self) -> None:
        """Write the rows that there are from the beginning."""
        with self._connection.cursor() as cursor:
            tickets = [(number, text(self._chance)) for number in range(TICKETS)]
            comments = [(number, self._chance.randrange(TICKETS), text(self._chance)) for number in range(COMMENTS)]
            cursor.executemany("INSERT INTO tickets VALUES (%s, %s)", tickets)
            cursor.executemany("INSERT INTO comments VALUES (%s, %s, %s)", comments)

    def start(self) -> None:
        """Begin to change rows."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the transaction at hand, and tell what went wrong if something did."""
        self._stop.set()
        self._thread.join()
        self._connection.close()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop.wait(1 / CHANGES_PER_S):
                self._change()
                self.committed += 1
                if self.committed % LARGE_EVERY == 0:
                    self._change_many()
        except BaseException as error:
            self.failure = error

    def _change(self) -> None:
        chance, execute = self._chance, self._connection.execute
        ticket, oldest = chance.randrange(TICKETS), self._next - COMMENTS
        match chance.randrange(4):
            case 0:
                execute("UPDATE tickets SET title = %s WHERE id = %s", [text(chance), ticket])
            case 1:
                which = chance.randrange(oldest, self._next)
                execute("UPDATE comments SET body = %s WHERE id = %s", [text(chance), which])
            case 2:
                which = chance.randrange(oldest, self._next)
                execute("UPDATE comments SET ticket_id = %s WHERE id = %s", [ticket, which])
            case _:
                with self._connection.transaction():
                    execute("DELETE FROM comments WHERE id = %s", [oldest])
                    execute("INSERT INTO comments VALUES (%s, %s, %s)", [self._next, ticket, text(chance)])
                self._next += 1

    def _change_many(self) -> None:
        """Update many rows in one transaction, and sometimes roll it back."""
        chance, oldest = self._chance, self._next - COMMENTS
        roll_back = chance.random() < ROLLED_BACK
        with self._connection.transaction(force_rollback=roll_back), self._connection.cursor() as cursor:
            rows = [(text(chance), number) for number in chance.sample(range(oldest, self._next), LARGE_ROWS)]
            cursor.executemany("UPDATE comments SET body = %s WHERE id = %s", rows)
            self._stop.wait(OPEN_S)
        self.committed += not roll_back


def measurements(
    pid: int, connection: psycopg.Connection[tuple[object, ...]], spool: Path
) -> dict[Series, Callable[[], float]]:
    """Return what is measured, and how."""

    def value(statement: str) -> Callable[[], float]:
        def ask() -> float:
            row = connection.execute(statement.encode()).fetchone()
            assert row is not None
            return float(str(row[0]))

        return ask

    def added(statement: str) -> Callable[[], float]:
        """Return what gives the growth of a counter since it was asked last."""
        total = value(statement)
        last = total()

        def ask() -> float:
            nonlocal last
            before, last = last, total()
            return last - before

        return ask

    def memory() -> float:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def entries(of: str) -> Callable[[], float]:
        return lambda: len(list(Path(f"/proc/{pid}/{of}").iterdir()))

    def spooled() -> float:
        """The files of the spool have no names: only the process that has them open leads to them."""
        size = 0
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed just now
                if os.readlink(link).startswith(f"{spool}/"):
                    size += link.stat().st_size
        return size / 2**20

    return {
        Series("memory of the worker", "MiB", allowed=4): memory,
        Series("open files", "files", allowed=1): entries("fd"),
        Series("threads", "threads", allowed=1): entries("task"),
        Series("sessions", "sessions", allowed=1): value(SESSIONS),
        Series("WAL held by the slot", "MiB", allowed=16): value(RETAINED),
        Series(SPOOL, "MiB", allowed=1): spooled,
        Series("temporary files, written", "MiB", allowed=1): added(TEMPORARY),
        Series("dead rows of our tables", "rows", allowed=DEAD_ROWS): value(DEAD),
        Series("size of our tables", "MiB", allowed=2, share=0.2): value(SIZE),
    }


def command(config: Path, *arguments: str) -> str:
    """Run a command beside the worker, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "cdcsync", *arguments, "-c", str(config)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def soak(seconds: float, picture: Path | None, directory: Path) -> int:
    """Run the worker, measure, and return the exit status: 1 if something grows."""
    with (
        Cluster(settings={"autovacuum_naptime": "5s", "logical_decoding_work_mem": DECODED_AT_ONCE}) as cluster,
        psycopg.connect(cluster.dsn(), autocommit=True) as admin,
    ):
        admin.execute(TABLES.encode())
        spool, config = directory / "spool", directory / "cdcsync.toml"
        spool.mkdir()
        config.write_text(CONFIG.format(dsn=cluster.dsn(), spool=spool))
        load = Load(cluster.dsn())
        load.fill()
        worker = Worker(config, directory / "worker.log")
        try:
            worker.until_said("backfill_done")
            load.start()
            series = measure(worker, admin, spool, config, seconds)
            load.stop()
            print(command(config, "verify", "tickets"), end="")
            print(command(config, "verify", "comments"), end="")
            streamed = int(str((admin.execute(STREAMED.encode()).fetchone() or (0,))[0]))
        finally:
            if worker.alive:
                worker.stop()
    for one in series:
        verdict = "flat" if one.flat else "GROWS"
        trend = one.trend
        print(
            f"{verdict:<6} {one.name:<26} mean {trend.mean:>10,.1f} {one.unit}, grows by {trend.growth:+,.1f} ±"
            f" {trend.error:,.1f}, {one.allowance:,.1f} allowed"
        )
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(draw(series))
        print(f"the picture is {picture}")
    flat = sum(one.flat for one in series)
    spooled = max(value for one in series if one.name == SPOOL for _, value in one.points)
    if not streamed or not spooled:
        print("no transaction was streamed, or none was seen in the spool")
    done = f"{load.committed:,} transactions in {seconds:,.0f} s, {streamed:,} streamed"
    print(f"{done}; {flat} of {len(series)} series are flat")
    return 0 if streamed and spooled and flat == len(series) else 1


def measure(
    worker: Worker, admin: psycopg.Connection[tuple[object, ...]], spool: Path, config: Path, seconds: float
) -> list[Series]:
    """Measure until the time is up; what was measured while everything filled is left out."""
    measured = measurements(worker.process.pid, admin, spool)
    every, turn = max(0.25, seconds / 400), 0
    began = time.monotonic()
    disturb = began + min(DISTURB_S, seconds / 6)
    pause = threading.Event()
    while (now := time.monotonic()) < began + seconds:
        if not worker.alive:
            raise SystemExit(f"the worker ended by itself:\n{worker.tail()}")
        if now - began >= WARM_UP * seconds:
            for series, probe in measured.items():
                series.add(now - began, probe())
        if now >= disturb:
            disturb = now + min(DISTURB_S, seconds / 6)
            if turn % (len(OPERATIONS) + 1) < len(OPERATIONS):
                command(config, *OPERATIONS[turn % (len(OPERATIONS) + 1)])
            else:
                admin.execute(SESSIONS.replace("count(*)", "pg_terminate_backend(pid)").encode())
            turn += 1
        pause.wait(every)
    return list(measured)


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--picture", type=Path, default=Path("build/soak.svg"), help="where the picture goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cdcsync-soak-") as directory:
        return soak(60 * options.minutes, options.picture, Path(directory))


if __name__ == "__main__":
    raise SystemExit(main())
