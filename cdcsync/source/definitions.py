"""What the source looks up to decode a change: whether that changed while the slot was created.

A slot decodes each transaction by the catalogs as they were then. Its creation waits until all transactions have ended
that were open when it began, and takes no note of those that begin and commit meanwhile. What they did to the catalogs
is then missing from the catalogs by which it decodes until they next change: a row of a new table, or with a new label
of an enum, cannot be decoded at all, and a row of an altered table is sent under the names that its columns had before,
without an error.

Source: PostgreSQL, src/backend/replication/logical/snapbuild.c (SNAPBUILD_BUILDING_SNAPSHOT) and decode.c
(xact_decode, heap2_decode: nothing is processed below SNAPBUILD_FULL_SNAPSHOT).
"""

from __future__ import annotations

from typing import LiteralString, cast

from cdcsync.model.visibility import XID_SPAN
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection

LOOKED_UP: tuple[LiteralString, ...] = (
    "pg_class AS c WHERE relkind IN ('r', 'p', 'm', 't', 'c') AND relpersistence <> 't'",
    "pg_attribute AS c JOIN pg_class AS r ON r.oid = attrelid"
    " WHERE relkind IN ('r', 'p', 'c') AND relpersistence <> 't'",
    "pg_index AS c JOIN pg_class AS r ON r.oid = indrelid"
    " WHERE (indisprimary OR indisreplident) AND relpersistence <> 't'",
    "pg_type AS c WHERE typtype <> 'c' AND (typtype, typcategory) <> ('b', 'A')",
    "pg_enum AS c WHERE true",
    "pg_namespace AS c WHERE nspname !~ '^pg_(toast_)?temp_'",
    "pg_publication AS c WHERE true",
    "pg_publication_rel AS c WHERE true",
)
"""Tables and their columns, the keys that identify rows, types, names, and what is published, in every version; but
for temporary tables, whose changes are not decoded."""

SCHEMAS: LiteralString = "pg_publication_namespace AS c WHERE true"
"""The same of publications of schemas, which PostgreSQL 15 has and later versions."""


async def definitions_changed_since(connection: Connection, transaction: int) -> bool:
    """Say whether transactions from this one on have changed, in this database, what decoding looks up.

    A row that was frozen long ago keeps its id, whose age is negative once two billion more have been used. What was
    dropped leaves no trace, and does no harm: the catalogs of before still have it.

    Source: PostgreSQL, "System Columns" (xmin); `age(xid)`.
    """
    catalogs = LOOKED_UP if connection.info.server_version < 150000 else (*LOOKED_UP, SCHEMAS)
    changed: LiteralString = " UNION ALL ".join(
        "SELECT FROM " + one + " AND age(c.xmin) BETWEEN 0 AND age(%(since)s::text::xid)" for one in catalogs
    )
    found = await fetch_value(connection, "SELECT EXISTS (" + changed + ")", {"since": transaction % XID_SPAN})
    return cast(bool, found)
