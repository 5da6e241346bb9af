"""Tells metrics, log and embedders about a batch that is in the target.

A batch may be prepared several times, because a server was away or the batch before it was not written. It is accounted
for once, when it is committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import structlog

from cdcsync.flows.embed import EmbedLoop
from cdcsync.flows.follow.apply import Outcome
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import LIVE, FailedDocument
from cdcsync.model.rows import Upsert
from cdcsync.pgoutput.wire import to_datetime

log = structlog.get_logger()

REPORTED_ERRORS = 10
"""Errors of a batch that are logged: what fails for all rows may say something else of each."""


class Accounts:
    """Counts what was applied, and tells each index's embed loop what waits for it."""

    def __init__(
        self,
        metrics: Metrics,
        embed_loops: Mapping[str, EmbedLoop],
        beside: Mapping[str, Sequence[EmbedLoop]] | None = None,
    ) -> None:
        """Count by index.

        :param embed_loops: those of the live generations.
        :param beside: those of the other generations of an index.
        """
        self._metrics = metrics
        self._embed_loops = embed_loops
        self._beside = beside or {}

    def note(self, batch: Batch, outcome: Outcome, *, before: Lsn, checkpoint: Lsn) -> None:
        """Note a batch that moved the checkpoint from `before` to `checkpoint`."""
        metrics = self._metrics
        metrics.transactions.inc(batch.transactions)
        metrics.batch_rows.observe(batch.rows)
        metrics.apply_seconds.observe(outcome.seconds)
        if batch.oldest_us is not None and batch.end_lsn is not None:
            changed = [index for index in outcome.applied if index in batch.indexes and batch.indexes[index].live]
            self._note_freshness(outcome, changed, before, batch.end_lsn, to_datetime(batch.oldest_us))
        for index, of_index in batch.indexes.items():
            upserts = sum(1 for change in of_index.live.values() if isinstance(change, Upsert))
            metrics.changes.labels(index, "upsert").inc(upserts)
            metrics.changes.labels(index, "delete").inc(len(of_index.live) - upserts)
            metrics.changes.labels(index, "truncate").inc(of_index.truncated)
        for index, result in outcome.applied.items():
            changes = outcome.changes[index]
            for relation, touched in changes.touched.items():
                metrics.related_changes.labels(index, relation).inc(touched)
            metrics.documents_unchanged.labels(index).inc(len(changes.kept))
            self._report(index, changes.failed)
            metrics.chunks.labels(index).inc(result.chunks)
            metrics.chunks_deleted.labels(index).inc(result.deleted)
            metrics.vectors.labels(index, "reused").inc(result.reused)
            metrics.vectors.labels(index, "inline").inc(result.inline)
            current = result.chunks - result.reused - result.inline - result.queued
            self._embed_loops[index].avoided("current", current)
            live = any(one.lane == LIVE for one in changes.documents)
            if result.queued:
                self._embed_loops[index].notify(live=live)
            if result.beside:
                for loop in self._beside.get(index, ()):
                    loop.notify(live=live)
        log.debug(
            "batch_applied",
            rows=batch.rows,
            transactions=batch.transactions,
            checkpoint=str(checkpoint),
            milliseconds=round(outcome.seconds * 1000, 1),
        )

    def _report(self, index: str, failed: Sequence[FailedDocument]) -> None:
        """Say why rows have no place in the index now; which rows they are, the target knows."""
        self._metrics.document_failures.labels(index).inc(len(failed))
        for error, rows in Counter(one.error for one in failed).most_common(REPORTED_ERRORS):
            log.warning("document_failed", index=index, error=error, failed=rows, fix=f"cdcsync failures {index} list")

    def _note_freshness(
        self, outcome: Outcome, changed: Sequence[str], before: Lsn, end: Lsn, committed: datetime
    ) -> None:
        age_s = max(0.0, (datetime.now(UTC) - committed).total_seconds())
        self._metrics.note_text_freshness(changed, age_s)
        for index, result in outcome.applied.items():
            self._embed_loops[index].commits.note(before, end, committed)
            if all(one.lane == LIVE for one in outcome.changes[index].documents):
                self._metrics.note_vector_freshness(index, age_s, result.inline + result.reused)
