"""What a committed batch means for metrics and log: it counts once, however often it was prepared."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from cdcsync.errors import TargetUnavailable
from cdcsync.flows.follow.accounts import REPORTED_ERRORS, Accounts
from cdcsync.flows.follow.apply import Applier, Outcome
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import Applied, ChangeSet, FailedDocument, Kept
from cdcsync.model.rows import Upsert
from cdcsync.model.transactions import Committed
from cdcsync.tracing import Tracing
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={})
NOTHING_WRITTEN = Applied(chunks=0, deleted=0, reused=0, inline=0, queued=0)


class Target:
    """A session that is away so many times, and the preparer of its index, which always comes to the same."""

    looks_ahead = False

    def __init__(self, changes: ChangeSet, *, away: int = 0) -> None:
        self.changes = changes
        self.away = away
        self.prepared = 0

    async def ensure(self, specs: Any) -> None: ...

    def writer(self, index: str) -> None: ...

    async def prepare(self, changes: Any, look_ups: Any) -> ChangeSet:
        self.prepared += 1
        return self.changes

    async def apply(self, changes: Any, *_: Any, **__: Any) -> dict[str, Applied]:
        if self.away:
            self.away -= 1
            raise TargetUnavailable("gone", where="target")
        return dict.fromkeys(changes, NOTHING_WRITTEN)


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
    changes = ChangeSet(
        False, [], [Kept(("a",), (), 10)], [], {}, failed=failed("no such thing"), touched={"customer": 3}
    )
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
