"""Row-level security on the chunks of an index: what the tool server's role sees is held to its caller's tenant.

The server adds a filter to every search. The policy holds the same a second time, in the database, so that a mistake
there leaks nothing. Other roles see what they saw; the worker owns the table, and policies do not concern an owner.

Source: PostgreSQL, "Row Security Policies".
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.config.serving import Serve
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names

SETTING = "cdcsync.tenant"
"""The setting that names the tenant of a session."""

POLICY = "cdcsync_tenant"


async def put_policy(connection: Connection, schema: str, spec: IndexSpec, serve: Serve) -> None:
    """Create, replace or remove the policy, as the configuration says. The caller's transaction commits."""
    chunks = Names(schema, spec.relations).chunks
    cursor = await connection.execute(
        "SELECT c.relrowsecurity, obj_description(p.oid, 'pg_policy') FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_policy p ON p.polrelid = c.oid AND p.polname = %s WHERE n.nspname = %s AND c.relname = %s",
        [POLICY, schema, f"{spec.relations}_chunks"],
    )
    row = await cursor.fetchone()
    enabled, described = row if row is not None else (False, None)
    bound = serve.tenant.column
    if bound is None or serve.role is None or bound not in spec.shape.key + spec.shape.carried:
        if described is not None:
            await connection.execute(sql.SQL("DROP POLICY {} ON {}").format(sql.Identifier(POLICY), chunks))
            await connection.execute(sql.SQL("ALTER TABLE {} DISABLE ROW LEVEL SECURITY").format(chunks))
        return
    wanted = f"cdcsync: {serve.role} sees the rows whose {bound} is the setting {SETTING}"
    if enabled and described == wanted:
        return
    await connection.execute(sql.SQL("DROP POLICY IF EXISTS {} ON {}").format(sql.Identifier(POLICY), chunks))
    await connection.execute(
        sql.SQL(
            "CREATE POLICY {policy} ON {chunks} USING (current_user OPERATOR(pg_catalog.<>) {role}"
            " OR {column}::pg_catalog.text OPERATOR(pg_catalog.=) pg_catalog.current_setting({setting}, true))"
        ).format(
            policy=sql.Identifier(POLICY),
            chunks=chunks,
            role=sql.Literal(serve.role),
            column=sql.Identifier(bound),
            setting=sql.Literal(SETTING),
        )
    )
    await connection.execute(
        sql.SQL("COMMENT ON POLICY {} ON {} IS {}").format(sql.Identifier(POLICY), chunks, sql.Literal(wanted))
    )
    await connection.execute(sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(chunks))
