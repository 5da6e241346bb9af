"""The worker's side of requests: which is served next, how far it is, and when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString, cast

from psycopg import sql

from cdcsync.model.batch import PageEnd
from cdcsync.model.requests import OPEN, Problem, Request
from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.registry import Registry
from cdcsync.target.requests.tables import COLUMNS, SERVED, Tables, to_request

FOUND_KEPT_S = 3_600
"""How long the findings of a verification are kept: only the command that asked for it reads them, at once."""

KEPT_S = 7 * 24 * 3_600
"""How long replays and verifications that have ended are kept, so that somebody can see what was done."""


_PRECEDENCE: LiteralString = (
    "CASE WHEN keyed THEN 0 WHEN filter IS NOT NULL AND (kind = 'related' OR owed) OR owed AND phase = 'orphans'"
    " THEN 1 ELSE 2 END"
)
"""Single documents come first, then what changed by related rows and partitions, then whatever reads a table."""

_ENDED: LiteralString = "b.state IN ('done', 'failed', 'cancelled')"


class Queue:
    """The requests that the worker serves."""

    def __init__(self, schema: str) -> None:
        tables = Tables(schema)
        self._table = tables.requests
        self._keys = tables.keys
        self._differences = tables.differences
        self.channel = tables.channel
        self._registry = Registry(schema)

    async def next_open(self, connection: Connection, indexes: list[str]) -> Request | None:
        """Return the request to serve now for these indexes: of the oldest of each, one that somebody waits for.

        So no index waits for the load of another one, which may take hours. Requests of paused indexes wait.
        """
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {SERVED} FROM (SELECT DISTINCT ON (index_name) * FROM {{}}"
                " WHERE state IN ('requested', 'running') AND index_name = ANY(%s) AND kind <> 'compare'"
                f" AND index_name NOT IN {{}} ORDER BY index_name, id) AS b ORDER BY {_PRECEDENCE}, id LIMIT 1"
            ).format(self._table, self._registry.paused),
            [indexes],
        )
        return None if row is None else to_request(row)

    async def oldest_comparison(self, connection: Connection, indexes: list[str]) -> Request | None:
        """Return the comparison to make next of these indexes; those of indexes that are paused or loading wait.

        Until an index is loaded, everything that it lacks would differ.
        """
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {COLUMNS} FROM {{}} WHERE state IN ('requested', 'running') AND index_name = ANY(%s)"
                " AND kind = 'compare' AND index_name NOT IN {} AND index_name NOT IN (SELECT index_name FROM {}"
                " WHERE kind IN ('initial', 'resync') AND state = ANY(%s)) ORDER BY id LIMIT 1"
            ).format(self._table, self._registry.paused, self._table),
            [indexes, list(OPEN)],
        )
        return None if row is None else to_request(row)

    async def start(self, connection: Connection, request: Request, rows_total: int | None) -> bool:
        """Note that a request is being served; False if it is not to be: it was paused or cancelled, or reads more now.

        Until it has begun, a change may ask for more to be read by it.
        """
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'running', started_at = coalesce(started_at, now()),"
                " rows_total = coalesce(rows_total, %s) WHERE id = %s AND state IN ('requested', 'running')"
                " AND up_to IS NOT DISTINCT FROM %s::text[]"
            ).format(self._table),
            [rows_total, request.id, None if request.up_to is None else list(request.up_to)],
        )
        crash_point("request started")
        return cursor.rowcount > 0

    async def rebuilding(self, connection: Connection, request: Request) -> bool:
        """Say whether documents of the request's index wait to be rebuilt, because rows of related tables changed."""
        row = await fetch_one(
            connection,
            sql.SQL(
                "SELECT EXISTS (SELECT FROM {} WHERE index_name = %s AND kind = 'related' AND state = ANY(%s))"
            ).format(self._table),
            [request.index, list(OPEN)],
        )
        return cast(bool, row[0])

    async def keys(self, connection: Connection, request: Request, after: int, limit: int) -> list[Key]:
        """Return the keys that follow the `after`-th of a keyed request, in their order."""
        cursor = await connection.execute(
            sql.SQL("SELECT key FROM {} WHERE backfill_id = %s AND place > %s ORDER BY place LIMIT %s").format(
                self._keys
            ),
            [request.id, after, limit],
        )
        return [tuple(cast(list[str], row[0])) for row in await cursor.fetchall()]

    async def note(
        self,
        connection: Connection,
        request: Request,
        found: Sequence[tuple[Key, Problem]],
        *,
        cursor: Key | None,
        rows_done: int,
        done: bool,
    ) -> None:
        """Store what a page of a verification found, together with how far it got."""
        async with connection.transaction():
            async with connection.cursor() as writer:
                await writer.executemany(
                    sql.SQL("INSERT INTO {} VALUES (%s, %s, %s) ON CONFLICT DO NOTHING").format(self._differences),
                    [(request.id, list(key), problem) for key, problem in found],
                )
            key = None if cursor is None else tuple(cursor)
            await self.end_page(connection, PageEnd(request.id, request.phase, key, rows_done, done))
            crash_point("verified page written")
        crash_point("verified page committed")

    async def end_page(self, connection: Connection, page: PageEnd) -> Request | None:
        """Note how far a page that is being applied brings its request, and return what the request is then."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "UPDATE {} SET phase = %s, cursor = %s::text[], rows_done = %s,"
                " state = CASE WHEN %s AND state <> 'cancelled' THEN 'done' ELSE state END,"
                " finished_at = CASE WHEN %s AND state <> 'cancelled' THEN clock_timestamp() ELSE finished_at END"
                f" WHERE id = %s RETURNING {SERVED}"
            ).format(self._table),
            [
                page.phase,
                None if page.cursor is None else list(page.cursor),
                page.rows,
                page.done,
                page.done,
                page.backfill_id,
            ],
        )
        return None if row is None else to_request(row)

    async def compared(self, connection: Connection, request: Request, rows: int) -> None:
        """End a comparison, and with it those of the same index that were asked for before it began."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'done', rows_done = %s, finished_at = clock_timestamp() WHERE index_name = %s"
                " AND kind = 'compare' AND state IN ('requested', 'running') AND requested_at <="
                " (SELECT coalesce(started_at, requested_at) FROM {} WHERE id = %s) OR id = %s"
            ).format(self._table, self._table),
            [rows, request.index, request.id, request.id],
        )
        crash_point("comparison ended")

    async def fail(self, connection: Connection, request: Request, error: str) -> bool:
        """End a request that cannot be served; returns False if it has ended already."""
        failed = await connection.execute(
            sql.SQL(
                f"UPDATE {{}} AS b SET state = 'failed', error = %s, finished_at = now() WHERE id = %s AND NOT {_ENDED}"
            ).format(self._table),
            [error, request.id],
        )
        crash_point("request failed")
        return failed.rowcount > 0

    async def forget_keys(self, connection: Connection, request: Request) -> None:
        """Remove the keys of a request if it has ended."""
        await connection.execute(
            sql.SQL(
                f"DELETE FROM {{}} AS k USING {{}} AS b WHERE b.id = %s AND k.backfill_id = b.id AND {_ENDED}"
            ).format(self._keys, self._table),
            [request.id],
        )
        crash_point("keys of a served request removed")

    async def prune(self, connection: Connection) -> None:
        """Remove the keys of requests that have ended, and in time what they found and they themselves.

        The last load of an index stays: it says whether the index is whole. Hundreds of thousands of requests may have
        ended, few of which have keys or findings: those are looked up by the keys and findings that there are.
        """
        # Not clock_timestamp(), by which no index can be searched.
        ended = f"{_ENDED} AND b.finished_at < statement_timestamp() - make_interval(secs => %s)"
        for table, age_s in ((self._keys, 0), (self._differences, FOUND_KEPT_S)):
            await connection.execute(
                sql.SQL(
                    "WITH RECURSIVE of (id) AS (SELECT min(backfill_id) FROM {table} UNION ALL"
                    " SELECT (SELECT min(k.backfill_id) FROM {table} AS k WHERE k.backfill_id > of.id)"
                    " FROM of WHERE of.id IS NOT NULL)"
                    " DELETE FROM {table} AS k USING {requests} AS b WHERE b.id = k.backfill_id"
                    f" AND b.id = ANY(ARRAY(SELECT id FROM of)) AND {ended}"
                ).format(table=table, requests=self._table),
                [age_s],
            )
            crash_point("keys of ended requests removed")
        await connection.execute(
            sql.SQL(
                f"DELETE FROM {{}} AS b WHERE b.kind IN ('replay', 'verify', 'compare', 'related') AND {ended}"
            ).format(self._table),
            [KEPT_S],
        )
        crash_point("ended requests removed")
