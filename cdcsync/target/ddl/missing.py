"""Relations that an index should have in the target and lacks: somebody dropped them, or they became invalid."""

from __future__ import annotations

import msgspec
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names


class Missing(msgspec.Struct, frozen=True):
    """The missing relations of an index.

    :ivar tables: those that hold its contents: the source has to be read again.
    :ivar built: what searches need, and can be built of what is there.
    """

    tables: tuple[str, ...] = ()
    built: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"missing in the target: {', '.join((*self.tables, *self.built))}"

    def __bool__(self) -> bool:
        return bool(self.tables or self.built)


async def missing_relations(connection: Connection, schema: str, spec: IndexSpec) -> Missing:
    """Return what is missing of an index that is loaded."""
    names, view = Names(schema, spec.name), spec.config.view_name
    tables = [f"{spec.name}_chunks", f"{spec.name}_backlog", f"{spec.name}_vectors_{spec.generation}"]
    built = [names.hnsw_name(spec.generation), names.near_name(spec.generation)]
    built += [] if spec.config.search is None else [names.search_name]
    row = await fetch_one(
        connection,
        sql.SQL(
            """
            SELECT ARRAY(
                SELECT wanted FROM unnest(%(tables)s::text[]) AS wanted WHERE NOT EXISTS (
                    SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = wanted)),
            ARRAY(
                SELECT wanted FROM unnest(%(built)s::text[]) AS wanted WHERE NOT EXISTS (
                    SELECT FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
                    WHERE c.relnamespace = n.oid AND c.relname = wanted AND i.indisvalid)),
            EXISTS (SELECT FROM pg_class c JOIN pg_namespace v ON v.oid = c.relnamespace
                    WHERE v.nspname = %(schema)s AND c.relname = %(view)s)
            FROM (SELECT (SELECT oid FROM pg_namespace WHERE nspname = %(ours)s) AS oid) AS n
            """
        ),
        {"tables": tables, "built": built, "schema": view.schema, "view": view.name, "ours": schema},
    )
    absent, unbuilt, viewed = row
    return Missing(tuple(absent), (*unbuilt, *(() if viewed else (str(view),))))
