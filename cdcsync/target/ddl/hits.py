"""A hit: the composite type `SCHEMA.INDEX_hit` whose rows an index's search function returns.

A column can be added to it while other objects use the function.

Source: PostgreSQL, "CREATE TYPE", "ALTER TYPE".
"""

from __future__ import annotations

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection

OWN = {
    "chunk_no": "integer",
    "content": "text",
    "score": "double precision",
    "distance": "double precision",
    "vector_rank": "integer",
    "text_rank": "integer",
    "text_score": "double precision",
    "headline": "text",
    "stale": "boolean",
}
"""The attributes of a hit after key and carried columns, and their types, in order."""


def attribute_of(column: str) -> str:
    """Return what a hit calls a key or carried column: its name, unless a hit has an attribute of that name itself."""
    return f"carried_{column}" if column in OWN else column


async def attributes(connection: Connection, schema: str, spec: IndexSpec) -> dict[str, str]:
    """Return the attributes of an index's hits and their types, in order; none while there is no such type."""
    cursor = await connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod)"
        " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'c' AND a.attnum > 0"
        " AND NOT a.attisdropped ORDER BY a.attnum",
        [schema, f"{spec.searched_as}_hit"],
    )
    return dict(await cursor.fetchall())


def wanted_attributes(spec: IndexSpec) -> dict[str, str]:
    """Return the attributes that an index's hits should have, and their types, in order."""
    columns = zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True)
    return {attribute_of(column): type_ for column, type_ in columns} | OWN
