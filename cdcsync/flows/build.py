"""The build flow: once an index's first load has drained, builds what searches need and declares the index live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import anyio
import structlog
from psycopg import sql

from cdcsync.backoff import backoff_s
from cdcsync.crashpoints import crash_point
from cdcsync.errors import TargetUnavailable
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, connect, speaking_of
from cdcsync.target.ddl.building import build_hnsw, build_search
from cdcsync.target.ddl.relations import MAX_ATTEMPTS, Names

log = structlog.get_logger()

POLL_S = 0.5
"""How often a building index is looked at: one small query."""


async def build_until_live(dsn: str, schema: str, specs: Sequence[IndexSpec]) -> None:
    """Return when every index is live; an index whose load is still going is left building.

    Vectors without HNSW are searched exactly meanwhile; building it once at the end is several times faster than
    growing it.
    """
    left = list(specs)
    attempt = 0
    while left:
        try:
            connection = await connect(dsn, "target", application_name="cdcsync build")
            try:
                with speaking_of("target"):
                    while left:
                        left = [spec for spec in left if not await _advance(connection, schema, spec)]
                        attempt = 0
                        await anyio.sleep(POLL_S)
            finally:
                with anyio.CancelScope(shield=True):
                    await connection.close()
        except TargetUnavailable as error:
            log.warning("build_waits", error=str(error))
            await anyio.sleep(backoff_s(attempt, first=0.2, most=15))
            attempt += 1


async def _advance(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Build one index if its load has drained; returns whether nothing is left to do for it."""
    names = Names(schema, spec.name)
    cursor = await connection.execute(
        sql.SQL(
            "SELECT i.state,"
            " (SELECT array[b.state, b.error] FROM {} AS b WHERE b.index_name = i.name"
            " AND b.kind IN ('initial', 'resync') ORDER BY b.id DESC LIMIT 1),"
            " EXISTS (SELECT FROM {} WHERE generation = {} AND lane > 0 AND attempts < {})"
            " FROM {} AS i WHERE i.name = %s"
        ).format(
            sql.Identifier(schema, "backfills"),
            names.backlog,
            sql.Literal(spec.generation),
            sql.Literal(MAX_ATTEMPTS),
            sql.Identifier(schema, "indexes"),
        ),
        [spec.name],
    )
    row = await cursor.fetchone()
    if row is None or row[0] != "building":
        return True
    load, error = row[1] or ("requested", None)
    if load in ("failed", "cancelled"):
        reason = f"its load was {load}{': ' + error if error else ''}; start the worker again to load it"
        await connection.execute(
            sql.SQL("UPDATE {} SET state = 'paused', reason = %s WHERE name = %s").format(
                sql.Identifier(schema, "indexes")
            ),
            [reason, spec.name],
        )
        crash_point("ended load noted")
        log.error("load_ended", index=spec.name, state=load)
        return True
    if load != "done" or cast(bool, row[2]):
        return False
    await build_search(connection, schema, spec)
    log.info("hnsw_building", index=spec.name)
    await build_hnsw(connection, schema, spec)
    await connection.execute(sql.SQL("ANALYZE {}").format(names.chunks))
    await connection.execute(sql.SQL("ANALYZE {}").format(names.vectors(spec.generation)))
    await connection.execute(
        sql.SQL("UPDATE {} SET state = 'live', live_at = now() WHERE name = %s AND state = 'building'").format(
            sql.Identifier(schema, "indexes")
        ),
        [spec.name],
    )
    crash_point("index declared live")
    log.info("index_live", index=spec.name)
    return True
