"""An index's view as it is, and what becomes of it when the configuration calls it by another name.

Source: PostgreSQL, "ALTER VIEW"; "System Catalogs" (pg_depend, pg_rewrite).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection


class View(msgspec.Struct, frozen=True):
    """An index's view.

    :ivar columns: its columns in their order, with their types as SQL writes them.
    :ivar stored: those of the chunks table's columns that it reads.
    :ivar reads_vectors: whether it reads the vectors that it should.
    :ivar built_on: whether other objects depend on it.
    """

    columns: dict[str, str]
    stored: frozenset[str]
    reads_vectors: bool
    built_on: bool

    def shows(self, columns: Sequence[str], stored: Sequence[str]) -> bool:
        """Say whether it shows these columns, as far as what is built on it allows.

        :param stored: those of them that are of the chunks table.
        """
        if not self.reads_vectors:
            return False
        if not self.built_on:
            return list(self.columns) == list(columns)
        left_out = self.columns.keys() - set(columns)
        return self.columns.keys() >= set(columns) and self.stored >= set(stored) and not left_out & self.stored


async def read_view(
    connection: Connection, view: QualifiedName, chunks: sql.Identifier, vectors: sql.Identifier
) -> View | None:
    """Return a view; None if there is none."""
    row = await fetch_row(
        connection,
        """
        SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               array(SELECT format_type(atttypid, atttypmod) FROM pg_attribute
                     WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
               array(SELECT DISTINCT a.attname::text FROM pg_depend d
                     JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
                     JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                     WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%s)),
               EXISTS (SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
                       WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%s)),
               EXISTS (SELECT FROM pg_depend d LEFT JOIN pg_rewrite r
                           ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
                       WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid AND d.deptype = 'n'
                           AND r.ev_class IS DISTINCT FROM c.oid)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
        """,
        [chunks.as_string(connection), vectors.as_string(connection), view.schema, view.name],
    )
    if row is None:
        return None
    names, types, stored, reads_vectors, built_on = row
    return View(dict(zip(names, types, strict=True)), frozenset(stored), reads_vectors, built_on)


async def follow_name(connection: Connection, chunks: sql.Identifier, marker: str, view: QualifiedName) -> None:
    """Give an index's view its new name; who may use it still may, and what is built on it stays.

    Where the new view exists already, the old one is dropped.

    :param chunks: the index's chunks table, which its views read.
    :param marker: how the comment of its views begins.
    """
    cursor = await connection.execute(
        """
        SELECT c.oid::int8, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind = 'v' AND starts_with(obj_description(c.oid, 'pg_class'), %s) AND EXISTS (
            SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid AND r.ev_class = c.oid
            WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = to_regclass(%s))
        ORDER BY c.oid
        """,
        [marker, chunks.as_string(connection)],
    )
    found = [(oid, QualifiedName(schema, name)) for oid, schema, name in await cursor.fetchall()]
    there = any(name == view for _, name in found)
    for oid, name in found:
        if name == view:
            continue
        old = sql.Identifier(name.schema, name.name)
        if there:
            await connection.execute(sql.SQL("DROP VIEW {}").format(old))
            continue
        # By a name that nobody has: the old one may be taken in the new schema, and the new one in the old.
        passing = f"cdcsync_view_{oid}"
        for statement, where, new in (
            ("ALTER VIEW {} RENAME TO {}", old, passing),
            ("ALTER VIEW {} SET SCHEMA {}", sql.Identifier(name.schema, passing), view.schema),
            ("ALTER VIEW {} RENAME TO {}", sql.Identifier(view.schema, passing), view.name),
        ):
            await connection.execute(sql.SQL(statement).format(where, sql.Identifier(new)))
        there = True
