"""An applier over a session and preparers that a test decides about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import anyio
import anyio.lowlevel

from cdcsync.config import QualifiedName
from cdcsync.errors import (
    CdcsyncError,
)
from cdcsync.flows.follow.apply import Applier
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, IndexChanges
from cdcsync.model.changeset import Applied, ChangeSet
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import Shape, Upsert
from cdcsync.model.transactions import Committed
from cdcsync.tracing import Tracing

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
        self.wal_end: Lsn | None = None

    async def open_writers(self, indexes: object) -> None:
        pass

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


def applier(target: Target, metrics: Metrics | None = None, tracing: Tracing | None = None) -> Applier:
    """Return an applier over this session."""
    preparers = cast(Any, {shape.index: target for shape in SHAPES})
    return Applier(cast(Any, target), [], preparers, metrics or Metrics(), tracing or Tracing(), first_wait_s=0.0)


def a_batch(lsn: int = 10) -> Batch:
    """Return a batch with a row of each index, of the transaction at `lsn`."""
    batch = Batch()
    for shape in SHAPES:
        batch.add(Upsert(shape, ("a",), ("a", "text"), 1, lsn))
    batch.commit(Committed(Lsn(20), 5))
    return batch


class Following:
    """A full batch that follows the one in hand."""

    def __init__(self, batch: Batch | None = None) -> None:
        self.batch = batch or a_batch()
        self.taken = 0

    async def __call__(self) -> Batch:
        self.taken += 1
        return self.batch
