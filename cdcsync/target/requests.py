"""Backfill requests: rows that any process writes and the worker serves.

Requests of one index are served in the order they came, one at a time. A paused one lets those behind it pass.

Source: PostgreSQL, "NOTIFY".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, LiteralString, cast

import msgspec
from psycopg import sql

from cdcsync.crashpoints import crash_point
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import Rebuild
from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.registry import Registry

Kind = Literal["initial", "replay", "resync", "verify", "compare", "related"]
"""The purpose of a request. "related" rebuilds the documents that rows of related tables belong to.
A comparison compares the whole index with its source, and replays the differences."""
Phase = Literal["rows", "orphans"]
RequestAction = Literal["pause", "resume", "cancel"]
Problem = Literal["missing", "stale", "orphaned", "carried", "failed", "undecided"]
"""How a document can differ from its row: failed is one that cannot be made, and is not there; undecided what changed
each time that it was looked at."""

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.backfills (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE,
        kind text NOT NULL,
        rewrite boolean NOT NULL DEFAULT false,
        force_embed boolean NOT NULL DEFAULT false,
        filter text,
        keyed boolean NOT NULL DEFAULT false,
        max_rows_per_s int CHECK (max_rows_per_s > 0),
        state text NOT NULL DEFAULT 'requested'
            CHECK (state IN ('requested', 'running', 'paused', 'done', 'failed', 'cancelled')),
        phase text NOT NULL DEFAULT 'rows' CHECK (phase IN ('rows', 'orphans')),
        cursor text[],
        rows_done bigint NOT NULL DEFAULT 0,
        rows_total bigint,
        error text,
        requested_at timestamptz NOT NULL DEFAULT now(),
        started_at timestamptz,
        finished_at timestamptz
    )
    """,
    # Earlier versions held the kinds to a list that could not be added to.
    "ALTER TABLE {schema}.backfills DROP CONSTRAINT IF EXISTS backfills_kind_check",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS through text",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS owed boolean NOT NULL DEFAULT false",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS up_to text[]",
    "COMMENT ON COLUMN {schema}.backfills.up_to IS"
    " 'The key after which it ends, if another request had yet to read what follows when this one was asked for.'",
    "COMMENT ON COLUMN {schema}.backfills.owed IS"
    " 'Whether the worker asked for it because the index would be out of date without it: it cannot be cancelled.'",
    "COMMENT ON COLUMN {schema}.backfills.through IS"
    " 'The related table whose change asks for documents to be rebuilt.'",
    "COMMENT ON TABLE {schema}.backfills IS 'cdcsync: requests to read source tables, and how far each is.'",
    "COMMENT ON COLUMN {schema}.backfills.phase IS"
    " 'rows: reading the source; orphans: asking it which index keys it still has.'",
    "COMMENT ON COLUMN {schema}.backfills.cursor IS"
    " 'The key of the last row that was applied; commits together with the rows.'",
    "COMMENT ON COLUMN {schema}.backfills.keyed IS"
    " 'Only the keys in backfill_keys are read; cursor is then the place of the last one that was.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.backfill_keys (
        backfill_id bigint NOT NULL REFERENCES {schema}.backfills ON DELETE CASCADE,
        place bigint NOT NULL,
        key text[] NOT NULL,
        PRIMARY KEY (backfill_id, place)
    )
    """,
    "COMMENT ON TABLE {schema}.backfill_keys IS"
    " 'cdcsync: the keys that a request is about, where it is not about all; removed when the request has ended.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.differences (
        backfill_id bigint NOT NULL REFERENCES {schema}.backfills ON DELETE CASCADE,
        key text[] NOT NULL,
        problem text NOT NULL,
        PRIMARY KEY (backfill_id, key)
    )
    """,
    # Earlier versions held the problems to a list that could not be added to.
    "ALTER TABLE {schema}.differences DROP CONSTRAINT IF EXISTS differences_problem_check",
    "COMMENT ON TABLE {schema}.differences IS 'cdcsync: what a verification found to differ from the source.'",
    "CREATE INDEX IF NOT EXISTS backfills_open ON {schema}.backfills (index_name, id) "
    "WHERE state IN ('requested', 'running', 'paused')",
)
"""Needs the table `indexes`."""

_COLUMNS = (
    "id, index_name, kind, rewrite, filter, state, phase, cursor, rows_done, rows_total, started_at,"
    " force_embed, keyed, max_rows_per_s, error, through, finished_at"
)
"""What commands read too, which may be newer than the worker and its tables."""

_SERVED = f"{_COLUMNS}, up_to"
"""What the worker reads of requests that it serves."""

_ACTIONS: Mapping[RequestAction, tuple[str, tuple[str, ...]]] = {
    "pause": ("paused", ("requested", "running")),
    "resume": ("requested", ("paused",)),
    "cancel": ("cancelled", ("requested", "running", "paused")),
}
"""Each action's new state, and those it can be had in."""

OPEN = ("requested", "running", "paused")

OWED = ("compare", "related")
"""Kinds that the worker alone asks for, once, and needs for the index to stay equal: nobody may cancel them. Of a
replay, the column `owed` says it."""

MOST_REBUILDS = 50
"""Rebuilds of an index that wait; more of them read most of the table one by one."""

FOUND_KEPT_S = 3_600
"""How long the findings of a verification are kept: only the command that asked for it reads them, at once."""

KEPT_S = 7 * 24 * 3_600
"""How long replays and verifications that have ended are kept, for whoever wants to know what was done."""


class Request(msgspec.Struct, frozen=True):
    """A backfill; `cursor` is the key of the last row applied, or the place of the last key of a keyed one.

    :ivar up_to: the key after which it ends; None if it reads the table to its end.
    """

    id: int
    index: str
    kind: Kind
    rewrite: bool
    filter: str | None
    state: str
    phase: Phase
    cursor: tuple[str, ...] | None
    rows_done: int
    rows_total: int | None
    started_at: datetime | None
    force_embed: bool = False
    keyed: bool = False
    max_rows_per_s: int | None = None
    error: str | None = None
    through: str | None = None
    finished_at: datetime | None = None
    up_to: Key | None = None

    @property
    def read_all(self) -> bool:
        """Whether it is done and has read the whole table."""
        whole = (
            not self.keyed
            and self.filter is None
            and self.up_to is None
            and (self.phase == "rows" or self.kind == "resync")
        )
        return self.state == "done" and whole

    @property
    def new(self) -> bool:
        """Whether the index most likely has none of the rows to be read."""
        return self.kind == "initial" and not self.rewrite

    @property
    def changes_texts(self) -> bool:
        """Whether most documents that it reads are other ones than the index has, or are chunked again anyway."""
        return self.new or self.rewrite or self.kind == "related"

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state not in OPEN


class Requests:
    """The backfills table, with the keys and the findings that belong to it."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self._registry = Registry(schema)
        self._table = sql.Identifier(schema, "backfills")
        self._keys = sql.Identifier(schema, "backfill_keys")
        self._differences = sql.Identifier(schema, "differences")
        # A hash: the server refuses channels with names of more than 63 bytes, and a schema's may have as many.
        self.channel = "cdcsync_" + hashlib.sha256(schema.encode()).hexdigest()[:16]

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
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'cancelled', finished_at = now() WHERE index_name = %s"
                " AND kind IN ('initial', 'resync') AND filter IS NULL AND state = ANY(%s)"
                " RETURNING id, max_rows_per_s"
            ).format(self._table),
            [index, list(OPEN)],
        )
        replaced = sorted(cast(list[tuple[int, int | None]], await cursor.fetchall()))
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
        await connection.execute(
            sql.SQL("UPDATE {} SET error = %s WHERE id = ANY(%s)").format(self._table),
            [f"replaced by request {id_}", [one for one, _ in replaced]],
        )
        return id_

    async def follow_configuration(self, connection: Connection, index: str, *, rewrite: bool) -> int:
        """Ask for all rows to be read again, as the configuration asks for other contents.

        Needs a transaction around it. It takes the place of those that were asked for so before: it reads all that they
        would have read.
        """
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'cancelled', finished_at = now() WHERE index_name = %s AND kind = 'replay'"
                " AND owed AND filter IS NULL AND NOT keyed AND phase = 'rows' AND state = ANY(%s)"
                " RETURNING id, rewrite, max_rows_per_s"
            ).format(self._table),
            [index, list(OPEN)],
        )
        replaced = sorted(cast(list[tuple[int, bool, int | None]], await cursor.fetchall()))
        id_ = await self.add(
            connection,
            index,
            "replay",
            rewrite=rewrite or any(was for _, was, _ in replaced),
            filter_=None,
            max_rows_per_s=replaced[-1][2] if replaced else None,
            owed=True,
        )
        await connection.execute(
            sql.SQL("UPDATE {} SET error = %s WHERE id = ANY(%s)").format(self._table),
            [f"replaced by request {id_}", [one for one, *_ in replaced]],
        )
        return id_

    async def rebuild(self, connection: Connection, index: str, rebuild: Rebuild) -> None:
        """Ask for documents to be rebuilt, in the caller's transaction.

        A request for the same, or for more, that has not begun takes it over. One that is being served has yet to read
        the documents behind its cursor, so that only those before it are asked for: its pages that are under way are
        read again as they were overtaken. If too many requests wait, one for all documents takes their place.
        """
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
            served = await fetch_row(
                connection,
                sql.SQL(
                    "SELECT cursor FROM {} WHERE index_name = %s AND state = 'running' AND NOT keyed AND {}"
                    " AND up_to IS NULL ORDER BY id LIMIT 1 FOR UPDATE"
                ).format(self._table, covering),
                [index, rebuild.condition],
            )
            if served == (None,):
                return  # nothing that it has read is in the index
            up_to = None if served is None else tuple(cast(list[str], served[0]))
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
        await self.add(
            connection,
            index,
            "related",
            rewrite=rewrite,
            filter_=filter_,
            keys=keys,
            through=rebuild.relation,
            up_to=up_to,
        )

    async def _wake(self, connection: Connection, index: str) -> None:
        await connection.execute("SELECT pg_notify(%s, %s)", [self.channel, index])

    async def oldest_open(self, connection: Connection, indexes: list[str]) -> Request | None:
        """Return the request to serve next for these indexes; those of paused indexes wait."""
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {_SERVED} FROM {{}} WHERE state IN ('requested', 'running') AND index_name = ANY(%s)"
                " AND kind <> 'compare' AND index_name NOT IN {} ORDER BY id LIMIT 1"
            ).format(self._table, self._registry.paused),
            [indexes],
        )
        return None if row is None else _request(row)

    async def oldest_comparison(self, connection: Connection, indexes: list[str]) -> Request | None:
        """Return the comparison to make next of these indexes; those of indexes that are paused or loading wait.

        Until an index is loaded, everything that it lacks would differ.
        """
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {_COLUMNS} FROM {{}} WHERE state IN ('requested', 'running') AND index_name = ANY(%s)"
                " AND kind = 'compare' AND index_name NOT IN {} AND index_name NOT IN (SELECT index_name FROM {}"
                " WHERE kind IN ('initial', 'resync') AND state = ANY(%s)) ORDER BY id LIMIT 1"
            ).format(self._table, self._registry.paused, self._table),
            [indexes, list(OPEN)],
        )
        return None if row is None else _request(row)

    async def compare(self, connection: Connection, index: str) -> None:
        """Ask for a comparison, in the caller's transaction; one that has not begun yet sees the present, too."""
        row = await fetch_row(
            connection,
            sql.SQL("SELECT FROM {} WHERE index_name = %s AND kind = 'compare' AND state = 'requested'").format(
                self._table
            ),
            [index],
        )
        if row is None:
            await self.add(connection, index, "compare", rewrite=False, filter_=None)

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

    async def still_to_begin(self, connection: Connection, index: str) -> bool:
        """Say whether an index holds nothing, and its first load is still to come."""
        # `plan` asks this of tables of earlier versions, too, which lack columns.
        load = await fetch_row(
            connection,
            sql.SQL(
                "SELECT kind = 'initial' AND cursor IS NULL AND state = ANY(%s) FROM {} WHERE index_name = %s"
                " AND kind IN ('initial', 'resync') ORDER BY id DESC LIMIT 1"
            ).format(self._table),
            [list(OPEN), index],
        )
        if load != (True,):
            return False
        row = await fetch_one(
            connection,
            sql.SQL("SELECT EXISTS (SELECT FROM {}) OR EXISTS (SELECT FROM {} WHERE index_name = %s)").format(
                sql.Identifier(self._schema, f"{index}_chunks"), sql.Identifier(self._schema, "failed_documents")
            ),
            [index],
        )
        return not row[0]

    async def latest(self, connection: Connection, index: str) -> Request | None:
        """Return the open request of an index, or the last one that ended."""
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {_COLUMNS} FROM {{}}"
                " WHERE index_name = %s ORDER BY state IN ('requested', 'running', 'paused') DESC, id DESC LIMIT 1"
            ).format(self._table),
            [index],
        )
        return None if row is None else _request(row)

    async def last_load(self, connection: Connection, index: str) -> Request | None:
        """Return the request that last read, or is to read, the whole of an index's table."""
        row = await fetch_row(
            connection,
            sql.SQL(
                f"SELECT {_COLUMNS} FROM {{}} WHERE index_name = %s AND kind IN ('initial', 'resync')"
                " ORDER BY id DESC LIMIT 1"
            ).format(self._table),
            [index],
        )
        return None if row is None else _request(row)

    async def last_loads(self, connection: Connection) -> dict[str, Request]:
        """Return `last_load` of every index that has one."""
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT DISTINCT ON (index_name) {_COLUMNS} FROM {{}} WHERE kind IN ('initial', 'resync')"
                " ORDER BY index_name, id DESC"
            ).format(self._table)
        )
        return {load.index: load for load in map(_request, await cursor.fetchall())}

    async def present(self, connection: Connection, indexes: Sequence[str]) -> list[Request]:
        """Return for each index the request that is served, or else the next one, or else the one that ended last."""
        cursor = await connection.execute(
            sql.SQL(
                f"SELECT DISTINCT ON (index_name) {_COLUMNS} FROM {{}} WHERE index_name = ANY(%s)"
                " ORDER BY index_name, array_position(ARRAY['running', 'requested', 'paused'], state),"
                " CASE WHEN state IN ('running', 'requested', 'paused') THEN id ELSE -id END"
            ).format(self._table),
            [list(indexes)],
        )
        return [_request(row) for row in await cursor.fetchall()]

    async def one(self, connection: Connection, id_: int) -> Request | None:
        """Return a request as it is now; None when it went with its index."""
        row = await fetch_row(
            connection, sql.SQL(f"SELECT {_COLUMNS} FROM {{}} WHERE id = %s").format(self._table), [id_]
        )
        return None if row is None else _request(row)

    async def action(
        self, connection: Connection, index: str, action: RequestAction, *, id_: int | None = None
    ) -> list[int]:
        """Pause, resume or cancel the open requests of an index, or only one of them; returns those that it changed.

        What the index is owed is not cancelled.
        """
        state, before = _ACTIONS[action]
        cursor = await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = %s, finished_at = CASE WHEN %s = 'cancelled' THEN now() END"
                " WHERE index_name = %s AND state = ANY(%s) AND (%s::bigint IS NULL OR id = %s)"
                " AND NOT (%s = 'cancelled' AND (owed OR kind = ANY(%s))) RETURNING id"
            ).format(self._table),
            [state, state, index, list(before), id_, id_, state, list(OWED)],
        )
        changed = sorted(cast(int, row[0]) for row in await cursor.fetchall())
        await self._wake(connection, index)
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

    async def state(self, connection: Connection, request: Request) -> str | None:
        """Return a request's state now: someone may have paused or cancelled it."""
        row = await fetch_row(
            connection, sql.SQL("SELECT state FROM {} WHERE id = %s").format(self._table), [request.id]
        )
        return None if row is None else cast(str, row[0])

    async def fail(self, connection: Connection, request: Request, error: str) -> None:
        """End a request that cannot be served."""
        await connection.execute(
            sql.SQL("UPDATE {} SET state = 'failed', error = %s, finished_at = now() WHERE id = %s").format(
                self._table
            ),
            [error, request.id],
        )
        crash_point("request failed")

    async def prune(self, connection: Connection) -> None:
        """Remove the keys of requests that have ended, and in time what they found and they themselves.

        The last load of an index stays: it says whether the index is whole.
        """
        ended = "b.state IN ('done', 'failed', 'cancelled') AND b.finished_at <"
        for table, age_s in ((self._keys, 0), (self._differences, FOUND_KEPT_S)):
            await connection.execute(
                sql.SQL(
                    f"DELETE FROM {{}} AS k USING {{}} AS b WHERE b.id = k.backfill_id AND {ended}"
                    " clock_timestamp() - make_interval(secs => %s)"
                ).format(table, self._table),
                [age_s],
            )
            crash_point("keys of ended requests removed")
        await connection.execute(
            sql.SQL(
                f"DELETE FROM {{}} AS b WHERE b.kind IN ('replay', 'verify', 'compare', 'related') AND {ended}"
                " clock_timestamp() - make_interval(secs => %s)"
            ).format(self._table),
            [KEPT_S],
        )
        crash_point("ended requests removed")

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
                f" WHERE id = %s RETURNING {_SERVED}"
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
        return None if row is None else _request(row)

    async def found(self, connection: Connection, id_: int) -> list[tuple[Key, Problem]]:
        """Return what a verification found, by key."""
        cursor = await connection.execute(
            sql.SQL("SELECT key, problem FROM {} WHERE backfill_id = %s ORDER BY key").format(self._differences), [id_]
        )
        return [(tuple(key), problem) for key, problem in await cursor.fetchall()]


def _request(row: tuple[Any, ...]) -> Request:
    values = list(row)
    values[7] = None if values[7] is None else tuple(values[7])
    values[17:] = [None if key is None else tuple(key) for key in values[17:]]
    return Request(*values)
