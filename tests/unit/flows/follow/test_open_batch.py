"""The open batch: when the applier gets it, when the receiver has to wait, and which positions need no apply."""

from __future__ import annotations

import anyio
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import IndexFault
from cdcsync.flows.follow.open_batch import Limits, Look, OpenBatch, Position
from cdcsync.lsn import Lsn
from cdcsync.model.batch import Batch, PageEnd, PageRows
from cdcsync.model.lag import Lag
from cdcsync.model.progress import Progress
from cdcsync.model.rows import Shape, Upsert
from cdcsync.model.transactions import Began, Committed
from cdcsync.tracing import Tracing

pytestmark = pytest.mark.anyio

SHAPE = Shape(index="articles", table=QualifiedName("public", "articles"), key=("id",), carried=(), text=("body",))
GONE = IndexFault("column body is gone", index="articles")
ROWS = 3


class Opened:
    """An open batch of at most three rows, with what it tells."""

    def __init__(self) -> None:
        self.progress = Progress(Lsn(10))
        self.lag = Lag(lambda: 0.0, lambda: 0.0)
        self.stopping = anyio.Event()
        self.limits = Limits(ROWS, 10**6)
        self.batch = OpenBatch(self.progress, self.limits, self.lag, Tracing(), self.stopping)

    def begin(self, commit_lsn: int) -> None:
        self.batch.begin(Began(Lsn(commit_lsn), 5))

    def change(self, *keys: str) -> None:
        for key in keys:
            self.batch.add(Upsert(SHAPE, (key,), (key, "text"), 1, 20))

    def commit(self, end_lsn: int) -> None:
        self.batch.commit(Committed(Lsn(end_lsn), 5))

    def transaction(self, end_lsn: int, *keys: str) -> None:
        self.begin(end_lsn - 1)
        self.change(*keys)
        self.commit(end_lsn)

    async def offered(self) -> Batch | Position | Look | None:
        """Return what the applier gets now; None if there is nothing."""
        with anyio.move_on_after(0):
            return await self.batch.next()
        return None

    async def next(self) -> Batch | Lsn | None:
        """Return what is to be committed now, whoever waits for it; None if there is nothing."""
        found = await self.offered()
        assert not isinstance(found, Look)
        if isinstance(found, Position):
            return found.lsn if found.due else None
        return found

    async def take(self) -> Batch:
        taken = await self.next()
        assert isinstance(taken, Batch)
        return taken

    def apply(self, batch: Batch) -> None:
        if batch.end_lsn is not None:
            self.progress.commit(batch.end_lsn)
        self.batch.done(batch)


@pytest.fixture
async def opened() -> Opened:
    return Opened()


async def test_the_first_batches_of_a_burst_end_with_a_transaction_and_grow_until_the_stream_is_dry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdcsync.flows.follow.open_batch.BURST_ROWS", 1)
    opened = Opened()
    opened.limits.rows = 4
    sizes = []
    for position in range(20, 90, 10):
        opened.batch.note_more()
        opened.begin(position - 1)
        opened.change(f"{position}a")
        assert await opened.next() is None or opened.batch.full  # a transaction is not divided
        opened.change(f"{position}b")
        opened.commit(position)
        if opened.batch.full:
            taken = await opened.take()
            sizes.append(taken.rows)
            opened.apply(taken)
    assert sizes == [2, 2, 4, 4]
    opened.batch.note_dry(heard_all=True)
    assert (await opened.take()).rows == 2
    opened.batch.note_more()
    opened.transaction(100, "a")
    assert opened.batch.full


async def test_a_transaction_is_taken_once_the_stream_is_dry(opened: Opened) -> None:
    opened.transaction(20, "a")
    assert await opened.next() is None
    opened.batch.note_dry(heard_all=True)
    batch = await opened.take()
    assert (batch.rows, batch.end_lsn, batch.ahead) == (1, Lsn(20), None)
    assert opened.batch.applying
    opened.apply(batch)
    assert not opened.batch.applying
    assert await opened.next() is None


async def test_what_has_arrived_since_it_was_dry_is_waited_for(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=True)
    opened.batch.note_more()
    opened.transaction(20, "a")
    assert await opened.next() is None


async def test_what_has_waited_long_enough_is_taken_though_more_keeps_coming_but_never_half_a_transaction(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.batch.note_more()
    opened.transaction(20, "a")
    assert await opened.next() is None
    monkeypatch.setattr("cdcsync.flows.follow.open_batch.HELD_S", 0.0)
    opened.begin(29)
    opened.change("b")
    assert await opened.next() is None
    opened.commit(30)
    opened.begin(39)  # of tables that no index reads
    taken = await opened.take()
    assert (taken.end_lsn, taken.partial, taken.ahead, taken.rows) == (30, False, None, 2)
    opened.apply(taken)
    opened.commit(40)
    assert await opened.next() == 40


async def test_an_unfinished_transaction_is_not_taken_unless_there_is_no_more_room(opened: Opened) -> None:
    opened.begin(30)
    opened.change("a", "b")
    opened.batch.note_dry(heard_all=True)
    assert await opened.next() is None
    opened.change("c")
    assert opened.batch.full
    batch = await opened.take()
    assert (batch.partial, batch.end_lsn, batch.ahead) == (True, None, Lsn(31))
    assert not opened.batch.full


async def test_the_receiver_waits_while_there_is_no_room_and_is_woken_when_the_batch_is_taken(opened: Opened) -> None:
    opened.transaction(20, *"abc")
    woken = []

    async def receive() -> None:
        while opened.batch.full:
            await opened.batch.wait_for_applier(3_600)
        woken.append("taken")
        await opened.batch.wait_for_applier(3_600)
        woken.append("done")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        assert not woken
        batch = await opened.take()
        await anyio.wait_all_tasks_blocked()
        assert woken == ["taken"]
        opened.apply(batch)
    assert woken == ["taken", "done"]


async def test_the_applier_is_woken_when_there_is_something_to_do(opened: Opened) -> None:
    taken: list[Batch | Position | Look] = []

    async def apply() -> None:
        taken.append(await opened.batch.next())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(apply)
        await anyio.wait_all_tasks_blocked()
        opened.transaction(20, "a")
        opened.batch.note_dry(heard_all=True)
    assert len(taken) == 1


async def test_the_applier_looks_once_after_its_session_and_before_it_takes_more(opened: Opened) -> None:
    opened.transaction(20, "a")
    opened.batch.note_dry(heard_all=True)
    opened.batch.look()
    opened.batch.look()
    assert await opened.offered() == Look()
    assert isinstance(await opened.offered(), Batch)
    assert await opened.offered() is None


async def test_a_position_without_changes_is_written_alone_and_only_once(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=True)
    opened.transaction(20)
    assert await opened.next() == Lsn(20)
    opened.progress.commit(Lsn(20))
    assert await opened.next() is None
    assert opened.progress.received == Lsn(20)


async def test_a_position_is_not_written_before_the_changes_that_came_ahead_of_it(opened: Opened) -> None:
    opened.transaction(20, "a")
    opened.batch.pass_by(Lsn(25), promptly=False)
    opened.transaction(30)
    opened.batch.note_dry(heard_all=True)
    batch = await opened.take()
    # An empty transaction behind the changes goes with them, a keepalive's position does not.
    assert batch.end_lsn == Lsn(30)
    assert opened.progress.received == Lsn(10)


async def test_everything_is_held_up_to_a_position_that_was_passed_by_once_what_came_before_it_is_applied(
    opened: Opened,
) -> None:
    assert opened.batch.held == 10
    opened.batch.pass_by(Lsn(15), promptly=False)
    assert opened.batch.held == 15
    opened.transaction(20, "a")
    opened.batch.pass_by(Lsn(25), promptly=False)
    assert opened.batch.held == 15
    opened.batch.note_dry(heard_all=True)
    taken = await opened.take()
    opened.batch.pass_by(Lsn(30), promptly=False)
    assert opened.batch.held == 10, "the checkpoint, as long as a batch is being applied"
    opened.apply(taken)
    assert opened.batch.held == 30


async def test_a_position_is_not_written_inside_a_transaction(opened: Opened) -> None:
    opened.batch.pass_by(Lsn(20), promptly=True)
    opened.begin(30)
    opened.batch.note_dry(heard_all=True)
    assert await opened.next() is None


async def test_positions_are_written_less_and_less_often_unless_the_source_waits(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=True)
    opened.batch.pass_by(Lsn(20), promptly=False)
    assert await opened.next() == Lsn(20)
    opened.progress.commit(Lsn(20))
    opened.batch.pass_by(Lsn(30), promptly=False)
    assert await opened.next() is None
    opened.batch.pass_by(Lsn(31), promptly=True)
    assert await opened.next() == Lsn(31)


async def test_a_position_that_is_not_due_is_offered_to_whoever_waits_for_it(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.batch.pass_by(Lsn(20), promptly=True)
    opened.batch.note_dry(heard_all=True)
    assert await opened.offered() == Position(Lsn(20), due=True)
    opened.progress.commit(Lsn(20))
    monkeypatch.setattr("cdcsync.flows.follow.open_batch.OFFER_S", 0.0)
    assert await opened.offered() is None

    opened.batch.pass_by(Lsn(30), promptly=False)
    assert await opened.offered() == Position(Lsn(30), due=False)
    assert await opened.offered() == Position(Lsn(30), due=False)

    opened.begin(40)
    assert await opened.offered() is None


async def test_a_pause_goes_with_the_next_batch_even_if_that_has_no_changes(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=True)
    opened.batch.pause(GONE)
    batch = await opened.take()
    assert (batch.paused, batch.partial) == ({"articles": GONE}, False)


async def test_a_pause_inside_a_transaction_waits_for_its_end(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=True)
    opened.begin(20)
    opened.batch.pause(GONE)
    assert await opened.next() is None
    opened.commit(21)
    batch = await opened.take()
    assert (set(batch.paused), batch.end_lsn) == ({"articles"}, Lsn(21))


async def test_the_end_of_a_transaction_with_a_stored_pause_is_committed_even_if_nothing_came_after_it(
    opened: Opened,
) -> None:
    opened.begin(20)
    opened.batch.pause(GONE)
    opened.change(*"abc")
    opened.apply(await opened.take())
    opened.commit(21)
    opened.batch.note_dry(heard_all=True)
    assert (await opened.take()).end_lsn == Lsn(21)


async def test_nothing_is_taken_once_the_worker_is_to_stop(opened: Opened) -> None:
    opened.transaction(20, *"abc")
    opened.batch.note_dry(heard_all=True)
    opened.stopping.set()
    assert await opened.next() is None


async def test_a_page_is_taken_with_its_mark(opened: Opened) -> None:
    end = PageEnd(backfill_id=1, phase="rows", cursor=("a",), rows=1, done=False)
    row = Upsert(SHAPE, ("a",), ("a", "text"), 0, 20)
    opened.batch.add_page(PageRows(SHAPE, [row], end, "mark"))
    opened.batch.note_dry(heard_all=True)
    batch = await opened.take()
    assert (batch.pages, batch.marks, batch.rows) == ([end], ["mark"], 1)


async def test_a_mark_without_rows_is_committed_so_that_it_can_be_waited_for(opened: Opened) -> None:
    opened.batch.add_page(PageRows(SHAPE, (), None, "mark"))
    opened.batch.note_dry(heard_all=True)
    batch = await opened.take()
    assert (batch.pages, batch.marks) == ([], ["mark"])


async def test_the_lag_is_that_of_the_batch_in_hand_until_it_is_in_the_target(opened: Opened) -> None:
    opened.batch.note_dry(heard_all=False)
    assert not opened.lag.caught_up
    opened.batch.note_dry(heard_all=True)
    assert opened.lag.caught_up
    opened.begin(19)
    opened.change("a")
    assert not opened.lag.caught_up
    opened.commit(20)
    opened.batch.note_dry(heard_all=True)
    batch = await opened.take()
    assert not opened.lag.caught_up
    opened.apply(batch)
    assert opened.lag.caught_up


async def test_nothing_is_left_if_all_was_heard_and_the_batch_in_hand_is_the_last(opened: Opened) -> None:
    opened.transaction(20, "a")
    opened.batch.note_dry(heard_all=False)
    await opened.take()
    assert not opened.batch.nothing_left
    opened.batch.note_dry(heard_all=True)
    assert opened.batch.nothing_left
    opened.transaction(30, "b")
    assert not opened.batch.nothing_left


async def test_while_a_batch_is_in_hand_the_next_one_is_taken_only_once_it_is_full(opened: Opened) -> None:
    opened.transaction(20, "a")
    opened.batch.note_dry(heard_all=True)
    first = await opened.take()
    opened.transaction(30, "b", "c")
    with anyio.move_on_after(0):
        await opened.batch.following()
        raise AssertionError("it could still grow")
    taken: list[Batch] = []

    async def take() -> None:
        taken.append(await opened.batch.following())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        opened.transaction(40, "d")
        await opened.batch.wait_for_applier(0)
    (second,) = taken
    assert (second.rows, second.end_lsn) == (3, Lsn(40))
    assert not opened.batch.nothing_left
    opened.apply(first)
    assert opened.batch.applying
    assert opened.batch.nothing_left
    opened.apply(second)
    assert not opened.batch.applying


async def test_no_batch_is_prepared_ahead_once_the_worker_is_to_stop(opened: Opened) -> None:
    opened.transaction(20, *"abc")
    opened.stopping.set()
    with anyio.move_on_after(0):
        await opened.batch.following()
        raise AssertionError
