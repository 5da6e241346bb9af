"""What a committed batch means for metrics and log: it counts once, however often it was prepared."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from cdcsync.errors import TargetUnavailable
from cdcsync.flows.follow.accounts import REPORTED_ERRORS, Accounts
from cdcsync.flows.follow.apply import Applier, Outcome
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import LIVE, Applied, ChangeSet, FailedDocument, Kept
from cdcsync.model.rows import Delete, Upsert
from cdcsync.model.transactions import Committed
from cdcsync.tracing import Tracing
from tests.support.indexes import changes, document, make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={})
NOTHING = Applied(chunks=0, deleted=0, reused=0, inline=0, queued=0)


class Target:
    """A session that is away so many times, and the preparer of its index, which always comes to the same."""

    looks_ahead = False
    wal_end: Lsn | None = None

    def __init__(self, changes: ChangeSet, *, away: int = 0) -> None:
        self.changes = changes
        self.away = away
        self.prepared = 0

    async def open_writers(self, indexes: object) -> None:
        pass

    async def ensure(self, specs: Any) -> None: ...

    def writer(self, index: str) -> None: ...

    async def prepare(self, changes: Any, look_ups: Any) -> ChangeSet:
        self.prepared += 1
        return self.changes

    async def apply(self, changes: Any, *_: Any, **__: Any) -> dict[str, Applied]:
        if self.away:
            self.away -= 1
            raise TargetUnavailable("gone", where="target")
        return dict.fromkeys(changes, NOTHING)


async def accounted(target: Target) -> Callable[..., float | None]:
    """Apply and account for a batch of one row; returns what reads a metric of the index."""
    metrics, tracing = Metrics(), Tracing()
    loop: Any = SimpleNamespace(avoided=lambda *_: None, commits=SimpleNamespace(note=lambda *_: None))
    accounts = Accounts(metrics, {"articles": loop})
    batch = Batch()
    batch.add(Upsert(SPEC.shape, ("a",), ("a", "text"), 1, 10))
    batch.commit(Committed(Lsn(20), 5))

    def committed(outcome: Outcome) -> None:
        accounts.note(batch, outcome, before=Lsn(0), checkpoint=Lsn(20))

    applier = Applier(cast(Any, target), [SPEC], {"articles": cast(Any, target)}, metrics, tracing, first_wait_s=0.0)
    await applier.apply(batch, caught_up=lambda: True, committed=committed)

    def counted(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"cdcsync_{name}_total", {"index": "articles", **labels})

    return counted


def failed(*reasons: str) -> list[FailedDocument]:
    return [FailedDocument((f"key {at}",), reason, 0x10) for at, reason in enumerate(reasons)]


async def test_a_batch_that_is_prepared_again_because_the_target_was_away_counts_once() -> None:
    changes = ChangeSet(False, [], [Kept(("a",), ())], [], {}, failed=failed("no such thing"), touched={"customer": 3})
    target = Target(changes, away=2)

    with capture_logs() as events:
        counted = await accounted(target)

    assert target.prepared == 3
    assert counted("documents_unchanged") == 1
    assert counted("document_failures") == 1
    assert counted("related_changes", relation="customer") == 3
    assert [event["event"] for event in events].count("document_failed") == 1


async def test_the_log_says_how_many_rows_failed_for_each_of_the_commonest_reasons_and_which_they_are_nowhere() -> None:
    reasons = [f"reason {number}" for number in range(REPORTED_ERRORS + 3)]
    changes = ChangeSet(False, [], [], [], {}, failed=failed(*reasons, "usual", "usual"))

    with capture_logs() as logged:
        counted = await accounted(Target(changes))

    events = [event for event in logged if event["event"] == "document_failed"]
    assert len(events) == REPORTED_ERRORS
    assert events[0] == {
        "event": "document_failed",
        "log_level": "warning",
        "index": "articles",
        "error": "usual",
        "failed": 2,
        "fix": "cdcsync failures articles list",
    }
    assert "key" not in str(events)
    assert counted("document_failures") == len(reasons) + 2


class Loop:
    """An embed loop that only listens."""

    def __init__(self) -> None:
        self.heard: list[bool] = []
        self.saved: list[tuple[str, int]] = []
        self.commits = SimpleNamespace(note=lambda *facts: self.noted.append(facts))
        self.noted: list[Any] = []

    def notify(self, *, live: bool) -> None:
        self.heard.append(live)

    def avoided(self, reason: str, count: int) -> None:
        self.saved.append((reason, count))


def accounts(metrics: Metrics, loop: Loop, *beside: Loop) -> Accounts:
    loops: Any = {"articles": loop}
    others: Any = {"articles": beside}
    return Accounts(metrics, loops, others)


def batch(*changed: Upsert | Delete, committed: bool = True) -> Batch:
    made = Batch()
    if committed:
        made.oldest_us, made.commit_time_us, made.end_lsn = 0, 3_600_000_000, Lsn(0x20)
    for change in changed:
        made.of(SPEC.shape).live[change.key] = change
    return made


def upsert(key: str) -> Upsert:
    return Upsert(SPEC.shape, (key,), (key, "text"), 1, 0x10)


def note(accounts: Accounts, batch: Batch, applied: Applied, *, lane: int = LIVE) -> None:
    outcome = Outcome({"articles": changes(document("1", "text", lane=lane))}, {"articles": applied}, 0.25)
    accounts.note(batch, outcome, before=Lsn(0x10), checkpoint=Lsn(0x20))


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"cdcsync_{name}", labels)


def test_changes_chunks_and_vectors_are_counted_by_kind() -> None:
    metrics = Metrics()
    applied = Applied(chunks=10, deleted=2, reused=3, inline=1, queued=4)
    note(accounts(metrics, Loop()), batch(upsert("1"), upsert("2"), Delete(SPEC.shape, ("3",), 1, 0x10)), applied)
    for kind, times in (("upsert", 2), ("delete", 1), ("truncate", 0)):
        assert sample(metrics, "changes_total", index="articles", operation=kind) == times
    assert sample(metrics, "chunks_total", index="articles") == 10
    assert sample(metrics, "chunks_deleted_total", index="articles") == 2


def test_chunks_whose_vector_is_current_are_embeddings_avoided() -> None:
    loop = Loop()
    note(accounts(Metrics(), loop), batch(), Applied(chunks=10, deleted=0, reused=3, inline=1, queued=4))
    assert loop.saved == [("current", 2)]


@pytest.mark.parametrize("lane", [LIVE, LIVE + 1])
def test_the_embed_loop_hears_of_texts_that_wait_and_whether_they_are_live(lane: int) -> None:
    loop, beside = Loop(), Loop()
    told = accounts(Metrics(), loop, beside)
    note(told, batch(), NOTHING, lane=lane)
    assert (loop.heard, beside.heard) == ([], [])
    note(told, batch(), msgspec.structs.replace(NOTHING, queued=1), lane=lane)
    assert (loop.heard, beside.heard) == ([lane == LIVE], [])
    note(told, batch(), msgspec.structs.replace(NOTHING, beside=1), lane=lane)
    assert (len(loop.heard), beside.heard) == (1, [lane == LIVE])


def test_text_is_as_old_as_the_oldest_change_in_its_batch_and_a_batch_without_a_commit_has_no_age() -> None:
    metrics, loop = Metrics(), Loop()
    told = accounts(metrics, loop)
    note(told, batch(upsert("1"), committed=False), NOTHING)
    assert sample(metrics, "text_freshness_seconds_count") == 0
    assert loop.noted == []
    note(told, batch(upsert("1")), NOTHING)
    assert sample(metrics, "text_freshness_seconds_count") == 1
    ((before, end, committed),) = loop.noted
    assert (before, end, committed) == (Lsn(0x10), Lsn(0x20), datetime(2000, 1, 1, tzinfo=UTC))
