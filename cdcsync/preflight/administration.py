"""The SQL with which an administrator prepares one database for a worker: what is missing, and nothing else.

`cdcsync config roles` is the same as a script with every case: several tables, two databases, a role that searches.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.config.names import quote
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import REPLICATION_ROLES, Server, read_server
from cdcsync.source.relations import Table

GENERATED_VERSION = 180000
"""PostgreSQL 18: a publication can send stored generated columns."""

_RESETS = {
    "database": "ALTER DATABASE {database} RESET",
    "user": "ALTER ROLE {role} RESET",
    "database user": "ALTER ROLE {role} IN DATABASE {database} RESET",
}
"""How a setting is taken back, by where it comes from, as pg_settings has it."""


def allow_writes(server: Server) -> str:
    """Return the fix for transactions that are read-only by default.

    The fix itself has to begin its transaction as READ WRITE: ALTER DATABASE and ALTER ROLE are writes.
    """
    if server.read_only_by == "client":
        return "take default_transaction_read_only out of the DSN's options and of PGOPTIONS"
    if (reset := _RESETS.get(server.read_only_by or "")) is None:
        return "ALTER SYSTEM SET default_transaction_read_only = off; then SELECT pg_reload_conf()"
    of = reset.format(database=quote(server.database), role=quote(server.role))
    return f"BEGIN READ WRITE; {of} default_transaction_read_only; COMMIT"


class Prepared(msgspec.Struct, frozen=True):
    """The objects that exist already for a worker of this role."""

    version: int
    database: str
    wal_level: str
    managed: str | None
    role_exists: bool
    role_replicates: bool
    reads: bool
    uses_schema: bool
    creates_views: bool
    has_vector: bool
    has_schema: bool
    uses_own_schema: bool
    published: bool
    sends_table: bool


async def read_prepared(
    connection: Connection, table: Table, role: str, *, publication: str, schema: str, view_schema: str
) -> Prepared:
    """Read what an administrator need not do any more."""
    server = await read_server(connection)
    row = await fetch_one(
        connection,
        """
        SELECT (SELECT rolname FROM pg_roles WHERE rolname = ANY(%(managed)s)), r.oid IS NOT NULL,
               coalesce(r.rolsuper OR r.rolreplication
                   OR EXISTS (SELECT FROM pg_roles m WHERE m.rolname = ANY(%(managed)s)
                              AND pg_has_role(r.oid, m.oid, 'USAGE')), false),
               coalesce(has_table_privilege(r.oid, %(table)s::int8::oid, 'SELECT'), false),
               coalesce(has_schema_privilege(r.oid, %(table_schema)s, 'USAGE'), false),
               coalesce((SELECT has_schema_privilege(r.oid, v.oid, 'USAGE')
                                AND has_schema_privilege(r.oid, v.oid, 'CREATE')
                         FROM pg_namespace v WHERE v.nspname = %(view_schema)s), false),
               EXISTS (SELECT FROM pg_extension WHERE extname = 'vector'),
               EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s),
               coalesce((SELECT has_schema_privilege(r.oid, o.oid, 'USAGE')
                                AND has_schema_privilege(r.oid, o.oid, 'CREATE')
                         FROM pg_namespace o WHERE o.nspname = %(schema)s), false),
               EXISTS (SELECT FROM pg_publication WHERE pubname = %(publication)s),
               EXISTS (SELECT FROM pg_publication p WHERE p.pubname = %(publication)s AND (p.puballtables
                       OR EXISTS (SELECT FROM pg_publication_rel m
                                  WHERE m.prpubid = p.oid AND m.prrelid = %(table)s::int8::oid)))
        FROM (VALUES (1)) AS one LEFT JOIN pg_roles r ON r.rolname = %(role)s
        """,
        {
            "managed": list(REPLICATION_ROLES),
            "role": role,
            "table": table.oid,
            "table_schema": table.name.schema,
            "schema": schema,
            "view_schema": view_schema,
            "publication": publication,
        },
    )
    return Prepared(server.version, server.database, server.wal_level, *row)


def statements(
    found: Prepared, table: QualifiedName, role: str, *, publication: str, schema: str, view_schema: str
) -> Iterator[str]:
    """Yield the statements that are left to run, each with a comment where it needs one."""
    worker = quote(role)
    if found.wal_level != "logical":
        yield "ALTER SYSTEM SET wal_level = logical;      -- then restart the server; managed services have a parameter"
    if not found.has_vector:
        yield "CREATE EXTENSION vector;"
    if not found.role_exists:
        yield f"CREATE ROLE {worker} LOGIN;                -- in psql, \\password {worker} sets its password"
    if not found.role_replicates:
        grant = f"GRANT {found.managed} TO {worker};" if found.managed else f"ALTER ROLE {worker} REPLICATION;"
        yield grant
    if not found.uses_schema:
        yield f"GRANT USAGE ON SCHEMA {quote(table.schema)} TO {worker};"
    if not found.reads:
        yield f"GRANT SELECT ON TABLE {table} TO {worker};"
    if not found.published:
        generated = ", publish_generated_columns = stored" if found.version >= GENERATED_VERSION else ""
        yield (
            f"CREATE PUBLICATION {quote(publication)} FOR TABLE {table}"
            f" WITH (publish_via_partition_root = true{generated});"
        )
    elif not found.sends_table:
        yield f"ALTER PUBLICATION {quote(publication)} ADD TABLE {table};"
    if not found.has_schema:
        yield f"CREATE SCHEMA {quote(schema)} AUTHORIZATION {worker};      -- for chunks, vectors and the checkpoint"
    elif not found.uses_own_schema:
        yield f"GRANT USAGE, CREATE ON SCHEMA {quote(schema)} TO {worker};"
    if not found.creates_views:
        yield f"GRANT USAGE, CREATE ON SCHEMA {quote(view_schema)} TO {worker};      -- for the view that is searched"
