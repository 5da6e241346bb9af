"""Asking for a backfill: new requests, those that a new one replaces, and what an operator does to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import LiteralString, cast

from psycopg import sql

from cdcsync.model.requests import OPEN, Kind, Phase, RequestAction
from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.requests.tables import Tables

_ACTIONS: Mapping[RequestAction, tuple[str, tuple[str, ...]]] = {
    "pause": ("paused", ("requested", "running")),
    "resume": ("requested", ("paused",)),
    "cancel": ("cancelled", ("requested", "running", "paused")),
}
"""Each action's new state, and those it can be had in."""

OWED = ("compare", "related")
"""Kinds that the worker alone asks for, once, and needs for the index to stay equal: nobody may cancel them. Of a
replay, the column `owed` says it."""


class Requests:
    """Requests to the worker; they take effect when the caller commits. `action` commits by itself."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        tables = Tables(schema)
        self._table = tables.requests
        self._keys = tables.keys
        self.channel = tables.channel

    async def add(
        self,
        connection: Connection,
        index: str,
        kind: Kind,
        *,
        rewrite: bool,
        filter_: str | None,
        force_embed: bool = False,
        keys: Iterable[Key] | None = None,
        max_rows_per_s: int | None = None,
        phase: Phase = "rows",
        through: str | None = None,
        owed: bool = False,
        up_to: Key | None = None,
    ) -> int:
        """Ask for a backfill and wake the worker; takes effect when the caller commits.

        :param keys: needs a transaction around it, so that the worker does not see the request without them.
        :param through: the related table whose change asks for it.
        :param phase: where it begins: what begins at "orphans" only removes what the source no longer has.
        :param owed: whether the index would be out of date without it, so that nobody may cancel it.
        :param up_to: the key after which it ends.
        """
        columns = "index_name, kind, rewrite, filter, force_embed, keyed, max_rows_per_s, phase, through, owed"
        values: list[object] = [index, kind, rewrite, filter_, force_embed, keys is not None, max_rows_per_s, phase]
        values += [through, owed]
        if up_to is not None:  # commands may be newer than the worker and its tables, and never ask for this
            columns += ", up_to"
            values.append(list(up_to))
        row = await fetch_one(
            connection,
            sql.SQL(f"INSERT INTO {{}} ({columns}) VALUES ({{}}) RETURNING id").format(
                self._table, sql.SQL(", ").join([sql.Placeholder()] * len(values))
            ),
            values,
        )
        id_ = cast(int, row[0])
        if keys is not None:
            count = 0
            statement = sql.SQL("COPY {} (backfill_id, place, key) FROM STDIN").format(self._keys)
            async with connection.cursor() as writer, writer.copy(statement) as copy:
                for count, key in enumerate(keys, start=1):
                    await copy.write_row((id_, count, list(key)))
            await connection.execute(
                sql.SQL("UPDATE {} SET rows_total = %s WHERE id = %s").format(self._table), [count, id_]
            )
        await self._wake(connection, index)
        return id_

    async def reload(self, connection: Connection, index: str, *, rewrite: bool) -> int:
        """Ask for a resync in place of the loads that are open: it reads all that they would have read.

        Needs a transaction around it. Documents are chunked again where a load that did not get through was to do so.
        The new request is as slow as the newest of those that it replaces, which name it.
        """
        replaced = await self._cancel(connection, index, "kind IN ('initial', 'resync')")
        # Rows that fail again are listed again; the source may write a key differently by now.
        await connection.execute(
            sql.SQL("DELETE FROM {} WHERE index_name = %s").format(sql.Identifier(self._schema, "failed_documents")),
            [index],
        )
        row = await fetch_one(
            connection,
            sql.SQL(
                "SELECT coalesce(bool_or(b.rewrite), false) FROM {} AS b"
                " WHERE b.index_name = %s AND b.kind IN ('initial', 'resync') AND b.state <> 'done' AND NOT EXISTS"
                " (SELECT FROM {} AS d WHERE d.index_name = b.index_name AND d.kind IN ('initial', 'resync')"
                " AND d.state = 'done' AND d.id > b.id)"
            ).format(self._table, self._table),
            [index],
        )
        id_ = await self.add(
            connection,
            index,
            "resync",
            rewrite=rewrite or cast(bool, row[0]),
            filter_=None,
            max_rows_per_s=replaced[-1][1] if replaced else None,
        )
        await self._name_successor(connection, replaced, id_)
        return id_

    async def follow_configuration(self, connection: Connection, index: str, *, rewrite: bool) -> int:
        """Ask for all rows to be read again, as the configuration asks for other contents.

        Needs a transaction around it. It takes the place of those that were asked for so before: it reads all that they
        would have read.
        """
        replaced = await self._cancel(connection, index, "kind = 'replay' AND owed AND NOT keyed AND phase = 'rows'")
        id_ = await self.add(
            connection,
            index,
            "replay",
            rewrite=rewrite or any(was for *_, was in replaced),
            filter_=None,
            max_rows_per_s=replaced[-1][1] if replaced else None,
            owed=True,
        )
        await self._name_successor(connection, replaced, id_)
        return id_

    async def _cancel(
        self, connection: Connection, index: str, condition: LiteralString
    ) -> list[tuple[int, int | None, bool]]:
        """Cancel the open requests about all rows that fulfil a condition; return their ids, paces and `rewrite`."""
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'cancelled', finished_at = now() WHERE index_name = %s AND filter IS NULL"
                " AND state = ANY(%s) AND " + condition + " RETURNING id, max_rows_per_s, rewrite"
            ).format(self._table),
            [index, list(OPEN)],
        )
        return sorted(await cursor.fetchall())

    async def _name_successor(
        self, connection: Connection, replaced: Sequence[tuple[int, int | None, bool]], id_: int
    ) -> None:
        await connection.execute(
            sql.SQL("UPDATE {} SET error = %s WHERE id = ANY(%s)").format(self._table),
            [f"replaced by request {id_}", [one for one, *_ in replaced]],
        )

    async def limit(self, connection: Connection, index: str, max_rows_per_s: int | None) -> None:
        """Set how many rows a second the load of an index reads at most, from its next page on. The caller commits."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET max_rows_per_s = %s WHERE index_name = %s AND kind IN ('initial', 'resync')"
                " AND state = ANY(%s)"
            ).format(self._table),
            [max_rows_per_s, index, list(OPEN)],
        )

    async def compare(self, connection: Connection, index: str) -> None:
        """Ask for a comparison, in the caller's transaction; one that has not begun yet sees the present, too."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "SELECT FROM {} WHERE index_name = %s AND kind = 'compare'"
                " AND state = 'requested' AND started_at IS NULL"
            ).format(self._table),
            [index],
        )
        if row is None:
            await self.add(connection, index, "compare", rewrite=False, filter_=None)

    async def action(
        self, connection: Connection, index: str, action: RequestAction, *, id_: int | None = None
    ) -> list[int]:
        """Pause, resume or cancel the open requests of an index, or only one of them; returns those that it changed.

        What the index is owed is not cancelled. A verification is not paused: it is short, and somebody waits for it.
        """
        state, before = _ACTIONS[action]
        async with connection.transaction():
            cursor = await connection.execute(
                sql.SQL(
                    "UPDATE {} SET state = %s, finished_at = CASE WHEN %s = 'cancelled' THEN now() END"
                    " WHERE index_name = %s AND state = ANY(%s) AND (%s::bigint IS NULL OR id = %s)"
                    " AND NOT (%s = 'cancelled' AND (owed OR kind = ANY(%s)))"
                    " AND NOT (%s = 'paused' AND kind = 'verify') RETURNING id"
                ).format(self._table),
                [state, state, index, list(before), id_, id_, state, list(OWED), state],
            )
            changed = sorted(cast(int, row[0]) for row in await cursor.fetchall())
            await self._wake(connection, index)
            crash_point("requests changed")
        crash_point("changed requests committed")
        return changed

    async def owed(self, connection: Connection, index: str) -> list[int]:
        """Return the open requests of an index that cannot be cancelled."""
        cursor = await connection.execute(
            sql.SQL(
                "SELECT id FROM {} WHERE index_name = %s AND (owed OR kind = ANY(%s)) AND state = ANY(%s) ORDER BY id"
            ).format(self._table),
            [index, list(OWED), list(OPEN)],
        )
        return [cast(int, row[0]) for row in await cursor.fetchall()]

    async def _wake(self, connection: Connection, index: str) -> None:
        await connection.execute("SELECT pg_notify(%s, %s)", [self.channel, index])
