"""Questions about requests: which one an index was loaded by, what is open, and what a verification found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from psycopg import sql

from cdcsync.model.requests import OPEN, Problem, Request
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.registry import Registry
from cdcsync.target.requests.tables import COLUMNS, Tables, to_request


class History:
    """The requests that there are and were; nothing is written."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        tables = Tables(schema)
        self._table = tables.requests
        self._differences = tables.differences
        self._registry = Registry(schema)

    async def one(self, connection: Connection, id_: int) -> Request | None:
        """Return a request as it is now; None when it went with its index."""
        row = await fetch_row(
            connection, sql.SQL(f"SELECT {COLUMNS} FROM {{}} WHERE id = %s").format(self._table), [id_]
        )
        return None if row is None else to_request(row)

    async def present(self, connection: Connection, indexes: Sequence[str]) -> list[Request]:
        """Return for each index the request that is served, or else the next one, or else the one that ended last."""
        precedence = "array_position(ARRAY['running', 'requested', 'paused'], state), id LIMIT 1"
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT {COLUMNS} FROM (SELECT DISTINCT unnest(%s::text[])) AS i (name), LATERAL (SELECT * FROM ("
                "(SELECT * FROM {table} WHERE index_name = i.name AND state IN ('requested', 'running', 'paused')"
                f" ORDER BY {precedence}) UNION ALL"
                # Between equal bounds: for = i.name the planner may read the primary key backwards until it finds one.
                " (SELECT * FROM {table} WHERE index_name BETWEEN i.name AND i.name"
                " ORDER BY index_name DESC, id DESC LIMIT 1)"
                f") AS b ORDER BY {precedence}) AS b ORDER BY index_name"
            ).format(table=self._table),
            [list(indexes)],
        )
        return [to_request(row) for row in await cursor.fetchall()]

    async def begun(self, connection: Connection, indexes: Sequence[str]) -> list[str]:
        """Return those of the indexes that exist and hold rows, or did: no load of them is still to begin."""
        cursor = await connection.execute(
            sql.SQL(
                "SELECT i.name FROM unnest(%s::text[]) AS i (name) WHERE i.name IN {} AND NOT EXISTS"
                " (SELECT FROM {} AS b WHERE b.index_name = i.name AND b.kind IN ('initial', 'resync')"
                " AND b.filter IS NULL AND b.state = ANY(%s) AND b.phase = 'rows' AND b.cursor IS NULL) ORDER BY i.name"
            ).format(self._registry.names, self._table),
            [list(indexes), list(OPEN)],
        )
        return [cast(str, row[0]) for row in await cursor.fetchall()]

    async def still_to_begin(self, connection: Connection, spec: IndexSpec) -> bool:
        """Say whether an index holds nothing, and its first load is still to come."""
        # `plan` asks this of tables of earlier versions, too, which lack columns.
        load = await fetch_row(
            connection,
            sql.SQL(
                "SELECT kind = 'initial' AND cursor IS NULL AND state = ANY(%s) FROM {} WHERE index_name = %s"
                " AND kind IN ('initial', 'resync') ORDER BY id DESC LIMIT 1"
            ).format(self._table),
            [list(OPEN), spec.name],
        )
        if load != (True,):
            return False
        row = await fetch_one(
            connection,
            sql.SQL("SELECT EXISTS (SELECT FROM {}) OR EXISTS (SELECT FROM {} WHERE index_name = %s)").format(
                sql.Identifier(self._schema, f"{spec.relations}_chunks"),
                sql.Identifier(self._schema, "failed_documents"),
            ),
            [spec.name],
        )
        return not row[0]

    async def last_load(self, connection: Connection, index: str) -> Request | None:
        """Return the request that last read, or is to read, the whole of an index's table."""
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {COLUMNS} FROM {{}} WHERE index_name = %s AND kind IN ('initial', 'resync')"
                " ORDER BY id DESC LIMIT 1"
            ).format(self._table),
            [index],
        )
        return None if row is None else to_request(row)

    async def reads_table(self, connection: Connection, index: str) -> bool:
        """Say whether a request of an index is under way, or next, that may read its whole table."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "SELECT FROM {} WHERE index_name = %s AND NOT keyed AND kind IN ('initial', 'resync', 'replay')"
                " AND state IN ('requested', 'running') LIMIT 1"
            ).format(self._table),
            [index],
        )
        return row is not None

    async def forced(self, connection: Connection, index: str) -> int | None:
        """Return the first open request of an index that makes vectors anew whatever their text; None without one."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "SELECT id FROM {} WHERE index_name = %s AND force_embed AND state = ANY(%s) ORDER BY id LIMIT 1"
            ).format(self._table),
            [index, list(OPEN)],
        )
        return None if row is None else cast(int, row[0])

    async def last_loads(self, connection: Connection) -> dict[str, Request]:
        """Return `last_load` of every index that has one."""
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT {COLUMNS} FROM (SELECT b.* FROM {{}} AS i (name), LATERAL (SELECT * FROM {{}}"
                " WHERE index_name = i.name AND kind IN ('initial', 'resync') ORDER BY id DESC LIMIT 1) AS b) AS b"
            ).format(self._registry.names, self._table)
        )
        return {load.index: load for load in map(to_request, await cursor.fetchall())}

    async def doubted(self, connection: Connection, load: Request) -> bool:
        """Say whether what a load has read is still to be compared, as the table was rewritten meanwhile."""
        row = await fetch_row(
            connection,
            sql.SQL(
                "SELECT FROM {} AS c, {} AS l WHERE l.id = %s AND c.index_name = l.index_name AND c.kind = 'compare'"
                " AND c.state IN ('requested', 'running') AND c.requested_at <= l.finished_at"
            ).format(self._table, self._table),
            [load.id],
        )
        return row is not None

    async def found(self, connection: Connection, id_: int) -> list[tuple[Key, Problem]]:
        """Return what a verification found, by key."""
        cursor = await connection.execute(
            sql.SQL("SELECT key, problem FROM {} WHERE backfill_id = %s ORDER BY key").format(self._differences),
            [id_],
        )
        return [(tuple(key), problem) for key, problem in await cursor.fetchall()]
