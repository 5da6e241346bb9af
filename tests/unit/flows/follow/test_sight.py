"""Readings that see what was delivered: which transactions one waits for, and for how long."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from cdcsync.errors import SourceUnavailable
from cdcsync.flows.follow import sight
from cdcsync.flows.follow.sight import PutOff, Sight
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.locking import LockedOut
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={})
COMPUTED = msgspec.structs.replace(SPEC, shape=msgspec.structs.replace(SPEC.shape, computed=("author.name",)))

OLD = 3_000_000_000
"""The next transaction of a cluster that is in the second half of the ids."""


class Source:
    """Shows one snapshot after the other, and the last one from then on."""

    def __init__(self, *snapshots: Snapshot) -> None:
        self.snapshots = list(snapshots)
        self.readings = self.closed = 0

    async def connection(self) -> Source:
        return self

    async def aclose(self) -> None:
        self.closed += 1

    async def read(self, _: Any) -> tuple[Snapshot, str]:
        self.readings += 1
        return self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0], "the row"


def of(source: Source, monkeypatch: pytest.MonkeyPatch, doubted: set[int] | None = None) -> Sight:
    async def in_doubt(_: Any) -> set[int]:
        return doubted or set()

    async def blockers(*_: Any) -> list[str]:
        return []

    async def running(_: Any) -> frozenset[int]:
        return source.snapshots[0].running

    async def current(_: Any) -> Snapshot:
        return source.snapshots[0]

    monkeypatch.setattr(sight, "running_transactions", running)
    monkeypatch.setattr(sight, "current_snapshot", current)
    monkeypatch.setattr(sight, "in_doubt", in_doubt)
    monkeypatch.setattr(sight, "blockers", blockers)
    monkeypatch.setattr(sight, "HIDDEN_S", 0.01)
    return Sight(COMPUTED, cast(Any, source), LockedOut("articles", ()))


def seen(*hidden: int, next_: int = OLD) -> Snapshot:
    return Snapshot(min((next_, *hidden)), next_, frozenset(hidden))


async def test_a_reading_waits_for_what_was_applied_before_it_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(seen(OLD - 5), seen(OLD - 5), seen(), seen(OLD - 5))
    of_one = of(source, monkeypatch)
    await of_one.applied({OLD - 5})
    assert await of_one.read({OLD - 1}, source.read) == "the row"
    assert source.readings == 3
    assert await of_one.read({OLD - 1}, source.read) == "the row"


async def test_what_stays_hidden_is_put_off_and_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(seen(OLD - 5))
    of_one = of(source, monkeypatch, {OLD - 5})  # of an earlier worker
    await of_one.applied(())
    with pytest.raises(PutOff):
        await of_one.read((), source.read)
    readings = source.readings
    assert of_one.poor
    with pytest.raises(PutOff):
        await of_one.read((), source.read)
    assert source.readings == readings


async def test_a_row_of_a_page_has_no_transaction_that_could_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(seen())
    of_one = of(source, monkeypatch)
    await of_one.applied({0})
    assert await of_one.read((), source.read) == "the row"
    assert source.readings == 1


async def test_an_earlier_transaction_that_this_server_never_gave_out_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source(seen())
    of_one = of(source, monkeypatch)
    await of_one.applied({OLD + 7, OLD - 2**31 - 3})  # of the server that was before, and half of all ids ago
    assert await of_one.read((), source.read) == "the row"
    before = source.readings
    assert await of_one.read((), source.read) == "the row"
    assert source.readings == before + 1


async def test_a_server_that_never_gave_out_a_delivered_id_is_another_one_whose_rows_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source(seen())
    of_one = of(source, monkeypatch)
    await of_one.applied({OLD - 1})
    with pytest.raises(SourceUnavailable, match="has not given out"):
        await of_one.read({OLD}, source.read)
    assert source.closed == 1
    source.snapshots = [seen(next_=OLD + 1)]
    assert await of_one.read({OLD}, source.read) == "the row"
