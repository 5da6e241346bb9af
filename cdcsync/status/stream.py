"""The stream as both servers show it: its slot, its worker, and how far it is behind the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

import anyio
import msgspec
import psycopg

from cdcsync.config import Config, QualifiedName
from cdcsync.errors import CdcsyncError
from cdcsync.lsn import Lsn
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import READERS_WAIT, WRITERS_WAIT, Lock, exclusive_locks
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.settings import Side
from cdcsync.source.catalog import Slot, current_lsn, misfit, read_slot, why_lost
from cdcsync.source.slot import FOLLOWER
from cdcsync.status.indexes import Indexes
from cdcsync.status.model import IndexStatus, SlotStatus, WorkerStatus
from cdcsync.target.pipelines import PipelineState

FRESH = timedelta(seconds=15)
"""How long a worker's word holds that nothing was left to apply. An idle worker gives it every 10 s."""

SAME_WRITE = timedelta(milliseconds=1)
"""Two readings of the clock in one UPDATE are microseconds apart, those of two commits are further."""

LOCKED_S = 10.0
"""How long a transaction has been open, at least, whose lock on a table is told."""

COMES_AND_GOES_S = 0.3
"""How long a lock is watched before it is told: the transaction may be old, and the lock one of a moment. No longer,
because a reading is repeated the less often the longer it takes."""

_GAP_REMEDY = 'docs/operations.md, "After a gap", says how to continue'


async def read_source(
    config: Config, source: Connection | CdcsyncError, problems: list[str]
) -> tuple[Lsn | None, Slot | None]:
    """Return the end of the source's WAL, None if it cannot be read, and the slot."""
    if isinstance(source, psycopg.AsyncConnection):
        try:
            with speaking_of("source"):
                return await current_lsn(source), await read_slot(source, config.source.slot)
        except CdcsyncError as error:
            source = error
    problems.append(f"the source cannot be read, so lag and slot are unknown: {source.with_fix}")
    return None, None


async def read_locks(
    config: Config, source: Connection | None, target: Connection, stored: Indexes, problems: list[str]
) -> dict[str, IndexStatus]:
    """Return the status of each index with who holds one of its tables locked, and add that to `problems`.

    Reads from a locked source table and writes to a locked target table wait; everything else continues. A lock that
    is held only for a moment is not reported, even if its transaction is old.

    :param source: None while it does not answer.
    """
    followed = {
        name: [
            *(one for one in config.indexes[name].followed if not one.patterns),
            *(QualifiedName.parse(one) for one in status.tables),
        ]
        for name, status in stored.found.items()
    }
    asked = [_Asked("target", target, WRITERS_WAIT, stored.written)]
    if source is not None:
        asked.insert(0, _Asked("source", source, READERS_WAIT, followed))
    seen = [(one, locks) for one in asked if (locks := await _locks(one, problems))]
    if not seen:
        return stored.found
    await anyio.sleep(COMES_AND_GOES_S)
    told = dict(stored.found)
    for one, locks in seen:
        before = {(lock.table, lock.transaction) for lock in locks}
        lasting = [lock for lock in await _locks(one, problems) if (lock.table, lock.transaction) in before]
        for name, tables in one.tables.items():
            if (lock := next((lock for lock in lasting if lock.of in tables), None)) is not None:
                told[name] = msgspec.structs.replace(told[name], locked=str(lock))
                problems.append(f"index {name} cannot use a table: {lock}; {lock.remedy}")
    return told


class _Asked(msgspec.Struct, frozen=True):
    """Which locks of a server are asked about: `modes` on the tables of each index."""

    side: Side
    connection: Connection
    modes: Sequence[str]
    tables: Mapping[str, Sequence[QualifiedName]]


async def _locks(asked: _Asked, problems: list[str]) -> list[Lock]:
    every = {one for of in asked.tables.values() for one in of}
    try:
        with speaking_of(asked.side):
            return await exclusive_locks(asked.connection, every, modes=asked.modes, open_for_s=LOCKED_S)
    except CdcsyncError as error:
        problems.append(f"the locks of the {asked.side} cannot be read: {error.with_fix}")
        return []


def read_worker(
    state: PipelineState | None, slot: Slot | None, *, locked: bool | None, since: datetime | None
) -> WorkerStatus:
    """Return the worker as the servers show it.

    :param locked: whether a session holds the pipeline's lock, `since` when it exists; None if nobody can tell.
    """
    name = None if state is None else state.worker
    waits = None
    if locked is False and state is not None and slot is not None and slot.reader == FOLLOWER:
        waits = (
            f"a worker reads slot {slot.name} (source pid {slot.active_pid}) without this pipeline's lock: it cannot"
            " write to the target, or is of a pipeline with another target; its log says which"
        )
    return WorkerStatus(name, locked, since, waits)


def slot_status(slot: Slot) -> SlotStatus:
    """Return the slot as a status shows it."""
    return SlotStatus(
        name=slot.name,
        active=slot.active_pid is not None,
        wal_status=slot.wal_status,
        retained_bytes=slot.retained_bytes,
        safe_bytes=slot.safe_bytes,
        confirmed_flush=None if slot.confirmed_flush is None else str(slot.confirmed_flush),
    )


def worker_problems(config: Config, slot: Slot | None, worker: WorkerStatus) -> Iterator[str]:
    """Yield the problems of a worker that does not run, or does not read the slot."""
    if worker.waits is not None:
        yield worker.waits
        return
    if worker.running is False:
        yield f"no worker runs for slot {config.source.slot}: start `cdcsync run`"
    if slot is None:
        return
    if slot.active_pid is not None and not worker.running:
        yield f"slot {slot.name} is read by a process that is not this pipeline's worker: source pid {slot.active_pid}"
    if slot.active_pid is None and worker.running:
        yield f"worker {worker.name} runs and is not reading slot {slot.name}: its log says why"


def slot_problems(name: str, slot: Slot | None, state: PipelineState, *, standby: bool) -> Iterator[str]:
    """Yield the problems of a slot that is gone, foreign, ahead of the checkpoint, or has lost WAL or is about to.

    :param standby: whether the target is a standby, whose checkpoint is that of a moment ago.
    """
    if slot is None:
        if state.checkpoint is not None:
            yield f"slot {name} is gone, and with it the changes since {state.checkpoint}: {_GAP_REMEDY}"
        return
    if (refused := misfit(slot, begun=state.checkpoint is not None)) is not None:
        why, fix = refused
        yield f"slot {name} {why}; {fix}"
        return
    if slot.wal_status == "lost":
        yield f"slot {name} has lost WAL that the index needs ({why_lost(slot)}): {_GAP_REMEDY}"
    elif slot.wal_status == "unreserved":
        yield (
            f"slot {name} holds more WAL than max_slot_wal_keep_size and is lost at the source's next checkpoint:"
            " let the worker catch up, or raise the setting"
        )
    if standby or slot.confirmed_flush is None or state.checkpoint is None:
        return
    if slot.confirmed_flush > state.checkpoint:
        yield f"slot {name} is ahead of the checkpoint, at {slot.confirmed_flush}: {_GAP_REMEDY}"


class Lag(msgspec.Struct, frozen=True):
    """How far the index is behind the source; None for what is not known."""

    bytes: int | None = None
    seconds: float | None = None
    caught_up: bool | None = None


def read_lag(
    end: Lsn | None, state: PipelineState | None, worker: WorkerStatus, begun: datetime | None, now: datetime
) -> Lag:
    """Return how far the index is behind the source.

    The end of the WAL is seldom the checkpoint itself: other databases write too, and so do we. So a worker that said
    moments ago that nothing was left counts as caught up. Otherwise the lag is the time since it last said so; if the
    target's clock went back to before that, since the source committed the last transaction that was applied.
    """
    if end is None or state is None:
        return Lag()
    if state.checkpoint is None:
        return Lag(caught_up=False)
    behind = end.bytes_since(state.checkpoint)
    said = state.caught_up_at
    nothing_left = said is not None and state.updated_at - said < SAME_WRITE and abs(now - said) < FRESH
    if behind == 0 or (worker.running and nothing_left):
        return Lag(behind, 0.0, True)
    start = (state.commit_time if said is not None and said > now else said) or begun
    return Lag(behind, None if start is None else round(max(0.0, (now - start).total_seconds()), 3), False)
