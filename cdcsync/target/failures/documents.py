"""Rows that no document could be made of: a table that all indexes share says which they are, and why.

Apply writes it in its own transaction, so it is as true as the chunks are: a row is listed from the commit that leaves
it out of the index to the one that takes its document in, or takes note that the row is gone.

1. While an index has none, nothing is asked of the server. Whether it has any is what the table last said; only the
   holder of the pipeline's lock adds some, so the answer can be wrong in one direction alone, which costs a look.
2. An index lists `MOST` rows, none with a key of more than `KEY_BYTES`. Of those that find no room only their number is
   kept, under an empty key, until a reading of the whole table has gone by without one.
3. A key is the text that the source writes. One that is written differently is another key in the stream too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TypeGuard, cast

import msgspec
from psycopg import sql

from cdcsync.lsn import Lsn
from cdcsync.model.changeset import ChangeSet, FailedDocument
from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection

TABLE = "failed_documents"

MOST = 10_000
"""Rows that an index lists, in a megabyte or two: a template or function that fails for every row of a large table is
not to make a second copy of its keys."""

KEY_BYTES = 2_000
"""Longer keys are not listed: as text they would not go into the table's index, whose rows are at most some 2,700."""

ERROR_CHARACTERS = 500
"""Stored errors are cut to this."""

NO_ROOM = "more rows failed than are listed: attempts says how often one found no room"


class Listed(msgspec.Struct, frozen=True):
    """How many failed documents are listed, and how often one found no room since the list was last whole."""

    documents: int = 0
    unlisted: int = 0

    @property
    def at_least(self) -> int:
        """How many rows are left out at least: of those that found no room, nobody knows how many there still are."""
        return self.documents + (self.unlisted > 0)


class FailedDocuments:
    """Keeps the list of one index, over the connection that applies."""

    def __init__(self, connection: Connection, schema: str, index: str, width: int) -> None:
        """Make what keeps a list.

        :param width: how many columns the key has.
        """
        self._connection = connection
        self._index = index
        self._width = width
        self._any = True
        columns = [sql.Identifier(f"k{at}") for at in range(width)]
        self._parts: dict[str, sql.Composable] = {
            "table": sql.Identifier(schema, TABLE),
            "index": sql.Literal(index),
            "columns": sql.SQL(", ").join(columns),
            "arrays": sql.SQL(", ").join([sql.SQL("%s::text[]")] * width),
            "most": sql.Literal(MOST),
            "no_room": sql.Literal(NO_ROOM),
        }

    async def apply(self, changes: ChangeSet) -> None:
        """Bring the list to what a batch leaves, inside the caller's transaction; the caller commits."""
        if self._any:
            if changes.truncated:
                self._any = await self._empty()
            if changes.cleared:
                await self._connection.execute(
                    self._sql("DELETE FROM {table} WHERE index_name = {index} AND key[1] = ANY(%s)"),
                    [list(changes.cleared)],
                )
            if not changes.truncated and (settled := list(_settled(changes))):
                self._any = await self._remove(settled)
        if changes.failed:
            self._any = True
            await self._add(changes.failed)

    async def _empty(self) -> bool:
        """Remove all, and say whether there were any."""
        cursor = await self._connection.execute(self._sql("DELETE FROM {table} WHERE index_name = {index}"))
        return cursor.rowcount > 0

    async def _remove(self, keys: Sequence[Key]) -> bool:
        """Remove these keys, and say whether there were any at all."""
        row = await fetch_one(
            self._connection,
            self._sql(
                "WITH gone AS (DELETE FROM {table} AS f USING unnest({arrays}) AS s({columns})"
                " WHERE f.index_name = {index} AND f.key = ARRAY[{columns}])"
                # Of before the deletion: an answer that holds if all of this is rolled back.
                " SELECT EXISTS (SELECT FROM {table} WHERE index_name = {index})"
            ),
            [list(column) for column in zip(*keys, strict=True)],
        )
        return cast(bool, row[0])

    async def _add(self, failed: Sequence[FailedDocument]) -> None:
        """List these rows; one that is delivered once more has not failed once more."""
        short = [one for one in failed if listable(one.key)]
        row = await fetch_one(
            self._connection,
            self._sql(
                "WITH failed AS (SELECT ARRAY[{columns}] AS key, error, commit_lsn"
                " FROM unnest({arrays}, %s::text[], %s::pg_lsn[]) AS s({columns}, error, commit_lsn)),"
                " again AS (UPDATE {table} AS f SET error = s.error, commit_lsn = s.commit_lsn, failed_at = now(),"
                " attempts = f.attempts + (f.commit_lsn <> s.commit_lsn)::int"
                " FROM failed AS s WHERE f.index_name = {index} AND f.key = s.key RETURNING f.key),"
                " put AS (INSERT INTO {table} (index_name, key, error, commit_lsn)"
                " SELECT {index}, s.key, s.error, s.commit_lsn FROM failed AS s"
                " WHERE NOT EXISTS (SELECT FROM again AS a WHERE a.key = s.key)"
                " LIMIT greatest(0, {most} - (SELECT count(*) FROM {table}"
                " WHERE index_name = {index} AND key <> '{{}}')) RETURNING key)"
                " SELECT (SELECT count(*) FROM again) + (SELECT count(*) FROM put)"
            ),
            [
                *([one.key[at] for one in short] for at in range(self._width)),
                [one.error[:ERROR_CHARACTERS] for one in short],
                [str(Lsn(one.commit_lsn)) for one in short],
            ],
        )
        if unlisted := len(failed) - cast(int, row[0]):
            await self._connection.execute(
                self._sql(
                    "INSERT INTO {table} AS f (index_name, key, error, commit_lsn, attempts)"
                    " VALUES ({index}, '{{}}', {no_room}, %s, %s)"
                    " ON CONFLICT (index_name, key) DO UPDATE SET attempts = f.attempts + excluded.attempts,"
                    " commit_lsn = excluded.commit_lsn, failed_at = now()"
                ),
                [str(Lsn(max(one.commit_lsn for one in failed))), unlisted],
            )

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts)


def listable(key: tuple[str | None, ...]) -> TypeGuard[Key]:
    """Say whether a key names a row, and is short enough to be listed."""
    parts = [part.encode() for part in key if part is not None]
    return len(parts) == len(key) and sum(map(len, parts)) <= KEY_BYTES


def _settled(changes: ChangeSet) -> Iterator[Key]:
    """Yield the keys of a batch that are gone, or whose document could be made."""
    failed = {one.key for one in changes.failed}
    yield from changes.deleted
    yield from changes.absent
    yield from (kept.key for kept in changes.kept)
    yield from (document.key for document in changes.documents if document.key not in failed)


async def close_list(connection: Connection, schema: str, index: str, began: datetime | None) -> None:
    """Note that a request has read the whole table: if every failure since `began` found room, the list is whole again.

    The caller commits.
    """
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE index_name = %s AND key = '{{}}' AND failed_at < %s").format(
            sql.Identifier(schema, TABLE)
        ),
        [index, began],
    )


async def forget_failed(connection: Connection, schema: str, index: str) -> int:
    """Empty the list of an index and return how many rows it had; the caller commits.

    What a worker is just writing stays, rather than that the two wait for each other.
    """
    table = sql.Identifier(schema, TABLE)
    row = await fetch_one(
        connection,
        sql.SQL(
            "WITH gone AS (DELETE FROM {} WHERE index_name = %s AND key IN"
            " (SELECT key FROM {} WHERE index_name = %s FOR UPDATE SKIP LOCKED) RETURNING key)"
            " SELECT count(*) FROM gone WHERE key <> '{{}}'"
        ).format(table, table),
        [index, index],
    )
    return cast(int, row[0])


async def failed_among(connection: Connection, schema: str, index: str, keys: Sequence[Key]) -> set[Key]:
    """Return those keys that the index lists."""
    if not keys or not await has_list(connection, schema):
        return set()
    wanted = set(keys)
    cursor = await connection.execute(
        sql.SQL("SELECT key FROM {} WHERE index_name = %s").format(sql.Identifier(schema, TABLE)), [index]
    )
    return {key for row in await cursor.fetchall() if (key := tuple(cast(list[str], row[0]))) in wanted}


async def unlisted_among(connection: Connection, schema: str, index: str, keys: Sequence[Key]) -> list[Key]:
    """Return those keys of failed documents that the index does not list, although it has room for them."""
    listed = await failed_among(connection, schema, index, keys)
    left = [key for key in keys if key not in listed]
    if left and (await count_failed(connection, schema)).get(index, Listed()).unlisted:
        return []
    return left


async def count_failed(connection: Connection, schema: str) -> dict[str, Listed]:
    """Return what each index of a schema lists, those that list nothing left out."""
    cursor = await connection.execute(
        sql.SQL(
            "SELECT index_name, count(*) FILTER (WHERE key <> '{{}}'),"
            " coalesce(sum(attempts) FILTER (WHERE key = '{{}}'), 0)::int8 FROM {} GROUP BY index_name"
        ).format(sql.Identifier(schema, TABLE))
    )
    return {index: Listed(*counts) for index, *counts in await cursor.fetchall()}


async def has_list(connection: Connection, schema: str) -> bool:
    """Say whether the table is there: the worker makes it, and a command may be newer than the worker."""
    name = sql.Identifier(schema, TABLE).as_string(connection)
    cursor = await connection.execute("SELECT to_regclass(%s) IS NOT NULL", [name])
    return await cursor.fetchone() == (True,)
