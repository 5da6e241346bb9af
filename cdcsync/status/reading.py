"""One reading of both servers, by any process: nothing is written, nothing is asked of the worker.

The source is read before the target. The checkpoint that is found was then reached after the end of the WAL that it is
compared with, so a lag of 0 is never claimed wrongly; and a slot that was ahead of the checkpoint truly is.

Source: PostgreSQL, "pg_replication_slots"; "pg_locks".
"""

from __future__ import annotations

from datetime import datetime
from typing import cast

import psycopg

from cdcsync.config import Config
from cdcsync.errors import CdcsyncError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.source.slot import FOLLOWER
from cdcsync.status.embedders import read_embedders
from cdcsync.status.headline import with_headlines
from cdcsync.status.indexes import Indexes, absent, read_indexes
from cdcsync.status.model import VERSION, Status
from cdcsync.status.stream import (
    read_lag,
    read_locks,
    read_source,
    read_worker,
    slot_problems,
    slot_status,
    worker_problems,
)
from cdcsync.status.tables import BRIEFLY, relations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.version import require_ours


async def read_status(config: Config, source: Connection | CdcsyncError, target: Connection) -> Status:
    """Read the status from both servers.

    What cannot be read of the source, of an index or of a table in which workers note something is among the problems.

    :param source: without a connection, what only the source knows is None, for the reason that the error tells.
    :param target: a connection in autocommit that nobody else uses meanwhile.
    :raises TargetUnavailable: the target does not answer now, or the pipeline's tables are locked.
    :raises SetupError: the role may not read the pipeline's tables.
    """
    problems: list[str] = []
    end, slot = await read_source(config, source, problems)
    schema, name = config.target.schema, config.source.slot
    with speaking_of("target"):
        await target.execute(BRIEFLY)
        await require_ours(target, schema)
        present = await relations(target, schema)
        pipelines = Pipelines(schema, name)
        set_up = {"pipelines", "indexes", "backfills"} <= present
        state = await pipelines.read(target) if set_up else None
        holder = await pipelines.holder(target)
        now, since, standby = await _clock(target, holder)
        ours = slot if slot is not None and slot.foreign is None else None
        locked: bool | None = holder is not None
        if standby:  # it shows no lock of its primary, so a worker that reads the slot is taken for ours
            locked = None if end is None else ours is not None and ours.reader == FOLLOWER
        worker = read_worker(state, ours, locked=locked, since=since)
        stored = Indexes()
        if state is None:
            problems.append(f"schema {schema} of the target holds no pipeline {name}: run `cdcsync run` first")
        else:
            problems += worker_problems(config, ours if end is not None else None, worker)
            if end is not None:
                problems += slot_problems(name, slot, state, standby=standby)
            stored = await read_indexes(target, config, present, now, problems, waiting=state.waiting)
        known = await read_embedders(target, config, present, worker, now, problems)
    answers = source if isinstance(source, psycopg.AsyncConnection) and end is not None else None
    found = await read_locks(config, answers, target, stored, problems)
    lag = read_lag(end, state, worker, stored.oldest, now)
    status = Status(
        version=VERSION,
        read_at=now,
        pipeline=name,
        publication=config.source.publication,
        checkpoint=None if state is None or state.checkpoint is None else str(state.checkpoint),
        lag_bytes=lag.bytes,
        lag_seconds=lag.seconds,
        caught_up=lag.caught_up,
        slot=None if ours is None else slot_status(ours),
        worker=worker,
        embedders=known,
        indexes={index: found.get(index) or absent(config, index) for index in config.indexes},
        problems=problems,
        standby=standby,
    )
    return with_headlines(status, config.worker.ready_max_lag_s)


async def _clock(target: Connection, holder: int | None) -> tuple[datetime, datetime | None, bool]:
    """Return the target's time, by which rows are stamped, the start of the lock's session, whether it is a standby."""
    cursor = await target.execute(
        "SELECT clock_timestamp(), (SELECT backend_start FROM pg_stat_activity WHERE pid = %s), pg_is_in_recovery()",
        [holder],
    )
    return cast(tuple[datetime, datetime | None, bool], await cursor.fetchone())
