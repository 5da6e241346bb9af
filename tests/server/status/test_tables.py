"""Tables that a status is read from, and those that its role may not read."""

from __future__ import annotations

import math
from typing import cast

import pytest
from psycopg import sql

from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import connect
from cdcsync.status.tables import relations
from cdcsync.worker.gauges import set_gauges
from cdcsync.worker.state import WorkerState
from tests.support.statuses import Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_what_the_role_may_not_read_is_left_out_and_told(stopped: Pipeline) -> None:
    role = f"{stopped.target.info.dbname}_reader"
    reader = sql.Identifier(role)
    await stopped.target.execute(sql.SQL("CREATE ROLE {}").format(reader))
    try:
        await stopped.target.execute(sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {}").format(reader))
        await stopped.target.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {}").format(reader))
        await stopped.target.execute(sql.SQL("REVOKE SELECT ON cdcsync.failed_documents FROM {}").format(reader))
        await stopped.target.execute(sql.SQL("SET ROLE {}").format(reader))

        status = await stopped.status()

        assert status.indexes["articles"].failed_documents is None
        handle = WorkerState(stopped.config)
        set_gauges(handle, status)
        told = handle.metrics.registry.get_sample_value("cdcsync_failed_documents", {"index": "articles"})
        await handle.aclose()
        assert told is not None
        assert math.isnan(told)
        assert problem(status, 'this role may not read "cdcsync"."failed_documents"').endswith(
            'GRANT SELECT ON "cdcsync"."failed_documents"'
        )
    finally:
        await stopped.target.execute("RESET ROLE")
        await stopped.target.execute(sql.SQL("DROP OWNED BY {}").format(reader))
        await stopped.target.execute(sql.SQL("DROP ROLE {}").format(reader))


NOTES = ("audits", "backfills", "embedders", "evaluations", "failed_documents", "generations", "judged_runs", "tiers")


@pytest.mark.parametrize("fault", ["locked", "of another form"])
async def test_what_cannot_be_read_of_the_shared_tables_is_told_and_everything_else_is_shown(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("cdcsync.status.reading.BRIEFLY", "SET lock_timeout = '20ms'")
    async with await connect(stopped.dsn, "target", autocommit=False) as other:
        for name in NOTES:
            table = sql.Identifier("cdcsync", name)
            if fault == "locked":
                await other.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table))
            else:
                await other.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(table, sql.Identifier(f"{name}_")))
                await other.execute(sql.SQL("CREATE TABLE {} (other int)").format(table))
                await other.execute(sql.SQL("INSERT INTO {} VALUES (1)").format(table))
        if fault != "locked":
            await other.commit()
        status = await stopped.status()
    for name in NOTES:
        assert problem(status, name).split(" cannot be read, and what it tells is left out: ")[1]
    assert (status.indexes["articles"].state, status.indexes["articles"].unreadable) == ("live", None)
    assert status.caught_up is not None
    assert status.slot is not None


@pytest.mark.parametrize("schema", ["cdcsync", "public"])
async def test_the_relations_of_a_schema_are_found_without_reading_those_of_all_others(
    stopped: Pipeline, schema: str
) -> None:
    target = stopped.target
    await target.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.moved (id int)")
    await target.execute(sql.SQL("ALTER TABLE elsewhere.moved SET SCHEMA {}").format(sql.Identifier(schema)))
    await target.execute(
        "DO $$ BEGIN FOR n IN 1..300 LOOP EXECUTE 'CREATE TABLE elsewhere.t' || n || ' ()'; END LOOP; END $$"
    )
    await target.execute("ANALYZE pg_class, pg_depend")

    async def scans() -> int:
        await target.execute("SELECT pg_stat_force_next_flush()")
        statement = "SELECT seq_scan FROM pg_stat_sys_tables WHERE relid = 'pg_class'::regclass"
        return cast(int, await fetch_value(target, statement))

    before = await scans()
    found = await relations(target, schema)
    assert await scans() == before

    cursor = await target.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind NOT IN ('i', 'I', 'c')",
        [schema],
    )
    assert found == {name for (name,) in await cursor.fetchall()}
    assert "moved" in found
