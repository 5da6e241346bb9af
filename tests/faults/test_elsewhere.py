"""Another cluster is named before the one that the index follows."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import several
from tests.support.outages import MakeSimple, configure
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.faults]


def test_worker_and_commands_go_past_another_cluster_that_is_named_first(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    source, other = make_cluster(), make_cluster()
    pipeline = make_simple(source.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    configure(pipeline, dsn=several(other, source))
    worker = pipeline.start()
    pipeline.source.execute("UPDATE articles SET title = title || ' again'")
    pipeline.in_step()
    for command in ("check", "plan", "status"):
        assert pipeline.command(command).returncode == 0
    assert pipeline.stop(worker) == 0

    # While the right one is away, a start waits for it.
    source.stop()
    worker = pipeline.start()
    until(lambda: "another cluster" in pipeline.tail(), pipeline.tail)
    source.start()
    pipeline.connect_source(source.dsn())
    pipeline.source.execute("UPDATE articles SET title = title || ' and again'")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    assert pipeline.times("index_paused") == 0


def test_a_teardown_drops_the_slot_of_the_server_that_was_followed_and_no_other(
    make_cluster: Callable[..., Cluster], database: Database, make_simple: MakeSimple
) -> None:
    source, other = make_cluster(), make_cluster()
    pipeline = make_simple(source.dsn(), database.dsn)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    slot = pipeline.config.source.slot
    of_the_name = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
    with psycopg.connect(other.dsn(), autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])

        # The other cluster alone: its slot of the same name may be another pipeline's.
        configure(pipeline, dsn=other.dsn())
        assert "another cluster" in pipeline.command("status").stdout
        refused = pipeline.command("teardown", "--yes")
        assert refused.returncode == 2
        assert "the slot may not be this pipeline's: this is another cluster" in refused.stderr

        configure(pipeline, dsn=several(other, source))
        done = pipeline.command("teardown", "--yes")
        assert done.returncode == 0, done.stderr
        assert pipeline.source.execute(of_the_name, [slot]).fetchone() == (0,)
        assert elsewhere.execute(of_the_name, [slot]).fetchone() == (1,)

        # Without the slot, what is left can be torn down from any server, and the answer says what may be left.
        elsewhere.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    configure(pipeline, dsn=other.dsn())
    done = pipeline.command("teardown", "--purge", "--yes")
    assert done.returncode == 0, done.stderr
    assert "drop the slot there, for it keeps WAL" in done.stdout
