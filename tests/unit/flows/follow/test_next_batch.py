"""The next batch: prepared while the one before it is written, and again where that was in vain."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cdcsync.errors import (
    CdcsyncError,
    IndexFault,
    SetupError,
    TargetUnavailable,
)
from cdcsync.model.batch import Batch, IndexChanges
from cdcsync.model.changeset import ChangeSet
from tests.support.appliers import SHAPES, Following, Target, a_batch, applier

pytestmark = pytest.mark.anyio


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


async def test_the_texts_of_a_batch_that_is_prepared_ahead_are_in_the_traces_of_its_own_transactions() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from cdcsync.tracing import OpenTelemetry

    spans, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = OpenTelemetry(provider)

    class Traced(Target):
        async def prepare(self, changes: IndexChanges, look_ups: Any, before: ChangeSet | None = None) -> ChangeSet:
            tracing.follow((one.lsn, f"{one.lsn} {changes.shape.index}".encode()) for one in changes.live.values())
            return await super().prepare(changes, look_ups, before)

    def traced(lsn: int) -> Batch:
        batch = a_batch(lsn)
        tracing.begin(lsn)
        tracing.note(f"00-{lsn:032x}-b7ad6b7169203331-01".encode())
        tracing.end(batch.origins)
        return batch

    target = Traced()
    target.waits_for_all_ahead = True
    made, following = applier(target, tracing=tracing), Following(traced(2))
    await made.apply(traced(1), caught_up=lambda: False, following=following)
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    with tracing.call("model", [b"1 articles", b"1 notes", b"2 articles", b"2 notes"]):
        pass

    texts = {
        one.context.trace_id: dict(one.attributes or {})["cdcsync.texts"]
        for one in spans.get_finished_spans()
        if one.name == "cdcsync.embed"
    }
    assert texts == {1: 2, 2: 2}
    assert sum(one.name == "cdcsync.prepare" for one in spans.get_finished_spans()) == 4


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
    target = Target(IndexFault("the target refuses a value", index="notes"))
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
    with anyio.fail_after(60):
        await made.apply(a_batch(), caught_up=lambda: False, following=following, committed=lambda _: told.set())
    assert (len(target.prepared), len(target.commits)) == (4, 1)
    target.waits_for_all_ahead = False
    await made.apply(following.batch, caught_up=lambda: False)
    assert (len(target.prepared), len(target.commits)) == (4, 2)


@pytest.mark.parametrize("away", [SetupError("too many connections for role"), None], ids=["refused", "a pooler waits"])
async def test_a_connection_for_look_ups_that_is_not_to_be_had_is_tried_for_again_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, away: CdcsyncError | None
) -> None:
    monkeypatch.setattr("cdcsync.flows.follow.next_batch.CONNECT_S", 0.0)
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
    monkeypatch.setattr(made._next, "_tried_again_at", anyio.current_time())
    target.waits_for_all_ahead = True
    await made.apply(a_batch(), caught_up=lambda: False, following=following)
    assert len(tried) == 2
