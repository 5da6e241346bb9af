"""The receiver: frames become events, statuses are sent on time, and nothing is read while there is no room."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, cast

import anyio
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SourceUnavailable
from cdcsync.flows.follow import receive
from cdcsync.flows.follow.open_batch import Limits, OpenBatch
from cdcsync.flows.follow.receive import NUDGE_GROWTH, NUDGE_S, TURN_MESSAGES, Dry, Heard, Passed, Receiver
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.lag import Lag
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Shape, Upsert
from cdcsync.model.transactions import Assembler, Began, Committed
from cdcsync.pgoutput import messages as pg
from cdcsync.pgoutput.frames import Keepalive, XLogData
from cdcsync.source.spool import Spool
from cdcsync.tracing import PREFIX, Tracing
from tests.property.test_pgoutput_bytes import encode

pytestmark = pytest.mark.anyio

SHAPE = Shape(index="articles", table=QualifiedName("public", "articles"), key=("id",), carried=(), text=("body",))
SOURCE_END = Lsn(100)
SILENCE_S = 60.0


class FakeSlot:
    """A connection that has these frames, and remembers the statuses that it was sent."""

    def __init__(self, *frames: XLogData | Keepalive) -> None:
        self.frames = deque(frames)
        self.statuses: list[tuple[Lsn, Lsn]] = []
        self.asked: list[bool] = []
        self.waits: list[float] = []
        self.sent = anyio.Event()
        self.ended = False
        self.polls_late = False
        self.closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    def poll(self) -> XLogData | Keepalive | None:
        return self.frames.popleft() if self.frames else None

    async def receive(self, timeout_s: float) -> XLogData | Keepalive | None:
        if self.ended:
            raise SourceUnavailable("the server ended the replication stream")
        self.waits.append(timeout_s)
        if self.polls_late:
            return None
        with anyio.move_on_after(timeout_s):
            await self.sent.wait()
        return self.poll()

    async def send_status(self, received: Lsn, durable: Lsn, *, ask: bool = False) -> None:
        self.statuses.append((received, durable))
        self.asked.append(ask)


class Noted(Tracing):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    def note(self, content: bytes) -> None:
        self.contents.append(content)


class Reception:
    """A receiver of a fake connection, and the open batch that it waits for."""

    def __init__(self, directory: Path, slot: FakeSlot, rows: int = 100, status_every_s: float = 3_600.0) -> None:
        self.slot = slot
        self.progress = Progress(Lsn(10))
        self.metrics = Metrics()
        self.tracing = Noted()
        self.spool = Spool(str(directory), 10**6)
        self.now = 1_000.0
        self.lag = Lag(lambda: self.now, lambda: self.now)
        self.lag.begin(Lsn(10), SILENCE_S)
        self.batch = OpenBatch(self.progress, Limits(rows, 10**6), self.lag, self.tracing, anyio.Event())
        self.receiver = Receiver(
            cast(Any, slot),
            SOURCE_END,
            assembler=Assembler({("public", "articles"): [SHAPE]}, Lsn(10)),
            spool=self.spool,
            open_batch=self.batch,
            progress=self.progress,
            lag=self.lag,
            metrics=self.metrics,
            tracing=self.tracing,
            status_every_s=status_every_s,
        )

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Sequence[Heard]]]:
        events = self.receiver.events()
        try:
            yield events
        finally:
            await events.aclose()

    async def until_dry(self) -> list[Heard]:
        """Return what is heard until nothing more has arrived."""
        heard: list[Heard] = []
        async with self.events() as events:
            async for some in events:
                heard += some
                if isinstance(heard[-1], Dry):
                    return heard
        raise AssertionError


def data(message: pg.PgoutputMessage, at: int = 0) -> XLogData:
    return XLogData(Lsn(at), Lsn(at), 0, encode(message))


def relation(xid: int | None = None) -> pg.Relation:
    columns = tuple(pg.Column(name == "id", name, 25, -1) for name in ("id", "body"))
    return pg.Relation(xid, 1, "public", "articles", "d", columns)


def insert(key: str, xid: int | None = None) -> pg.Insert:
    return pg.Insert(xid, 1, (key, "text"))


def begin(commit_lsn: int) -> pg.Begin:
    return pg.Begin(Lsn(commit_lsn), 5, 7)


def commit(commit_lsn: int) -> pg.Commit:
    return pg.Commit(0, Lsn(commit_lsn), Lsn(commit_lsn + 1), 5)


def upsert(key: str, lsn: int) -> Upsert:
    return Upsert(SHAPE, (key,), (key, "text"), 7, Lsn(lsn))


async def test_a_transaction_is_heard_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    slot = FakeSlot(data(begin(20), 20), data(relation()), data(insert("a"), 20), data(commit(20), 21))
    reception = Reception(tmp_path, slot)
    assert await reception.until_dry() == [
        Began(Lsn(20), 5),
        upsert("a", 20),
        Committed(Lsn(21), 5),
        Dry(heard_all=False),
    ]
    assert reception.progress.received == Lsn(21)


async def test_silence_says_something_only_once_all_is_heard_that_there_was_at_the_start(tmp_path: Path) -> None:
    assert await Reception(tmp_path, FakeSlot(Keepalive(Lsn(99), 0, False))).until_dry() == [
        Passed(Lsn(99), promptly=False),
        Dry(heard_all=False),
    ]
    assert await Reception(tmp_path, FakeSlot(Keepalive(SOURCE_END, 0, False))).until_dry() == [
        Passed(SOURCE_END, promptly=False),
        Dry(heard_all=True),
    ]


async def test_a_streamed_transaction_is_heard_whole_at_its_commit_without_what_was_rolled_back(tmp_path: Path) -> None:
    slot = FakeSlot(
        data(pg.StreamStart(7, True)),
        data(relation(7)),
        data(insert("a", 7)),
        data(insert("b", 8)),
        data(pg.StreamStop()),
        data(begin(20), 20),
        data(commit(20), 21),
        data(pg.StreamAbort(7, 8, None, None)),
        data(pg.StreamCommit(7, 0, Lsn(30), Lsn(31), 5), 31),
    )
    reception = Reception(tmp_path, slot)
    assert await reception.until_dry() == [
        *(Began(Lsn(20), 5), Committed(Lsn(21), 5)),
        *(Began(Lsn(30), 5), upsert("a", 30), Committed(Lsn(31), 5)),
        Dry(heard_all=False),
    ]
    assert (reception.spool.transactions, reception.spool.bytes) == (0, 0)


async def test_a_keepalive_inside_a_transaction_passes_nothing_and_its_reply_is_sent(tmp_path: Path) -> None:
    slot = FakeSlot(data(begin(20), 20), Keepalive(Lsn(50), 0, True))
    reception = Reception(tmp_path, slot)
    assert await reception.until_dry() == [Began(Lsn(20), 5), Dry(heard_all=False)]
    assert slot.statuses == [(Lsn(20), Lsn(10))]


async def test_the_trace_context_of_an_application_is_noted(tmp_path: Path) -> None:
    slot = FakeSlot(
        data(begin(20)),
        data(pg.Message(None, True, Lsn(15), PREFIX, b"00-1-2-01")),
        data(pg.Message(None, False, Lsn(15), PREFIX, b"of no transaction")),
        data(pg.Message(None, True, Lsn(15), "another", b"x")),
    )
    reception = Reception(tmp_path, slot)
    await reception.until_dry()
    assert reception.tracing.contents == [b"00-1-2-01"]


async def test_nothing_is_yielded_without_room_and_statuses_are_sent_meanwhile(tmp_path: Path) -> None:
    slot = FakeSlot(data(begin(20)), data(relation()), data(insert("a")), data(insert("b")), data(insert("c")))
    reception = Reception(tmp_path, slot, rows=2, status_every_s=0.0)
    keys: list[str] = []

    async def receive() -> None:
        async with reception.events() as events:
            async for some in events:
                for one in some:
                    if isinstance(one, Began):
                        reception.batch.begin(one)
                    elif isinstance(one, Upsert):
                        reception.batch.add(one)
                        keys.append(one.key[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        while len(slot.statuses) < 3:
            await anyio.lowlevel.checkpoint()
        assert keys == ["a", "b"]
        assert set(slot.statuses) == {(Lsn(10), Lsn(10))}
        assert isinstance(await reception.batch.next(), Batch)
        while keys != ["a", "b", "c"]:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def test_a_status_reports_as_flushed_only_what_is_committed(tmp_path: Path) -> None:
    slot = FakeSlot(data(begin(20), 20), data(commit(20), 21))
    reception = Reception(tmp_path, slot, status_every_s=0.0)
    await reception.until_dry()
    reception.progress.commit(Lsn(15))
    await reception.until_dry()
    assert slot.statuses == [(Lsn(21), Lsn(10)), (Lsn(21), Lsn(15))]


async def test_what_is_committed_in_the_same_wal_is_reported_once_the_source_has_sent_on(tmp_path: Path) -> None:
    slot = FakeSlot(data(begin(20), 20), data(commit(20), 21))
    reception = Reception(tmp_path, slot, status_every_s=0.0)
    await reception.until_dry()
    reception.progress.commit(Lsn(21), wal_end=Lsn(30))
    reception.progress.commit(None, wal_end=Lsn(40))
    await reception.until_dry()
    # Also in the middle of a transaction, in which nothing is passed by.
    slot.frames.extend([data(begin(38), 38), Keepalive(Lsn(40), 0, False)])
    await reception.until_dry()
    assert [durable for _, durable in slot.statuses] == [Lsn(10), Lsn(10), Lsn(21)]


@pytest.mark.parametrize("spooled", [False, True], ids=["whole", "streamed while it is open"])
async def test_statuses_are_sent_in_the_middle_of_a_large_transaction(tmp_path: Path, spooled: bool) -> None:
    xid = 7 if spooled else None
    start = [data(pg.StreamStart(7, True))] if spooled else [data(begin(20))]
    rows = [data(insert(str(key), xid)) for key in range(3 * TURN_MESSAGES)]
    slot = FakeSlot(*start, data(relation(xid)), *rows)
    reception = Reception(tmp_path, slot, rows=10**6, status_every_s=0.0)
    await reception.until_dry()
    # One for each turn, and one before the wait.
    assert len(slot.statuses) == 4
    reception.spool.clear()


async def test_a_moved_checkpoint_shortens_the_wait_for_the_next_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "NUDGE_S", math.inf)
    slot = FakeSlot()
    reception = Reception(tmp_path, slot)
    await reception.until_dry()
    reception.progress.commit(Lsn(15))
    async with reception.events() as events:
        await anext(events)
        with anyio.move_on_after(0):
            await anext(events)
    (wait,) = slot.waits
    assert wait <= 1.0


async def test_a_source_that_fell_quiet_is_nudged_at_growing_pauses_and_not_asked_to_reply(tmp_path: Path) -> None:
    slot = FakeSlot()
    slot.sent.set()
    async with Reception(tmp_path, slot).events() as events:
        for position in (98, 99):
            slot.frames.append(Keepalive(Lsn(position), 0, False))
            assert await anext(events) == (Passed(Lsn(position), promptly=False),)
            slot.sent = anyio.Event()
            slot.waits.clear()
            assert await anext(events) == (Dry(heard_all=False),)
            before = len(slot.statuses)
            for number in range(1, 5):
                assert await anext(events) == (Dry(heard_all=False),)
                assert len(slot.statuses) == before + number
            assert all(wait <= NUDGE_S * NUDGE_GROWTH**number for number, wait in enumerate(slot.waits))
            assert slot.waits[3] > NUDGE_S
            slot.sent.set()
    assert not any(slot.asked)


async def test_a_source_that_only_answers_is_not_nudged_for_that(tmp_path: Path) -> None:
    class Answering(FakeSlot):
        """Says how far it has sent before each sleep, as a walsender does whose client has not received so far."""

        async def send_status(self, received: Lsn, durable: Lsn, *, ask: bool = False) -> None:
            await super().send_status(received, durable, ask=ask)
            self.frames.append(Keepalive(Lsn(98), 0, False))
            self.sent.set()
            self.sent = anyio.Event()

    slot = Answering(Keepalive(Lsn(98), 0, False))
    async with Reception(tmp_path, slot).events() as events:
        with anyio.move_on_after(0.5):
            while True:
                await anext(events)
    assert 2 <= len(slot.statuses) <= 5


@pytest.mark.parametrize("messages", [TURN_MESSAGES - 1, TURN_MESSAGES, TURN_MESSAGES + 1])
@pytest.mark.parametrize("spooled", [False, True], ids=["whole", "streamed while it is open"])
async def test_a_source_that_fell_quiet_is_nudged_however_much_it_had_sent(
    tmp_path: Path, spooled: bool, messages: int
) -> None:
    xid = 7 if spooled else None
    rows = [data(insert(str(key), xid)) for key in range(messages - 3)]
    if spooled:
        end = [data(pg.StreamStop()), data(pg.StreamCommit(7, 0, Lsn(30), Lsn(31), 5), 31)]
        slot = FakeSlot(data(pg.StreamStart(7, True)), data(relation(7)), *rows, *end)
    else:
        slot = FakeSlot(data(begin(20), 20), data(relation()), *rows, data(commit(20), 21))
    reception = Reception(tmp_path, slot)
    await reception.until_dry()
    before = len(slot.statuses)
    with anyio.move_on_after(10):
        async with reception.events() as events:
            await anext(events)
            await anext(events)
    assert len(slot.statuses) > before


async def test_a_source_that_keeps_sending_is_not_nudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "NUDGE_S", 0.2)
    slot = FakeSlot(Keepalive(Lsn(98), 0, False))
    reception = Reception(tmp_path, slot)
    await reception.until_dry()
    await anyio.sleep(0.3)
    slot.frames.extend([data(begin(20)), data(relation())])
    slot.frames.extend(data(insert(str(key))) for key in range(3 * TURN_MESSAGES))
    await reception.until_dry()
    assert len(slot.statuses) == 1


async def test_the_last_status_waits_for_the_batch_in_hand(tmp_path: Path) -> None:
    slot = FakeSlot()
    reception = Reception(tmp_path, slot)
    reception.batch.begin(Began(Lsn(20), 5))
    reception.batch.add(upsert("a", 20))
    reception.batch.commit(Committed(Lsn(21), 5))
    reception.batch.note_dry(heard_all=True)
    batch = await reception.batch.next()
    assert isinstance(batch, Batch)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reception.receiver.finish)
        await anyio.wait_all_tasks_blocked()
        reception.progress.commit(Lsn(21))
        reception.batch.done(batch)
    assert slot.statuses[-1] == (Lsn(21), Lsn(21))


async def test_a_connection_that_ended_is_an_error(tmp_path: Path) -> None:
    slot = FakeSlot()
    slot.ended = True
    async with Reception(tmp_path, slot).events() as events:
        await anext(events)
        with pytest.raises(SourceUnavailable):
            await anext(events)


async def test_a_source_that_stays_silent_is_asked_to_reply_and_is_away_in_the_end(tmp_path: Path) -> None:
    slot = FakeSlot(Keepalive(Lsn(99), 0, False))
    reception = Reception(tmp_path, slot, status_every_s=0.0)
    async with reception.events() as events:
        for _ in range(3):
            await anext(events)
        # Nothing is asked while something comes, and from then on each time.
        assert slot.asked == [False, True]
        reception.now += SILENCE_S / 2
        await anext(events)
        reception.now += SILENCE_S
        with pytest.raises(SourceUnavailable, match="nothing has come from the source for 90 s"):
            await anext(events)


async def test_what_came_while_the_worker_had_no_turn_is_not_silence(tmp_path: Path) -> None:
    slot = FakeSlot()
    reception = Reception(tmp_path, slot, status_every_s=0.0)
    async with reception.events() as events:
        await anext(events)
        reception.now += 2 * SILENCE_S
        slot.polls_late = True
        slot.frames.append(Keepalive(Lsn(99), 0, False))
        assert await anext(events) == (Passed(Lsn(99), promptly=False),)
