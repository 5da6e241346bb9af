"""Another cluster is named before the one that the index follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.demo.cluster import Cluster
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
    configure(
        pipeline,
        dsn=f"host=127.0.0.1,127.0.0.1 port={other.port},{source.port} user=postgres dbname=postgres"
        " target_session_attrs=read-write",
    )
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
