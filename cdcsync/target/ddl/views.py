"""What became of an index's view when the configuration calls it by another name.

Source: PostgreSQL, "ALTER VIEW"; "System Catalogs" (pg_depend, pg_rewrite).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.postgres.sessions import Connection


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
