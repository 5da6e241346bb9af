"""The stream: what becomes of each event, until it is told to stop or an index is paused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import msgspec
import pytest

from cdcsync.errors import IndexFault, SourceUnavailable
from cdcsync.flows.follow.accounts import Accounts
from cdcsync.flows.follow.apply import Applier
from cdcsync.flows.follow.open_batch import Limits
from cdcsync.flows.follow.stream import Stream
from cdcsync.lsn import INVALID_LSN, Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, PageEnd, PageRows
from cdcsync.model.changeset import ChangeSet
from cdcsync.model.lag import Lag
from cdcsync.model.rows import Upsert
from cdcsync.model.transactions import MARK_PREFIX, Mark
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput import messages as pg
from cdcsync.pgoutput.frames import Keepalive, XLogData
from cdcsync.source.spool import Spool
from cdcsync.tracing import Tracing
from tests.support.indexes import make_spec
from tests.unit.flows.follow.test_receive import FakeSlot, begin, commit, data, insert, relation

pytestmark = pytest.mark.anyio

SPEC = msgspec.structs.replace(make_spec(carried={}), table_oid=1)
CHECKPOINT, SOURCE_END = Lsn(10), Lsn(20)
BEFORE = Snapshot(1, 2, frozenset())


class FakeTarget:
    """A session that takes whatever comes, with the preparer of its one index; it can be made to wait."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.checkpoints: list[Lsn | None] = []
        self.paused: list[str] = []
        self.pages: list[PageEnd] = []
        self.caught_up: list[bool] = []
        self.rewrote: list[bool] = []
        self.released = anyio.Event()
        self.released.set()

    async def open_writers(self, indexes: object) -> None:
        pass

    async def ensure(self, specs: Any) -> None:
        await anyio.lowlevel.checkpoint()

    def writer(self, index: str) -> None: ...

    looks_ahead = False
    wal_end: Lsn | None = None

    async def prepare(self, changes: Any, look_ups: Any) -> Any:
        return changes

    async def apply(self, changes: Any, pages: Any, checkpoint: Lsn | None, **rest: Any) -> dict[str, Any]:
        await self.released.wait()
        for of_index in changes.values():
            self.keys += [key[0] for key in (*of_index.live, *of_index.filled)]
            self.rewrote.append(of_index.rewrite)
        self.pages += pages
        self.checkpoints.append(checkpoint)
        self.paused += rest.get("paused") or {}
        self.caught_up.append(rest["caught_up"])
        return {}


class Preparing(FakeTarget):
    """One beside which the next batch is prepared while a batch is written."""

    looks_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.prepared = 0

    async def look_ups(self, index: str) -> None: ...

    async def prepare(self, changes: Any, look_ups: Any, before: Any = None) -> Any:
        self.prepared += 1
        return ChangeSet(False, list(changes.live), [], [], {}, new=True)

    async def apply(self, changes: Any, pages: Any, checkpoint: Lsn | None, **rest: Any) -> dict[str, Any]:
        await self.released.wait()
        self.keys += [key for of_index in changes.values() for (key,) in of_index.deleted]
        return {}


class Followed:
    """A stream over a fake connection into a fake target."""

    def __init__(
        self,
        directory: Path,
        *frames: XLogData | Keepalive,
        target: FakeTarget | None = None,
        batch_rows: int = 100,
    ) -> None:
        self.slot = FakeSlot(*frames)
        self.target = target or FakeTarget()
        self.one_wal = False
        self.stopping = anyio.Event()
        self.deliveries = Deliveries()
        self.deliveries.record()
        self.pages: dict[str, PageRows] = {}
        self.applied: list[Batch] = []
        self.lag = Lag(lambda: 0.0, anyio.current_time)
        metrics, tracing = Metrics(), Tracing()
        loops: Any = {"articles": SimpleNamespace()}
        self.stream = Stream(
            specs=[SPEC],
            applier=Applier(cast(Any, self.target), [SPEC], {"articles": cast(Any, self.target)}, metrics, tracing),
            accounts=Accounts(metrics, loops),
            deliveries={"articles": self.deliveries},
            page_at=lambda mark: self.pages.get(mark.content),
            applying=lambda _: None,
            applied=lambda batch, _: self.applied.append(batch),
            spool=Spool(str(directory), 10**6),
            metrics=metrics,
            tracing=tracing,
            lag=self.lag,
            limits=Limits(batch_rows, 10**6),
            stopping=self.stopping,
        )

    async def follow(self) -> list[IndexFault]:
        return await self.stream.follow(
            cast(Any, self.slot),
            CHECKPOINT,
            SOURCE_END,
            one_wal=self.one_wal,
            status_every_s=3_600.0,
            silence_s=3_600.0,
        )

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Callable[[Callable[[], object]], Any]]:
        """Follow for the time of a block, which waits for what it expects; then stop in order."""

        async def until(expected: Callable[[], object]) -> None:
            with anyio.fail_after(60):
                while not expected():
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.follow)
            yield until
            self.stopping.set()


def transaction(at: int, *messages: pg.PgoutputMessage) -> list[XLogData]:
    return [data(begin(at), at), data(relation()), *map(data, messages), data(commit(at), at + 1)]


def mark(content: str) -> pg.Message:
    return pg.Message(None, True, Lsn(5), MARK_PREFIX, content.encode())


async def test_a_transaction_reaches_the_target_is_acknowledged_and_remembered_for_pages(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a"), insert("b")))
    async with followed.following() as until:
        await until(lambda: followed.target.keys)
        await until(lambda: followed.lag.caught_up)
    assert followed.target.keys == ["a", "b"]
    assert (followed.target.checkpoints[0], followed.target.caught_up[0]) == (Lsn(31), True)
    assert followed.stream.checkpoint == Lsn(31)
    assert followed.slot.statuses[-1] == (Lsn(31), Lsn(31))
    assert followed.deliveries.hides(("a",), BEFORE)
    assert [batch.transactions for batch in followed.applied] == [1]


async def test_a_target_in_the_same_wal_is_acknowledged_from_its_next_commit_on(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a")))
    followed.one_wal, followed.target.wal_end = True, Lsn(35)
    async with followed.following() as until:
        await until(lambda: followed.stream.checkpoint == Lsn(31))
        followed.slot.frames.append(Keepalive(Lsn(40), 0, True))
        followed.slot.sent.set()
        await until(lambda: followed.stream.checkpoint == Lsn(40))
    assert {durable for _, durable in followed.slot.statuses} <= {INVALID_LSN, CHECKPOINT, Lsn(31)}
    assert followed.slot.statuses[-1][1] == Lsn(31)


async def test_the_end_of_a_transaction_of_other_tables_is_committed_alone(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30))
    async with followed.following() as until:
        await until(lambda: followed.stream.checkpoint == 31)
    assert (followed.target.keys, followed.applied) == ([], [])


async def test_the_rows_of_a_page_are_committed_at_their_mark(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, mark("unknown"), mark("page 1")))
    end = PageEnd(backfill_id=1, phase="rows", cursor=("a",), rows=1, done=False)
    row = Upsert(SPEC.shape, ("a",), ("a", "text"), 0, 5)
    followed.pages["page 1"] = PageRows(SPEC.shape, [row], end, "page 1", new=True)
    async with followed.following() as until:
        await until(lambda: followed.target.pages)
    assert (followed.target.keys, followed.target.pages) == (["a"], [end])
    assert followed.applied[0].marks == ["page 1"]
    assert Mark("page 1", Lsn(5)).content in followed.pages


@pytest.mark.parametrize("rewriting", [True, False])
async def test_live_changes_are_chunked_again_while_pages_are_whose_rows_they_may_overtake(
    tmp_path: Path, rewriting: bool
) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a")))
    followed.deliveries.record(rewriting=rewriting)
    async with followed.following() as until:
        await until(lambda: followed.target.keys)
    assert followed.target.rewrote == [rewriting]
    followed.deliveries.stop()
    assert not followed.deliveries.rewriting


async def test_an_index_that_cannot_follow_its_table_ends_the_following_once_its_pause_is_stored(
    tmp_path: Path,
) -> None:
    without_body = pg.Relation(None, 1, "public", "articles", "d", (pg.Column(True, "id", 25, -1),))
    later = transaction(50, insert("never"))
    followed = Followed(tmp_path, *transaction(30, without_body), *transaction(40), *later)
    with anyio.fail_after(60):
        (why,) = await followed.follow()
    assert why.index == "articles"
    assert followed.target.paused == ["articles"]
    assert followed.target.keys == []


async def test_a_pause_from_outside_ends_the_following_too(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a")))
    gone = IndexFault("the table was dropped", index="articles")
    found: list[IndexFault] = []

    async def follow() -> None:
        found.extend(await followed.follow())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        while not followed.target.keys:
            await anyio.lowlevel.checkpoint()
        followed.stream.pause(gone)
    assert found == [gone]
    assert followed.target.paused == ["articles"]


async def test_a_worker_that_is_to_stop_finishes_the_batch_in_hand_and_reports_it(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a")))
    followed.target.released = anyio.Event()
    async with followed.following() as until:
        await until(lambda: not followed.slot.frames)
        await anyio.wait_all_tasks_blocked()
        followed.stopping.set()
        await anyio.wait_all_tasks_blocked()
        assert followed.target.checkpoints == []
        followed.target.released.set()
    assert followed.slot.statuses[-1] == (Lsn(31), Lsn(31))


async def test_a_source_that_shuts_down_is_let_go_however_long_a_write_takes(tmp_path: Path) -> None:
    followed = Followed(tmp_path, *transaction(30, insert("a")))
    followed.target.released = anyio.Event()

    async def follow() -> None:
        with pytest.raises(SourceUnavailable, match="shutting down"):
            await followed.follow()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        followed.stream.leave()
        with anyio.move_on_after(30):
            while not followed.slot.closed:
                await anyio.lowlevel.checkpoint()
        closed, keys = followed.slot.closed, list(followed.target.keys)
        followed.target.released.set()
    assert (closed, keys) == (True, [])
    assert followed.stream.checkpoint == Lsn(31)  # what had begun is finished, and counts


async def test_a_worker_that_is_to_stop_also_finishes_the_batch_that_is_being_prepared_and_takes_no_other(
    tmp_path: Path,
) -> None:
    changes = [frame for number, key in enumerate("abcde") for frame in transaction(30 + 10 * number, insert(key))]
    target = Preparing()
    followed = Followed(tmp_path, *changes, target=target, batch_rows=1)
    target.released = anyio.Event()
    async with followed.following() as until:
        await until(lambda: target.prepared == 2)
        await anyio.wait_all_tasks_blocked()
        followed.stopping.set()
        await anyio.wait_all_tasks_blocked()
        assert target.keys == []
        target.released.set()
    assert target.keys == ["a", "b"]
    assert target.prepared == 2
    assert followed.slot.statuses[-1][1] == followed.stream.checkpoint


async def test_a_connection_that_breaks_ends_the_following_and_the_next_one_begins_with_an_empty_batch(
    tmp_path: Path,
) -> None:
    half = transaction(30, insert("a"))[:-1]
    followed = Followed(tmp_path, *half)
    followed.slot.ended = True
    with pytest.raises(SourceUnavailable):
        await followed.follow()
    assert not followed.lag.heard_lately

    followed.slot.ended = False
    followed.slot.frames.extend(transaction(40, insert("b")))
    async with followed.following() as until:
        await until(lambda: followed.target.keys)
    assert followed.target.keys == ["b"]


@pytest.mark.parametrize("when", ["before the first connection", "while it breaks"])
async def test_a_pause_from_outside_outlives_the_connection_whose_batch_was_to_store_it(
    tmp_path: Path, when: str
) -> None:
    followed = Followed(tmp_path)
    gone = IndexFault("the table was dropped", index="articles")
    if when == "while it breaks":
        followed.slot.frames.extend(transaction(30, insert("a"))[:-1])
        async with anyio.create_task_group() as tasks:

            async def follow() -> None:
                with pytest.raises(SourceUnavailable):
                    await followed.follow()

            tasks.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            followed.stream.pause(gone)
            followed.stream.leave()
    else:
        followed.stream.pause(gone)

    followed.slot.frames.extend(transaction(40, insert("b")))
    with anyio.fail_after(60):
        assert await followed.follow() == [gone]

    assert followed.target.paused == ["articles"]
