"""One read of the source: rows, with the snapshot that they were read under.

Each is one short REPEATABLE READ transaction that writes nothing: no lock beyond ACCESS SHARE, no snapshot that
outlives it.

Source: PostgreSQL, "Transaction Isolation"; "System Information Functions" (pg_current_snapshot).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import LiteralString

import anyio
import msgspec
from psycopg import sql

from cdcsync.model.rows import Key, Row, Unread
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.queries import Statement, fetch_texts
from cdcsync.postgres.sessions import Connection


class Page(msgspec.Struct, frozen=True):
    """Rows in key order, and the snapshot they were read under; of several, the oldest.

    :ivar more: whether more rows follow, although there are fewer than were asked for.
    :ivar unread: the rows that the server fails to read.
    :ivar last: the key that the next page begins after, if that is not the last row's.
    """

    snapshot: Snapshot
    rows: list[Row]
    more: bool = False
    unread: dict[Key, Unread] = {}
    last: Key | None = None


async def read_rows(
    connection: Connection, statement: Statement, arguments: Sequence[object], tables: Sequence[str]
) -> Page:
    """Return the rows of a statement, every value as text.

    :param tables: the tables that it reads, which must not have been rewritten after the snapshot.
    """
    while (page := await _read_once(connection, statement, arguments, tables)) is None:
        pass
    return page


async def _read_once(
    connection: Connection, statement: Statement, arguments: Sequence[object], tables: Sequence[str]
) -> Page | None:
    """Read under one snapshot; returns None when the table was made or rewritten after it and so looked empty.

    To lock the table before would do as well, but needs more than the right to read some of its columns.
    """
    try:
        # Sent together, as the last two: a live change may wait for this, and each way there and back takes its time.
        begun = await connection.execute(_BEGIN)
        begun.nextset()
        (snapshot,) = await begun.fetchone() or ("",)
        # Never prepared: a plan that is kept fails once a column has another type.
        rows = await fetch_texts(connection, statement, arguments, prepare=False)
        page = Page(Snapshot.parse(snapshot), rows)
        ended = await connection.execute(sql.SQL(_REWRITTEN + "; COMMIT").format(tables=sql.Literal(list(tables))))
        rewritten = await ended.fetchone()
    except BaseException:
        if not connection.closed:
            with anyio.CancelScope(shield=True):
                await connection.rollback()
        raise
    return page if rewritten == (False,) else None


@contextlib.asynccontextmanager
async def reading(connection: Connection) -> AsyncIterator[None]:
    """Open a transaction in which no condition that someone wrote can write."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION READ ONLY")
        yield


_BEGIN: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SELECT pg_current_snapshot()::text"

_REWRITTEN: LiteralString = """
    SELECT EXISTS (
        SELECT FROM unnest({tables}::text[]::regclass[]) AS read (oid) CROSS JOIN LATERAL
            (SELECT read.oid UNION SELECT relid FROM pg_partition_tree(read.oid)) AS now (oid)
        LEFT JOIN pg_class AS c ON c.oid = now.oid
        WHERE c.relfilenode IS DISTINCT FROM coalesce(pg_relation_filenode(now.oid), 0))
"""
"""Compares the files of tables and their partitions: as they are, which functions tell, with what the snapshot sees."""
