"""The pipeline's row in the target: lease, fence, checkpoint, and which source cluster it belongs to.

The rules:

1. One worker per slot writes. It holds a session advisory lock and has raised `fence`. Each transaction that it
   commits updates the row *where fence is still its own*, so a worker that lost its session cannot write behind its
   successor. Its other sessions, which embed, settle, build and compare, are *admitted* under its fence: who raises the
   fence ends those that were admitted under an older one, and an overtaken worker is not admitted again. So of a worker
   that was frozen or cut off, nothing comes late.
2. The checkpoint only moves forward, and only in the transaction that applied what it stands for.
3. The checkpoint is a chain (`model/chain`). Each commit counts one up in `commits`, and moves the checkpoint only from
   the values that this worker last saw committed. Any other values mean that the target went back to an earlier state
   (a standby that lagged was promoted, a backup was restored), or that somebody edited the row: nothing is written, and
   the worker begins anew, which looks for a gap.
4. A commit whose answer was lost may or may not have happened: afterwards both its old and its new values continue the
   chain.
5. `ahead` is how far beyond the checkpoint the index may already hold something of the source: rows of a transaction
   that is applied in part, or of a page of a backfill. A source that branched off before that never had them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime
from typing import LiteralString, cast

import anyio
import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from cdcsync.errors import RunError, TargetRewound, TargetUnavailable
from cdcsync.logs import get_logger
from cdcsync.lsn import Lsn
from cdcsync.model.chain import Lease, continued, overtaken
from cdcsync.model.pauses import Pause
from cdcsync.postgres.liveness import BEATS, PATIENCE_S, WatchedConnection
from cdcsync.postgres.queries import fetch_one, fetch_row, fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection

log = get_logger()

END_SESSION_MS = 5_000
"""How long to wait for a session that was told to end."""

END_POLL_S = 0.02
"""How often it is looked whether those have ended that were told to together."""


class PipelineState(msgspec.Struct, frozen=True):
    """The stored state of a pipeline.

    :ivar waiting: why indexes that have no row of their own yet are paused.
    :ivar approved_source: the server that somebody approved, by `ServerIdentity.name`.
    :ivar source_started: when the source was started that the index follows; None if no worker has noted it yet.
    :ivar commit_lsn: where the last transaction that was applied ended; None if that is not known.
    """

    checkpoint: Lsn | None
    ahead: Lsn | None
    commits: int
    system_identifier: str | None
    timeline: int | None
    fence: int
    worker: str | None
    commit_time: datetime | None
    caught_up_at: datetime | None
    updated_at: datetime
    waiting: dict[str, Pause] = {}
    approved_source: str | None = None
    source_started: datetime | None = None
    commit_lsn: Lsn | None = None

    @property
    def lease(self) -> Lease:
        """The part of it that each commit compares."""
        return Lease(self.fence, self.checkpoint, self.commits)

    @property
    def reach(self) -> Lsn | None:
        """The furthest position of the source of which the index may hold something; None without a checkpoint."""
        return self.checkpoint if self.checkpoint is None else max(self.checkpoint, self.ahead or self.checkpoint)


def waiters_lock(schema: str) -> str:
    """Return how the name of the lock begins that `wait_for` shares while it waits; the slot's name follows."""
    return f"cdcsync waits {schema} "


async def others_begun(connection: Connection, schema: str, slot: str) -> dict[str, str | None]:
    """Return the other schemas of the target whose pipeline follows a slot of this name, as far as the role may look.

    :returns: for each the source cluster's system identifier.
    """
    schemas = await fetch_rows(
        connection,
        "SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = 'pipelines' AND c.relkind = 'r' AND n.nspname <> %s"
        " AND obj_description(c.oid, 'pg_class') LIKE 'cdcsync%%'"
        " AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1",
        [schema],
    )
    found: dict[str, str | None] = {}
    for (other,) in schemas:
        statement = sql.SQL("SELECT system_identifier FROM {} WHERE slot = %s AND checkpoint IS NOT NULL")
        row = await fetch_row(connection, statement.format(sql.Identifier(other, "pipelines")), [slot])
        if row is not None:
            found[other] = row[0]
    return found


class Pipelines:
    """The pipelines table, for one slot."""

    def __init__(self, schema: str, slot: str) -> None:
        self._table = sql.Identifier(schema, "pipelines")
        self._schema = schema
        self._slot = slot
        self._lock = f"cdcsync pipeline {schema} {slot}"
        self._admissions = sql.Literal(f"cdcsync admitted {schema} {slot}")

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
        """Return the stored state, None when the pipeline was never set up here; earlier tables tell it, too."""
        row = await fetch_row(
            connection,
            # Columns that earlier versions had not are looked up by name in the row.
            sql.SQL(
                "SELECT checkpoint::text, to_jsonb(p) ->> 'ahead', coalesce((to_jsonb(p) ->> 'commits')::bigint, 0),"
                " system_identifier, timeline, fence, worker, commit_time, caught_up_at, updated_at,"
                " to_jsonb(p) -> 'waiting', to_jsonb(p) ->> 'approved_source',"
                " (to_jsonb(p) ->> 'source_started')::timestamptz, to_jsonb(p) ->> 'commit_lsn' FROM {} AS p"
                " WHERE slot = %s"
            ).format(self._table),
            [self._slot],
        )
        if row is None:
            return None
        checkpoint, ahead, commits, *rest = row
        rest[-4] = msgspec.convert(rest[-4] or {}, dict[str, Pause])
        rest[-1] = _lsn(rest[-1])
        return PipelineState(_lsn(checkpoint), _lsn(ahead), commits, *rest)

    async def approve_source(self, connection: Connection, server: str) -> None:
        """Let the index follow a server that is not the one it has followed, once. The caller commits."""
        await connection.execute(
            sql.SQL("UPDATE {} SET approved_source = %s WHERE slot = %s").format(self._table), [server, self._slot]
        )

    async def note_waiting(self, connection: Connection, pauses: Mapping[str, Pause], indexes: Collection[str]) -> None:
        """Note why indexes that have no row of their own are paused; earlier notes stay. The caller commits.

        :param indexes: those of which there may be a note, and no other.
        """
        told = {name: {"reason": one.reason, "remedy": one.remedy} for name, one in pauses.items()}
        await connection.execute(
            sql.SQL(
                "UPDATE {} AS p SET waiting = (SELECT jsonb_object_agg(name,"
                " coalesce(p.waiting -> name, jsonb_build_object('since', now())) || coalesce(told -> name, '{{}}'))"
                " FROM (SELECT %s::jsonb AS told) AS new, unnest(%s::text[]) AS name"
                " WHERE coalesce(p.waiting, '{{}}') || told ? name) WHERE slot = %s"
            ).format(self._table),
            [Jsonb(told), list(indexes), self._slot],
        )

    async def publication(self, connection: Connection) -> str | None:
        """Return the publication that the pipeline was last set up with; None if it never was."""
        row = await fetch_row(
            connection, sql.SQL("SELECT publication FROM {} WHERE slot = %s").format(self._table), [self._slot]
        )
        return None if row is None else cast(str, row[0])

    async def begun(self, connection: Connection) -> bool:
        """Say whether there is a checkpoint; tables of every earlier version tell."""
        statement = sql.SQL("SELECT FROM {} WHERE slot = %s AND checkpoint IS NOT NULL").format(self._table)
        return await fetch_row(connection, statement, [self._slot]) is not None

    async def try_lock(self, connection: Connection, *, wait_s: float = 0) -> bool:
        """Take the pipeline's lock for this session, if no other session holds it that anybody has heard of lately.

        A session that has it beats.

        :param wait_s: how long to wait for a session that is just ending.
        :raises TargetUnavailable: the session is with a standby, which knows nothing of the primary's locks.
        """
        self.refuse_standby(connection)
        statement = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
        locked = await fetch_value(connection, statement, [self._lock])
        if not locked and await self.end_silent(connection):
            locked = await fetch_value(connection, statement, [self._lock])
        if not locked and wait_s:
            return await self.lock_within(connection, wait_s)
        if locked:
            _beats(connection)
        return bool(locked)

    async def awaited(self, connection: Connection) -> bool:
        """Say whether `wait_for` waits in some transaction for a checkpoint of this pipeline, or has waited in it."""
        row = await fetch_one(
            connection,
            "SELECT NOT pg_try_advisory_xact_lock(hashtextextended(%s, 0))",
            [waiters_lock(self._schema) + self._slot],
        )
        return bool(row[0])

    async def lock_within(self, connection: Connection, seconds: float) -> bool:
        """Take the pipeline's lock as `try_lock` does, waiting a while for a session that is just ending."""
        try:
            async with connection.transaction():
                await connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{seconds * 1000:.0f}ms"])
                await connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [self._lock])
        except psycopg.errors.LockNotAvailable:
            return False
        _beats(connection)
        return True

    async def holder(self, connection: Connection) -> int | None:
        """Return the backend process that holds the pipeline's lock, None when no worker does."""
        row = await fetch_row(
            connection,
            # A bigint key is shown as two halves; objsubid 1 tells it from a key made of two integers.
            "SELECT l.pid FROM pg_locks AS l, hashtextextended(%s, 0) AS key"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND l.classid::int8 = (key >> 32) & 4294967295 AND l.objid::int8 = key & 4294967295",
            [self._lock],
        )
        return None if row is None else cast(int, row[0])

    async def end_session(self, connection: Connection, pid: int, application_name: str) -> None:
        """End a session of our own that the server has not noticed to be gone, and wait until its locks are free."""
        async with _as_login(connection):
            await connection.execute(
                "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE pid = %s AND application_name = %s"
                " AND usename = session_user",
                [END_SESSION_MS, pid, application_name],
            )

    async def end_silent(self, connection: Connection, silent_s: float | None = None) -> bool:
        """End the session that holds the lock if nothing has come from it for so long; returns whether it did.

        A session that has it is heard from all the time, see `postgres/liveness`. The host of one that is silent is
        down or cut off, or its process is stopped; should it live after all, the fence keeps it from writing.

        The server's clock may have been set meanwhile. It only says whom to watch, for the last third of that time: two
        beats of a session that lives.

        :param silent_s: by default as long as a far end may say nothing before somebody looks whether it is there.
        """
        if silent_s is None:
            silent_s = connection.patience_s if isinstance(connection, WatchedConnection) else PATIENCE_S
        watched_s = silent_s * 2 / BEATS
        async with _as_login(connection):
            row = await fetch_row(
                connection,
                "SELECT a.pid, a.state_change FROM pg_stat_activity AS a WHERE a.pid = %s AND"
                " starts_with(a.application_name, 'cdcsync ') AND a.usename = session_user AND a.state <> 'active'"
                " AND clock_timestamp() - a.state_change NOT BETWEEN '0' AND %s * interval '1 s'",
                [await self.holder(connection), silent_s - watched_s],
            )
        if row is None:
            return False
        await anyio.sleep(watched_s)
        ended = None
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
            async with _as_login(connection):
                # A transaction of the caller's would see the session as it was.
                await connection.execute("SELECT pg_stat_clear_snapshot()")
                ended = await fetch_row(
                    connection,
                    "SELECT pg_terminate_backend(a.pid, %s) FROM pg_stat_activity AS a"
                    " WHERE a.pid = %s AND a.state_change = %s AND a.state <> 'active'",
                    [END_SESSION_MS, *row],
                )
        if ended != (True,):
            return False
        log.warning("silent_session_ended", slot=self._slot, pid=row[0], silent_s=silent_s)
        return True

    async def take_over(self, connection: Connection, worker: str | None = None) -> Lease:
        """Raise the fence; waits for a transaction of the predecessor that is still committing.

        :param worker: the name of the new worker; None of a command, which ends soon.
        :raises RunError: the pipeline's row is gone.
        """
        row = await fetch_row(
            connection,
            sql.SQL(
                # By the clock higher than any before, also where the row began anew or went back with the target.
                # Before version 2 there was no `commits`.
                "UPDATE {} AS p SET fence = greatest(fence + 1, (extract(epoch FROM clock_timestamp()) * 1000)::int8),"
                " worker = coalesce(%s, worker) WHERE slot = %s"
                " RETURNING fence, checkpoint::text, coalesce((to_jsonb(p) ->> 'commits')::int8, 0)"
            ).format(self._table),
            [worker, self._slot],
        )
        if row is None:
            raise self.gone()
        fence, checkpoint, commits = row
        return Lease(fence, _lsn(checkpoint), commits)

    async def admit(self, connection: Connection, lease: Lease) -> None:
        """Let a session write beside the one that has the lock, until somebody else takes over.

        It is marked first, with a lock that nobody waits for, and looks at the fence then: whoever takes over meanwhile
        has raised the fence before looking for marks.

        :raises LeaseLost: somebody has taken over by now.
        :raises TargetRewound: the target went back to before this worker took over.
        :raises TargetUnavailable: the session is with a standby.
        :raises RunError: the pipeline's row is gone.
        """
        self.refuse_standby(connection)
        cursor = await connection.execute(
            sql.SQL("SELECT pg_advisory_lock_shared(hashtext({}), {}); SELECT fence FROM {} WHERE slot = {}").format(
                self._admissions, _mark(lease), self._table, sql.Literal(self._slot)
            )
        )
        cursor.nextset()
        row = await cursor.fetchone()
        if row is None:
            raise self.gone()
        if row[0] > lease.fence:
            raise overtaken(self._slot)
        if row[0] < lease.fence:
            raise TargetRewound("the target went back to before this worker took over", where=f"slot {self._slot}")

    def refuse_standby(self, connection: Connection) -> None:
        """Refuse a session with a standby.

        :raises TargetUnavailable: it is one.
        """
        if isinstance(connection, WatchedConnection) and connection.backend is not None and connection.backend.standby:
            raise TargetUnavailable(
                "the target is a standby at the moment, which takes no writes and shows no locks of its primary",
                where=f"slot {self._slot}",
                hint="point target.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
            )

    async def end_overtaken(self, connection: Connection, lease: Lease, spared: Collection[int] = ()) -> list[int]:
        """End the sessions that were admitted under an older fence, and return their processes once they are gone.

        What they were doing is undone, or was committed before this returns. Call it once the fence is raised.

        :param spared: the processes of those that go on.
        :raises TargetUnavailable: one of them does not end, or we may not end it.
        """
        found = left = await self._admitted_before(connection, lease, spared)
        for pid, _ in found:
            with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                async with _as_login(connection):
                    await connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        deadline = anyio.current_time() + END_SESSION_MS / 1000
        while left and anyio.current_time() < deadline:
            await anyio.sleep(END_POLL_S)
            left = await self._admitted_before(connection, lease, spared)
        if left:
            pid, role = left[0]
            raise TargetUnavailable(
                f"a session of the worker before does not end: pid {pid}, of role {role}",
                where=f"slot {self._slot}",
                hint=f"end it, as that role or a superuser: SELECT pg_terminate_backend({pid})",
            )
        return [pid for pid, _ in found]

    async def _admitted_before(
        self, connection: Connection, lease: Lease, spared: Collection[int]
    ) -> list[tuple[int, str]]:
        """Return the sessions that bear the mark of another fence, with their roles."""
        return await fetch_rows(
            connection,
            sql.SQL(
                "SELECT l.pid, coalesce(a.usename, '') FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a"
                " ON a.pid = l.pid, hashtext({}) AS key WHERE l.locktype = 'advisory' AND l.objsubid = 2"
                " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                " AND l.classid::int8 = key & 4294967295 AND l.objid::int8 <> {} AND l.pid <> pg_backend_pid()"
                " AND l.pid <> ALL (%s::int[]) ORDER BY l.pid"
            ).format(self._admissions, _mark(lease)),
            [list(spared)],
        )

    async def shows(self, connection: Connection, lease: Lease) -> bool:
        """Say whether what a connection reads holds all that was committed under a lease: a standby may be behind."""
        row = await fetch_row(
            connection,
            sql.SQL("SELECT fence = %s AND commits >= %s FROM {} WHERE slot = %s").format(self._table),
            [lease.fence, lease.commits, self._slot],
        )
        return row == (True,)

    async def present(self, connection: Connection) -> PipelineState:
        """Return the stored state of a pipeline that was set up.

        :raises RunError: the row is gone.
        """
        state = await self.read(connection)
        if state is None:
            raise self.gone()
        return state

    def gone(self) -> RunError:
        """Return what to raise where the pipeline's row is gone."""
        return RunError("the pipeline's row is gone", where=f"slot {self._slot}", hint="start the worker again")

    async def begin_at(
        self,
        connection: Connection,
        lease: Lease,
        checkpoint: Lsn,
        system_identifier: str,
        timeline: int,
        started: datetime | None = None,
    ) -> Lease:
        """Store where the pipeline starts and which cluster it follows, which spends an approval of that.

        :param started: when the server was started.

        :raises LeaseLost, TargetRewound: as `commit`.
        """
        moved, _ = await self._move(
            connection,
            lease,
            "checkpoint = %s, system_identifier = %s, timeline = %s, source_started = %s, approved_source = NULL,"
            " commit_lsn = CASE WHEN checkpoint IS NOT NULL THEN commit_lsn END, updated_at = now()",
            [str(checkpoint), system_identifier, timeline, started],
        )
        return moved

    async def forget(self, connection: Connection, lease: Lease) -> Lease:
        """Forget the checkpoint inside the caller's transaction: the pipeline begins as one that never ran.

        :raises LeaseLost, TargetRewound: as `commit`.
        """
        moved, _ = await self._move(connection, lease, "checkpoint = NULL, ahead = NULL, updated_at = now()", [])
        return moved

    async def tells_wal_end(self, connection: Connection) -> bool:
        """Say whether a commit over this connection can tell where the WAL ends.

        Not every service has the function for that, and its EXECUTE may have been revoked from PUBLIC.
        """
        usable = await fetch_value(
            connection,
            "SELECT has_function_privilege(to_regprocedure('pg_catalog.pg_current_wal_insert_lsn()')::oid, 'EXECUTE')",
        )
        return usable is True

    async def commit(
        self,
        connection: Connection,
        lease: Lease,
        checkpoint: Lsn | None,
        *,
        ahead: Lsn | None = None,
        commit_time: datetime | None = None,
        caught_up: bool = False,
        wal_end: bool = False,
    ) -> tuple[Lease, Lsn | None]:
        """Move the checkpoint, or with None just continue the chain, inside the caller's transaction.

        :param ahead: the position just after the commit record of a transaction that is applied in part.
        :param wal_end: whether to ask where the WAL ends, which only a connection that `tells_wal_end` can answer.
        :returns: the lease that holds once the caller's transaction has committed, and where the WAL ended as the row
            was written, which is before the commit; None if that was not asked for.
        :raises LeaseLost: another worker has taken over; the caller must roll back.
        :raises TargetRewound: the row is not as it was last committed; the caller must roll back.
        """
        return await self._move(
            connection,
            lease,
            "checkpoint = greatest(checkpoint, %s::pg_lsn), ahead = greatest(ahead, %s::pg_lsn),"
            " commit_time = coalesce(%s, commit_time), commit_lsn = coalesce(%s::pg_lsn, commit_lsn),"
            " caught_up_at = CASE WHEN %s THEN clock_timestamp() ELSE caught_up_at END,"
            " updated_at = clock_timestamp()",
            [_text(checkpoint), _text(ahead), commit_time, commit_time and _text(checkpoint), caught_up],
            wal_end=wal_end,
        )

    async def _move(
        self,
        connection: Connection,
        lease: Lease,
        assignments: LiteralString,
        values: Sequence[object],
        *,
        wal_end: bool = False,
    ) -> tuple[Lease, Lsn | None]:
        """Update the row if it is as it was last seen: the only statement by which a worker changes it."""
        # PostgreSQL looks up the function, and checks who may call it, even in a branch of a CASE that is not taken.
        position: LiteralString = "pg_catalog.pg_current_wal_insert_lsn()::text" if wal_end else "NULL"
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET " + assignments + ", commits = commits + 1 WHERE slot = %s AND fence = %s"
                " AND commits = %s AND checkpoint IS NOT DISTINCT FROM %s::pg_lsn RETURNING checkpoint::text, commits, "
                + position
            ).format(self._table),
            [*values, self._slot, lease.fence, lease.commits, _text(lease.checkpoint)],
        )
        row = await cursor.fetchone()
        if row is None:
            continued(self._slot, lease, (await self.present(connection)).lease)
            raise TargetRewound("the pipeline's row changed while it was read", where=f"slot {self._slot}")
        return Lease(lease.fence, _lsn(row[0]), row[1]), _lsn(row[2])


@contextlib.asynccontextmanager
async def _as_login(connection: Connection) -> AsyncIterator[None]:
    """Act as the role that logged in: sessions belong to it.

    `ALTER ROLE ... SET role` may have put us in another one, which may neither see nor end them.
    """
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE NONE")
        yield


def _beats(connection: Connection) -> None:
    """Have a session be heard of from now on: others wait for what it holds."""
    if isinstance(connection, WatchedConnection):
        connection.beat()


def _mark(lease: Lease) -> sql.Literal:
    """Return a lease's fence as the second part of an advisory lock's key, which is an integer."""
    return sql.Literal(lease.fence % 2**31)


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)


def _text(lsn: Lsn | None) -> str | None:
    return None if lsn is None else str(lsn)
