"""The keys that an index holds, a page at a time, in the target's own order."""

from __future__ import annotations

from typing import cast

import psycopg
from psycopg import sql

from cdcsync.changes import Key
from cdcsync.index.comparisons import comparisons, follows
from cdcsync.index.schema import IndexSpec, Names
from cdcsync.postgres import Connection


async def page_of_keys(
    connection: Connection, schema: str, spec: IndexSpec, after: Key | None, limit: int
) -> list[Key]:
    """Return up to `limit` keys of documents, above `after`, as the target renders them.

    The order is the target's and means nothing to the source: two servers may sort text differently.
    """
    columns = [sql.Identifier(name) for name in spec.shape.key]
    listed = sql.SQL(", ").join(columns)
    values = [sql.SQL(f"${at}::text::{type_}") for at, type_ in enumerate(spec.key_types, start=1)]
    above = sql.SQL(" AND {}").format(follows(columns, values, await comparisons(connection, spec.key_types)))
    # A raw cursor: a column's name may hold a % that is no placeholder.
    cursor = psycopg.AsyncRawCursor(connection)
    await cursor.execute(
        sql.SQL("SELECT {} FROM {} WHERE chunk_no = 0{} ORDER BY {} LIMIT {}").format(
            listed,
            Names(schema, spec.name).chunks,
            sql.SQL("") if after is None else above,
            listed,
            sql.Literal(limit),
        ),
        list(after or ()),
    )
    result = cursor.pgresult
    assert result is not None
    return [
        tuple(cast(bytes, result.get_value(row, column)).decode() for column in range(result.nfields))
        for row in range(result.ntuples)
    ]
