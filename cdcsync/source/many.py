"""Reading an index's many equal tables, one after the other, in the order of their names.

A page is of one table. What is asked for by key is asked of each table that the keys name. Each read has a snapshot of
its own; the oldest is the one that is returned, which at worst takes a row for older than it is. A table that was
dropped meanwhile has no rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.model.rows import SOURCE_TABLE, Key, Row, Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.source.reads import Page
from cdcsync.source.tables import SourceTable
from cdcsync.source.transactions import current_snapshot

T = TypeVar("T")


def source_table(spec: IndexSpec) -> SourceTable:
    """Return what reads an index's rows."""
    return SourceTables(spec) if spec.shape.many else SourceTable.of(spec)


class SourceTables(SourceTable):
    """One index's view of its tables."""

    def __init__(self, spec: IndexSpec) -> None:
        self.shape = spec.shape
        self._members = {str(one.shape.table): SourceTable.of(one) for one in spec.each}

    async def page(self, connection: Connection, after: Key | None, limit: int, where: str | None = None) -> Page:
        """Return rows of the first table that has any after a key; `more` says whether another table follows."""
        snapshot = await current_snapshot(connection)
        nothing, names = Page(snapshot, []), list(self._members)
        for name, member, start in self._from(after):
            page = await _of(member, nothing, member.page, connection, start, limit, where)
            if page.rows or page.last is not None:
                return msgspec.structs.replace(page, snapshot=snapshot, more=page.more or name != names[-1])
        return nothing

    async def up_to(self, connection: Connection, key: Key) -> str:
        """Return the condition of the rows up to a key in the order of pages, in SQL on the row `t`."""
        parts = {"table": sql.Identifier("t", SOURCE_TABLE), "name": sql.Literal(key[0])}
        before = sql.SQL('{table} < {name} COLLATE pg_catalog."C"').format(**parts).as_string(connection)
        if key[0] not in self._members:
            return before
        same = sql.SQL("{table} = {name}").format(**parts).as_string(connection)
        return f"({before} OR {same} AND {await self._members[key[0]].up_to(connection, key)})"

    def _from(self, after: Key | None) -> Iterator[tuple[str, SourceTable, Key | None]]:
        for name, member in self._members.items():
            if after is None or name >= after[0]:
                yield name, member, after if after is not None and name == after[0] else None

    async def fitting(
        self, connection: Connection, after: Key | None, limit: int, most_bytes: int, where: str | None = None
    ) -> int:
        """Return how many rows of a page are at most so large together, at least 1."""
        nothing = Page(await current_snapshot(connection), [])
        for _, member, start in self._from(after):
            page = await _of(member, nothing, member.page, connection, start, 1, where)
            if page.rows or page.last is not None:
                return await _of(member, limit, member.fitting, connection, start, limit, most_bytes, where)
        return limit

    async def fitting_keys(self, connection: Connection, keys: Sequence[Key], most_bytes: int) -> int:
        """Return how many of these keys, from the first on, have rows of at most so many bytes together."""
        fitting = len(keys)
        for name, mine in self._by_table(keys).items():
            member = self._members[name]
            fits = await _of(member, len(mine), member.fitting_keys, connection, mine, most_bytes)
            if fits < len(mine):
                fitting = min(fitting, keys.index(mine[fits]))
        return max(1, fitting) if keys else 0

    async def by_keys(self, connection: Connection, keys: Sequence[Key]) -> Page:
        """Return the rows that exist now with these keys, in no order."""
        snapshot = await current_snapshot(connection)
        rows: list[Row] = []
        unread: dict[Key, Unread] = {}
        for name, mine in self._by_table(keys).items():
            member = self._members[name]
            page = await _of(member, Page(snapshot, []), member.by_keys, connection, mine)
            rows += page.rows
            unread |= page.unread
        return Page(snapshot, rows, unread=unread)

    async def absent(self, connection: Connection, keys: Sequence[Key]) -> tuple[Snapshot, list[Key]]:
        """Return those of `keys` that the source does not write just so for any row now."""
        snapshot = await current_snapshot(connection)
        by_table = self._by_table(keys)
        gone = [key for key in keys if key[0] not in self._members]
        for name, mine in by_table.items():
            member = self._members[name]
            gone += (await _of(member, (snapshot, mine), member.absent, connection, mine))[1]
        missing = set(gone)
        return snapshot, [key for key in keys if key in missing]

    def _by_table(self, keys: Sequence[Key]) -> dict[str, list[Key]]:
        found: dict[str, list[Key]] = {}
        for key in keys:
            if key[0] in self._members:
                found.setdefault(key[0], []).append(key)
        return found

    async def estimate(self, connection: Connection) -> int:
        """Return the planner's idea of how many rows the tables have."""
        return sum([await _of(one, 0, one.estimate, connection) for one in self._members.values()])

    async def count(self, connection: Connection, where: str | None = None) -> int | None:
        """Return how many rows there are to read; None if a condition fails for one of them."""
        none: int | None = 0
        counts = [await _of(one, none, one.count, connection, where) for one in self._members.values()]
        return None if None in counts else sum(filter(None, counts))

    async def expected(self, connection: Connection, where: str | None = None) -> int:
        """Return the planner's idea of how many rows there are to read."""
        return sum([await _of(one, 0, one.expected, connection, where) for one in self._members.values()])


async def _of(
    member: SourceTable, otherwise: T, read: Callable[..., Awaitable[T]], connection: Connection, *arguments: object
) -> T:
    return await unless_dropped(member.shape.table, otherwise, read, connection, *arguments)


async def unless_dropped(
    table: QualifiedName, otherwise: T, read: Callable[..., Awaitable[T]], connection: Connection, *arguments: object
) -> T:
    """Return what is read of one of many tables, or `otherwise` if that table was dropped.

    :param read: takes the connection and the arguments.
    :raises psycopg.Error: it fails in another way: a function that a condition calls may miss a table of its own.
    """
    try:
        return await read(connection, *arguments)
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        if not await fetch_value(connection, "SELECT to_regclass(%s) IS NOT NULL", [str(table)]):
            return otherwise
    # Another table may just have got its name.
    return await read(connection, *arguments)
