"""Row-level security on the chunks of an index: what the tool server's role sees is held to its caller's tenant.

The server adds a filter to every search. The policy holds the same a second time, in the database, so that a mistake
there leaks nothing. It compares as a filter does, by the column's own type, so both find the same rows. Other roles see
what they saw; the worker owns the table, and policies do not concern an owner.

Source: PostgreSQL, "Row Security Policies".
"""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from cdcsync.config.serving import Serve
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.filters import Column, read_columns
from cdcsync.target.ddl.names import Names

SETTING = "cdcsync.tenant"
"""The setting that names the tenant of a session."""

POLICY: LiteralString = "cdcsync_tenant"

_TEXTS = ("pg_catalog.text", "pg_catalog.varchar", "pg_catalog.bpchar")
"""Types of which any text is a value. A session without a tenant has none of a value of another type."""

GUARDED: LiteralString = f"""(
    c.relrowsecurity AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = '{POLICY}'
        AND p.polpermissive)
    OR EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname <> '{POLICY}'))"""
"""Whether the relation `c` of a statement has row-level security of an operator's own.

Without it our policy is permissive, so that other roles pass. Beside it a permissive one would let them pass theirs, so
ours is restrictive there, and nothing that they are not shown by the operator's policies is shown to anyone.
"""


async def put_policy(connection: Connection, schema: str, spec: IndexSpec, serve: Serve) -> None:
    """Create, replace or remove the policy, as the configuration says. The caller's transaction commits."""
    chunks = Names(schema, spec.relations).chunks
    bound = serve.tenant.column
    if bound is None or serve.role is None or bound not in spec.shape.key + spec.shape.carried:
        await release_policy(connection, schema, spec)
        return
    column = (await read_columns(connection, spec))[bound]
    if await has_policy(connection, schema, spec, serve, column):
        return
    _, guarded, _ = await _read_policy(connection, schema, spec)
    await connection.execute(sql.SQL("DROP POLICY IF EXISTS {} ON {}").format(sql.Identifier(POLICY), chunks))
    await connection.execute(
        sql.SQL(
            "CREATE POLICY {policy} ON {chunks} AS {kind} USING (current_user OPERATOR(pg_catalog.<>) {role} OR {mine})"
        ).format(
            policy=sql.Identifier(POLICY),
            chunks=chunks,
            kind=sql.SQL("RESTRICTIVE" if guarded else "PERMISSIVE"),
            role=sql.Literal(serve.role),
            mine=column.equals(bound, _setting(column.type)),
        )
    )
    await connection.execute(
        sql.SQL("COMMENT ON POLICY {} ON {} IS {}").format(
            sql.Identifier(POLICY), chunks, sql.Literal(_wanted(serve, column))
        )
    )
    await connection.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(chunks))


async def has_policy(connection: Connection, schema: str, spec: IndexSpec, serve: Serve, column: Column) -> bool:
    """Say whether the policy is there, as the configuration and an operator's own policies want it.

    :param column: the bound one.
    """
    enabled, guarded, present = await _read_policy(connection, schema, spec)
    return enabled and present == (_wanted(serve, column), not guarded)


def _wanted(serve: Serve, column: Column) -> str:
    """Return the comment on the policy, which tells what it is made for."""
    return f"cdcsync: {serve.role} sees the rows whose {serve.tenant.column} is the setting {SETTING}, as {column.type}"


def _setting(type_: str) -> sql.Composed:
    """Return the text of the session's tenant: after a transaction that had one, the setting is there and empty."""
    setting = sql.SQL("pg_catalog.current_setting({}, true)").format(sql.Literal(SETTING))
    return setting if type_ in _TEXTS else sql.SQL("NULLIF({}, '')").format(setting)


async def release_policy(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Remove the policy, and row-level security if nobody else had any. The caller's transaction commits."""
    chunks = Names(schema, spec.relations).chunks
    _, guarded, present = await _read_policy(connection, schema, spec)
    if present is None:
        return
    await connection.execute(sql.SQL("DROP POLICY {} ON {}").format(sql.Identifier(POLICY), chunks))
    if not guarded:
        await connection.execute(sql.SQL("ALTER TABLE {} DISABLE ROW LEVEL SECURITY").format(chunks))


async def _read_policy(
    connection: Connection, schema: str, spec: IndexSpec
) -> tuple[bool, bool, tuple[str | None, bool] | None]:
    """Return whether all roles are under row-level security, if an operator has any, and our policy.

    Of the policy its comment, and whether it is permissive.
    """
    row = await fetch_row(
        connection,
        sql.SQL(
            "SELECT c.relrowsecurity AND coalesce(o.polroles = '{{0}}', true), "
            + GUARDED
            + ", o.oid IS NOT NULL, obj_description(o.oid, 'pg_policy'),"
            " o.polpermissive FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " LEFT JOIN pg_policy o ON o.polrelid = c.oid AND o.polname = {policy}"
            " WHERE n.nspname = {schema} AND c.relname = {table}"
        ).format(policy=sql.Literal(POLICY), schema=sql.Literal(schema), table=sql.Literal(f"{spec.relations}_chunks")),
    )
    if row is None:
        return False, False, None
    enabled, guarded, present, comment, permissive = row
    return enabled, guarded, (comment, permissive) if present else None
