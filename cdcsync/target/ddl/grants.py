"""What an operator has set on a relation, kept when another relation takes its place: grants, and options of views.

Source: PostgreSQL, "Privileges" (aclexplode), "CREATE VIEW".
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from psycopg import sql

from cdcsync.postgres.sessions import Connection


async def grants_of(connection: Connection, oid: int, successor: sql.Identifier) -> list[sql.Composed]:
    """Return the statements that grant on `successor` what roles other than the owner may do with a relation.

    What they may do with some of its columns is among it.
    """
    cursor = await connection.execute(
        "SELECT a.privilege_type, t.attname, r.rolname, a.is_grantable FROM pg_class c CROSS JOIN LATERAL ("
        " SELECT NULL::name AS attname, c.relacl AS acl"
        " UNION ALL SELECT attname, attacl FROM pg_attribute"
        " WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS t CROSS JOIN aclexplode(t.acl) AS a"
        " LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE c.oid = %s AND a.grantee <> c.relowner",
        [oid],
    )
    return [
        sql.SQL("GRANT " + privilege + "{} ON {} TO {}" + (" WITH GRANT OPTION" if grantable else "")).format(
            sql.SQL("") if column is None else sql.SQL(" ({})").format(sql.Identifier(column)),
            successor,
            sql.SQL("PUBLIC") if role is None else sql.Identifier(role),
        )
        for privilege, column, role, grantable in await cursor.fetchall()
    ]


async def view_settings(connection: Connection, oid: int, view: sql.Identifier) -> list[sql.Composed]:
    """Return the statements that give a view its options and grants again: one that replaces it has no options."""
    cursor = await connection.execute(
        "SELECT o.option_name, o.option_value FROM pg_class c CROSS JOIN pg_options_to_table(c.reloptions) AS o"
        " WHERE c.oid = %s",
        [oid],
    )
    options = [
        sql.SQL("ALTER VIEW {} SET ({} = {})").format(view, sql.Identifier(name), sql.Literal(value))
        for name, value in await cursor.fetchall()
    ]
    return [*options, *await grants_of(connection, oid, view)]


async def replace_view(
    connection: Connection, view: sql.Identifier, statement: sql.Composed, settings: Sequence[sql.Composed]
) -> None:
    """Run a view's CREATE OR REPLACE in the caller's transaction, and give it its options and grants again.

    :param settings: what `view_settings` returned of the view before.
    """
    try:
        async with connection.transaction():
            await connection.execute(statement)
    except psycopg.errors.InvalidTableDefinition:
        # To replace a view keeps its grants, but cannot change the columns it has.
        await connection.execute(sql.SQL("DROP VIEW {}").format(view))
        await connection.execute(statement)
    await set_again(connection, settings)


async def set_again(connection: Connection, statements: Sequence[sql.Composed]) -> None:
    """Run what `grants_of` or `view_settings` returned, in the transaction that replaced the relation.

    Grants on a column that is no longer there are left out.
    """
    for statement in statements:
        try:
            async with connection.transaction():
                await connection.execute(statement)
        except psycopg.errors.UndefinedColumn:
            continue
