"""The applier: it commits a batch in the target, however long a server is away, and returns what it did.

It owns the session that holds the pipeline's lock, so it is the only writer of chunks and checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import anyio
import anyio.lowlevel
import msgspec
import psycopg
import structlog

from cdcsync.backoff import Backoff, Failure, backoff_s
from cdcsync.errors import CdcsyncError, IndexFault, TargetUnavailable, Unavailable, leading
from cdcsync.flows.follow.next_batch import NextBatch, nothing_follows
from cdcsync.flows.follow.prepare import Preparer
from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import Applied, ChangeSet
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.pgoutput.wire import to_datetime
from cdcsync.postgres.errors import locked_out
from cdcsync.postgres.settings import Side
from cdcsync.target.failures.documents import listable
from cdcsync.target.session import ApplySession
from cdcsync.tracing import Tracing

log = structlog.get_logger()

COSTS_A_ROW = (psycopg.DataError, psycopg.errors.ProgramLimitExceeded)
"""The refusals of a value that leave out its row."""

MOST_REFUSED = 8
"""How many rows of an index a batch may leave out because the target cannot hold a value of theirs. Each takes some
attempts to find; if there are more, their common cause needs an operator."""


MOST_WAIT_S = 10.0
"""How long to wait at most before a batch is tried again."""

MOST_ATTEMPTS = 12
"""How often a batch is tried while it fails for one index: for a minute, or two if somebody holds the index's tables.
Then that index is paused."""


class Outcome(msgspec.Struct, frozen=True):
    """The result of applying a batch: `changes` and `applied` by index, without those that the batch pauses."""

    changes: Mapping[str, ChangeSet]
    applied: Mapping[str, Applied]
    seconds: float


class Applier:
    """Commits batches and positions."""

    def __init__(
        self,
        session: ApplySession,
        specs: Sequence[IndexSpec],
        preparers: Mapping[str, Preparer],
        metrics: Metrics,
        tracing: Tracing,
        *,
        first_wait_s: float = 0.1,
    ) -> None:
        """Write over `session`, with the preparer of each index.

        :param first_wait_s: how long to wait at first for a server that is away, or fails for one index.
        """
        self._session = session
        self._specs = specs
        self._preparers = preparers
        self._metrics = metrics
        self._tracing = tracing
        self._first_wait_s = first_wait_s
        self._backoff = Backoff(self._waits, first=first_wait_s, most=MOST_WAIT_S)
        self._next = NextBatch(session, preparers, tracing)

    def failing_for(self, seconds: float) -> CdcsyncError | None:
        """Return why nothing could be committed for so long, if that is so."""
        return self._backoff.failing_for(seconds)

    def begin(self) -> None:
        """Begin anew with a stream: what failed in the one before, which has been let go of, is over."""
        self._backoff.succeeded()

    @property
    def wal_end(self) -> Lsn | None:
        """Where the WAL ended as the last commit was written, if the session's `one_wal` is true."""
        return self._session.wal_end

    @property
    def following(self) -> Batch | None:
        """The batch to be applied next, if it was taken while the last one was written."""
        return self._next.batch

    async def apply(
        self,
        batch: Batch,
        *,
        caught_up: Callable[[], bool],
        following: Callable[[], Awaitable[Batch]] = nothing_follows,
        committed: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        """Commit a batch, trying again for as long as a server is away, and finish preparing the next one if it began.

        An index that cannot take its changes, or for which a server fails `MOST_ATTEMPTS` times, is paused with the
        batch: `batch.paused` has it then, and the others' changes are committed.

        :param caught_up: asked just before the commit, whether nothing is left to be applied after this batch.
        :param following: returns the next batch once that is full; it is prepared during the commit.
        :param committed: called at once when the batch is in the target, which may be long before this returns.
        :raises LeaseLost, TargetRewound: this worker must not, or cannot, write its batch.
        :raises TablesChanged: statements for an index name a type that has another name by now.
        :raises IndexFault: an index keeps the batch from being written although nothing of it is in there any more.
        """
        started = anyio.current_time()

        def done(changes: Mapping[str, ChangeSet], applied: Mapping[str, Applied]) -> None:
            self._backoff.succeeded()
            committed(Outcome(changes, applied, anyio.current_time() - started))

        changes = self._next.changes_of(batch)
        self._next.await_from(following)
        left_out, held_up = Counter[str](), Counter[str]()
        with self._tracing.batch(batch.origins, rows=batch.rows, transactions=batch.transactions):
            while True:
                try:
                    await self._session.ensure(self._specs)
                    await self._session.open_writers(batch.indexes)
                    if changes is None:
                        changes = await self._prepare(batch)
                    await self._commit_and_prepare(changes, batch, caught_up(), done)
                except IndexFault as error:
                    if isinstance(error.__cause__, psycopg.ProgrammingError):
                        with suppress(TargetUnavailable):
                            await self._session.see_unrenamed(error.index)
                    if left_out[error.index] < MOST_REFUSED and _leave_out(error, batch):
                        left_out[error.index] += 1
                    elif error.index in batch.paused and error.index not in batch.indexes:
                        raise  # without anything of that index in the batch it would be the same again
                    else:
                        # Rows left out of this batch are read again when the index is resumed.
                        batch.indexes.pop(error.index, None)
                        batch.paused[error.index] = error
                except Unavailable as error:
                    if error.index is None or error.index not in batch.indexes:
                        await self._backoff.wait(error)
                    else:
                        held_up[error.index] += 1
                        await self._wait_for_one(error, error.index, batch, held_up[error.index])
                else:
                    return
                changes = self._next.changes = None

    async def _wait_for_one(self, error: Unavailable, index: str, batch: Batch, attempt: int) -> None:
        """Wait after an attempt that failed for one index, or pause that index after the last one."""
        log.warning("batch_held_up", index=index, error=str(error), attempt=attempt)
        of_lock = isinstance(error, TargetUnavailable) and locked_out(error)
        if attempt >= MOST_ATTEMPTS:
            del batch.indexes[index]
            batch.paused[index] = await self._pause_of_lock(index) if of_lock else _pause_of(error, index)
        elif not of_lock:  # which was waited for already
            await anyio.sleep(backoff_s(attempt - 1, first=self._first_wait_s, most=MOST_WAIT_S))

    async def _pause_of_lock(self, index: str) -> IndexFault:
        try:
            locks = await self._session.lockers(index)
        except TargetUnavailable:
            locks = []
        return IndexFault(
            str(locks[0]) if locks else "its tables in the target are locked",
            index=index,
            where=f"index {index}",
            hint=locks[0].remedy if locks else "end the session that holds the lock: pg_locks names it",
        )

    async def awaited(self) -> bool:
        """Say whether a reader waits for a position; False if the target is away."""
        try:
            await self._session.ensure(self._specs)
            return await self._session.awaited()
        except TargetUnavailable as error:
            await self._backoff.wait(error)
            return False

    async def reopen(self) -> None:
        """Open the session again if it has ended, however long the target is away.

        :raises LeaseLost, TargetRewound: this worker must not, or cannot, write any more.
        """
        while True:
            try:
                await self._session.ensure(self._specs)
            except TargetUnavailable as error:
                await self._backoff.wait(error)
            else:
                self._backoff.succeeded()
                return

    async def note_position(self, position: Lsn, *, caught_up: bool) -> bool:
        """Commit a position up to which there is nothing to apply; False if the target is away."""
        try:
            await self._session.ensure(self._specs)
            with anyio.CancelScope(shield=True):
                await self._session.apply({}, (), position, commit_time=None, caught_up=caught_up)
        except TargetUnavailable as error:
            await self._backoff.wait(error)
            return False
        self._backoff.succeeded()
        return True

    async def _prepare(self, batch: Batch) -> dict[str, ChangeSet]:
        changes = {}
        for index, of_index in batch.indexes.items():
            with self._tracing.prepare(index, batch.origins):
                changes[index] = await self._preparers[index].prepare(of_index, self._session.writer(index))
        return changes

    async def _commit_and_prepare(
        self,
        changes: Mapping[str, ChangeSet],
        batch: Batch,
        caught_up: bool,
        done: Callable[[Mapping[str, ChangeSet], Mapping[str, Applied]], None],
    ) -> None:
        """Commit a batch; meanwhile, and to the end, prepare the one that follows if there is one."""
        waiting = anyio.CancelScope()
        try:
            async with anyio.create_task_group() as tasks:
                if self._next.possible_beside(changes):
                    tasks.start_soon(self._next.prepare, changes, waiting)
                with self._tracing.span("cdcsync.commit"):
                    applied = await self._commit(changes, batch, caught_up)
                # No await in between: if this is cancelled, everything that is committed has been accounted for.
                done(changes, applied)
                waiting.cancel()
                if batch.paused:
                    tasks.cancel_scope.cancel()  # what follows is delivered again, mostly
        except BaseExceptionGroup as group:
            error = leading(group)
            raise error from error.__cause__

    async def _commit(self, changes: Mapping[str, ChangeSet], batch: Batch, caught_up: bool) -> Mapping[str, Applied]:
        # Cancelled in the middle, the driver could leave the transaction open: one that has begun is finished.
        applied: dict[str, Applied] = {}
        with anyio.CancelScope(shield=True):
            applied.update(
                await self._session.apply(
                    changes,
                    batch.pages,
                    batch.end_lsn,
                    ahead=batch.ahead,
                    parts=batch.parts,
                    paused={index: Pause.of(error) for index, error in batch.paused.items()},
                    commit_time=to_datetime(batch.commit_time_us) if batch.commit_time_us is not None else None,
                    caught_up=caught_up,
                )
            )
        return applied

    def _waits(self, failure: Failure) -> None:
        side = _side(failure.error)
        if side == "target":
            self._metrics.reconnects.labels(side).inc()
        log.warning(
            "apply_waits", side=side, error=str(failure.error), attempt=failure.attempt, delay_s=failure.delay_s
        )


def _side(error: CdcsyncError | None) -> Side:
    return "target" if isinstance(error, TargetUnavailable) else "source"


def _pause_of(error: Unavailable, index: str) -> IndexFault:
    return IndexFault(f"the {_side(error)} says: {error.message}", index=index, where=error.where, hint=error.hint)


def _leave_out(error: IndexFault, batch: Batch) -> bool:
    """Leave out the row that has a value which the target cannot hold, if that is what happened; say whether it was.

    Such values are characters that the target's encoding lacks, labels that its enum lacks, and numbers beyond its type
    (class 22), and what is too long for a b-tree, a tsvector or a row (54000). A key that is too long cannot be listed
    either, so that nobody would learn which row is missing: it pauses the index.
    """
    changes = batch.indexes.get(error.index)
    if changes is None or error.key is None or not isinstance(error.__cause__, COSTS_A_ROW) or not listable(error.key):
        return False
    return changes.leave_out(error.key, Unread(error.message))
