"""A server that has too few connections left for a worker is told of before it starts, and a worker needs no more."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import psycopg
import pytest
from psycopg import conninfo, sql

from cdcsync.config import Config
from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import Side
from cdcsync.preflight.connections import Room, needed, room_findings
from cdcsync.target.generations import Generation, Generations, State
from tests.support.outages import MakeSimple
from tests.support.preflight import (
    ARTICLES,
    SLOT,
    Role,
    configured,
    examined,
    lay_out,
    stored_spec,
    warnings,
)
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


async def asked_for(config: Config) -> int:
    """Return how many connections a server is said to need for a worker, which leaves fewer."""
    told = [one.message for one in warnings(await examined(config)) if "CONNECTION LIMIT" in one.message]
    found = re.search(r"a worker opens up to (\d+) connections here", "".join(told))
    assert found is not None, told
    return int(found[1])


@pytest.mark.parametrize(("state", "more"), [("ready", 2), ("filling", 3), ("dropping", 0)])
async def test_each_generation_of_an_index_needs_the_connections_that_its_worker_opens(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role, state: State, more: int
) -> None:
    lone_database.execute(ARTICLES)
    owner = conninfo.conninfo_to_dict(lone_database.dsn)["user"]
    lone_database.execute(f"GRANT {owner} TO {role.name}; ALTER ROLE {role.name} CONNECTION LIMIT 5")
    target, spec = make_lone_database(), stored_spec()
    await lay_out(target, spec, slot=SLOT)
    config = configured(role.dsn, conninfo.make_conninfo(target.dsn, user=role.name), slot=SLOT, articles='search = ""')
    before = await asked_for(config)
    async with await connect(target.dsn, "target") as connection:
        second = Generation.of(msgspec.structs.replace(spec, generation=2, model="another"), state)
        await Generations("cdcsync").add(connection, second)
    assert await asked_for(config) == before + more


def test_a_worker_opens_no_more_sessions_of_any_name_than_it_is_said_to(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    cluster = make_cluster(settings={"log_connections": "on"})
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE index")
    databases: dict[Side, str] = {"source": "postgres", "target": "index"}
    often = "verify_every_s = 0.5\nevaluate_every_s = 0.5\nsettle_connections = 0"
    pipeline = make_simple(*(cluster.dsn(one) for one in databases.values()), worker_lines=often)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    until(lambda: pipeline.times("verified") > 1 and pipeline.times("evaluated") > 0, pipeline.tail)
    pipeline.get("/status")
    most = needed(pipeline.config, generations=1, filling=0)
    for side, database in databases.items():
        counted = {
            kind(name): count
            for name, count in pipeline.target.execute(
                "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = %s"
                " AND application_name LIKE 'cdcsync%%' AND application_name <> 'cdcsync liveness'"
                " AND backend_type = 'client backend' GROUP BY 1",
                [database],
            )
        }
        assert counted
        assert {name: count for name, count in counted.items() if count > most[side].get(name, 0)} == {}, side
        # Some are there for a moment only. Those without a name of their own are of a start, before most others.
        authorised = rf"connection authorized: user=\S+ database={database} application_name=(cdcsync.*?)(?: SSL .*)?$"
        opened = {kind(name) for name in re.findall(authorised, cluster.log.read_text(), re.MULTILINE)}
        assert "address" in opened
        assert opened - {"cdcsync", "liveness"} <= most[side].keys(), side


def kind(name: str) -> str:
    """Return what the application_name of a worker's session says of it, besides the slot."""
    return name.removeprefix("cdcsync ").removesuffix(" s")
