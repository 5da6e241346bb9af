"""The proof that a source has what was applied last, by what its slot sends again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from cdcsync.config import parse
from cdcsync.demo.cluster import Cluster
from cdcsync.errors import DecodingFailed, SourceUnavailable
from cdcsync.flows.blocked import Note
from cdcsync.flows.setup import proof
from cdcsync.flows.setup.proof import fell_back, has_last_applied
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.messages import Begin
from cdcsync.pgoutput.wire import to_datetime
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.catalog import Slot, read_slot
from cdcsync.source.slot import SlotConnection
from cdcsync.target.pipelines import PipelineState
from tests.support.configs import configuration
from tests.support.proxies import Proxy
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ROW = "INSERT INTO public.articles SELECT count(*) FROM public.articles"
MESSAGE = "SELECT pg_logical_emit_message(true, 'x', 'y')"
UNPUBLISHED = "INSERT INTO public.notes SELECT count(*) FROM public.notes"


LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def state(checkpoint: str, commit_time: datetime | None, commit_lsn: Lsn | None = None) -> PipelineState:
    now = datetime.now(UTC)
    return PipelineState(
        *(Lsn.parse(checkpoint), None, 0, None, None, 0, None, commit_time, None, now), commit_lsn=commit_lsn
    )


@pytest.mark.parametrize(
    ("applied", "after", "beyond", "proven"),
    [
        pytest.param([ROW, ROW], [], [], True, id="it comes last"),
        pytest.param([ROW], [MESSAGE, UNPUBLISHED], [ROW], True, id="what follows changes no row"),
        pytest.param([MESSAGE], [], [ROW], True, id="it is a message"),
        pytest.param([ROW], [ROW], [], False, id="a row was changed after it"),
        pytest.param([], [ROW], [], False, id="it is not there"),
        pytest.param([], [], [ROW], False, id="nothing is sent before the checkpoint"),
    ],
)
async def test_the_last_transaction_proves_the_history_unless_rows_were_changed_after_it(
    make_database: Callable[[], Database],
    applied: list[str],
    after: list[str],
    beyond: list[str],
    proven: bool,
) -> None:
    database = make_database()
    name = database.name
    database.execute("CREATE TABLE articles (id int)")
    database.execute("CREATE TABLE notes (id int)")
    database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    config = parse(configuration(database.dsn, slot=name), {}, where="the test's configuration")
    source = await connect(database.dsn, "source")
    await source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])

    async def run(statements: list[str]) -> str:
        for statement in statements:
            await source.execute(statement.encode())
        await source.execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
        cursor = await source.execute("SELECT pg_current_wal_insert_lsn()::text")
        return str((await cursor.fetchone() or ("",))[0])

    await run(applied)
    cursor = await source.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '2',"
        " 'publication_names', 'cdcsync', 'messages', 'true')",
        [name],
    )
    begun = [one for (data,) in await cursor.fetchall() if isinstance(one := decode(bytes(data)), Begin)]
    last = to_datetime(begun[-1].commit_time_us) if begun else LONG_AGO
    checkpoint = await run(after)
    await run(beyond)

    before = await read_slot(source, name)
    assert before is not None
    assert fell_back(before, state(checkpoint, last))
    for known, expected in ((state(checkpoint, last), proven), (state(checkpoint, None), False)):
        connection = await SlotConnection.connect(database.dsn)
        assert await has_last_applied(connection, source, config, before, known, unsaid) is expected
    now = await read_slot(source, name)
    assert now is not None
    assert (now.active_pid, now.confirmed_flush) == (None, before.confirmed_flush)
    assert not fell_back(now, state(str(now.confirmed_flush), last))
    await source.close()
    database.execute(f"SELECT pg_drop_replication_slot('{name}')")


def unsaid(why: str | None) -> None:
    """Take what nobody waits for."""
    assert why is None


class Asked:
    """A server with a slot, and a session with it."""

    def __init__(self, cluster: Cluster, source: Connection, slot: Slot) -> None:
        assert slot.confirmed_flush is not None
        self.cluster, self.source, self.slot, self.confirmed = cluster, source, slot, slot.confirmed_flush

    async def end(self, statement: str = MESSAGE) -> str:
        """Execute a statement, and return where the WAL ends then; more comes after that."""
        await self.source.execute(statement.encode())
        await self.source.execute(MESSAGE)
        cursor = await self.source.execute("SELECT pg_current_wal_insert_lsn()::text")
        (end,) = await cursor.fetchone() or ("",)
        await self.source.execute(MESSAGE)
        return str(end)

    async def proves(self, known: PipelineState, *, dsn: str | None = None, note: Note = unsaid) -> bool:
        config = parse(configuration(self.cluster.dsn(), slot=self.slot.name), {}, where="the test's configuration")
        connection = await SlotConnection.connect(dsn or self.cluster.dsn())
        return await has_last_applied(connection, self.source, config, self.slot, known, note)


@pytest.fixture
async def asked(make_cluster: Callable[..., Cluster]) -> AsyncIterator[Asked]:
    cluster = make_cluster(settings={"max_wal_senders": "1"})
    async with await connect(cluster.dsn(), "source") as source:
        await source.execute("CREATE TABLE public.articles (id int)")
        await source.execute("CREATE PUBLICATION cdcsync FOR TABLE public.articles")
        await source.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        slot = await read_slot(source, "s")
        assert slot is not None
        yield Asked(cluster, source, slot)


async def test_what_was_applied_before_the_slots_position_is_there_unless_rows_were_changed_after_it(
    asked: Asked,
) -> None:
    end = await asked.end()
    assert await asked.proves(state(end, LONG_AGO, asked.confirmed))
    assert not await asked.proves(state(end, LONG_AGO, Lsn(asked.confirmed + 8)))
    end = await asked.end(ROW)
    assert not await asked.proves(state(end, LONG_AGO, asked.confirmed))


async def test_nobody_can_tell_where_the_server_cannot_decode_again_what_was_applied(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: SlotConnection, timeout_s: float) -> None:
        raise DecodingFailed('publication "made_later" does not exist')

    known = state(await asked.end(ROW), LONG_AGO, asked.confirmed)
    monkeypatch.setattr(SlotConnection, "receive", fail)
    assert not await asked.proves(known)


async def test_how_far_the_slot_is_is_told_if_that_takes_long(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "REPORT_S", 0.0)
    end = await asked.end(ROW)
    said: list[str | None] = []
    assert not await asked.proves(state(end, LONG_AGO, asked.confirmed), note=said.append)
    first, last = said[0], said.pop()
    assert first is not None
    assert f"what precedes the checkpoint {end}" in first
    assert f"it is at {asked.confirmed}:" in first
    assert last is None
    assert len(set(said)) > 1


async def test_a_source_that_falls_silent_is_away(
    asked: Asked, make_proxy: Callable[[int], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SILENCE_S", 0.3)
    monkeypatch.setattr(proof, "ASK_S", 0.1)
    proxy = make_proxy(asked.cluster.port)
    start = SlotConnection.start

    async def start_and_fall_silent(self: SlotConnection, *arguments: Any, **options: Any) -> int:
        version = await start(self, *arguments, **options)
        proxy.freeze()
        return version

    monkeypatch.setattr(SlotConnection, "start", start_and_fall_silent)
    dsn = f"host=127.0.0.1 port={proxy.port} user=postgres dbname=postgres"
    with anyio.fail_after(60), pytest.raises(SourceUnavailable, match="nothing has come from the source"):
        await asked.proves(state("7F/0", LONG_AGO), dsn=dsn)
