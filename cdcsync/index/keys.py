"""The keys that an index holds, a page at a time, in the target's own order."""

from __future__ import annotations

from typing import cast

from psycopg import sql

from cdcsync.changes import Key
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
    above = sql.SQL(" AND ({}) > ({})").format(
        listed, sql.SQL(", ").join(sql.SQL("%s::text::" + type_) for type_ in spec.key_types)
    )
    cursor = await connection.execute(
        sql.SQL("SELECT {} FROM {} WHERE chunk_no = 0{} ORDER BY {} LIMIT {}").format(
            listed,
            Names(schema, spec.name).chunks,
            sql.SQL("") if after is None else above,
            listed,
            sql.Literal(limit),
        ),
        list(after or ()) or None,
    )
    result = cursor.pgresult
    assert result is not None
    return [
        tuple(cast(bytes, result.get_value(row, column)).decode() for column in range(result.nfields))
        for row in range(result.ntuples)
    ]
