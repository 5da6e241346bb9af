"""Reading rows of source tables, each time with the snapshot that they were read under.

Pages come in key order; single rows by key.

Rows come as the shape's tuples with every value in the text that its type's output function renders, which is what
the stream carries too.

Source: PostgreSQL, "Transaction Isolation"; "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.documents.related import Facts, RelatedRows
from cdcsync.memory import largest_value
from cdcsync.model.rows import OVERSIZED, SOURCE_TABLE, Key, Row, Shape, Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.comparisons import Comparison, comparisons, follows
from cdcsync.postgres.queries import fetch_one, fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import current_snapshot
from cdcsync.source.reads import Page, read_rows, reading
from cdcsync.source.related import computed, operators
from cdcsync.source.sizes import read_within
from cdcsync.source.unreadable import of_a_row, read_apart

T = TypeVar("T")

SOFT_ERRORS_VERSION = 160000
"""PostgreSQL 16: pg_input_is_valid."""

PLACE = sql.Identifier("cdcsync place")
"""The column that tells which of several keys is meant."""

_NO_VALUE = (psycopg.DataError, psycopg.IntegrityError)
"""The errors by which a server refuses a text as a value of a type or domain."""


class SourceTable:
    """One index's view of its table: which columns, of which types, and which rows."""

    def __init__(
        self,
        shape: Shape,
        key_types: Sequence[str],
        condition: str | None = None,
        *,
        related: Sequence[RelatedRows] = (),
        facts: Facts = MappingProxyType({}),
    ) -> None:
        self.shape = shape
        self.all_rows = condition is None
        """Whether the index has every row of the table."""
        self._related = related
        self._facts = facts
        self._equal: Callable[[str, str], str] | None = None
        self._files = list(
            dict.fromkeys(
                [str(shape.table), *(str(step.table) for top in related for one in top.walk() for step in one.steps)]
            )
        )
        table = sql.Identifier(shape.table.schema, shape.table.name)
        # In the table of one of many, its name is not a column.
        self._fixed = 0 if shape.source is None else 1
        keys: list[sql.Composable] = [sql.Identifier("t", name) for name in shape.key]
        if shape.source is not None:
            keys[0] = sql.SQL("{}::text").format(sql.Literal(shape.source))
        self._columns = sql.SQL(", ").join([*keys, *read_within(shape.columns[len(keys) :], shape, largest_value())])
        """What is read of a row: of too large values nothing, and whether there are any."""
        columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.own) if related else self._columns
        sent = _condition(condition) if condition else sql.SQL("true")
        # As a subquery, so that the condition's bare column names cannot be taken for those of what it is joined to; of
        # only the columns that the index needs, because the role may not be allowed to read the other columns.
        needed = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.own)
        self._bare = sql.SQL("{} AS t WHERE true").format(table)
        """All rows of the table, whether they belong to the index or not."""
        published = sql.SQL("(SELECT {} FROM {} AS t WHERE {})").format(needed, table, sent)
        self._rows = sql.SQL("{} AS t WHERE {}").format(table, sent)
        self._named = self._rows
        """The rows with the table's name among them, for conditions that tell tables apart."""
        if shape.source is not None:
            of_all = sql.SQL("SELECT {}::text AS {}, t.* FROM {} AS t WHERE {}").format(
                sql.Literal(shape.source), sql.Identifier(SOURCE_TABLE), table, sent
            )
            self._named = sql.SQL("({}) AS t WHERE true").format(of_all)
        self._selected = columns
        self._keys = keys
        self._key_types = tuple(key_types)
        self._comparisons: list[Comparison] = []
        # A condition's bare names can be no column of these.
        places = [f"cdcsync key {at}" for at in range(len(keys))]
        self._wanted = [
            sql.SQL("{}::" + type_).format(sql.Identifier("wanted", place))
            for place, type_ in zip(places, key_types, strict=True)
        ]
        self._wanted_from = sql.SQL("unnest({}) WITH ORDINALITY AS wanted({}, {})").format(
            sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at in range(1, len(keys) + 1)),
            sql.SQL(", ").join(map(sql.Identifier, places)),
            PLACE,
        )
        self._table = table
        self._sent = sent
        self._published = published

    @classmethod
    def of(cls, spec: IndexSpec) -> Self:
        """Return the table of an index, with what is related to it."""
        return cls(spec.shape, spec.source_key_types, spec.condition, related=spec.documents.related, facts=spec.facts)

    async def page(self, connection: Connection, after: Key | None, limit: int, where: str | None = None) -> Page:
        """Return up to `limit` rows with keys above `after`, in key order; fewer rows than that are the last ones."""
        conditions = await self._after(connection, after, where)
        order = sql.SQL(" ORDER BY {}").format(sql.SQL(", ").join(self._ordered))
        rows = sql.SQL(" AND ").join([self._named if where else self._rows, *conditions])
        statement = sql.SQL("SELECT {} FROM {}").format(self._selected, rows) + order
        statement += sql.SQL(" LIMIT {}").format(sql.Literal(limit))
        if self._related:
            statement = await self._with_related(connection, statement) + order
        try:
            page = await self._read(connection, statement, self._place(after))
        except psycopg.Error as error:
            if not of_a_row(error):
                raise
            return await self._page_apart(connection, after, limit, where, error)
        found = self._within(page)
        if found.unread:
            last = self.shape.key_of(page.rows[-1])
            return msgspec.structs.replace(found, more=len(page.rows) == limit, last=last)
        return found

    async def _page_apart(
        self, connection: Connection, after: Key | None, limit: int, where: str | None, error: psycopg.Error
    ) -> Page:
        """Return the same page although the server fails at a row of it, which is told apart by its key.

        :param error: that failure; it is raised if `where` is the reason, which is nothing about the row.
        """
        snapshot = await current_snapshot(connection)
        rows = sql.SQL(" AND ").join([self._bare, *await self._after(connection, after, None)])
        statement = sql.SQL("SELECT {} FROM {} ORDER BY {} LIMIT {}").format(
            sql.SQL(", ").join(self._keys), rows, sql.SQL(", ").join(self._ordered), sql.Literal(limit)
        )
        keys = cast(list[Key], (await self._read(connection, statement, self._place(after))).rows)
        found = await self._by_keys(connection, keys, where)
        if where and found.unread and (await self._by_keys(connection, list(found.unread))).rows:
            raise error
        place = {key: at for at, key in enumerate(keys)}
        ordered = sorted(found.rows, key=lambda row: place.get(self.shape.key_of(row), 0))
        return msgspec.structs.replace(
            found, snapshot=snapshot, rows=ordered, more=len(keys) == limit, last=keys[-1] if keys else None
        )

    @property
    def _ordered(self) -> Sequence[sql.Composable]:
        """The columns that order the table's rows."""
        return self._keys[self._fixed :]

    def _place(self, after: Key | None) -> list[str]:
        """Return the values of the ordering columns."""
        return list(after[self._fixed :]) if after is not None else []

    async def _keyed(
        self, connection: Connection, selected: sql.Composable, *, apart: bool, where: str | None = None
    ) -> sql.Composed:
        """Return a statement over the rows with wanted keys.

        :param apart: whether the condition is not even asked of other rows, for which it may fail, whatever the
            planner would do first.
        :param where: a further condition; with it, they are always asked of these rows only.
        """
        same = await self._same(connection)
        if not (apart or where):
            of: sql.Composable = self._published
            holds: sql.Composable = sql.SQL("true")
        else:
            of = self._table
            if where and self.shape.source is not None:
                of = sql.SQL("(SELECT {}::text AS {}, t.* FROM {} AS t)").format(
                    sql.Literal(self.shape.source), sql.Identifier(SOURCE_TABLE), self._table
                )
            conditions = sql.SQL(" AND ").join([self._sent, *([_condition(where)] if where else [])])
            holds = sql.SQL("CASE WHEN {} THEN {} END").format(same, conditions)
        return sql.SQL("SELECT {} FROM {} AS t JOIN {} ON {} WHERE {}").format(
            selected, of, self._wanted_from, same, holds
        )

    async def _with_related(self, connection: Connection, rows: sql.Composed, *, apart: bool = False) -> sql.Composed:
        """Return a statement that gives the same rows with all columns, those of related tables included."""
        if not self._related:
            return rows
        if self._equal is None:
            self._equal = await operators(connection, self._facts)
        whole = computed(rows, self.shape, self._related, self._facts, self._equal, apart=apart)
        return sql.SQL("SELECT {} FROM {} AS t").format(self._columns, whole)

    async def _after(self, connection: Connection, after: Key | None, where: str | None) -> list[sql.Composable]:
        """Return the conditions of the rows that follow a key."""
        conditions: list[sql.Composable] = []
        if after is not None:
            types = self._key_types[self._fixed :]
            values = [sql.SQL(f"${at}::text::{type_}") for at, type_ in enumerate(types, start=1)]
            compared = (await self._compared(connection))[self._fixed :]
            conditions.append(follows(self._ordered, values, compared))
        if where:
            conditions.append(_condition(where))
        return conditions

    async def up_to(self, connection: Connection, key: Key) -> str:
        """Return the condition of the rows up to a key in the order of pages, in SQL on the row `t`."""
        typed = zip(self._place(key), self._key_types[self._fixed :], strict=True)
        values = [sql.SQL("{}::text::" + type_).format(sql.Literal(value)) for value, type_ in typed]
        compared = (await self._compared(connection))[self._fixed :]
        return sql.SQL("NOT ({})").format(follows(self._ordered, values, compared)).as_string(connection)

    async def fitting(
        self, connection: Connection, after: Key | None, limit: int, most_bytes: int, where: str | None = None
    ) -> int:
        """Return how many rows of a page are at most so large together, at least 1; no value is read for that."""
        if not await self._has_large_values(connection):
            return limit
        of = self._named if where else self._rows
        try:
            return await self._fitting(connection, of, after, limit, most_bytes, where)
        except psycopg.Error as error:
            if not of_a_row(error):
                raise
            # Rows that do not fulfil the condition may be read, too, where it fails.
            return await self._fitting(connection, self._bare, after, limit, most_bytes, None)

    async def _fitting(
        self,
        connection: Connection,
        of: sql.Composed,
        after: Key | None,
        limit: int,
        most_bytes: int,
        where: str | None,
    ) -> int:
        # Our own aliases are names that no column is likely to have.
        statement = sql.SQL(
            'SELECT count(*), count(*) FILTER (WHERE "so far" <= {most}) FROM (SELECT'
            ' sum("row size") OVER (ORDER BY {keys} ROWS UNBOUNDED PRECEDING) AS "so far" FROM'
            ' (SELECT {keys}, {size} AS "row size" FROM {rows}'
            " ORDER BY {keys} LIMIT {limit}) AS t) AS sizes"
        ).format(
            most=sql.Literal(most_bytes),
            keys=sql.SQL(", ").join(self._ordered),
            size=await self._size(connection),
            rows=sql.SQL(" AND ").join([of, *await self._after(connection, after, where)]),
            limit=sql.Literal(limit),
        )
        async with reading(connection):
            ((rows, fitting),) = await fetch_texts(connection, statement, self._place(after), prepare=False)
        return limit if rows == fitting else max(1, int(cast(str, fitting)))

    async def fitting_keys(self, connection: Connection, keys: Sequence[Key], most_bytes: int) -> int:
        """Return how many of these keys, from the first on, have rows of at most so many bytes together; at least 1."""
        if len(keys) < 2 or not await self._has_large_values(connection):
            return len(keys)
        selected = sql.SQL("wanted.{}, {}").format(PLACE, await self._size(connection))

        async def read(possible: Sequence[Key], apart: bool) -> dict[Key, int]:
            cursor = psycopg.AsyncRawCursor(connection)
            statement = await self._keyed(connection, selected, apart=apart)
            async with reading(connection):
                await cursor.execute(statement, self._arrays(possible), prepare=False)
                return {possible[place - 1]: size for place, size in await cursor.fetchall()}

        parts, _, _ = await self._read_keys(connection, keys, read)
        sizes = {key: size for part in parts for key, size in part.items()}
        total = 0
        for place, key in enumerate(keys, start=1):
            total += sizes.get(key, 0)
            if total > most_bytes:
                return max(1, place - 1)
        return len(keys)

    async def _has_large_values(self, connection: Connection) -> bool:
        """Say whether any value is stored out of line: if none is, no row is larger than a page of the server's."""
        row = await fetch_one(
            connection,
            "SELECT EXISTS (SELECT FROM pg_class WHERE reltoastrelid <> 0 AND pg_relation_size(reltoastrelid) > 0"
            " AND (oid = %(table)s::regclass OR oid IN (SELECT relid FROM pg_partition_tree(%(table)s::regclass))))",
            {"table": str(self.shape.table)},
        )
        return bool(row[0])

    async def _size(self, connection: Connection) -> sql.Composable:
        """Return SQL of a row's size that reads no value: of compressed ones other than text, the compressed size."""
        cursor = await connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
            " AND atttypid IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)",
            [str(self.shape.table)],
        )
        plain = {name for (name,) in await cursor.fetchall()}
        return sql.SQL(" + ").join(
            sql.SQL("coalesce({}({}), 0)").format(
                sql.SQL("octet_length" if name in plain else "pg_column_size"), sql.Identifier("t", name)
            )
            for name in self.shape.own
        )

    async def by_keys(self, connection: Connection, keys: Sequence[Key]) -> Page:
        """Return the rows that exist now with these keys, in no order."""
        return await self._by_keys(connection, keys)

    async def _by_keys(self, connection: Connection, keys: Sequence[Key], where: str | None = None) -> Page:
        """Return the rows with these keys that a condition holds for, too."""

        async def read(possible: Sequence[Key], apart: bool) -> Page:
            rows = await self._keyed(connection, self._selected, apart=apart, where=where)
            statement = await self._with_related(connection, rows, apart=apart)
            return self._within(await self._read(connection, statement, self._arrays(possible)))

        pages, unread, snapshot = await self._read_keys(connection, keys, read)
        if snapshot is None:
            return pages[0]
        for page in pages:
            unread |= page.unread
        return Page(snapshot, [row for page in pages for row in page.rows], unread=unread)

    async def absent(self, connection: Connection, keys: Sequence[Key]) -> tuple[Snapshot, list[Key]]:
        """Return those of `keys` that the source does not write just so for any row now.

        A key that equals a row's by the source's own equality and is written differently (by citext, abc for ABC) is
        absent, too: the index has, or gets, that row under the key as it is written. One that cannot be read is not.
        """
        selected = sql.SQL("wanted.{}, {}").format(PLACE, sql.SQL(", ").join(self._keys))

        async def read(possible: Sequence[Key], apart: bool) -> tuple[Snapshot, set[Key]]:
            statement = await self._keyed(connection, selected, apart=apart)
            page = await self._read(connection, statement, self._arrays(possible))
            return page.snapshot, {cast(Key, key) for _, *spelt in page.rows if (key := tuple(spelt)) in wanted}

        wanted = set(keys)
        parts, unread, snapshot = await self._read_keys(connection, keys, read)
        found = unread.keys() | {key for _, part in parts for key in part}
        return snapshot or parts[0][0], [key for key in keys if key not in found]

    async def _read_keys(
        self, connection: Connection, keys: Sequence[Key], read: Callable[[Sequence[Key], bool], Awaitable[T]]
    ) -> tuple[list[T], dict[Key, Unread], Snapshot | None]:
        """Read by keys at once or, if a row or a key makes that fail, in parts.

        Keys that are no values of the key's types, and so no row's, are left out then.

        :param read: its second argument says whether conditions are to be asked of rows with these keys alone.
        :returns: what was read, the keys whose rows cannot be read, and a snapshot of before it was read in parts.
        """
        try:
            return [await read(keys, False)], {}, None
        except psycopg.Error as error:
            if not of_a_row(error):
                raise
        snapshot = await current_snapshot(connection)
        possible = await self._possible(connection, keys)
        return *await read_apart(possible, lambda part: read(part, True)), snapshot

    async def _possible(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        """Return those keys that are values of the key's types."""
        if connection.info.server_version >= SOFT_ERRORS_VERSION:
            valid = sql.SQL(" AND ").join(
                sql.SQL("pg_catalog.pg_input_is_valid({}, {})").format(
                    sql.Identifier("wanted", f"cdcsync key {at}"), type_
                )
                for at, type_ in enumerate(map(sql.Literal, self._key_types))
            )
            # Not every type's input function can say so without an error.
            with contextlib.suppress(*_NO_VALUE):
                said = await self._of_wanted(connection, valid, keys)
                keys = [keys[place - 1] for place, valid in said if valid]
        cast_all = sql.SQL(", ").join(self._wanted)
        _, impossible = await read_apart(keys, lambda part: self._of_wanted(connection, cast_all, part))
        return [key for key in keys if key not in impossible]

    async def _of_wanted(
        self, connection: Connection, selected: sql.Composable, keys: Sequence[Key]
    ) -> list[tuple[Any, ...]]:
        """Return the place of each key with what is selected of it; no table is read."""
        cursor = psycopg.AsyncRawCursor(connection)
        statement = sql.SQL("SELECT {}, {} FROM {}").format(PLACE, selected, self._wanted_from)
        await cursor.execute(statement, self._arrays(keys), prepare=False)
        return await cursor.fetchall()

    async def _compared(self, connection: Connection) -> list[Comparison]:
        """Return the key's operators, which are looked up once."""
        if not self._comparisons:
            self._comparisons = await comparisons(connection, self._key_types)
        return self._comparisons

    async def _same(self, connection: Connection) -> sql.Composed:
        """Return SQL that says whether a row has a wanted key."""
        compared = await self._compared(connection)
        return sql.SQL(" AND ").join(
            sql.SQL("{} {} {}").format(key, one.equal, wanted)
            for key, one, wanted in zip(self._keys, compared, self._wanted, strict=True)
        )

    async def _read(self, connection: Connection, statement: sql.Composed, arguments: Sequence[object]) -> Page:
        return await read_rows(connection, statement, arguments, self._files)

    def _within(self, page: Page) -> Page:
        """Return a page with the rows that have too large values among those that cannot be read."""
        width = len(self.shape.columns)
        if not page.rows or len(page.rows[0]) == width:
            return page
        rows: list[Row] = []
        unread: dict[Key, Unread] = {}
        for row in page.rows:
            if row[width] == "t":
                unread[self.shape.key_of(row)] = OVERSIZED
            else:
                rows.append(row[:width])
        return msgspec.structs.replace(page, rows=rows, unread=unread)

    def _arrays(self, keys: Sequence[Key]) -> list[list[str]]:
        return [[key[at] for key in keys] for at in range(len(self.shape.key))]

    async def estimate(self, connection: Connection) -> int:
        """Return the planner's idea of how many rows the table has."""
        row = await fetch_one(
            connection,
            # A partition tree is empty for a table that has no part in partitioning, and a root repeats its leaves.
            "SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::int8 FROM pg_class c WHERE c.relkind <> 'p'"
            " AND (c.oid = %(table)s::regclass OR c.oid IN (SELECT relid FROM pg_partition_tree(%(table)s::regclass)))",
            {"table": str(self.shape.table)},
        )
        return cast(int, row[0])

    async def count(self, connection: Connection, where: str | None = None) -> int | None:
        """Return how many rows there are to read; None if a condition fails for one of them."""
        statement = sql.SQL("SELECT count(*) FROM {}").format(self._fulfilling(where))
        try:
            async with reading(connection):
                row = await fetch_one(connection, statement)
        except psycopg.Error as error:
            if not of_a_row(error):
                raise
            return None
        return cast(int, row[0])

    async def expected(self, connection: Connection, where: str | None = None) -> int:
        """Return the planner's idea of how many rows there are to read; none is looked at."""
        if where is None and self.all_rows:
            return await self.estimate(connection)
        statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(self._fulfilling(where))
        async with reading(connection):
            row = await fetch_one(connection, statement)
        return int(row[0][0]["Plan"]["Plan Rows"])

    def _fulfilling(self, where: str | None) -> sql.Composable:
        return sql.SQL(" AND ").join([self._named, _condition(where)]) if where else self._rows


def _condition(text: str) -> sql.Composable:
    """Return a condition that someone wrote."""
    return sql.SQL("(" + text + ")")


async def emit_mark(connection: Connection, content: str) -> None:
    """Write one of our marks into the WAL; the stream delivers it after all that committed before.

    The message is transactional: its commit flushes it, so that it does not wait for other writers to do so.
    """
    await connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, content])
