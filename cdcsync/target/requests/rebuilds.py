"""Asking for documents to be rebuilt because rows of related tables changed, and how such requests come together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
from psycopg import sql

from cdcsync.model.changeset import Rebuild
from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.requests.submission import Requests
from cdcsync.target.requests.tables import Tables

MOST_KEYS = 50_000
"""Keys of one request: more begin another one, so that looking for those which it has stays quick."""

MOST_REBUILDS = 50
"""Rebuilds of an index that wait; more of them read most of the table one by one."""


class Rebuilds:
    """Requests of the kind "related"."""

    def __init__(self, schema: str) -> None:
        tables = Tables(schema)
        self._table = tables.requests
        self._keys = tables.keys
        self._requests = Requests(schema)

    async def ask(self, connection: Connection, index: str, rebuild: Rebuild) -> None:
        """Ask for documents to be rebuilt, in the caller's transaction.

        A request for the same, or for more, that has not begun takes it over. One that is being served reads the
        documents that follow `rebuild.read` later, so that only those up to there are asked for: the rows of its pages
        that are under way are read again as they were overtaken, but not what was inserted between them meanwhile. If
        too many requests wait, one for all documents takes their place. Keys come together in one request.
        """
        if rebuild.keys is not None and await self._joined(connection, index, rebuild.keys, rewrite=rebuild.rewrite):
            return
        unbegun = sql.SQL("index_name = %s AND state = 'requested' AND started_at IS NULL AND NOT keyed")
        up_to: Key | None = None
        if rebuild.keys is None:
            covering = sql.SQL(
                "(filter IS NULL OR filter = %s) AND kind IN ('related', 'initial', 'resync') AND phase = 'rows'"
            )
            row = await fetch_row(
                connection,
                # Locked, so that it does not begin before this commits.
                sql.SQL("SELECT FROM {} WHERE {} AND {} AND up_to IS NULL LIMIT 1 FOR UPDATE").format(
                    self._table, unbegun, covering
                ),
                [index, rebuild.condition],
            )
            if row is not None:
                return
            if rebuild.read is not None:
                served = sql.SQL(
                    "SELECT FROM {} WHERE id = %s AND state = 'running' AND {} AND up_to IS NULL FOR UPDATE"
                )
                arguments = [rebuild.read[0], rebuild.condition]
                if await fetch_row(connection, served.format(self._table, covering), arguments) is not None:
                    up_to = rebuild.read[1]
            cursor = await connection.execute(
                sql.SQL(
                    "UPDATE {} SET up_to = %s::text[] WHERE {} AND kind = 'related' AND up_to IS NOT NULL"
                    " AND filter IS NOT DISTINCT FROM %s"
                ).format(self._table, unbegun),
                [None if up_to is None else list(up_to), index, rebuild.condition],
            )
            if cursor.rowcount:
                return
        cursor = await connection.execute(
            sql.SQL("SELECT id, rewrite FROM {} WHERE {} AND kind = 'related' FOR UPDATE").format(self._table, unbegun),
            [index],
        )
        waiting = {cast(int, row[0]): cast(bool, row[1]) for row in await cursor.fetchall()}
        all_of_them = len(waiting) >= MOST_REBUILDS
        rewrite = rebuild.rewrite or (all_of_them and any(waiting.values()))
        if all_of_them:
            await connection.execute(
                sql.SQL("UPDATE {} SET state = 'cancelled', finished_at = now() WHERE id = ANY(%s)").format(
                    self._table
                ),
                [list(waiting)],
            )
        filter_, keys, up_to = (None, None, None) if all_of_them else (rebuild.condition, rebuild.keys, up_to)
        await self._requests.add(
            connection,
            index,
            "related",
            rewrite=rewrite,
            filter_=filter_,
            keys=keys,
            through=rebuild.relation,
            up_to=up_to,
        )

    async def _joined(self, connection: Connection, index: str, keys: Sequence[Key], *, rewrite: bool) -> bool:
        """Add keys to those of a request that has not begun; returns whether there is one that has room."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "SELECT id, rows_total FROM {} WHERE index_name = %s AND kind = 'related' AND state = 'requested'"
                " AND started_at IS NULL AND keyed AND rewrite = %s ORDER BY id DESC LIMIT 1 FOR UPDATE"
            ).format(self._table),
            [index, rewrite],
        )
        if row is None or row[1] + len(keys) > MOST_KEYS:
            return False
        id_, count = row
        cursor = await connection.execute(
            sql.SQL(
                "INSERT INTO {keys} (backfill_id, place, key)"
                " SELECT %(id)s, %(count)s + row_number() OVER (ORDER BY wanted.place), wanted.key FROM ("
                "SELECT one.place, ARRAY(SELECT jsonb_array_elements_text(one.key)) AS key"
                " FROM jsonb_array_elements(%(wanted)s::jsonb) WITH ORDINALITY AS one (key, place)) AS wanted"
                " WHERE NOT EXISTS (SELECT FROM {keys} AS k WHERE k.backfill_id = %(id)s AND k.key = wanted.key)"
            ).format(keys=self._keys),
            {"id": id_, "count": count, "wanted": msgspec.json.encode(keys).decode()},
        )
        await connection.execute(
            sql.SQL("UPDATE {} SET rows_total = %s WHERE id = %s").format(self._table), [count + cursor.rowcount, id_]
        )
        return True
