"""Which transactions may be delivered already although no snapshot shows them."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import connect
from cdcsync.source.catalog import in_doubt
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]

MINE = "SELECT pg_current_xact_id()::xid::text::int8"


def begun(dsn: str) -> tuple[psycopg.Connection, int]:
    """Return a session with an open transaction that has an id, and the id."""
    session = psycopg.connect(dsn, autocommit=True)
    session.execute("BEGIN")
    session.execute("SELECT pg_logical_emit_message(true, 'test', '')")  # a commit of nothing waits for nobody
    (xid,) = session.execute(MINE).fetchone() or (0,)
    return session, int(xid)


@pytest.fixture
def served(make_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = make_cluster(settings={"synchronous_commit": "local"})
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE cdc LOGIN REPLICATION")
    return cluster


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("user", ["postgres", "cdc"])
async def test_an_open_transaction_is_in_doubt_only_if_a_standby_is_waited_for_and_we_may_not_see_by_whom(
    served: Cluster, user: str
) -> None:
    open_, xid = begun(served.dsn())
    source = await connect(served.dsn(user=user), "source")
    with psycopg.connect(served.dsn(), autocommit=True) as admin:
        assert await in_doubt(source) == set()
        with served.standby() as standby:
            assert standby.running
            admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            admin.execute("SELECT pg_reload_conf()")
            confirmed = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: admin.execute(confirmed).fetchone() == (True,), "the standby to be synchronous")
            assert await in_doubt(source) == set()
        # Nobody confirms any more.
        waiting, late = begun(served.dsn())
        waiting.execute("SET synchronous_commit = on")
        waiting.pgconn.send_query(b"COMMIT")
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: admin.execute(waits).fetchone() == (True,), "the commit to wait")
        assert await in_doubt(source) == ({late} if user == "postgres" else {late, xid})
        assert await (await source.execute("SELECT 1")).fetchone() == (1,)
        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
        while waiting.pgconn.get_result() is not None:
            pass
    for session in (open_, waiting):
        session.close()
    await source.close()
