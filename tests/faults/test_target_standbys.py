"""A target of several hosts, one of them a standby that is behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.changeset import ChangeSet
from cdcsync.postgres.sessions import connect
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.session import ApplySession
from tests.support.indexes import SCHEMA, changes, document, make_spec, register, until
from tests.support.outages import make_target

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.anyio]

SLOT = "slot"


async def test_a_standby_that_is_behind_is_never_asked_what_the_index_holds(
    make_cluster: Callable[..., Cluster],
) -> None:
    primary, spec = make_cluster(), make_spec(search=None)
    target = make_target(primary)

    async def apply(session: ApplySession, change: ChangeSet, checkpoint: int) -> None:
        await session.apply({spec.name: change}, (), Lsn(checkpoint), commit_time=None, caught_up=False)

    async with contextlib.AsyncExitStack() as stack:
        connection = await connect(target, "target")
        stack.push_async_callback(connection.close)
        # The writer's connection is all that the primary has to spare.
        await connection.execute("CREATE ROLE lone LOGIN CONNECTION LIMIT 1")
        async with connection.transaction():
            await create_shared(connection, SCHEMA)
            await Pipelines(SCHEMA, SLOT).ensure(connection, "publication")
            await create_index_relations(connection, SCHEMA, spec)
            await register(connection, spec, slot=SLOT)
        await connection.execute(
            f"GRANT ALL ON SCHEMA {SCHEMA} TO lone; GRANT ALL ON ALL TABLES IN SCHEMA {SCHEMA} TO lone"
        )
        await connection.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {SCHEMA} TO lone")
        standby = stack.enter_context(primary.standby(slot="near"))
        both = conninfo.make_conninfo(
            target, user="lone", host="127.0.0.1,127.0.0.1", port=f"{primary.port},{standby.port}"
        )
        session = ApplySession(both, SCHEMA, SLOT)
        stack.push_async_callback(session.aclose)
        assert await session.try_open()
        await session.prepare([spec])
        await apply(session, changes(document("1", "before")), 1)

        cursor = await connection.execute("SELECT pg_current_wal_insert_lsn()")
        written = await cursor.fetchone()
        with psycopg.connect(standby.dsn(), autocommit=True) as watching:

            async def replayed() -> bool:
                return watching.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", written).fetchone() == (True,)

            await until(replayed)
            watching.execute("SELECT pg_wal_replay_pause()")
        await apply(session, changes(document("1", "after", existed=True)), 2)

        with pytest.raises(TargetUnavailable, match="does not show what was committed last"):
            await session.look_ups(spec.name)
        await connection.execute("ALTER ROLE lone CONNECTION LIMIT 2")
        found = await (await session.look_ups(spec.name)).stored_hashes([("1",)])
        assert found == await session.writer(spec.name).stored_hashes([("1",)])
