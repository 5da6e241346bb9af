"""Commands whose target is a read replica: they read what they can, and say what only its primary has."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support import forked
from tests.support.outages import MakeSimple, make_target
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.proof]

SEARCH = ("search", "articles", "title 7", "-k", "1")
OF_ITS_OWN = "makes a function for its session"
AT_THE_PRIMARY = "point the DSN at the primary"
NO_LOCKS = "the target is a standby at the moment"

COMMANDS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (SEARCH, 0, "title 7"),
    ((*SEARCH, "--filter", "tenant=2"), 0, "title 7"),
    ((*SEARCH, "--where", "tenant = 2"), 2, OF_ITS_OWN),
    ((*SEARCH, "--explain"), 2, OF_ITS_OWN),
    (("status", "--check"), 0, "a standby"),
    (("plan",), 2, "the server is a standby"),
    (("check",), 2, "the server is a standby"),
    (("run",), 2, "the server is a standby"),
    (("verify", "articles"), 0, "the index equals the source"),
    (("evaluate", "articles"), 0, "only reads"),
    (("failures", "articles", "list"), 0, "nothing has failed"),
    (("failures", "articles", "retry"), 1, AT_THE_PRIMARY),
    (("replay", "articles", "--dry-run"), 0, "nothing was changed"),
    (("replay", "articles"), 1, AT_THE_PRIMARY),
    (("migrate", "articles", "status"), 0, "live"),
    (("audit",), 0, ""),
    (("serve", "--stdio"), 0, ""),
    (("drop", "articles", "--yes"), 1, NO_LOCKS),
    (("teardown", "--yes"), 1, NO_LOCKS),
)
"""Each command, the exit status that it has against a read replica, and what it says."""


class Reader:
    """One who reads a replica, with a configuration for that, and another whose source does not answer."""

    def __init__(self, pipeline: Pipeline, standby: Cluster, directory: Path) -> None:
        self.pipeline = pipeline
        self.standby = psycopg.connect(standby.dsn("target"), autocommit=True)
        source, target = pipeline.path.read_text().split("[target]")
        target = target.replace(pipeline.config.target.dsn, standby.dsn("target")) + "[serve]\nanonymous = true\n"
        away = source.replace(pipeline.config.source.dsn, "host=127.0.0.1 port=1 dbname=nowhere")
        self.path, self.alone = directory / "reader.toml", directory / "alone.toml"
        for path, text in ((self.path, source), (self.alone, away)):
            path.write_text(f"{text}[target]{target}")

    def command(self, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of this reader, with a configuration."""
        return forked.run(*arguments, "-c", str(path or self.path), more={"COLUMNS": "200"}, answer="")

    def follow(self) -> None:
        """Wait until the replica has what its primary has now."""
        lsn = self.pipeline.position()
        ask = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        until(lambda: self.standby.execute(ask, [lsn]).fetchone() == (True,), f"the replica to be at {lsn}")


@pytest.fixture
def reader(make_cluster: Callable[..., Cluster], make_simple: MakeSimple, tmp_path: Path) -> Iterator[Reader]:
    """A reader of a replica of a pipeline whose worker runs."""
    primary = make_cluster()
    target = make_target(primary)
    pipeline = make_simple(target, target)
    pipeline.start()
    pipeline.live()
    with primary.standby() as standby:
        reader = Reader(pipeline, standby, tmp_path)
        with reader.standby:
            reader.follow()
            yield reader


def test_each_command_reads_a_replica_or_says_what_only_its_primary_can_do(reader: Reader) -> None:
    def use(case: tuple[tuple[str, ...], int, str]) -> str | None:
        arguments, status, told = case
        done = reader.command(*arguments)
        said = done.stdout + done.stderr
        as_told = done.returncode == status and told in said and "Traceback" not in said
        return None if as_told else f"{' '.join(arguments)} ended with {done.returncode}: {said}"

    with ThreadPoolExecutor(4) as threads:
        assert [wrong for wrong in threads.map(use, COMMANDS) if wrong] == []


def test_a_status_that_is_read_from_a_replica_guesses_nothing_that_only_its_primary_shows(reader: Reader) -> None:
    pipeline = reader.pipeline
    reader.standby.execute("SELECT pg_wal_replay_pause()")
    pipeline.source.execute("INSERT INTO articles VALUES (1000, 1, 'late')")
    lsn = pipeline.position()
    until(
        lambda: (
            pipeline.source.execute(
                "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = 's'", [lsn]
            ).fetchone()
            == (True,)
        ),
        "the slot to be ahead of the checkpoint that the replica shows",
    )
    behind = reader.command("status", "--check")
    assert behind.returncode == 0, behind.stdout
    assert "runs" in behind.stdout

    reader.standby.execute("SELECT pg_wal_replay_resume()")
    pipeline.stop(pipeline.processes[-1])
    until(lambda: "no worker runs for slot s" in reader.command("status").stdout, "the status to miss the worker")

    alone = reader.command("status", path=reader.alone).stdout
    assert "no worker" not in alone
    assert "the source does not answer, so the lag is unknown" in alone
