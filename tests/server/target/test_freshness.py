"""How fresh an index is: known of one that is kept in step, and of no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.freshness import Freshness, read_freshness
from cdcsync.target.generations import Generation, Generations
from tests.support.indexes import SCHEMA, make_spec, register
from tests.support.roles import Roles
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

OF = "the index 'articles'"
SET = "UPDATE cdcsync.indexes SET {} WHERE name = 'articles'"
ASK = "INSERT INTO cdcsync.backfills (index_name, kind, state, owed) VALUES ('articles', '{}', '{}', {})"

UNKNOWN: dict[str, tuple[str, Freshness]] = {
    "paused": (
        SET.format("state = 'paused', reason = 'row 7'"),
        Freshness("paused", warning=f"{OF} is paused"),
    ),
    "unfollowed": (
        SET.format("unfollowed_at = now()"),
        Freshness("live", warning=f"{OF} is no longer followed"),
    ),
    "building": (
        SET.format("state = 'building'"),
        Freshness("building", warning=f"{OF} is being built: a search may not find all of it"),
    ),
    **{
        f"{kind}, {state}": (
            ASK.format(kind, state, owed),
            Freshness("live", warning=f"{OF} is being completed: it may lack rows, or hold older ones"),
        )
        for kind, state, owed in (
            ("initial", "running", False),
            ("resync", "paused", False),
            ("related", "requested", False),
            ("replay", "requested", True),
        )
    },
    "gone": ("DELETE FROM cdcsync.indexes WHERE name = 'articles'", Freshness()),
    "no position yet": ("UPDATE cdcsync.pipelines SET checkpoint = NULL WHERE slot = 's'", Freshness("live")),
}
"""What happens to the index, and what is known of its freshness then."""


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target with two live indexes of two pipelines."""
    connection = await connect_target()
    await create_shared(connection, SCHEMA)
    for slot, name in (("s", "articles"), ("t", "notes")):
        await connection.execute(
            "INSERT INTO cdcsync.pipelines (slot, publication, checkpoint, caught_up_at)"
            " VALUES (%s, 'p', '1/10', now() - interval '1 hour')",
            [slot],
        )
        await register(connection, make_spec(name=name), slot=slot)
    return connection


@pytest.mark.parametrize("happens", UNKNOWN)
async def test_the_position_of_an_index_that_is_not_kept_in_step_is_not_known(
    connection: Connection, happens: str
) -> None:
    statement, known = UNKNOWN[happens]
    await connection.execute(statement.encode())
    assert await read_freshness(connection, SCHEMA, make_spec(name="articles")) == known
    other = await read_freshness(connection, SCHEMA, make_spec(name="notes"))
    assert (other.state, other.lsn, other.warning) == ("live", "1/10", None)
    assert other.lag_s is not None
    assert 3600 <= other.lag_s < 7200


async def test_a_word_from_before_the_clock_went_back_says_nothing(connection: Connection) -> None:
    await connection.execute(
        "UPDATE cdcsync.pipelines SET commit_time = now() - interval '1 minute', caught_up_at = now() + interval '1 h'"
    )
    lag_s = (await read_freshness(connection, SCHEMA, make_spec())).lag_s
    assert lag_s is not None
    assert lag_s >= 60


@pytest.mark.parametrize("happens", [None, *UNKNOWN])
async def test_a_search_says_the_same_as_an_answer_of_the_tool_server(
    connection: Connection, happens: str | None
) -> None:
    if happens is not None:
        await connection.execute(UNKNOWN[happens][0].encode())
    told = (await read_freshness(connection, SCHEMA, make_spec())).warning
    said = await fetch_value(connection, f"SELECT {SCHEMA}.standing('articles', 1)")
    if told is None or "is being completed" in told:  # which only the tool server says
        assert said is None
    else:
        assert told.replace("is paused", "is paused, and is as it was then").split(" since ")[0] in said or told in said


@pytest.mark.parametrize("name", ["articles", "articles~other"])
async def test_of_a_generation_that_is_being_built_no_position_is_known_and_a_search_says_so(
    connection: Connection, name: str
) -> None:
    own, other = make_spec(), msgspec.structs.replace(make_spec(), name=name, generation=2)
    if name == own.name:
        await Generations(SCHEMA).add(connection, Generation.of(other, "filling"))
    else:
        await register(connection, other, slot="s", state="building")

    said = "generation 2 of the index 'articles' is being built: a search may not find all of it"
    fresh = await read_freshness(connection, SCHEMA, other)
    assert (fresh.lsn, fresh.lag_s, fresh.warning) == (None, None, said)
    assert await fetch_value(connection, f"SELECT {SCHEMA}.standing('{name}', 2)") == said
    assert (await read_freshness(connection, SCHEMA, own)).lsn == "1/10"
    assert await fetch_value(connection, f"SELECT {SCHEMA}.standing('articles', 1)") is None

    await connection.execute("UPDATE cdcsync.generations SET state = 'ready'")
    await connection.execute("UPDATE cdcsync.indexes SET state = 'live'")
    assert (await read_freshness(connection, SCHEMA, other)).lsn == "1/10"
    assert await fetch_value(connection, f"SELECT {SCHEMA}.standing('{name}', 2)") is None


async def test_a_role_that_may_not_ask_is_told_so_and_reads_all_the_same(
    roles: Roles, target: Database, connection: Connection
) -> None:
    reader = roles.create("reader")
    for statement in (
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO {reader}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {SCHEMA} TO {reader}",
        f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {SCHEMA} FROM PUBLIC",
    ):
        await connection.execute(statement.encode())
    async with await connect(roles.dsn(target, reader), "target") as its:
        seen = await read_freshness(its, SCHEMA, make_spec(name="articles"))
        assert (seen.state, seen.lsn, seen.lag_s) == ("live", None, None)
        assert "may not execute wait_for" in (seen.warning or "")
        assert await read_freshness(its, SCHEMA, make_spec(name="nothing")) == Freshness()


@pytest.mark.parametrize(("kind", "state"), [("initial", "done"), ("replay", "running"), ("verify", "running")])
async def test_a_request_that_owes_the_index_nothing_leaves_its_position_known(
    connection: Connection, kind: str, state: str
) -> None:
    await connection.execute(ASK.format(kind, state, False).encode())
    assert (await read_freshness(connection, SCHEMA, make_spec(name="articles"))).lsn == "1/10"
