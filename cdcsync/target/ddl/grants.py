"""The grants on a relation, kept when another relation takes its place.

Source: PostgreSQL, "Privileges" (aclexplode).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.postgres.sessions import Connection


async def grants_of(connection: Connection, oid: int, successor: sql.Identifier) -> list[sql.Composed]:
    """Return the statements that grant on `successor` what roles other than the owner may do with a relation."""
    cursor = await connection.execute(
        "SELECT a.privilege_type, r.rolname, a.is_grantable FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a"
        " LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE c.oid = %s AND a.grantee <> c.relowner",
        [oid],
    )
    return [
        sql.SQL("GRANT " + privilege + " ON {} TO {}" + (" WITH GRANT OPTION" if grantable else "")).format(
            successor, sql.SQL("PUBLIC") if role is None else sql.Identifier(role)
        )
        for privilege, role, grantable in await cursor.fetchall()
    ]
