"""The builds of search indexes that are under way, and whom they wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import msgspec

from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation

OPEN_FOR_S = 1.0
"""A build waits for every transaction that it finds. One that is younger is over before anybody could end it."""


class Build(msgspec.Struct, frozen=True):
    """The build of a search index that is under way.

    :ivar blocks: how many blocks it has read, and how many there are.
    :ivar waits_for: the process ID of the session whose transaction it waits for, if that has been open for a while.
    """

    blocks: tuple[int, int] | None = None
    waits_for: int | None = None


Builds = Mapping[str, Build]
"""By the name of the table."""


async def read_builds(target: Connection, schema: str) -> dict[str, Build]:
    """Return the builds of search indexes of a schema that are under way.

    Source: PostgreSQL, "CREATE INDEX Progress Reporting"; pgvector, "Indexing Progress".
    """
    cursor = await target.execute(
        # When a transaction began may be hidden from our role, or lie ahead if the clock went back: then it is told.
        "SELECT c.relname, p.blocks_done, p.blocks_total, CASE WHEN starts_with(p.phase, 'waiting for ')"
        " AND (a.xact_start BETWEEN clock_timestamp() - make_interval(secs => %s) AND clock_timestamp()) IS NOT TRUE"
        " THEN nullif(p.current_locker_pid, 0) END"
        " FROM pg_stat_progress_create_index AS p JOIN pg_class AS c ON c.oid = p.relid"
        " LEFT JOIN pg_stat_activity AS a ON a.pid = p.current_locker_pid"
        " WHERE p.datname = current_database()"
        " AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)",
        [OPEN_FOR_S, schema],
    )
    return {
        cast(str, name): Build((done, total) if total else None, pid)
        for name, done, total, pid in await cursor.fetchall()
    }


def index_waits(entry: Entry, builds: Builds) -> str | None:
    """Return why what searches of an index need cannot be built right now, and how to help."""
    names = _bare(entry)
    return waits(builds, [names.settled_name(entry.generation), names.chunks_name], entry.reason)


def generation_waits(entry: Entry, one: Generation, builds: Builds) -> str | None:
    """Return why a generation of an index cannot be filled or built right now, or else what was noted of it."""
    return waits(builds, [_bare(entry).settled_name(one.generation)], one.reason)


def _bare(entry: Entry) -> Names:
    return Names("", entry.relations)  # names without their schema need none


def waits(builds: Builds, tables: Iterable[str], noted: str | None) -> str | None:
    """Return why what is built on some tables cannot be completed right now, and how to help.

    :param noted: why nothing could be built when that was last tried; a build that is under way is past that.
    """
    under_way = [builds[table] for table in tables if table in builds]
    for build in under_way:
        if build.waits_for is not None:
            return (
                f"the build waits for the open transaction of the target's session with pid {build.waits_for}; end"
                " that transaction, or wait for it"
            )
    return None if under_way else noted
