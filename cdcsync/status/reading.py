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
from cdcsync.target.version import require_upgraded


async def read_status(config: Config, source: Connection | CdcsyncError | None, target: Connection) -> Status:
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
        await require_upgraded(target, schema)
        present = await relations(target, schema)
        pipelines = Pipelines(schema, name)
        set_up = {"pipelines", "indexes", "backfills"} <= present
        state = await pipelines.read(target) if set_up else None
        holder = await pipelines.holder(target)
        now, since = await _clock(target, holder)
        ours = slot if slot is not None and slot.foreign is None else None
        worker = read_worker(state, ours, locked=holder is not None, since=since)
        stored = Indexes()
        if state is None:
            problems.append(f"schema {schema} of the target holds no pipeline {name}: run `cdcsync run` first")
        else:
            problems += worker_problems(config, ours if end is not None else None, worker)
            if end is not None:
                problems += slot_problems(name, slot, state)
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
    )
    return with_headlines(status, config.worker.ready_max_lag_s)


async def _clock(target: Connection, holder: int | None) -> tuple[datetime, datetime | None]:
    """Return the target's time, which its rows are stamped with, and since when the lock's session exists."""
    cursor = await target.execute(
        "SELECT clock_timestamp(), (SELECT backend_start FROM pg_stat_activity WHERE pid = %s)", [holder]
    )
    return cast(tuple[datetime, datetime | None], await cursor.fetchone())
