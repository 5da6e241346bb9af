"""The registry of indexes: what is kept of each, how one is paused and resumed, and rows of other versions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from cdcsync.config.names import beside_name, own_name
from cdcsync.model.pauses import Pause
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.registry import Registry, made_by
from tests.support.indexes import SCHEMA, make_spec

pytestmark = [pytest.mark.server, pytest.mark.anyio]

REGISTRY = Registry(SCHEMA)
SPEC = make_spec()


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target whose shared tables exist, with a pipeline and no index."""
    connection = await connect_target()
    await create_shared(connection, SCHEMA)
    await connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('s', 'p')")
    return connection


async def test_before_the_first_set_up_there_is_no_index(connect_target: Callable[[], Awaitable[Connection]]) -> None:
    connection = await connect_target()
    assert await REGISTRY.find(connection, "articles") is None
    assert await REGISTRY.all(connection) == {}


async def test_a_registered_index_is_building_and_has_what_it_is_made_by(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    entry = await REGISTRY.find(connection, "articles")
    assert entry is not None
    assert (entry.slot, entry.state, entry.pause) == ("s", "building", None)
    assert (entry.key, entry.columns, entry.fingerprint) == (SPEC.shape.key, SPEC.shape.carried, SPEC.fingerprint)
    assert (entry.model, entry.dimensions, entry.generation) == (SPEC.model, SPEC.dimensions, SPEC.generation)
    assert await REGISTRY.all(connection) == {"articles": entry}


async def test_what_stored_vectors_depend_on_is_not_registered_anew(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    other = msgspec.structs.replace(SPEC, model="another", dimensions=7, fingerprint="g", table_oid=5)
    await REGISTRY.register(connection, "s", other)
    entry = await REGISTRY.find(connection, "articles")
    assert entry is not None
    assert (entry.model, entry.dimensions) == (SPEC.model, SPEC.dimensions)
    assert (entry.fingerprint, entry.table_oid) == ("g", 5)


async def test_an_entry_says_whether_registering_would_change_it(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    entry = await REGISTRY.find(connection, "articles")
    assert entry is not None
    assert made_by(entry, make_spec())
    for other in (
        make_spec(text="{title}"),
        make_spec(dimensions=9),
        make_spec(carried={}),
        make_spec(generation=2),
        msgspec.structs.replace(SPEC, left_out={"public.notes": "it lacks a column"}),
        msgspec.structs.replace(SPEC, table_oid=5),
        msgspec.structs.replace(SPEC, stem="articles~2"),
    ):
        assert not made_by(entry, other)


async def test_a_pause_is_stored_with_reason_remedy_and_when_it_began(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    await REGISTRY.register(connection, "s", make_spec(name="notes"))
    await REGISTRY.pause(connection, "articles", Pause("the key is gone", "add it again"))
    first = (await REGISTRY.all(connection))["articles"]
    assert (first.state, first.reason) == ("paused", "the key is gone; add it again")
    assert first.pause == Pause("the key is gone", "add it again", first.paused_at)
    assert first.paused_at is not None

    await REGISTRY.pause(connection, "articles", Pause("its type changed"))
    again = (await REGISTRY.all(connection))["articles"]
    assert again.pause == Pause("its type changed", None, first.paused_at)
    assert (await REGISTRY.all(connection))["notes"].state == "building"


async def test_registering_resumes_a_paused_index_and_leaves_a_live_one_live(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    await REGISTRY.declare_live(connection, "articles")
    await REGISTRY.register(connection, "s", SPEC)
    assert (await REGISTRY.all(connection))["articles"].state == "live"

    await REGISTRY.pause(connection, "articles", Pause("the key is gone", "add it again"))
    await REGISTRY.declare_live(connection, "articles")
    assert (await REGISTRY.all(connection))["articles"].state == "paused"
    await REGISTRY.register(connection, "s", SPEC)
    entry = (await REGISTRY.all(connection))["articles"]
    assert (entry.state, entry.reason, entry.remedy, entry.paused_at) == ("building", None, None, None)


async def test_a_fingerprint_comes_back_as_it_was_noted(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    await REGISTRY.note_fingerprint(connection, "articles", {"types": {"17": [4, None]}}, {"publication": "5 730"})
    async with connection.transaction():
        entry = await REGISTRY.find(connection, "articles", lock=True)
    assert entry is not None
    assert (entry.made_of, entry.sent_by) == ({"types": {"17": [4, None]}}, {"publication": "5 730"})


async def test_a_live_index_that_has_to_be_read_again_is_building_until_then(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    await REGISTRY.declare_live(connection, "articles")
    await REGISTRY.load_again(connection, "articles")
    assert (await REGISTRY.all(connection))["articles"].state == "building"


async def test_a_row_that_an_older_or_a_newer_version_wrote_is_read(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    await connection.execute(
        "ALTER TABLE cdcsync.indexes DROP COLUMN remedy, DROP COLUMN paused_at, DROP COLUMN made_of,"
        " DROP COLUMN sent_by, ADD COLUMN of_the_future int DEFAULT 3"
    )
    await connection.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'the key is gone; add it again'")
    entry = await REGISTRY.find(connection, "articles")
    assert entry is not None
    assert entry.pause == Pause("the key is gone; add it again")

    await create_shared(connection, SCHEMA)
    await REGISTRY.pause(connection, "articles", Pause("the key is gone", "add it again"))
    assert ((await REGISTRY.all(connection))["articles"].pause or Pause("")).remedy == "add it again"


async def test_a_start_that_finds_everything_there_waits_for_no_reader(
    connection: Connection, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    reader = await connect_target()
    await connection.execute("SET lock_timeout = '3s'")
    async with reader.transaction():
        await reader.execute("SELECT FROM cdcsync.indexes JOIN cdcsync.pipelines USING (slot)")
        await create_shared(connection, SCHEMA)


async def test_the_entries_of_one_pipeline_are_forgotten_together(connection: Connection) -> None:
    await connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('t', 'p')")
    await REGISTRY.register(connection, "s", SPEC)
    await REGISTRY.register(connection, "t", make_spec(name="notes"))
    await REGISTRY.forget(connection, "s")
    assert set(await REGISTRY.all(connection)) == {"notes"}


async def test_a_partition_is_noted_once_and_what_is_known_of_it_stays(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", SPEC)
    known = {"tables": {"public.articles": {"leaves": {"7": [70, "500"]}}}}
    await REGISTRY.note_fingerprint(connection, "articles", known, {})
    before = await REGISTRY.find(connection, "articles")
    for oid in (7, 8, 8):
        await REGISTRY.note_part(connection, "articles", "public.articles", oid)
    await REGISTRY.note_part(connection, "articles", "public.unknown", 9)
    entry = await REGISTRY.find(connection, "articles")
    assert entry is not None
    assert entry.made_of == {"tables": {"public.articles": {"leaves": {"7": [70, "500"], "8": [0, ""]}}}}

    assert not await REGISTRY.note_fingerprint(connection, "articles", known, {}, before=before)
    assert await REGISTRY.note_fingerprint(connection, "articles", known, {}, before=entry)


async def test_the_last_number_of_a_generation_outlives_its_index(connection: Connection) -> None:
    assert await REGISTRY.dropped(connection) == {}
    for name in ("articles", "notes", beside_name("notes")):
        await REGISTRY.register(connection, "s", make_spec(name=name, view=f"{own_name(name)}_index", generation=2))
    await REGISTRY.note_generation(connection, "notes", 3)
    await REGISTRY.remove(connection, "articles")
    assert await REGISTRY.dropped(connection) == {"articles": 2}
    await REGISTRY.forget(connection, "s")
    assert await REGISTRY.dropped(connection) == {"articles": 2, "notes": 3}
    await REGISTRY.register(connection, "s", make_spec(name="notes", generation=1))  # as an earlier version does
    await REGISTRY.remove(connection, "notes")
    assert await REGISTRY.dropped(connection) == {"articles": 2, "notes": 3}


async def test_an_index_of_an_earlier_version_leaves_its_number_too(connection: Connection) -> None:
    await REGISTRY.register(connection, "s", make_spec(generation=2))
    await connection.execute("DROP TABLE cdcsync.dropped_indexes")
    await connection.execute("ALTER TABLE cdcsync.indexes DROP COLUMN last_generation")
    assert await REGISTRY.dropped(connection) == {}
    await REGISTRY.remove(connection, "articles")
    assert await REGISTRY.dropped(connection) == {"articles": 2}
