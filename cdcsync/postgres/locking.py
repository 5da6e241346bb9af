"""Locks that others want, taken so that no statement of theirs waits for long and none ever fails.

On the target every later search waits behind a session that waits for an exclusive lock. On the source the catalog's
functions lock a partition before its parent, and ALTER TABLE locks the parent first. So a lock is waited for only
briefly, then everything is given up, and tried again a little later.

Nor do we wait for long where others hold a table: what is for other indexes would wait as well. `LockedOut` remembers
that, and `exclusive_locks` tells who it is.

Source: PostgreSQL, "Explicit Locking"; "Client Connection Defaults" (lock_timeout); "pg_locks", "pg_stat_activity".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import LiteralString, TypeVar

import anyio
import msgspec
import psycopg

from cdcsync.backoff import backoff_s
from cdcsync.config import QualifiedName
from cdcsync.errors import CdcsyncError, SetupError, SourceUnavailable, Unavailable
from cdcsync.logs import get_logger
from cdcsync.postgres.autovacuums import Vacuumed, end_autovacuums
from cdcsync.postgres.errors import LOCKED_OUT, first_line, locked_out, of_a_statement, speaking_of
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.postgres.settings import Side

log = get_logger()

T = TypeVar("T")

BRIEFLY = "SET LOCAL lock_timeout = '400ms'"
"""In one transaction; for as long as `ALWAYS_BRIEFLY`."""

SHARED_LOCK_WAIT_MS = 2_000
"""How long a session that serves several indexes waits for a lock on the tables of one: the others wait behind it."""

LOCKED_OUT_S = 5.0
"""How long a table that was found locked is not asked for: each attempt costs others the time that it waits."""


ATTEMPTS = 6
"""How many times `attempt` tries a change: for some seconds in all."""

OPEN_FOR_S = 1.0
"""A transaction that is younger was not in the way of the first attempts."""


FIRST_NUDGE, NUDGE_EVERY = 2, 5
"""The attempts after which an autovacuum is asked to let go: the third, and then each fifth, some 20 s apart."""


async def until_locked(
    change: Callable[[], Awaitable[T]],
    *,
    table: str,
    attempts: int | None = None,
    vacuumed: Vacuumed | None = None,
) -> T:
    """Do a change that begins with `BRIEFLY`, in a transaction of its own, again and again until nobody is in its way.

    :param table: what is locked, for the log.
    :param attempts: how many times it is tried at most, where others wait for the caller meanwhile.
    :param vacuumed: what autovacuums are asked to let go of.
    :raises LockNotAvailable, DeadlockDetected: somebody was in its way each time; or the error of our tree that the
        change made of these.
    """
    failures = 0
    while True:
        try:
            return await change()
        except (*LOCKED_OUT, Unavailable) as error:
            if not locked_out(error):
                raise
            said = first_line(error) if isinstance(error, psycopg.Error) else str(error)
            log.info("lock_waits", table=table, attempt=failures + 1, error=said)
            if failures + 1 == attempts:
                raise
            if vacuumed is not None and failures % NUDGE_EVERY == FIRST_NUDGE and await end_autovacuums(vacuumed):
                pause_s = 0.0  # another one may begin as soon as the server looks for work again
            else:
                pause_s = backoff_s(failures, first=0.1, most=5)
            await anyio.sleep(pause_s)
            failures += 1


class Lock(msgspec.Struct, frozen=True):
    """A lock that keeps everybody from using a table or publication, or a request for one, behind which others wait.

    :ivar of: the table that was asked about; None if it is a publication's.
    :ivar table: its name, as SQL writes it; of a partitioned table it may be a partition's. Or `publication NAME`.
    :ivar pid: of the session; None for a prepared transaction, which `session` names.
    :ivar session: its application and role.
    :ivar ending: the statement that ends its transaction.
    :ivar age: how long a session's transaction has been open; None if we may not know.
    :ivar granted: whether it has the lock; else it waits for others, and we behind it.
    :ivar transaction: the transaction that it is of: another one each time that the session has begun again.
    """

    of: QualifiedName | None
    table: str
    pid: int | None
    session: str
    ending: str
    age: str | None
    granted: bool
    transaction: str

    def __str__(self) -> str:
        holder = f"pid {self.pid} ({self.session})" if self.pid is not None else self.session
        lasting = "" if self.age is None else f", whose transaction has been open for {self.age}"
        if self.granted:
            return f"{self.table} is locked by {holder}{lasting}"
        return f"{self.table} cannot be used because {holder} waits for a lock on it{lasting}"

    @property
    def remedy(self) -> str:
        """The fix, as an instruction."""
        return f"wait until that transaction ends, or end it: {self.ending}"


READERS_WAIT = ("AccessExclusiveLock",)
"""The locks that keep everybody from reading a table."""

WRITERS_WAIT = (*READERS_WAIT, "ExclusiveLock", "ShareRowExclusiveLock", "ShareLock")
"""The locks that keep everybody from writing to a table."""

PUBLISHING_WAITS = (*WRITERS_WAIT, "ShareUpdateExclusiveLock")
"""Those that keep a table from entering or leaving a publication. VACUUM and CREATE INDEX CONCURRENTLY take some."""

BUILDING_WAITS = (*PUBLISHING_WAITS, "RowExclusiveLock")
"""Those whose transactions CREATE INDEX CONCURRENTLY waits for: of everybody who writes, too."""

REPLACING_WAITS = (*BUILDING_WAITS, "RowShareLock", "AccessShareLock")
"""Those that keep a table or view from being dropped or replaced: of everybody who reads it, too."""

LOCKED: LiteralString = (
    "(SELECT array_agg(relation) FROM pg_locks WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)
"""SQL for the relations that a statement would have to wait for.

Functions that write an expression of a table (pg_get_expr and the like) lock it, as does pg_partition_tree."""

PREPARED: LiteralString = """
    SELECT transaction, prepared, format('prepared transaction %%L (%%s, prepared %%s ago)', gid, owner,
            date_trunc('second', clock_timestamp() - prepared)) AS words,
        format('COMMIT PREPARED %%1$L or ROLLBACK PREPARED %%1$L in database %%2$I', gid, database) AS ending
    FROM pg_prepared_xacts
"""
"""SQL for the prepared transactions, as an operator knows them, and the statements that end them."""

_HELD: LiteralString = """
        l.pid,
        coalesce(p.words, nullif(concat_ws(', ', nullif(a.application_name, ''), 'role ' || a.usename), ''),
            a.backend_type, ''),
        coalesce(p.ending, format('SELECT pg_terminate_backend(%%s)', l.pid)),
        date_trunc('second', clock_timestamp() - a.xact_start)::text, l.granted, l.virtualtransaction
"""
# A prepared transaction keeps the virtual id that it had in its session, and gets another one when the server starts
# again. Like each transaction it has its own id locked, under the same virtual id. If it is gone from only one of the
# views, it has just ended.
_HOLDERS: LiteralString = (
    """
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
    LEFT JOIN (("""
    + PREPARED
    + """) AS p JOIN pg_locks AS own ON own.transactionid = p.transaction AND own.pid IS NULL)
        ON own.virtualtransaction = l.virtualtransaction
    WHERE (l.pid <> pg_backend_pid() OR p.words IS NOT NULL)
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
)
_EXCLUSIVE: LiteralString = (
    """
    WITH RECURSIVE wanted (oid, place) AS (
        SELECT c.oid, named.place FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS named (schema, name, place)
            JOIN pg_namespace AS n ON n.nspname = named.schema
            JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = named.name
        -- Who reads a table opens its partitions, its indexes and what holds its large values.
        UNION SELECT part.oid, w.place FROM wanted AS w CROSS JOIN LATERAL (
            SELECT inhrelid FROM pg_inherits WHERE inhparent = w.oid
            UNION ALL SELECT indexrelid FROM pg_index WHERE indrelid = w.oid
            UNION ALL SELECT reltoastrelid FROM pg_class WHERE oid = w.oid AND reltoastrelid <> 0
        ) AS part (oid)
    )
    SELECT w.place, quote_ident(n.nspname) || '.' || quote_ident(c.relname),"""
    + _HELD
    + """
    FROM pg_locks AS l JOIN wanted AS w ON w.oid = l.relation
    JOIN pg_class AS c ON c.oid = w.oid JOIN pg_namespace AS n ON n.oid = c.relnamespace"""
    + _HOLDERS
    + """
        AND l.locktype = 'relation' AND l.mode = ANY(%s)
        -- What began ahead of now did so before the clock went back.
        AND (coalesce(a.xact_start, p.prepared)
            BETWEEN clock_timestamp() - make_interval(secs => %s) AND clock_timestamp()) IS NOT TRUE
    ORDER BY l.granted DESC, 2
"""
)
# A statement that changes a publication takes AccessExclusiveLock on it, which conflicts with every other lock.
_OF_PUBLICATION: LiteralString = (
    "SELECT 'publication ' || quote_ident(pub.pubname),"
    + _HELD
    + "FROM pg_locks AS l JOIN pg_publication AS pub ON pub.oid = l.objid"
    + _HOLDERS
    + """
        AND l.locktype = 'object' AND l.classid = 'pg_publication'::regclass AND pub.pubname = %s
    ORDER BY l.granted DESC
"""
)


async def exclusive_locks(
    connection: Connection,
    tables: Collection[QualifiedName],
    *,
    modes: Collection[str] = READERS_WAIT,
    open_for_s: float = 0.0,
) -> list[Lock]:
    """Return who keeps everybody from reading these tables or partitions of them, those who do before those who will.

    :param modes: the locks in question.
    :param open_for_s: leave out transactions that were begun later than that. Nothing tells since when a lock is held.
    """
    asked = list(tables)
    schemas, names = [one.schema for one in asked], [one.name for one in asked]
    cursor = await connection.execute(_EXCLUSIVE, [schemas, names, list(modes), open_for_s])
    return [Lock(asked[place - 1], *lock) for place, *lock in await cursor.fetchall()]


async def publishing_locks(connection: Connection, publication: str, tables: Collection[QualifiedName]) -> list[Lock]:
    """Return who keeps a publication from being changed, and then who keeps these tables from entering or leaving it.

    A statement that changes a publication locks it first, and then the tables.
    """
    cursor = await connection.execute(_OF_PUBLICATION, [publication])
    held = [Lock(None, *lock) for lock in await cursor.fetchall()]
    return [*held, *await exclusive_locks(connection, tables, modes=PUBLISHING_WAITS)]


def away(error: CdcsyncError, side: Side) -> bool:
    """Say whether a server is away, for all indexes: not if an error came of what a statement for one of them needs.

    The driver's error tells, whether or not the innermost `speaking_of` knew which index that was.
    """
    if not isinstance(error, Unavailable) or locked_out(error):
        return False
    return not (isinstance(error.__cause__, psycopg.Error) and of_a_statement(error.__cause__, side))


async def attempt(
    connection: Connection,
    change: Callable[[], Awaitable[T]],
    relations: Sequence[QualifiedName],
    *,
    where: str,
    vacuumed: Vacuumed | None = None,
) -> T:
    """Do a change as `until_locked` does, a few times.

    :param relations: the ones that nobody else may use meanwhile. The first names the change in the log.
    :raises SetupError: others used them each time; nothing was changed. It names one of them.
    """
    try:
        return await until_locked(change, table=str(relations[0]), attempts=ATTEMPTS, vacuumed=vacuumed)
    except LOCKED_OUT as error:
        held = await exclusive_locks(connection, relations, modes=REPLACING_WAITS, open_for_s=OPEN_FOR_S)
        raise SetupError(
            "other transactions have locked its view or tables for some seconds, a dump for one"
            + "".join(f": {lock}" for lock in held[:1]),
            where=where,
            hint=f"{held[0].remedy}; then try again"
            if held
            else "see pg_locks and pg_stat_activity; when they are over, try again",
        ) from error


class LockedOut:
    """Whether the tables of an index could not be used just now, for all who use them over the same sessions.

    Mostly because somebody holds them locked.
    """

    def __init__(self, index: str, source: Sequence[QualifiedName], target: Sequence[QualifiedName] = ()) -> None:
        """Remember it of an index.

        :param source: its tables in the source; `target`: those in the target.
        """
        self._index = index
        self._tables: dict[Side, Sequence[QualifiedName]] = {"source": source, "target": target}
        self._until = float("-inf")

    @property
    def lately(self) -> bool:
        """Whether that was so lately that nobody asks for them again."""
        return anyio.current_time() < self._until

    def wait(self) -> None:
        """Have nobody ask for them for a while."""
        self._until = anyio.current_time() + LOCKED_OUT_S

    async def note(self, error: CdcsyncError, source: Session, target: Session | None = None) -> bool:
        """Note an error of using them over a session, and log who holds a lock.

        Returns False if the error does not pass, or is not theirs alone.
        """
        side: Side = "source" if isinstance(error, SourceUnavailable) else "target"
        session = source if side == "source" else target
        if session is None or not isinstance(error, Unavailable) or away(error, side):
            return False
        self.wait()
        if not locked_out(error):
            log.warning("index_left_alone", index=self._index, error=str(error))
            return True
        try:
            with speaking_of(side):
                modes = READERS_WAIT if side == "source" else WRITERS_WAIT
                locks = await exclusive_locks(await session.connection(), self._tables[side], modes=modes)
        except CdcsyncError:
            locks = []
        log.warning("table_locked", index=self._index, error=str(error), locks=[str(one) for one in locks])
        return True
