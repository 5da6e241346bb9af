"""Connections: whether the servers have as many left as a worker opens.

Source: PostgreSQL, "Connections and Authentication" (max_connections, reserved_connections), "CREATE ROLE" and "CREATE
DATABASE" (CONNECTION LIMIT).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cdcsync.config import Config
from cdcsync.config.names import quote
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.settings import Side
from cdcsync.preflight.findings import Finding
from cdcsync.target.backlog import storing_sessions

ON_SOURCE = {
    "check": 1,
    "control": 1,
    "watch": 1,
    "slot": 1,
    "address": 1,
    "re-read": 1,
    "backfill": 1,
    "compare": 1,
    "audit": 1,
    "status": 1,
    "heartbeat": 1,
}
"""Sessions of a worker on the source at most, by what follows `cdcsync` in their application_name, besides the slot's
own, which `max_wal_senders` counts."""

ON_TARGET = {
    "check": 1,
    "apply": 1,
    "look-up": 1,
    "watch": 1,
    "address": 1,
    "backfill": 1,
    "compare": 1,
    "audit": 1,
    "build": 3,
    "rebuild": 1,
    "words": 1,
    "pending words": 1,
    "status": 1,
}
"""The same on the target, without those that depend on the configuration and the indexes; see `needed`.

A session that asks whether a server lives ("liveness") is in neither: it is there only while a statement of another
one gets no answer."""


class Room(msgspec.Struct, frozen=True):
    """The connections that are left on a server for our role, besides those that workers have already.

    :ivar limited_by: the setting that leaves no more.
    """

    left: int
    limited_by: str


def needed(config: Config, *, generations: int, filling: int) -> dict[Side, dict[str, int]]:
    """Return how many sessions of each name a worker of this configuration opens at most, on each side.

    :param generations: how many generations of vectors it keeps, those of all indexes.
    :param filling: how many of these it fills beside a live one.
    """
    worker = config.worker
    by_need = {
        "embed": storing_sessions(generations),
        "migrate": filling,
        "settle": max(1, worker.settle_connections),  # one looks, though none may move vectors
        "evaluate": 1 if worker.evaluate_every_s else 0,
    }
    return {"source": ON_SOURCE, "target": ON_TARGET | by_need}


async def read_room(connection: Connection) -> Room:
    """Return how many connections are left."""
    row = await fetch_one(
        connection,
        """
        WITH used AS (
            SELECT usename, datname FROM pg_stat_activity
            WHERE datid IS NOT NULL AND usesysid IS NOT NULL
                AND NOT (usename = session_user AND application_name LIKE 'cdcsync%%')
        )
        SELECT current_setting('max_connections')::int - (SELECT count(*) FROM used)::int - CASE WHEN r.rolsuper THEN 0
                   ELSE current_setting('superuser_reserved_connections')::int
                       + coalesce(current_setting('reserved_connections', true)::int, 0) END,
               CASE WHEN r.rolconnlimit >= 0 AND NOT r.rolsuper
                   THEN r.rolconnlimit - (SELECT count(*) FROM used WHERE usename = session_user)::int END,
               CASE WHEN d.datconnlimit >= 0 AND NOT r.rolsuper
                   THEN d.datconnlimit - (SELECT count(*) FROM used WHERE datname = current_database())::int END,
               session_user, current_database()
        FROM pg_roles r, pg_database d WHERE r.rolname = session_user AND d.datname = current_database()
        """,
    )
    server, role, database, role_name, database_name = row
    rooms = [
        Room(server, "max_connections"),
        *([Room(role, f"the CONNECTION LIMIT of role {quote(role_name)}")] if role is not None else []),
        *([Room(database, f"the CONNECTION LIMIT of database {quote(database_name)}")] if database is not None else []),
    ]
    return min(rooms, key=lambda room: room.left)


def room_findings(side: str, room: Room, wanted: int) -> Iterator[Finding]:
    """Say whether a worker finds as many connections as it opens."""
    if room.left < wanted:
        yield Finding.warning(
            side,
            f"a worker opens up to {wanted} connections here, and {room.limited_by} leaves {max(0, room.left)}",
            f"raise {room.limited_by}, or close connections of others",
        )
