"""Reading rows of source tables, each time with the snapshot that they were read under.

Pages come in key order; single rows by key.

Source: PostgreSQL, "Transaction Isolation".
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Self, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.documents.related import Facts, RelatedRows
from cdcsync.model.rows import OVERSIZED, Key, Row, Shape, Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.queries import Statement
from cdcsync.postgres.sessions import Connection
from cdcsync.source import counts, fitting
from cdcsync.source.keys import read_keys
from cdcsync.source.marks import flush, unflushed
from cdcsync.source.reads import Page, read_rows
from cdcsync.source.statements import PLACE, Statements
from cdcsync.source.transactions import current_snapshot
from cdcsync.source.unreadable import of_a_row


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
        self._sql = Statements(shape, key_types, condition, related=related, facts=facts)
        self._by_key: bytes | None = None
        """The statement that reads rows by their keys, once it was made: making it takes as long as sending it."""

    @classmethod
    def of(cls, spec: IndexSpec) -> Self:
        """Return the table of an index, with what is related to it."""
        return cls(spec.shape, spec.source_key_types, spec.condition, related=spec.documents.related, facts=spec.facts)

    async def page(self, connection: Connection, after: Key | None, limit: int, where: str | None = None) -> Page:
        """Return up to `limit` rows with keys above `after`, in key order; fewer rows than that are the last ones."""
        rows = self._sql.named if where else self._sql.rows
        statement = await self._sql.page(
            connection, self._sql.selected, rows, after, limit, where, needed=self._sql.needed
        )
        if self._sql.related:
            order = sql.SQL(" ORDER BY {}").format(sql.SQL(", ").join(self._sql.ordered))
            statement = await self._sql.with_related(connection, statement) + order
        try:
            page = await self._read(connection, statement, self._sql.place(after))
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
        listed = sql.SQL(", ").join(self._sql.keys)
        order = sql.SQL(", ").join(self._sql.ordered)
        statement = await self._sql.page(connection, listed, self._sql.bare, after, limit, needed=order)
        keys = cast(list[Key], (await self._read(connection, statement, self._sql.place(after))).rows)
        found = await self._by_keys(connection, keys, where)
        if where and found.unread and (await self._by_keys(connection, list(found.unread))).rows:
            raise error
        place = {key: at for at, key in enumerate(keys)}
        ordered = sorted(found.rows, key=lambda row: place.get(self.shape.key_of(row), 0))
        return msgspec.structs.replace(
            found, snapshot=snapshot, rows=ordered, more=len(keys) == limit, last=keys[-1] if keys else None
        )

    async def up_to(self, connection: Connection, key: Key) -> str:
        """Return the condition of the rows up to a key in the order of pages, in SQL on the row `t`."""
        return await self._sql.up_to(connection, key)

    async def unflushed(self, connection: Connection) -> str | None:
        """Return up to where the WAL has to be flushed before what was read is on disk; see `source/marks`."""
        return await unflushed(connection)

    async def flush(self, connection: Connection, lsn: str) -> None:
        """Have the WAL flushed up to there."""
        await flush(connection, lsn)

    async def by_keys(self, connection: Connection, keys: Sequence[Key]) -> Page:
        """Return the rows that exist now with these keys, in no order."""
        return await self._by_keys(connection, keys)

    async def _by_keys(self, connection: Connection, keys: Sequence[Key], where: str | None = None) -> Page:
        """Return the rows with these keys that a condition holds for, too."""

        async def read(possible: Sequence[Key], apart: bool) -> Page:
            statement = self._by_key
            if apart or where or statement is None:
                rows = await self._sql.keyed(connection, self._sql.selected, apart=apart, where=where)
                statement = (await self._sql.with_related(connection, rows, apart=apart)).as_bytes(connection)
            if not (apart or where):
                self._by_key = statement
            return self._within(await self._read(connection, statement, self._sql.arrays(possible)))

        pages, unread, snapshot = await read_keys(self._sql, connection, keys, read)
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
        selected = sql.SQL("wanted.{}, {}").format(PLACE, sql.SQL(", ").join(self._sql.keys))

        async def read(possible: Sequence[Key], apart: bool) -> tuple[Snapshot, set[Key]]:
            statement = await self._sql.keyed(connection, selected, apart=apart)
            page = await self._read(connection, statement, self._sql.arrays(possible))
            return page.snapshot, {cast(Key, key) for _, *spelt in page.rows if (key := tuple(spelt)) in wanted}

        wanted = set(keys)
        parts, unread, snapshot = await read_keys(self._sql, connection, keys, read)
        found = unread.keys() | {key for _, part in parts for key in part}
        return snapshot or parts[0][0], [key for key in keys if key not in found]

    async def _read(self, connection: Connection, statement: Statement, arguments: Sequence[object]) -> Page:
        return await read_rows(connection, statement, arguments, self._sql.files)

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

    async def fitting(
        self, connection: Connection, after: Key | None, limit: int, most_bytes: int, where: str | None = None
    ) -> int:
        """Return how many rows of a page are at most so large together, at least 1; no value is read for that."""
        return await fitting.fitting(self._sql, connection, after, limit, most_bytes, where)

    async def fitting_keys(self, connection: Connection, keys: Sequence[Key], most_bytes: int) -> int:
        """Return how many of these keys, from the first on, have rows of at most so many bytes together; at least 1."""
        return await fitting.fitting_keys(self._sql, connection, keys, most_bytes)

    async def estimate(self, connection: Connection) -> int:
        """Return the planner's idea of how many rows the table has."""
        return await counts.estimate(self._sql, connection)

    async def count(self, connection: Connection, where: str | None = None) -> int | None:
        """Return how many rows there are to read; None if a condition fails for one of them."""
        return await counts.count(self._sql, connection, where)

    async def expected(self, connection: Connection, where: str | None = None) -> int:
        """Return the planner's idea of how many rows there are to read; none is looked at."""
        return await counts.expected(self._sql, connection, where)
