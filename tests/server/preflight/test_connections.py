"""A server that has too few connections left for a worker is told of before it starts, and a worker needs no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import sql

from cdcsync.preflight.connections import Room, needed, room_findings
from tests.support.outages import MakeSimple
from tests.support.preflight import ARTICLES, Role, configured, examined, warnings
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = pytest.mark.server


@pytest.mark.parametrize(("left", "told"), [(17, False), (16, True), (-3, True)])
def test_too_few_connections_are_told(left: int, told: bool) -> None:
    found = list(room_findings("target", Room(left, "max_connections"), 17))
    assert [one.level for one in found] == (["warning"] if told else [])
    if told:
        assert f"max_connections leaves {max(0, left)}" in found[0].message


@pytest.mark.parametrize("limit", ["role", "database"])
async def test_a_connection_limit_that_is_too_low_is_told_with_its_name(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role, limit: str
) -> None:
    lone_database.execute(ARTICLES)
    limited = {"role": ("ROLE", role.name), "database": ("DATABASE", lone_database.name)}[limit]
    statement = sql.SQL("ALTER " + limited[0] + " {} CONNECTION LIMIT 5").format(sql.Identifier(limited[1]))
    lone_database.execute(statement)

    report = await examined(configured(role.dsn, make_lone_database().dsn))

    told = [one for one in warnings(report) if "CONNECTION LIMIT" in one.message]
    assert [one.where for one in told] == ["source and target"]
    assert limited[1] in told[0].message


def test_a_worker_opens_no_more_than_it_is_said_to_and_keeps_few(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, slot=source.name, worker_lines="verify_every_s = 0.5")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    until(lambda: pipeline.times("verified") > 1, pipeline.tail)
    pipeline.get("/status")
    most = needed(pipeline.config)
    counted = {
        side: pipeline.target.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'cdcsync%%'"
            " AND backend_type = 'client backend'",
            [database.name],
        ).fetchone()
        for side, database in (("source", source), ("target", target))
    }
    for side in ("source", "target"):
        count = counted[side]
        assert count is not None
        assert 0 < count[0] <= most[side], counted
