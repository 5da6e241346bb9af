"""The gauges of a worker that tell what its two servers hold, which have to be read for that.

What this process knows by itself is shown where it becomes known (`metrics/instruments`), or asked of `WorkerState`
when the metrics are scraped.
"""

from __future__ import annotations

import math

import anyio
import structlog

from cdcsync.errors import CdcsyncError, Unavailable
from cdcsync.logs import Told
from cdcsync.metrics import STATES
from cdcsync.status import Status
from cdcsync.worker.state import WorkerState

log = structlog.get_logger()

GAUGES_S = 2.0
"""How often the gauges are read from both servers."""

GAUGES_SHARE = 0.05
"""How much of the time they may be read, which takes the longer the more indexes there are."""


async def set_gauges_for_ever(state: WorkerState) -> None:
    """Keep the gauges current, until cancelled: nothing that fails here may end the worker."""
    told = Told()
    while True:
        started = anyio.current_time()
        pause = GAUGES_S
        try:
            set_gauges(state, await state.status())
            told.over()
            pause = max(GAUGES_S, (anyio.current_time() - started) / GAUGES_SHARE)
        except Unavailable as error:
            log.debug("gauges_wait", error=str(error))
            if state.last is not None and state.readings.silent:  # a gap stops rates and alerts for long
                set_gauges(state, state.last, known=False)
        except CdcsyncError as error:
            if told.anew(error):
                log.warning("status_unreadable", error=str(error), fix=error.hint)
        except Exception as error:
            # A mistake of ours, which is no reason to let the indexes fall behind.
            if told.anew(error):
                log.exception("status_failed")
        await anyio.sleep(pause)


def set_gauges(state: WorkerState, status: Status, *, known: bool = True) -> None:
    """Show a reading.

    :param known: whether its figures still are, which nobody can tell while the target does not answer. What it has
        stored of states, proofs and recall stays as it was last read.
    """
    metrics = state.metrics
    metrics.checkpoint_lsn.set(int(state.checkpoint))
    metrics.lag_bytes.set(math.nan if status.lag_bytes is None or not known else status.lag_bytes)
    for name, index in status.indexes.items():
        away = 0.0 if known else math.nan
        unknown = away if index.unreadable is None else math.nan
        metrics.backlog.labels(name, "live").set(index.backlog_live + unknown)
        metrics.backlog.labels(name, "backfill").set(index.backlog - index.backlog_live + unknown)
        metrics.failed.labels(name).set(index.failed + unknown)
        metrics.discarded.labels(name).set(index.discarded + unknown)
        listed = index.failed_documents
        metrics.failed_documents.labels(name).set(math.nan if listed is None else listed + away)
        for possible in STATES:
            metrics.index_state.labels(name, possible).set(index.state == possible)
        metrics.index_chunks.labels(name).set(index.chunks + unknown)
        metrics.index_vectors.labels(name).set(index.vectors + unknown)
        metrics.generation_vectors.remove_by_labels({"index": name})
        for one in index.generations:
            if one.generation != index.generation:
                metrics.generation_vectors.labels(name, str(one.generation)).set(one.vectors + away)
        if index.proven_equal_at is not None:
            metrics.proven_equal.labels(name).set(index.proven_equal_at.timestamp())
            metrics.undecided.labels(name).set(index.undecided)
        if index.recall is not None:
            metrics.recall.labels(name).set(index.recall.recall)
            metrics.recall_finished.labels(name).set(index.recall.evaluated_at.timestamp())
        else:  # there is none of another generation
            metrics.recall.remove(name)
            metrics.recall_finished.remove(name)
        backfill = index.backfill
        metrics.backfill_done.labels(name).set(away if backfill is None else backfill.rows_done + away)
        metrics.backfill_expected.labels(name).set(away if backfill is None else (backfill.rows_total or 0) + away)
