"""What the benches that run a worker share: a PostgreSQL of their own, one table, its index, and the worker."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psycopg

from cdcsync.demo.cluster import Cluster

T = TypeVar("T")

PATIENCE_S = float(os.environ.get("PATIENCE_S", "300"))
"""A bench that waits longer is broken."""

POLL_S = 0.002

CONFIG = """
[source]
dsn = "{dsn}"
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
log_format = "json"
[embedders.model]
{embedder}
[indexes.articles]
table = "articles"
text = "{{body}}"
columns = ["tenant"]
embedder = "model"
{index}
"""

TABLE = "CREATE TABLE articles (id bigint PRIMARY KEY, tenant int NOT NULL, body text NOT NULL)"


class Pipeline:
    """A server with the table `articles`, and a worker that can be started and stopped.

    :ivar connection: to the source.
    :ivar target: to where the index is, which is the same database unless it is said to be apart.
    """

    def __init__(self, directory: Path, dsn: str, target: str, embedder: str, index: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.target = psycopg.connect(target, autocommit=True)
        self.target.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self.connection.execute(TABLE)
        self._config = directory / "cdcsync.toml"
        self._config.write_text(CONFIG.format(dsn=dsn, target=target, embedder=embedder, index=index))
        self._log = directory / "worker.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the worker; returns at once."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cdcsync", "run", "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ,
            )

    def configure(self, old: str, new: str) -> None:
        """Replace a part of the configuration; a worker reads it when it starts."""
        text = self._config.read_text()
        assert old in text
        self._config.write_text(text.replace(old, new))

    @property
    def pid(self) -> int:
        """The worker's process."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Stop the worker, if one runs."""
        if self._process is not None:
            process, self._process = self._process, None
            process.terminate()
            if process.wait(timeout=60) != 0:
                raise SystemExit(f"the worker failed:\n{self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End the worker at once, in whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def event(self, name: str) -> dict[str, Any]:
        """Wait until the worker has logged `name`, and return that event."""
        return self.until(lambda: next((one for one in self.events() if one.get("event") == name), None), name)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what the worker has logged."""
        for line in self._log.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def until(
        self, probe: Callable[[], T | None], what: str, poll_s: float = POLL_S, patience_s: float = PATIENCE_S
    ) -> T:
        """Return the first true answer of `probe`, asked every `poll_s` seconds for at most `patience_s`."""
        deadline = time.monotonic() + patience_s
        while not (answer := probe()):
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise SystemExit(f"no {what}; the worker said:\n{self._log.read_text()[-2000:]}")
            time.sleep(poll_s)
        return answer

    def load(self, rows: int) -> None:
        """Insert so many short articles, start a worker and wait until its index holds all of them."""
        self.connection.execute(
            "INSERT INTO articles SELECT i, i %% 50, 'the first text of ' || i FROM generate_series(1, %s) AS i", [rows]
        )
        self.start()
        self.live()
        self.text_in_step()
        self.vectors_in_step()

    def value(self, statement: str, *arguments: object) -> Any:
        """Return the one value that a statement gives on the source."""
        row = self.connection.execute(statement, arguments or None).fetchone()
        return None if row is None else row[0]

    def indexed(self, statement: str, *arguments: object) -> Any:
        """Return the one value that a statement gives on the target."""
        row = self.target.execute(statement, arguments or None).fetchone()
        return None if row is None else row[0]

    def text_in_step(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until the index's text is that of everything committed so far."""
        lsn = self.value("SELECT pg_current_wal_insert_lsn()::text")
        arrived = "SELECT cdcsync.wait_for('articles', %s, '1 s')"
        self.until(lambda: self.indexed(arrived, lsn), f"text at {lsn}", patience_s=patience_s)

    def vectors_in_step(self, poll_s: float = POLL_S, patience_s: float = PATIENCE_S) -> None:
        """Wait until every chunk has its vector, looking every `poll_s` seconds."""
        self.until(
            lambda: not self.indexed("SELECT EXISTS (SELECT FROM cdcsync.articles_backlog)"),
            "empty backlog",
            poll_s,
            patience_s,
        )

    def slot_is(self, active: bool, slot: str = "cdcsync") -> None:
        """Wait until a slot is read, or until nothing reads it any more: the moment from which a stream can come."""
        statement = "SELECT active = %s FROM pg_replication_slots WHERE slot_name = %s"
        self.until(lambda: self.value(statement, active, slot), f"slot {slot}, active {active}")

    def backend(self) -> int:
        """Return the process that writes for the worker."""
        statement = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'cdcsync apply %%'"
        pid: int = self.until(lambda: self.indexed(statement), "backend of the worker")
        return pid

    def live(self, indexes: int = 1, patience_s: float = PATIENCE_S) -> None:
        """Wait until so many indexes are complete."""
        self.until(
            lambda: (
                self.indexed("SELECT to_regclass('cdcsync.indexes') IS NOT NULL")
                and self.indexed("SELECT count(*) >= %s FROM cdcsync.indexes WHERE state = 'live'", indexes)
            ),
            "live index",
            patience_s=patience_s,
        )

    def status(self) -> dict[str, Any]:
        """Return what `cdcsync status --json` says."""
        command = [sys.executable, "-m", "cdcsync", "status", "--json", "-c", str(self._config)]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
        return found

    def metrics(self) -> dict[str, float]:
        """Return the worker's metrics by name and labels, as they are exposed."""
        port = self.event("listening")["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def pipeline(embedder: str, index: str = "", *, apart: bool = False, **settings: str) -> Iterator[Pipeline]:
    """Start a server and make a pipeline on it; both are gone afterwards.

    :param embedder: the keys of the embedder's section.
    :param index: more keys of the index's section.
    :param apart: whether the target is a server of its own, so that what is written there is not in the source's WAL.
    :param settings: settings of the server.
    """
    with (
        tempfile.TemporaryDirectory(prefix="cdcsync-bench-") as directory,
        Cluster(settings=settings) as cluster,
        Cluster(settings=settings) if apart else contextlib.nullcontext(cluster) as target,
    ):
        made = Pipeline(Path(directory), cluster.dsn(), target.dsn(), embedder, index)
        try:
            yield made
        finally:
            if made._process is not None and made._process.poll() is None:
                made._process.kill()
                made._process.wait()
            made.connection.close()
            made.target.close()


CPUCLOCK_SCHED = 2
"""With a process's complement above its three bits, Linux's clock of that process: all its threads, in nanoseconds."""


def processor_ms(pid: int) -> float:
    """Return how many milliseconds of a processor a process has had, all its threads together.

    Source: clock_getcpuclockid(3); Linux, include/linux/posix-timers.h (CPUCLOCK_SCHED).
    """
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED) * 1000


def bucket(before: dict[str, float], after: dict[str, float], name: str, share: float) -> float:
    """Return the upper bound of the bucket in which a histogram's share of the observations ends."""
    prefix = f'cdcsync_{name}_bucket{{le="'
    buckets = sorted(
        (float(key[len(prefix) : -2]), after[key] - before.get(key, 0.0)) for key in after if key.startswith(prefix)
    )
    total = buckets[-1][1]
    return next(le for le, count in buckets if count >= share * total)


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of all are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
