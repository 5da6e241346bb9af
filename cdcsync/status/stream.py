"""The stream as both servers show it: its slot, its worker, and how far it is behind the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

import anyio
import msgspec
import psycopg

from cdcsync.config import Config, QualifiedName
from cdcsync.errors import CdcsyncError, SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.postgres.locking import READERS_WAIT, WRITERS_WAIT, exclusive_locks
from cdcsync.postgres.sessions import Connection, Side, speaking_of
from cdcsync.source.catalog import Slot, current_lsn, read_slot, why_lost
from cdcsync.status.model import IndexStatus, SlotStatus, WorkerStatus
from cdcsync.target.pipelines import PipelineState

FRESH = timedelta(seconds=15)
"""How long a worker's word holds that nothing was left to apply. An idle worker gives it every 10 s."""

SAME_WRITE = timedelta(milliseconds=1)
"""Two readings of the clock in one UPDATE are microseconds apart, those of two commits are further."""

LOCKED_S = 10.0
"""How long a transaction has been open, at least, whose lock on a table is told."""

COMES_AND_GOES_S = 1.0
"""How long a lock is watched of whose transaction we may not know the age."""

_GAP_REMEDY = 'docs/operations.md, "After a gap", says how to continue'


async def read_source(
    config: Config, source: Connection | CdcsyncError | None, problems: list[str]
) -> tuple[Lsn | None, Slot | None]:
    """Return the end of the source's WAL, None if it cannot be read, and the slot."""
    error = source
    if isinstance(source, psycopg.AsyncConnection):
        try:
            with speaking_of("source"):
                return await current_lsn(source), await read_slot(source, config.source.slot)
        except CdcsyncError as why:
            error = why
    if isinstance(error, CdcsyncError) and not isinstance(error, SourceUnavailable):
        problems.append(f"the source cannot be read, so lag and slot are unknown: {error.with_fix}")
    else:
        problems.append("the source cannot be reached, so lag and slot are unknown: check that it runs")
    return None, None


async def read_locks(
    config: Config,
    source: Connection | None,
    target: Connection,
    found: Mapping[str, IndexStatus],
    problems: list[str],
) -> dict[str, IndexStatus]:
    """Return the status of each index with who holds one of its tables locked, and add that to `problems`.

    What is to be read from such a table, or written to it, waits, and everything else goes on. A lock that comes and
    goes is not told.

    :param source: None while it does not answer.
    """
    told = dict(found)
    if source is not None:
        followed = {
            name: [
                *(one for one in config.indexes[name].followed if not one.patterns),
                *(QualifiedName.parse(one) for one in status.tables),
            ]
            for name, status in found.items()
        }
        await _tell_locks("source", source, followed, READERS_WAIT, told, problems)
    ours = {
        name: [
            QualifiedName(config.target.schema, f"{name}_{one}")
            for one in ("chunks", "backlog", f"vectors_{status.generation}")
        ]
        for name, status in found.items()
    }
    await _tell_locks("target", target, ours, WRITERS_WAIT, told, problems)
    return told


async def _tell_locks(
    side: Side,
    connection: Connection,
    tables: Mapping[str, Sequence[QualifiedName]],
    modes: Sequence[str],
    told: dict[str, IndexStatus],
    problems: list[str],
) -> None:
    try:
        with speaking_of(side):
            every = {one for of in tables.values() for one in of}
            found_now = await exclusive_locks(connection, every, modes=modes, open_for_s=LOCKED_S) if every else []
            if not found_now:
                return
            # Of whom we may not look into, nobody tells how old the transaction is: one that comes and goes is gone.
            if any(lock.age is None for lock in found_now):
                await anyio.sleep(COMES_AND_GOES_S)
            before = {(lock.table, lock.pid) for lock in found_now}
            for name, of in tables.items():
                locks = [
                    lock
                    for lock in await exclusive_locks(connection, of, modes=modes, open_for_s=LOCKED_S)
                    if (lock.table, lock.pid) in before
                ]
                if locks:
                    told[name] = msgspec.structs.replace(told[name], locked=str(locks[0]))
                    problems.append(f"index {name} cannot use a table: {locks[0]}; {locks[0].remedy}")
    except CdcsyncError as error:
        problems.append(f"the locks of the {side} cannot be read: {error.with_fix}")


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
    if not worker.running:
        yield f"no worker runs for slot {config.source.slot}: start `cdcsync run`"
    if slot is None:
        return
    if slot.active_pid is not None and not worker.running:
        yield f"slot {slot.name} is read by a process that is not this pipeline's worker: source pid {slot.active_pid}"
    if slot.active_pid is None and worker.running:
        yield f"worker {worker.name} runs and is not reading slot {slot.name}: its log says why"


def slot_problems(name: str, slot: Slot | None, state: PipelineState) -> Iterator[str]:
    """Yield the problems of a slot that is gone, has lost WAL or is about to, or does not fit the checkpoint."""
    if slot is None:
        if state.checkpoint is not None:
            yield f"slot {name} is gone, and with it the changes since {state.checkpoint}: {_GAP_REMEDY}"
        return
    if slot.wal_status == "lost":
        yield f"slot {name} has lost WAL that the index needs ({why_lost(slot)}): {_GAP_REMEDY}"
    elif slot.wal_status == "unreserved":
        yield (
            f"slot {name} holds more WAL than max_slot_wal_keep_size and is lost at the source's next checkpoint:"
            " let the worker catch up, or raise the setting"
        )
    if slot.confirmed_flush is not None and state.checkpoint is not None and slot.confirmed_flush > state.checkpoint:
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
    moments ago that nothing was left counts as caught up. Otherwise the lag is the time since it last said so.
    """
    if end is None or state is None:
        return Lag()
    if state.checkpoint is None:
        return Lag(caught_up=False)
    behind = end.bytes_since(state.checkpoint)
    said = state.caught_up_at
    nothing_left = said is not None and state.updated_at - said < SAME_WRITE and now - said < FRESH
    if behind == 0 or (worker.running and nothing_left):
        return Lag(behind, 0.0, True)
    start = said or begun
    return Lag(behind, None if start is None else round(max(0.0, (now - start).total_seconds()), 3), False)
