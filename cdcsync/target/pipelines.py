"""The pipeline's row in the target: lease, fence, checkpoint, and what it says of the source.

The rules:

1. One worker per slot writes. It holds a session advisory lock, and has raised `fence`; each transaction that it
   commits moves the row *where fence is still its own*. A worker that lost its session cannot write behind its
   successor.
2. The checkpoint only moves forward, and only in the transaction that applied what it stands for.
3. After any doubt (a lost connection, a new worker) the checkpoint is read from here again.
"""

from __future__ import annotations

from datetime import datetime
from typing import cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.errors import LeaseLost
from cdcsync.lsn import Lsn
from cdcsync.postgres.sessions import Connection


class PipelineState(msgspec.Struct, frozen=True):
    """The stored state of a pipeline."""

    checkpoint: Lsn | None
    system_identifier: str | None
    timeline: int | None
    fence: int
    worker: str | None
    commit_time: datetime | None
    caught_up_at: datetime | None
    updated_at: datetime


class Pipelines:
    """The pipelines table, for one slot."""

    def __init__(self, schema: str, slot: str) -> None:
        self._table = sql.Identifier(schema, "pipelines")
        self._slot = slot
        self._lock = f"cdcsync pipeline {schema} {slot}"

    async def ensure(self, connection: Connection, publication: str) -> None:
        """Create the row when it is missing; it has no checkpoint then. The caller commits."""
        await connection.execute(
            sql.SQL(
                "INSERT INTO {} (slot, publication) VALUES (%s, %s)"
                " ON CONFLICT (slot) DO UPDATE SET publication = excluded.publication"
            ).format(self._table),
            [self._slot, publication],
        )

    async def read(self, connection: Connection) -> PipelineState | None:
        """Return the stored state, None when the pipeline was never set up here."""
        cursor = await connection.execute(
            sql.SQL(
                "SELECT checkpoint::text, system_identifier, timeline, fence, worker, commit_time, caught_up_at,"
                " updated_at FROM {} WHERE slot = %s"
            ).format(self._table),
            [self._slot],
        )
        row = await cursor.fetchone()
        if row is None:
            return None
        checkpoint, *rest = row
        return PipelineState(Lsn.parse(cast(str, checkpoint)) if checkpoint else None, *rest)

    async def try_lock(self, connection: Connection) -> bool:
        """Take the pipeline's lock for this session, if no other session holds it."""
        cursor = await connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [self._lock])
        row = await cursor.fetchone()
        assert row is not None
        return bool(row[0])

    async def lock_within(self, connection: Connection, seconds: float) -> bool:
        """Take the pipeline's lock for this session, waiting a while for a session that is just ending."""
        try:
            async with connection.transaction():
                await connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{seconds * 1000:.0f}ms"])
                await connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [self._lock])
        except psycopg.errors.LockNotAvailable:
            return False
        return True

    async def holder(self, connection: Connection) -> int | None:
        """Return the backend process that holds the pipeline's lock, None when no worker does."""
        cursor = await connection.execute(
            # A bigint key is shown as two halves; objsubid 1 tells it from a key made of two integers.
            "SELECT l.pid FROM pg_locks AS l, hashtextextended(%s, 0) AS key"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND l.classid::int8 = (key >> 32) & 4294967295 AND l.objid::int8 = key & 4294967295",
            [self._lock],
        )
        row = await cursor.fetchone()
        return None if row is None else cast(int, row[0])

    async def take_over(self, connection: Connection, worker: str) -> int:
        """Raise the fence and return it; waits for a transaction of the predecessor that is still committing."""
        cursor = await connection.execute(
            sql.SQL("UPDATE {} SET fence = fence + 1, worker = %s WHERE slot = %s RETURNING fence").format(self._table),
            [worker, self._slot],
        )
        row = await cursor.fetchone()
        if row is None:
            raise LeaseLost("the pipeline's row is gone", where=f"slot {self._slot}", hint="start the worker again")
        return cast(int, row[0])

    async def begin_at(
        self, connection: Connection, fence: int, checkpoint: Lsn, system_identifier: str, timeline: int
    ) -> None:
        """Store where the pipeline starts and which cluster it follows.

        :raises LeaseLost: another worker has taken over.
        """
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET checkpoint = %s, system_identifier = %s, timeline = %s, updated_at = now()"
                " WHERE slot = %s AND fence = %s"
            ).format(self._table),
            [str(checkpoint), system_identifier, timeline, self._slot, fence],
        )
        self._held(cursor.rowcount)

    async def forget(self, connection: Connection, fence: int) -> None:
        """Forget the checkpoint inside the caller's transaction: what follows is as for a pipeline that never began.

        :raises LeaseLost: another worker has taken over.
        """
        cursor = await connection.execute(
            sql.SQL("UPDATE {} SET checkpoint = NULL, updated_at = now() WHERE slot = %s AND fence = %s").format(
                self._table
            ),
            [self._slot, fence],
        )
        self._held(cursor.rowcount)

    async def commit(
        self,
        connection: Connection,
        fence: int,
        checkpoint: Lsn | None,
        *,
        commit_time: datetime | None = None,
        caught_up: bool = False,
    ) -> None:
        """Move the checkpoint, or with None just prove the fence, inside the caller's transaction.

        :raises LeaseLost: another worker has taken over; the caller must roll back.
        """
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET checkpoint = greatest(checkpoint, %s::pg_lsn),"
                " commit_time = coalesce(%s, commit_time),"
                " caught_up_at = CASE WHEN %s THEN clock_timestamp() ELSE caught_up_at END,"
                " updated_at = clock_timestamp() WHERE slot = %s AND fence = %s"
            ).format(self._table),
            [None if checkpoint is None else str(checkpoint), commit_time, caught_up, self._slot, fence],
        )
        self._held(cursor.rowcount)

    def _held(self, rows: int) -> None:
        if rows != 1:
            raise LeaseLost(
                "another worker has taken over this pipeline",
                where=f"slot {self._slot}",
                hint="this worker stops; the other one goes on",
            )
