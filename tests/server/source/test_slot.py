"""The slot's connection against a real walsender: what arrives, what is reported, and what each refusal means."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import (
    CdcsyncError,
    GapError,
    SetupError,
    SlotInUse,
    SourceUnavailable,
)
from cdcsync.lsn import INVALID_LSN, Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive, XLogData
from cdcsync.pgoutput.messages import Commit, Insert, PgoutputMessage, StreamCommit, StreamStart, StreamStop
from cdcsync.source.slot import MIN_VERSION, SlotConnection
from tests.support.decoding import still_streamed
from tests.support.indexes import until

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

GIVE_UP_AFTER_S = 60.0
"""How long a silent walsender is waited for; it sends a keepalive at least every 30 s, so silence is a fault."""

Connect = Callable[..., Awaitable[SlotConnection]]


@pytest.fixture
async def connect_slot(database: Database) -> AsyncIterator[Connect]:
    """Opens replication sessions on a database with the published table `t`; all are closed after the test."""
    with database.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, body text); CREATE PUBLICATION p FOR TABLE t")
    opened: list[SlotConnection] = []

    async def connect(**settings: str) -> SlotConnection:
        opened.append(await SlotConnection.connect(conninfo.make_conninfo(database.dsn, **settings)))
        return opened[-1]

    yield connect
    for slot in opened:
        await slot.aclose()


async def streaming(connect: Connect, database: Database, publications: Sequence[str] = ("p",)) -> SlotConnection:
    """Return a session that streams from a new slot, named as the database is."""
    slot = await connect()
    await slot.start(database.name, publications, await slot.create_slot(database.name), streaming=True)
    return slot


async def messages(slot: SlotConnection) -> AsyncIterator[tuple[XLogData, PgoutputMessage]]:
    """Yield what arrives."""
    streamed = False
    while True:
        frame = await slot.receive(GIVE_UP_AFTER_S)
        assert frame is not None, "the walsender is silent"
        if isinstance(frame, XLogData):
            message = decode(frame.payload, streamed=streamed)
            streamed = still_streamed(message, streamed)
            yield frame, message


async def until_commit(slot: SlotConnection) -> tuple[list[str], Commit]:
    """Return the ids that the next transaction inserted, and its end."""
    ids = []
    async for _, message in messages(slot):
        if isinstance(message, Insert):
            ids.append(str(message.new[0]))
        elif isinstance(message, Commit):
            return ids, message
    raise AssertionError


async def receive_for_ever(slot: SlotConnection, *, answer: bool = False) -> None:
    """Receive until the connection ends."""
    while True:
        frame = await slot.receive(GIVE_UP_AFTER_S)
        if answer and isinstance(frame, Keepalive):
            await slot.send_status(frame.wal_end, frame.wal_end)


def slots(database: Database, columns: str) -> list[tuple[Any, ...]]:
    return database.execute(
        f"SELECT {columns} FROM pg_replication_slots WHERE slot_name = %s",
        [database.name],
    )


def terminate(database: Database) -> None:
    """End the database's walsenders, as an administrator would, and wait until they are gone."""
    database.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE backend_type = 'walsender' AND datname = current_database()"
    )


# -- the server ------------------------------------------------------------------------------------------------------


async def test_a_server_says_who_it_is(database: Database, connect_slot: Connect) -> None:
    identity = await (await connect_slot()).identify()
    ((system, timeline, position, version),) = database.execute(
        "SELECT (SELECT system_identifier::text FROM pg_control_system()),"
        " (SELECT timeline_id FROM pg_control_checkpoint()), pg_current_wal_lsn()::text,"
        " current_setting('server_version_num')::int"
    )
    assert (identity.system_identifier, identity.timeline, identity.database) == (system, timeline, database.name)
    assert INVALID_LSN < identity.lsn <= Lsn.parse(position)
    assert version >= MIN_VERSION


async def test_the_session_can_be_found_by_its_name(database: Database, connect_slot: Connect) -> None:
    await connect_slot()
    found = database.execute(
        "SELECT application_name FROM pg_stat_activity WHERE backend_type = 'walsender' AND datname = %s",
        [database.name],
    )
    assert found == [("cdcsync",)]


# -- creating a slot -------------------------------------------------------------------------------------------------


async def test_a_slot_is_permanent_and_sends_from_where_it_says(database: Database, connect_slot: Connect) -> None:
    begin = await (await connect_slot()).create_slot(database.name)
    assert slots(database, "plugin, slot_type, temporary, two_phase, confirmed_flush_lsn::text") == [
        ("pgoutput", "logical", False, False, str(begin))
    ]


async def test_a_slot_can_be_made_to_survive_failover(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    ((version,),) = database.execute("SELECT current_setting('server_version_num')::int")
    if version < 170_000:
        pytest.skip("slots survive a failover from PostgreSQL 17 on")
    await slot.create_slot(database.name, failover=True)
    assert slots(database, "failover") == [(True,)]


async def test_a_slot_that_exists_is_not_created_again(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    begin = await slot.create_slot(database.name)
    with pytest.raises(SetupError, match="already exists"):
        await slot.create_slot(database.name)
    # The session goes on to be of use.
    await slot.start(database.name, ["p"], begin, streaming=False)


async def test_creating_a_slot_waits_for_transactions_that_write(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    created = []

    async def create() -> None:
        created.append(await slot.create_slot(database.name))

    async def waits() -> bool:
        found = database.execute(
            "SELECT cardinality(pg_blocking_pids(pid)) > 0 FROM pg_stat_activity"
            " WHERE backend_type = 'walsender' AND datname = %s",
            [database.name],
        )
        return found == [(True,)]

    with database.connect() as writing:
        writing.execute("BEGIN")
        writing.execute("INSERT INTO t VALUES (1)")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await until(waits)
            assert created == []
            writing.execute("COMMIT")
    assert len(created) == 1


# -- the stream ------------------------------------------------------------------------------------------------------


CREATING = """
import sys
import anyio
from cdcsync.source.slot import SlotConnection

async def create() -> None:
    async with await SlotConnection.connect(sys.argv[1]) as slot:
        await slot.create_slot(sys.argv[2])

anyio.run(create)
"""


async def test_a_process_killed_while_its_slot_waits_for_a_transaction_leaves_no_slot_behind(
    database: Database,
) -> None:
    with database.connect() as writer, writer.transaction():
        writer.execute("CREATE TABLE t (id int)")
        process = await anyio.open_process([sys.executable, "-c", CREATING, database.dsn, database.name])

        async def waits() -> bool:
            return slots(database, "active") == [(True,)]

        async def gone() -> bool:
            return slots(database, "active") == []

        await until(waits)
        process.kill()
        await process.wait()

        await until(gone)


async def test_what_is_committed_after_the_start_arrives_in_order(database: Database, connect_slot: Connect) -> None:
    slot = await streaming(connect_slot, database)
    with database.connect() as connection:
        connection.execute("INSERT INTO t VALUES (1), (2)")
        connection.execute("INSERT INTO t VALUES (3, repeat('x', 3000000))")
    first, end_of_first = await until_commit(slot)
    second, end_of_second = await until_commit(slot)
    assert (first, second) == (["1", "2"], ["3"])
    assert end_of_first.end_lsn <= end_of_second.commit_lsn < end_of_second.end_lsn


async def test_a_stream_begins_at_the_position_that_was_asked_for(database: Database, connect_slot: Connect) -> None:
    slot = await streaming(connect_slot, database)
    with database.connect() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO t VALUES (2)")
    _, first = await until_commit(slot)
    await slot.aclose()

    again = await connect_slot()
    await until(lambda: _free(database))
    await again.start(database.name, ["p"], first.end_lsn, streaming=True)
    assert (await until_commit(again))[0] == ["2"]


async def _free(database: Database) -> bool:
    return slots(database, "active") == [(False,)]


async def test_only_the_publications_named_are_sent_whatever_their_names(
    database: Database, connect_slot: Connect
) -> None:
    odd = "Ünï, \"x\" 'y' \\ {z} 100%"
    with database.connect() as connection:
        slot = await connect_slot()
        connection.execute("CREATE TABLE other (id int PRIMARY KEY)")
        quoted = odd.replace('"', '""')
        connection.execute(f'CREATE PUBLICATION "{quoted}" FOR TABLE other'.encode())
        begin = await slot.create_slot(database.name)
        await slot.start(database.name, [odd], begin, streaming=False)
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO other VALUES (2)")
    ids: list[str] = []
    while not ids:
        ids, _ = await until_commit(slot)
    assert ids == ["2"]


@pytest.mark.streaming
async def test_a_large_transaction_is_streamed_before_it_ends_only_if_asked_for(
    database: Database, connect_slot: Connect
) -> None:
    for asked in (True, False):
        slot = await connect_slot(options="-c logical_decoding_work_mem=64kB")
        name = f"{database.name}_{asked}".lower()
        version = await slot.start(name, ["p"], await slot.create_slot(name), streaming=asked)
        assert version in (2, 4)
        database.execute("INSERT INTO t SELECT n + %s, 'x' FROM generate_series(1, 5000) n", [5_000 * asked])
        seen = set()
        async for _, message in messages(slot):
            seen.add(type(message))
            if isinstance(message, Commit | StreamCommit):
                break
        assert ({StreamStart, StreamStop, StreamCommit} <= seen, Commit in seen) == (asked, not asked)


async def test_a_receiver_returns_without_a_frame_when_nothing_comes_in_time(
    database: Database, connect_slot: Connect
) -> None:
    slot = await streaming(connect_slot, database)

    async def quiet() -> bool:
        return await slot.receive(0.01) is None

    await until(quiet)
    assert await slot.receive(0) is None
    assert slot.poll() is None


async def test_what_has_arrived_is_polled_without_waiting(database: Database, connect_slot: Connect) -> None:
    slot = await streaming(connect_slot, database)
    database.execute("INSERT INTO t VALUES (1)")
    inserts = []

    async def arrived() -> bool:
        while (frame := slot.poll()) is not None:
            if isinstance(frame, XLogData) and isinstance(message := decode(frame.payload), Insert):
                inserts.append(message.new[0])
        return bool(inserts)

    await until(arrived)
    assert inserts == ["1"]


async def test_a_receiver_that_is_cancelled_loses_nothing(database: Database, connect_slot: Connect) -> None:
    """psycopg's own wait would send the walsender a cancel request, which ends the stream."""
    slot = await streaming(connect_slot, database)
    for number in range(5):
        with anyio.move_on_after(0.01):
            while True:
                await slot.receive(GIVE_UP_AFTER_S)
        database.execute("INSERT INTO t VALUES (%s)", [number])
        assert (await until_commit(slot))[0] == [str(number)]


# -- reporting -------------------------------------------------------------------------------------------------------


async def test_a_status_moves_the_slot_to_what_is_durable_and_not_to_what_was_received(
    database: Database, connect_slot: Connect
) -> None:
    slot = await streaming(connect_slot, database)
    with database.connect() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO t VALUES (2)")
    _, first = await until_commit(slot)
    _, second = await until_commit(slot)

    await slot.send_status(second.end_lsn, first.end_lsn)

    async def moved() -> bool:
        return slots(database, "confirmed_flush_lsn::text") == [(str(first.end_lsn),)]

    await until(moved)
    assert database.execute(
        "SELECT write_lsn::text, flush_lsn::text, replay_lsn::text FROM pg_stat_replication JOIN pg_replication_slots"
        " ON active_pid = pid WHERE slot_name = %s",
        [database.name],
    ) == [(str(second.end_lsn), str(first.end_lsn), str(first.end_lsn))]
    # An older one does not move it back.
    await slot.send_status(INVALID_LSN, INVALID_LSN)
    await slot.send_status(second.end_lsn, second.end_lsn)
    await until(lambda: _at(database, second.end_lsn))


async def _at(database: Database, position: Lsn) -> bool:
    return slots(database, "confirmed_flush_lsn::text") == [(str(position),)]


async def test_a_server_that_hears_nothing_asks_for_a_status(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot(options="-c wal_sender_timeout=400")
    await slot.start(database.name, ["p"], await slot.create_slot(database.name), streaming=False)
    asked: list[Keepalive] = []

    async def answered() -> bool:
        frame = await slot.receive(GIVE_UP_AFTER_S)
        assert frame is not None
        await slot.send_status(frame.wal_end, frame.wal_end)
        if isinstance(frame, Keepalive) and frame.reply_requested:
            asked.append(frame)
        return len(asked) == 3

    await until(answered)
    assert all(one.wal_end > INVALID_LSN for one in asked)


async def test_a_connection_whose_server_gave_up_waiting_for_a_status_is_unavailable(
    database: Database, connect_slot: Connect
) -> None:
    slot = await connect_slot(options="-c wal_sender_timeout=100")
    await slot.start(database.name, ["p"], await slot.create_slot(database.name), streaming=False)
    with pytest.raises(SourceUnavailable):
        await receive_for_ever(slot)


# -- refusals --------------------------------------------------------------------------------------------------------


async def test_a_slot_that_another_connection_reads_is_in_use_and_may_be_tried_again(
    database: Database, connect_slot: Connect
) -> None:
    first = await streaming(connect_slot, database)
    second = await connect_slot()
    with pytest.raises(SlotInUse):
        await second.start(database.name, ["p"], INVALID_LSN, streaming=False)
    with pytest.raises(SlotInUse, match=f'"{database.name}" is active') as busy:
        await second.start(database.name, ["p"], INVALID_LSN, streaming=False)
    assert busy.value.where == f"slot {database.name}"
    assert busy.value.hint
    assert busy.value.retry.value == "automatic"

    await first.aclose()
    await until(lambda: _free(database))
    await second.start(database.name, ["p"], INVALID_LSN, streaming=False)
    database.execute("INSERT INTO t VALUES (1)")
    assert (await until_commit(second))[0] == ["1"]


async def test_a_slot_that_is_gone_is_a_gap(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    await slot.create_slot(database.name)
    database.execute("SELECT pg_drop_replication_slot(%s)", [database.name])
    with pytest.raises(GapError, match="does not exist") as gap:
        await slot.start(database.name, ["p"], INVALID_LSN, streaming=False)
    assert gap.value.where == f"slot {database.name}"
    assert "resync" in (gap.value.hint or "")


async def test_a_slot_that_is_of_another_database_by_now_is_looked_at_again(
    database: Database, connect_slot: Connect, make_database: Callable[[], Database]
) -> None:
    """It is no gap that a resync heals: that would drop somebody's slot. The next look says how to continue."""
    await (await connect_slot()).create_slot(database.name)
    async with await SlotConnection.connect(make_database().dsn) as elsewhere:
        with pytest.raises(SourceUnavailable, match="was not created in this database"):
            await elsewhere.start(database.name, ["p"], INVALID_LSN, streaming=False)


async def test_a_slot_that_is_physical_by_now_is_looked_at_again(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    database.execute("SELECT pg_create_physical_replication_slot(%s)", [database.name])
    try:
        with pytest.raises(SourceUnavailable, match="physical"):
            await slot.start(database.name, ["p"], INVALID_LSN, streaming=False)
    finally:
        database.execute("SELECT pg_drop_replication_slot(%s)", [database.name])


async def test_a_publication_that_is_gone_is_named(database: Database, connect_slot: Connect) -> None:
    slot = await streaming(connect_slot, database, ["p", "nosuch"])
    database.execute("INSERT INTO t VALUES (1)")
    ((version,),) = database.execute("SELECT current_setting('server_version_num')::int")
    if version >= 180_000:
        # From 18 on the server warns, and sends what the other publications have.
        assert (await until_commit(slot))[0] == ["1"]
    else:
        with pytest.raises(CdcsyncError, match='"nosuch" does not exist'):
            await until_commit(slot)


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_session_that_the_server_ends_is_unavailable(
    database: Database, connect_slot: Connect, waiting: bool
) -> None:
    slot = await streaming(connect_slot, database)

    async def receive() -> None:
        with pytest.raises(SourceUnavailable):
            await receive_for_ever(slot)

    async with anyio.create_task_group() as tasks:
        if waiting:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(terminate, database)
    if not waiting:
        await receive()
    # And stays so, whatever is asked of it.
    for again in (slot.receive(GIVE_UP_AFTER_S), slot.send_status(Lsn(1), Lsn(1)), slot.identify()):
        with pytest.raises(SourceUnavailable):
            await again
    with pytest.raises(SourceUnavailable):
        slot.poll()


async def test_a_session_that_ends_before_it_streams_is_unavailable(database: Database, connect_slot: Connect) -> None:
    slot = await connect_slot()
    terminate(database)
    for ask in (slot.identify, lambda: slot.create_slot("x"), lambda: slot.start("x", [], Lsn(0), streaming=True)):
        with pytest.raises(SourceUnavailable):
            await ask()


async def test_a_closed_session_is_unavailable_and_may_be_closed_again(
    database: Database, connect_slot: Connect
) -> None:
    slot = await streaming(connect_slot, database)
    await slot.aclose()
    await slot.aclose()
    for again in (slot.receive(1), slot.send_status(Lsn(1), Lsn(1)), slot.identify()):
        with pytest.raises(SourceUnavailable):
            await again
    await until(lambda: _free(database))


# -- logging in ------------------------------------------------------------------------------------------------------


async def test_a_database_that_does_not_exist_is_a_matter_of_set_up(database: Database) -> None:
    with pytest.raises(SetupError, match="there is no database cdcsync_test_nosuch") as refused:
        await SlotConnection.connect(conninfo.make_conninfo(database.dsn, dbname="cdcsync_test_nosuch"))
    assert refused.value.hint


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(SourceUnavailable):
        await SlotConnection.connect("postgresql://postgres@127.0.0.1:1/nowhere")


@pytest.fixture(scope="module")
def strict() -> Iterator[Cluster]:
    """A server that asks the role `cdc` for its password, and keeps little WAL for a slot that is behind."""
    settings = {"max_slot_wal_keep_size": "1MB", "wal_keep_size": "0", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    with Cluster(settings=settings) as cluster:
        hba = cluster.data / "pg_hba.conf"
        hba.write_text("host all cdc,plain 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
        with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
            admin.execute(
                "CREATE ROLE cdc LOGIN REPLICATION PASSWORD 'right'; CREATE ROLE plain LOGIN PASSWORD 'right'"
            )
            admin.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t")
            admin.execute("SELECT pg_reload_conf()")
        yield cluster


async def test_a_wrong_password_and_a_missing_privilege_name_their_fix(strict: Cluster) -> None:
    dsn = strict.dsn(user="cdc")
    for password in ("wrong", ""):
        with pytest.raises(SetupError, match="password") as refused:
            await SlotConnection.connect(conninfo.make_conninfo(dsn, password=password, passfile="/dev/null"))
        assert "PGPASSWORD" in (refused.value.hint or "")
        assert "wrong" not in f"{refused.value.where}"
    async with await SlotConnection.connect(conninfo.make_conninfo(dsn, password="right")) as slot:
        assert (await slot.identify()).timeline == 1

    with pytest.raises(SetupError) as denied:
        await SlotConnection.connect(conninfo.make_conninfo(strict.dsn(user="plain"), password="right"))
    assert "ALTER ROLE … REPLICATION" in (denied.value.hint or "")
    assert "on Amazon RDS: GRANT rds_replication TO …" in (denied.value.hint or "")


async def test_a_timeline_is_read_whatever_a_restore_point_was_called(strict: Cluster) -> None:
    line = '1\t0/3000000\tat restore point "vor_\u00c4nderung"\n'
    history = strict.data / "pg_wal" / "00000002.history"
    history.write_bytes(line.encode("latin-1"))
    owner = strict.data.stat()
    os.chown(history, owner.st_uid, owner.st_gid)
    async with await SlotConnection.connect(strict.dsn()) as slot:
        assert await slot.end_of_timeline(1, 2) == Lsn.parse("0/3000000")
        history.unlink()
        assert await slot.end_of_timeline(1, 2) is None
        assert (await slot.identify()).timeline == 1, "the session goes on"


async def test_a_slot_that_lost_its_wal_is_a_gap(strict: Cluster) -> None:
    async with await SlotConnection.connect(strict.dsn()) as slot:
        begin = await slot.create_slot("behind")
        with psycopg.connect(strict.dsn(), autocommit=True) as admin:

            async def lost() -> bool:
                admin.execute("SELECT pg_logical_emit_message(false, '', repeat('x', 1000000)), pg_switch_wal()")
                admin.execute("CHECKPOINT")
                found = admin.execute("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'behind'")
                return found.fetchone() == ("lost",)

            await until(lost)
        with pytest.raises(GapError) as gap:
            await slot.start("behind", ["p"], begin, streaming=False)
    assert 'set source.on_gap = "resync"' in (gap.value.hint or "")


async def test_a_server_that_cannot_decode_says_so_and_has_lost_nothing(make_cluster: Callable[..., Cluster]) -> None:
    """Its error has the code of a slot that has lost WAL."""
    cluster = make_cluster(settings={"wal_level": "replica"})
    async with await SlotConnection.connect(cluster.dsn()) as slot:
        starts = partial(slot.start, "s", ["p"], INVALID_LSN, streaming=False)
        for asked in (partial(slot.create_slot, "s"), starts):
            with pytest.raises(SetupError, match="wal_level") as refused:
                await asked()
            assert "`cdcsync check` names the settings" in (refused.value.hint or "")


async def test_a_server_that_shuts_down_is_unavailable(make_cluster: Callable[..., Cluster]) -> None:
    """It waits until what it sent is flushed here; what is not answered would keep it from stopping."""
    cluster = make_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t")
    async with await SlotConnection.connect(cluster.dsn()) as slot:
        await slot.start("s", ["p"], await slot.create_slot("s"), streaming=False)

        async def follow() -> None:
            with pytest.raises(SourceUnavailable):
                await receive_for_ever(slot, answer=True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await anyio.to_thread.run_sync(cluster.stop)
    with pytest.raises(SourceUnavailable):
        await SlotConnection.connect(cluster.dsn())
