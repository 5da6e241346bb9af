"""Autovacuums, which let go of a table for whoever waits longer than `deadlock_timeout`.

We wait less for a lock (`postgres/locking`), so an autovacuum would never notice us. Where one may be in the way,
somebody has to wait so long, by a lock that excludes neither readers nor writers.

Source: PostgreSQL, "Explicit Locking"; "Lock Management" (deadlock_timeout); "Routine Vacuuming" (The Autovacuum
Daemon).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import LiteralString, NamedTuple

import psycopg
from psycopg import sql

from cdcsync.postgres.queries import fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection

_MAINTAINED: LiteralString = """
    SELECT DISTINCT format('%%I.%%I', n.nspname, c.relname)
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace,
        unnest(%s::text[], %s::text[]) AS wanted (schema, name)
    WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid() AND c.relkind = 'r'
        AND n.nspname = wanted.schema AND (c.relname = wanted.name OR starts_with(c.relname, wanted.name || '_'))
"""


class Vacuumed(NamedTuple):
    """Tables that a change locks and that an autovacuum may be at work on.

    :ivar connection: a session of their owner's, in autocommit.
    :ivar tables: each by its schema and its name; those whose names only continue with an underscore are meant too.
    """

    connection: Connection
    tables: Sequence[tuple[str, str]]


async def end_autovacuums(vacuumed: Vacuumed) -> bool:
    """Wait for tables that something maintains for so long that an autovacuum gives way; returns whether one did.

    Anything else, such as a VACUUM of an administrator's, does not, and nor does an autovacuum against wraparound.
    """
    connection = vacuumed.connection
    schemas, names = zip(*vacuumed.tables, strict=True)
    found = await fetch_rows(connection, _MAINTAINED, [list(schemas), list(names)])
    # It is told to end after that time, and then needs some to do so.
    patience = "SELECT setting::int + 2000 FROM pg_settings WHERE name = 'deadlock_timeout'"
    patience_ms: int = await fetch_value(connection, patience) if found else 0
    ended = False
    for (name,) in found:
        with contextlib.suppress(
            psycopg.errors.LockNotAvailable,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.UndefinedTable,
        ):
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {patience_ms}")
                await connection.execute(sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(sql.SQL(name)))
                ended = True
    return ended
