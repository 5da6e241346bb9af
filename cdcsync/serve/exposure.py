"""The ways on which the server's role can read rows of tenants that it is not held to, past row-level security.

The policy on an index's chunks holds the role to its caller's tenant. A view reads with its owner's privileges, a
materialized view has them from its owner, a function with SECURITY DEFINER runs as its owner, and another role that
this one may become is not held at all. So what the role may read besides what serving needs is told, and so is
everything made of it, however many views lie between.

Source: PostgreSQL, "Row Security Policies", "CREATE VIEW" (security_invoker), "CREATE FUNCTION" (SECURITY DEFINER),
"System Catalogs" (pg_depend, pg_rewrite).
"""

from __future__ import annotations

from typing import LiteralString

from cdcsync.config.serving import Serve
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target import calls
from cdcsync.target.ddl.filters import Column
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.policies import has_policy
from cdcsync.target.ddl.serving import FUNCTIONS, READ

UNHELD = (
    "set serve.role, have serve.dsn log in as that role, not as the owner of the tables, start the worker with this"
    " [serve] too, and take from the role what `past` lists: config/roles.sql with -v serve_role=… grants what it needs"
    " and no more of our tables; REVOKE takes a view, a function or another role from it"
)
"""The fix if the server's sessions are not held to their callers' tenants."""

_PAST: LiteralString = """
    WITH RECURSIVE private AS (
        SELECT c.oid, c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace(%(schema)s)
            AND c.relkind IN ('r', 'p', 'f') AND c.relname !~ %(read)s
    ), built (oid, base) AS (
        SELECT oid, NULL::oid FROM private UNION SELECT to_regclass(%(chunks)s), NULL
        UNION
        SELECT r.ev_class, b.oid FROM built b
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
            AND d.refobjid = b.oid
        JOIN pg_rewrite r ON r.oid = d.objid
        WHERE r.ev_class <> b.oid
    ), relations AS (
        SELECT c.oid, c.relkind, c.relnamespace, c.relkind = 'v' AND EXISTS (
            SELECT FROM pg_options_to_table(c.reloptions) AS o
            WHERE o.option_name = 'security_invoker' AND o.option_value::bool) AS invoker
        FROM pg_class c WHERE c.oid IN (SELECT oid FROM built)
    ), readable AS (
        SELECT DISTINCT v.oid FROM built b JOIN relations v USING (oid) JOIN relations i ON i.oid = b.base
        -- A view that reads with its caller's privileges does so within others, too; not within a materialized one.
        WHERE (v.relkind = 'm' OR v.relkind = 'v' AND NOT v.invoker AND NOT i.invoker)
            AND has_schema_privilege(v.relnamespace, 'USAGE') AND has_any_column_privilege(v.oid, 'SELECT')
        UNION
        SELECT p.oid FROM private p JOIN pg_attribute a ON a.attrelid = p.oid
        WHERE a.attnum > 0 AND NOT a.attisdropped AND (p.relname, a.attname) <> (%(calls)s, 'at')
            AND has_column_privilege(p.oid, a.attnum, 'SELECT')
    )
    SELECT CASE WHEN c.relkind IN ('v', 'm') THEN 'view ' ELSE 'table ' END || c.oid::regclass
    FROM readable JOIN pg_class c USING (oid)
    UNION ALL
    SELECT 'function ' || p.oid::regprocedure FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE p.prosecdef AND p.proowner <> current_user::regrole
        AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
        AND NOT (n.nspname = %(schema_name)s AND p.proname = ANY (%(functions)s))
        AND NOT EXISTS (SELECT FROM pg_depend e
                        WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid AND e.deptype = 'e')
        AND has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')
        AND EXISTS (SELECT FROM built b WHERE has_any_column_privilege(p.proowner, b.oid, 'SELECT'))
    UNION ALL
    SELECT 'role ' || r.oid::regrole FROM pg_roles r
    WHERE r.rolname <> current_user AND pg_has_role(r.oid, 'MEMBER')
        AND EXISTS (SELECT FROM built b WHERE has_any_column_privilege(r.oid, b.oid, 'SELECT'))
    ORDER BY 1
"""
"""Names what leads a session past the policy on an index's chunks, or to the tables that tell of all tenants.

A function of SQL or another language is not looked into: its owner may read these tables, so it may. Those of
extensions are left out, as the administrator who installed them made them anyone's."""


async def exposure(connection: Connection, schema: str, spec: IndexSpec, serve: Serve, column: Column) -> list[str]:
    """Return what leads the server's sessions past their callers' tenant; nothing if the database holds them to it.

    :param column: the bound one.
    """
    names = Names(schema, spec.relations)
    chunks = names.chunks.as_string(connection)
    statement: LiteralString = "SELECT current_user = %s AND row_security_active(to_regclass(%s))"
    if not await fetch_value(connection, statement, [serve.role, chunks]):
        return [f"row-level security on {chunks} does not apply to the role that serve.dsn logs in as"]
    past = [] if await has_policy(connection, schema, spec, serve, column) else [f"the policies on {chunks}"]
    asked = {
        "schema": names.schema.as_string(connection),
        "schema_name": schema,
        "chunks": chunks,
        "read": READ,
        "calls": calls.TABLE,
        "functions": list(FUNCTIONS),
    }
    return [*past, *(one for (one,) in await fetch_rows(connection, _PAST, asked))]
