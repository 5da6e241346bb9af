"""The applier: what it does with a server that is away, and with an index that cannot take its changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import anyio
import anyio.lowlevel
import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import (
    CdcsyncError,
    LeaseLost,
    SchemaChanged,
    SetupError,
    SourceUnavailable,
    TargetRewound,
    TargetUnavailable,
)
from cdcsync.flows.follow.apply import MOST_REFUSED, Applier, Outcome
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, IndexChanges
from cdcsync.model.changeset import Applied, ChangeSet
from cdcsync.model.links import Touch
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import Shape, UnreadRow, Upsert
from cdcsync.model.transactions import Committed
from cdcsync.tracing import Tracing

pytestmark = pytest.mark.anyio

TABLE = QualifiedName("public", "articles")
SHAPES = [Shape(index=name, table=TABLE, key=("id",), carried=(), text=("body",)) for name in ("articles", "notes")]
DONE = Applied(chunks=1, deleted=0, reused=0, inline=0, queued=1)


class Target:
    """A session that commits, or raises what it is given to raise first; and the preparers of its indexes."""

    def __init__(self, *failures: CdcsyncError) -> None:
        self.failures = list(failures)
        self.refused: dict[str, CdcsyncError] = {}
        self.prepared: list[str] = []
        self.opened = 0
        self.commits: list[tuple[set[str], Lsn | None, Mapping[str, Pause], bool]] = []
        self.can_prepare_ahead = True
        self.ahead: list[tuple[str, str]] = []
        """By what was looked up, and behind what, for batches that were prepared while another was written."""
        self.staged: list[Sequence[bytes] | None] = []
        self.looked_ahead = 0
        self.waits_for_all_ahead = False

    async def ensure(self, specs: Sequence[Any]) -> None:
        self.opened += 1

    def writer(self, index: str) -> Target:
        return self

    def stage(self, changes: ChangeSet) -> Iterator[bytes]:
        yield changes.deleted[0][0].encode()

    async def look_ups(self, index: str) -> str:
        return f"{index} beside"

    async def prepare(self, changes: IndexChanges, look_ups: Any, before: ChangeSet | None = None) -> ChangeSet:
        index = changes.shape.index
        self.prepared.append(index)
        if before is not None:
            self.looked_ahead += 1
            self.ahead.append((look_ups, before.deleted[0][0]))
        if index in self.refused:
            raise self.refused[index]
        return ChangeSet(False, [(index,)], [], [], {})

    async def apply(
        self,
        changes: Mapping[str, ChangeSet],
        pages: Sequence[Any],
        checkpoint: Lsn | None,
        *,
        paused: Mapping[str, Pause] | None = None,
        caught_up: bool,
        **_: Any,
    ) -> dict[str, Applied]:
        before = self.looked_ahead
        while self.waits_for_all_ahead and self.looked_ahead < before + len(changes):
            await anyio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        self.commits.append((set(changes), checkpoint, paused or {}, caught_up))
        self.staged += [one.staged for one in changes.values()]
        return dict.fromkeys(changes, DONE)

    @property
    def looks_ahead(self) -> bool:
        return self.can_prepare_ahead


def applier(target: Target, metrics: Metrics | None = None) -> Applier:
    preparers = cast(Any, {shape.index: target for shape in SHAPES})
    return Applier(cast(Any, target), [], preparers, metrics or Metrics(), Tracing(), first_wait_s=0.0)


def a_batch() -> Batch:
    batch = Batch()
    for shape in SHAPES:
        batch.add(Upsert(shape, ("a",), ("a", "text"), 1, 10))
    batch.commit(Committed(Lsn(20), 5))
    return batch


async def test_a_batch_is_committed_with_its_position_and_what_it_did_is_returned() -> None:
    target = Target()
    outcomes: list[Outcome] = []
    await applier(target).apply(a_batch(), caught_up=lambda: True, committed=outcomes.append)
    assert target.commits == [({"articles", "notes"}, Lsn(20), {}, True)]
    (outcome,) = outcomes
    assert outcome.applied == {"articles": DONE, "notes": DONE}
    assert set(outcome.changes) == {"articles", "notes"}


async def test_the_same_batch_is_prepared_and_committed_again_for_as_long_as_a_server_is_away() -> None:
    target = Target(TargetUnavailable("away"), TargetUnavailable("away"), SourceUnavailable("away"))
    metrics = Metrics()
    await applier(target, metrics).apply(a_batch(), caught_up=lambda: False)
    assert target.commits == [({"articles", "notes"}, Lsn(20), {}, False)]
    assert (target.opened, len(target.prepared)) == (4, 8)
    assert metrics.reconnects.labels("target")._value.get() == 2


async def test_an_index_that_cannot_take_its_changes_is_paused_with_the_batch_and_the_others_get_theirs() -> None:
    target = Target()
    target.refused["articles"] = error = SchemaChanged("its key is gone", index="articles", hint="put it back")
    batch = a_batch()
    outcomes: list[Outcome] = []
    await applier(target).apply(batch, caught_up=lambda: True, committed=outcomes.append)
    assert target.commits == [({"notes"}, Lsn(20), {"articles": Pause("its key is gone", "put it back")}, True)]
    assert batch.paused == {"articles": error}
    assert [set(one.applied) for one in outcomes] == [{"notes"}]


async def test_a_value_that_the_target_refuses_pauses_its_index_too() -> None:
    target = Target(SchemaChanged("the target refuses a value", index="notes"))
    batch = a_batch()
    await applier(target).apply(batch, caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


def refused(key: str, cause: Exception) -> SchemaChanged:
    error = SchemaChanged("the target refuses a value", index="notes")
    error.key, error.__cause__ = (key,), cause
    return error


@pytest.mark.parametrize("more", [0, 1])
async def test_rows_with_values_that_the_target_cannot_hold_are_left_out_unless_there_are_many(more: int) -> None:
    keys = [f"row {at}" for at in range(MOST_REFUSED + 1)]
    target = Target(*(refused(key, psycopg.errors.UntranslatableCharacter()) for key in keys[: MOST_REFUSED + more]))
    batch = a_batch()
    for key in keys:
        batch.add(Upsert(SHAPES[1], (key,), (key, "text"), 1, 10))
    notes = batch.indexes["notes"]
    await applier(target).apply(batch, caught_up=lambda: True)

    out = [change for change in notes.live.values() if isinstance(change, UnreadRow)]
    assert [(one.key, one.row, one.reason) for one in out] == [
        ((key,), (key, None), "the target refuses a value") for key in keys[:MOST_REFUSED]
    ]
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [
        ({"articles"}, {"notes"}) if more else ({"articles", "notes"}, set())
    ]


@pytest.mark.parametrize("again", [False, True])
async def test_a_document_is_left_out_as_well_if_a_related_row_has_such_a_value(
    again: bool,
) -> None:
    target = Target(*[refused("of the customer", psycopg.errors.UntranslatableCharacter())] * (1 + again))
    batch = a_batch()
    for lsn in (30, 20):
        batch.add(Touch(SHAPES[1], 0, ((str(lsn),),), 7, lsn))
    notes = batch.indexes["notes"]
    await applier(target).apply(batch, caught_up=lambda: True)

    change = notes.live["of the customer",]
    assert isinstance(change, UnreadRow)
    assert (change.row, change.lsn, change.reason) == (("of the customer", None), 30, "the target refuses a value")
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [
        ({"articles"}, {"notes"}) if again else ({"articles", "notes"}, set())
    ]


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        ("a", psycopg.errors.CheckViolation()),  # a constraint may concern every row
        ("elsewhere", psycopg.errors.UntranslatableCharacter()),
    ],
)
async def test_what_is_no_matter_of_a_row_of_the_batch_pauses_the_index(key: str, cause: Exception) -> None:
    target = Target(refused(key, cause))
    await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


async def test_a_row_that_is_refused_even_without_its_values_pauses_the_index() -> None:
    target = Target(*[refused("a", psycopg.errors.UntranslatableCharacter())] * 2)
    await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


@pytest.mark.parametrize("error", [LeaseLost("another worker"), TargetRewound("an older state")])
async def test_a_worker_that_must_not_write_what_it_has_in_hand_does_not_try_again(error: CdcsyncError) -> None:
    target = Target(error)
    with pytest.raises(type(error)):
        await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert not target.commits


async def test_a_position_is_committed_alone_or_not_at_all_while_the_target_is_away() -> None:
    target = Target(TargetUnavailable("away"))
    made = applier(target)
    assert not await made.note_position(Lsn(30), caught_up=True)
    assert await made.note_position(Lsn(30), caught_up=True)
    assert target.commits == [(set(), Lsn(30), {}, True)]


class Following:
    """A full batch that follows the one in hand."""

    def __init__(self) -> None:
        self.batch = a_batch()
        self.taken = 0

    async def __call__(self) -> Batch:
        self.taken += 1
        return self.batch


async def test_a_full_batch_is_prepared_while_the_one_before_it_is_written() -> None:
    target = Target()
    target.waits_for_all_ahead = True
    made, following = applier(target), Following()
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert made.following is following.batch
    assert target.ahead == [("articles beside", "articles"), ("notes beside", "notes")]
    assert len(target.prepared) == 4
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    assert (len(target.prepared), len(target.commits)) == (4, 2)
    assert target.staged == [None, None, [b"articles"], [b"notes"]]


async def test_a_batch_that_does_not_follow_at_once_is_not_waited_for() -> None:
    target = Target()
    made = applier(target)
    await made.apply(a_batch(), caught_up=lambda: True)
    assert (made.following, target.ahead) == (None, [])


async def test_what_was_prepared_behind_a_batch_that_failed_is_prepared_again() -> None:
    target = Target(TargetUnavailable("away"))
    target.waits_for_all_ahead = True
    made, following = applier(target), Following()
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    # The batch itself twice, and the one behind it each time.
    assert (following.taken, len(target.prepared), len(target.ahead)) == (1, 8, 4)
    assert made.following is following.batch


async def test_what_an_index_that_is_paused_meanwhile_would_hold_is_not_relied_on() -> None:
    target = Target(SchemaChanged("the target refuses a value", index="notes"))
    target.waits_for_all_ahead = True
    made, following = applier(target), Following()
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert target.ahead[2:] == [("articles beside", "articles")]


async def test_a_batch_that_is_to_be_written_anew_by_now_is_prepared_again() -> None:
    target = Target()
    target.waits_for_all_ahead = True
    made, following = applier(target), Following()
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    following.batch.indexes["notes"].rewrite = True
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    assert len(target.prepared) == 6


async def test_an_index_whose_equal_keys_may_be_written_differently_is_prepared_only_after_the_batch_before() -> None:
    target = Target()
    target.can_prepare_ahead = False
    made, following = applier(target), Following()
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert (made.following, following.taken, target.ahead) == (None, 0, [])


async def test_a_batch_that_cannot_be_prepared_ahead_is_prepared_after_the_one_before_it() -> None:
    target = Target()
    made, following = applier(target), Following()

    async def away(index: str) -> str:
        target.looked_ahead += len(SHAPES)
        raise SetupError("too many connections for role")

    target.waits_for_all_ahead = True
    target.look_ups = away  # type: ignore[method-assign]
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert made.following is following.batch
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    assert (len(target.prepared), len(target.commits)) == (4, 2)


async def test_what_is_committed_is_told_of_before_the_next_batch_is_prepared_and_that_is_not_done_twice() -> None:
    target = Target()
    made, following = applier(target), Following()
    told = anyio.Event()

    async def slow(index: str) -> str:
        target.looked_ahead += len(SHAPES)
        await told.wait()
        await anyio.lowlevel.checkpoint()
        return f"{index} beside"

    target.waits_for_all_ahead = True
    target.look_ups = slow  # type: ignore[method-assign]
    with anyio.fail_after(10):
        await made.apply(a_batch(), caught_up=lambda: False, following=following, committed=lambda _: told.set())
    assert (len(target.prepared), len(target.commits)) == (4, 1)
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    assert (len(target.prepared), len(target.commits)) == (4, 2)


@pytest.mark.parametrize("away", [SetupError("too many connections for role"), None], ids=["refused", "a pooler waits"])
async def test_a_connection_for_look_ups_that_is_not_to_be_had_is_tried_for_again_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, away: CdcsyncError | None
) -> None:
    monkeypatch.setattr("cdcsync.flows.follow.apply.CONNECT_S", 0.0)
    target = Target()
    made, following = applier(target), Following()
    tried = []

    async def not_to_be_had(index: str) -> str:
        tried.append(index)
        target.looked_ahead += len(SHAPES)
        if away is not None:
            raise away
        await anyio.sleep_forever()
        raise AssertionError

    target.waits_for_all_ahead = True
    target.look_ups = not_to_be_had  # type: ignore[method-assign]
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert made.following is following.batch
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False, following=following)
    assert (len(tried), len(target.prepared), len(target.commits)) == (1, 4, 2)
    monkeypatch.setattr(made, "_looks_ahead_at", anyio.current_time())
    target.waits_for_all_ahead = True
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert len(tried) == 2


async def test_what_is_committed_is_told_of_even_if_everything_is_cancelled_meanwhile() -> None:
    target = Target()
    told: list[Outcome] = []
    with anyio.CancelScope() as scope:

        async def committed_as_the_source_goes(*arguments: Any, **named: Any) -> dict[str, Applied]:
            scope.cancel()
            return await Target.apply(target, *arguments, **named)

        target.apply = committed_as_the_source_goes  # type: ignore[method-assign]
        await applier(target).apply(a_batch(), caught_up=lambda: False, following=Following(), committed=told.append)
    assert (len(target.commits), len(told)) == (1, 1)
