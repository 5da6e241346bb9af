"""Reading rows of source tables, each time with the snapshot that they were read under.

Pages come in key order; single rows by key.

Rows come as the shape's tuples with every value in the text that its type's output function renders, which is what
the stream carries too.

Each read is one short REPEATABLE READ transaction that writes nothing: no lock beyond ACCESS SHARE, no snapshot that
outlives it.

Source: PostgreSQL, "Transaction Isolation"; "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar, cast

import anyio
import msgspec
import psycopg
from psycopg import sql

from cdcsync.documents.related import Facts, RelatedRows
from cdcsync.model.rows import SOURCE_TABLE, Key, Row, Shape
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.comparisons import Comparison, comparisons, follows
from cdcsync.postgres.queries import fetch_one, fetch_row, fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.source.related import computed, operators

T = TypeVar("T")

SOFT_ERRORS_VERSION = 160000
"""PostgreSQL 16: pg_input_is_valid."""

_NO_VALUE = (psycopg.DataError, psycopg.IntegrityError)
"""The errors by which a server refuses a text as a value of a type or domain."""


class Page(msgspec.Struct, frozen=True):
    """Rows in key order, and the snapshot they were read under."""

    snapshot: Snapshot
    rows: list[Row]
    more: bool = False
    """Whether more rows follow, although there are fewer than were asked for."""


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
        self._columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.columns)
        columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.own) if related else self._columns
        # In the table of one of many, its name is not a column.
        self._fixed = 0 if shape.source is None else 1
        keys: list[sql.Composable] = [sql.Identifier("t", name) for name in shape.key]
        if shape.source is not None:
            keys[0] = sql.SQL("{}::text").format(sql.Literal(shape.source))
            selected = [*keys[:1], *(sql.Identifier("t", name) for name in shape.columns[1:])]
            columns = self._columns = sql.SQL(", ").join(selected)
        sent = _condition(condition) if condition else sql.SQL("true")
        # As a subquery, so that the condition's bare column names cannot be taken for those of what it is joined to; of
        # only the columns that the index needs, because the role may not be allowed to read the other columns.
        needed = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.own)
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
        places = [sql.Identifier(f"k{at}") for at in range(len(keys))]
        self._wanted = [
            sql.SQL("{}::" + type_).format(sql.Identifier("wanted", f"k{at}")) for at, type_ in enumerate(key_types)
        ]
        wanted = sql.SQL("unnest({}) WITH ORDINALITY AS wanted({}, place)").format(
            sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at in range(1, len(keys) + 1)),
            sql.SQL(", ").join(places),
        )
        self._by_keys = sql.SQL("SELECT {} FROM {} AS t JOIN {} ON ").format(columns, published, wanted)
        self._spellings = sql.SQL("SELECT wanted.place, {} FROM {} AS t JOIN {} ON ").format(
            sql.SQL(", ").join(keys), published, wanted
        )
        self._published = published
        self._wanted_from = wanted

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
        return await self._read(connection, statement, self._place(after))

    @property
    def _ordered(self) -> Sequence[sql.Composable]:
        """The columns that order the table's rows."""
        return self._keys[self._fixed :]

    def _place(self, after: Key | None) -> list[str]:
        """Return the values of the ordering columns."""
        return list(after[self._fixed :]) if after is not None else []

    async def _with_related(self, connection: Connection, rows: sql.Composed) -> sql.Composed:
        """Return a statement that gives the same rows with all columns, those of related tables included."""
        if not self._related:
            return rows
        if self._equal is None:
            self._equal = await operators(connection, self._facts)
        whole = computed(rows, self.shape, self._related, self._facts, self._equal)
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

    async def fitting(
        self, connection: Connection, after: Key | None, limit: int, most_bytes: int, where: str | None = None
    ) -> int:
        """Return how many rows of a page are at most so large together, at least 1; no value is read for that."""
        if not await self._has_large_values(connection):
            return limit
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
            rows=sql.SQL(" AND ").join(
                [self._named if where else self._rows, *await self._after(connection, after, where)]
            ),
            limit=sql.Literal(limit),
        )
        async with _reading(connection):
            ((rows, fitting),) = await fetch_texts(connection, statement, self._place(after), prepare=False)
        return limit if rows == fitting else max(1, int(cast(str, fitting)))

    async def fitting_keys(self, connection: Connection, keys: Sequence[Key], most_bytes: int) -> int:
        """Return how many of these keys, from the first on, have rows of at most so many bytes together; at least 1."""
        if not keys or not await self._has_large_values(connection):
            return len(keys)
        statement = sql.SQL("SELECT wanted.place, {} FROM {} AS t JOIN {} ON ").format(
            await self._size(connection), self._published, self._wanted_from
        ) + await self._same(connection)

        async def read(possible: Sequence[Key]) -> dict[Key, int]:
            cursor = psycopg.AsyncRawCursor(connection)
            async with _reading(connection):
                await cursor.execute(statement, self._arrays(possible), prepare=False)
                return {possible[place - 1]: size for place, size in await cursor.fetchall()}

        sizes = await self._of_possible(connection, keys, read)
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
        statement = await self._with_related(connection, self._by_keys + await self._same(connection))

        async def read(possible: Sequence[Key]) -> Page:
            return await self._read(connection, statement, self._arrays(possible))

        return await self._of_possible(connection, keys, read)

    async def absent(self, connection: Connection, keys: Sequence[Key]) -> tuple[Snapshot, list[Key]]:
        """Return those of `keys` that the source does not write just so for any row now.

        A key that equals a row's by the source's own equality and is written differently (by citext, abc for ABC) is
        absent, too: the index has, or gets, that row under the key as it is written.
        """
        statement = self._spellings + await self._same(connection)

        async def read(possible: Sequence[Key]) -> tuple[Snapshot, set[Key]]:
            page = await self._read(connection, statement, self._arrays(possible))
            return page.snapshot, {cast(Key, key) for _, *spelt in page.rows if (key := tuple(spelt)) in wanted}

        wanted = set(keys)
        snapshot, found = await self._of_possible(connection, keys, read)
        return snapshot, [key for key in keys if key not in found]

    async def _of_possible(
        self, connection: Connection, keys: Sequence[Key], read: Callable[[Sequence[Key]], Awaitable[T]]
    ) -> T:
        """Read by keys; those that are no values of the key's types, and so no row's, are left out if there are any."""
        try:
            return await read(keys)
        except _NO_VALUE:
            return await read(await self._possible(connection, keys))

    async def _possible(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        """Return those keys that are values of the key's types."""
        if connection.info.server_version >= SOFT_ERRORS_VERSION:
            valid = sql.SQL(" AND ").join(
                sql.SQL("pg_catalog.pg_input_is_valid({}, {})").format(sql.Identifier("wanted", f"k{at}"), type_)
                for at, type_ in enumerate(map(sql.Literal, self._key_types))
            )
            # Not every type's input function can say so without an error.
            with contextlib.suppress(*_NO_VALUE):
                said = await self._of_wanted(connection, valid, keys)
                keys = [keys[place - 1] for place, valid in said if valid]
        possible: list[Key] = []
        halves = [list(keys)]
        while halves:
            half = halves.pop()
            try:
                await self._of_wanted(connection, sql.SQL(", ").join(self._wanted), half)
            except _NO_VALUE:
                if len(half) > 1:
                    halves += [half[len(half) // 2 :], half[: len(half) // 2]]
            else:
                possible += half
        return possible

    async def _of_wanted(
        self, connection: Connection, selected: sql.Composable, keys: Sequence[Key]
    ) -> list[tuple[Any, ...]]:
        """Return the place of each key with what is selected of it; no table is read."""
        cursor = psycopg.AsyncRawCursor(connection)
        statement = sql.SQL("SELECT place, {} FROM {}").format(selected, self._wanted_from)
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
        while (page := await self._read_once(connection, statement, arguments)) is None:
            pass
        return page

    async def _read_once(
        self, connection: Connection, statement: sql.Composed, arguments: Sequence[object]
    ) -> Page | None:
        """Read under one snapshot; returns None when the table was made or rewritten after it and so looked empty.

        To lock the table before would do as well, but needs more than the right to read some of its columns.
        """
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            first = await fetch_one(connection, "SELECT pg_current_snapshot()::text")
            # Never prepared: a plan that is kept fails once a column has another type.
            rows = await fetch_texts(connection, statement, arguments, prepare=False)
            page = Page(Snapshot.parse(cast(str, first[0])), rows)
            rewritten = await fetch_row(connection, _REWRITTEN, {"tables": self._files})
        except BaseException:
            if not connection.closed:
                with anyio.CancelScope(shield=True):
                    await connection.rollback()
            raise
        await connection.execute("COMMIT")
        return page if rewritten == (False,) else None

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

    async def count(self, connection: Connection, where: str | None = None) -> int:
        """Return how many rows there are to read."""
        statement = sql.SQL("SELECT count(*) FROM {}").format(self._fulfilling(where))
        async with _reading(connection):
            row = await fetch_one(connection, statement)
        return cast(int, row[0])

    async def expected(self, connection: Connection, where: str | None = None) -> int:
        """Return the planner's idea of how many rows there are to read; none is looked at."""
        if where is None and self.all_rows:
            return await self.estimate(connection)
        statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(self._fulfilling(where))
        async with _reading(connection):
            row = await fetch_one(connection, statement)
        return int(row[0][0]["Plan"]["Plan Rows"])

    def _fulfilling(self, where: str | None) -> sql.Composable:
        return sql.SQL(" AND ").join([self._named, _condition(where)]) if where else self._rows


@contextlib.asynccontextmanager
async def _reading(connection: Connection) -> AsyncIterator[None]:
    """Open a transaction in which no condition that someone wrote can write."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION READ ONLY")
        yield


_REWRITTEN = """
    SELECT EXISTS (
        SELECT FROM unnest(%(tables)s::text[]::regclass[]) AS read (oid) CROSS JOIN LATERAL
            (SELECT read.oid UNION SELECT relid FROM pg_partition_tree(read.oid)) AS now (oid)
        LEFT JOIN pg_class AS c ON c.oid = now.oid
        WHERE c.relfilenode IS DISTINCT FROM coalesce(pg_relation_filenode(now.oid), 0))
"""
"""Compares the files of tables and their partitions: as they are, which functions tell, with what the snapshot sees."""


def _condition(text: str) -> sql.Composable:
    """Return a condition that someone wrote."""
    return sql.SQL("(" + text + ")")


async def emit_mark(connection: Connection, content: str) -> None:
    """Write one of our marks into the WAL; the stream delivers it after all that committed before.

    The message is transactional: its commit flushes it, so that it does not wait for other writers to do so.
    """
    await connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, content])
