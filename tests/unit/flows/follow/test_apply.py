"""The applier: what it does with a server that is away, and with an index that cannot take its changes."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest

from cdcsync.errors import (
    CdcsyncError,
    IndexFault,
    LeaseLost,
    SourceUnavailable,
    TargetRewound,
    TargetUnavailable,
    Unavailable,
)
from cdcsync.flows.follow.apply import MOST_ATTEMPTS, MOST_REFUSED, Outcome
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.changeset import Applied
from cdcsync.model.links import Touch
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import UnreadRow, Upsert
from tests.support.appliers import DONE, SHAPES, Following, Target, a_batch, applier

pytestmark = pytest.mark.anyio


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
    target.refused["articles"] = error = IndexFault("its key is gone", index="articles", hint="put it back")
    batch = a_batch()
    outcomes: list[Outcome] = []
    await applier(target).apply(batch, caught_up=lambda: True, committed=outcomes.append)
    assert target.commits == [({"notes"}, Lsn(20), {"articles": Pause("its key is gone", "put it back")}, True)]
    assert batch.paused == {"articles": error}
    assert [set(one.applied) for one in outcomes] == [{"notes"}]


async def test_a_value_that_the_target_refuses_pauses_its_index_too() -> None:
    target = Target(IndexFault("the target refuses a value", index="notes"))
    batch = a_batch()
    await applier(target).apply(batch, caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


def refused(key: str | None, cause: Exception) -> IndexFault:
    error = IndexFault("the target refuses a value", index="notes")
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
        (None, psycopg.errors.UntranslatableCharacter()),  # NULL names no row
    ],
)
async def test_what_is_no_matter_of_a_row_of_the_batch_pauses_the_index(key: str | None, cause: Exception) -> None:
    target = Target(refused(key, cause))
    await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


async def test_a_row_that_is_refused_even_without_its_values_pauses_the_index() -> None:
    target = Target(*[refused("a", psycopg.errors.UntranslatableCharacter())] * 2)
    await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert [(indexes, set(paused)) for indexes, _, paused, _ in target.commits] == [({"articles"}, {"notes"})]


@pytest.mark.parametrize(("kind", "side"), [(SourceUnavailable, "source"), (TargetUnavailable, "target")])
@pytest.mark.parametrize("fewer", [1, 0])
async def test_an_index_for_which_a_server_fails_again_and_again_is_paused_and_the_others_get_their_changes(
    kind: type[Unavailable], side: str, fewer: int
) -> None:
    error = kind("too many temporary files", where="index notes", hint="raise it", sqlstate="53400")
    error.index = "notes"
    target = Target(*[error] * (MOST_ATTEMPTS - fewer))
    await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert [(indexes, paused) for indexes, _, paused, _ in target.commits] == [
        ({"articles", "notes"}, {})
        if fewer
        else ({"articles"}, {"notes": Pause(f"the {side} says: too many temporary files", "raise it")})
    ]


async def test_an_index_that_keeps_a_batch_from_being_written_even_without_its_changes_is_not_tried_for_ever() -> None:
    target = Target(*[IndexFault("its tables are gone", index="notes")] * 2)
    with pytest.raises(IndexFault, match="its tables are gone"):
        await applier(target).apply(a_batch(), caught_up=lambda: True)
    assert not target.commits


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
