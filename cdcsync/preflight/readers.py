"""Readers of an index who see rows that row-level security is to hide from them.

A view of an index reads with its owner's privileges unless it has the option security_invoker, and row-level security
does not concern the owner of a table. So policies on the chunks hold for the search function and for who reads the
tables, and not for who reads the views. And row-level security of the source's tables does not come along with their
rows.

A role that sees every row anyway is not told of: the owner of the table, a superuser, a role with BYPASSRLS, and one
that a policy shows every row (`USING (true)`). `serve/exposure` looks at the role of the tool server.

Source: PostgreSQL, "Row Security Policies", "CREATE VIEW" (security_invoker), "CREATE POLICY", "Privileges".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import LiteralString

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.postgres.queries import fetch_rows
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.source.relations import Table
from cdcsync.target.ddl.grants import guarded
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.policies import POLICY
from cdcsync.target.entries import Entry

INVOKER_VERSION = 150000
"""PostgreSQL 15: the option security_invoker of views."""

_CHAPTER = 'docs/security.md, "Readers of an index", has more'


def _concerns(policy: LiteralString, role: LiteralString) -> LiteralString:
    """Return SQL that says whether a policy concerns what a role, 0 for everybody, selects."""
    return f"""({policy}.polcmd IN ('r', '*') AND EXISTS (
        SELECT FROM unnest({policy}.polroles) AS whom (oid)
        WHERE whom.oid = 0 OR {role} <> 0 AND pg_has_role({role}, whom.oid, 'USAGE')))"""


def _sees_all(table: LiteralString, role: LiteralString) -> LiteralString:
    """Return SQL that says whether a role, 0 for everybody, sees every row of a relation of pg_class.

    A condition that names a column is not asked for: the server would take a lock on the table to write its name, and
    wait for whoever changes the table.
    """
    return f"""(
        {role} <> 0 AND pg_has_role({role}, {table}.relowner, 'USAGE') AND NOT {table}.relforcerowsecurity
        OR EXISTS (SELECT FROM pg_policy AS o WHERE o.polrelid = {table}.oid AND o.polpermissive
                   AND CASE WHEN o.polqual::text LIKE '{{CONST %%' THEN pg_get_expr(o.polqual, 0) = 'true' END
                   AND {_concerns("o", role)})
        AND NOT EXISTS (SELECT FROM pg_policy AS n WHERE n.polrelid = {table}.oid AND NOT n.polpermissive
                        AND n.polname <> '{POLICY}' AND {_concerns("n", role)}))"""


_READERS: LiteralString = f"""
    WITH ours AS (
        SELECT c.oid, c.relkind = 'v' AS view, c.relnamespace, c.relowner, c.relacl,
               format('%%I.%%I', n.nspname, c.relname) AS name,
               c.relkind = 'v' AND starts_with(d.description, %(index)s) AS of_vectors,
               EXISTS (SELECT FROM pg_options_to_table(c.reloptions) AS o
                       WHERE o.option_name = 'security_invoker' AND o.option_value::bool) AS invoker
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        LEFT JOIN pg_description AS d ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid AND d.objsubid = 0
        WHERE c.relkind = 'v' AND (starts_with(d.description, %(index)s) OR starts_with(d.description, %(of_chunks)s))
            OR c.oid = to_regclass(%(chunks)s)
    ), granted AS (
        SELECT DISTINCT ours.oid, a.grantee FROM ours CROSS JOIN LATERAL (
            SELECT ours.relacl AS acl
            UNION ALL SELECT attacl FROM pg_attribute WHERE attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
        ) AS one CROSS JOIN aclexplode(one.acl) AS a
        WHERE a.privilege_type = 'SELECT' AND a.grantee <> ours.relowner
            AND has_schema_privilege(a.grantee, ours.relnamespace, 'USAGE')
    )
    SELECT ours.name, ours.view, ours.of_vectors, ours.invoker, r.rolname::text,
           coalesce(r.rolbypassrls, false) OR {_sees_all("c", "granted.grantee")},
           NOT coalesce(r.rolbypassrls, false) AND EXISTS (
               SELECT FROM unnest(%(schemas)s::text[], %(tables)s::text[], %(oids)s::int8[])
                   AS wanted (schema_name, name, oid)
               LEFT JOIN (pg_class AS t JOIN pg_namespace AS h ON h.oid = t.relnamespace)
                   ON t.oid = wanted.oid AND t.relname = wanted.name AND h.nspname = wanted.schema_name
               WHERE t.oid IS NULL OR NOT {_sees_all("t", "granted.grantee")}),
           has_table_privilege(granted.grantee, c.oid, 'SELECT') AND (
               NOT ours.of_vectors OR has_table_privilege(granted.grantee, to_regclass(%(vectors)s), 'SELECT'))
    FROM granted JOIN ours USING (oid) JOIN pg_class AS c ON c.oid = to_regclass(%(chunks)s)
    LEFT JOIN pg_roles AS r ON r.oid = granted.grantee
    WHERE granted.grantee = 0 OR r.oid IS NOT NULL AND NOT r.rolsuper
    ORDER BY 1, 5
"""


class _Reader(msgspec.Struct, frozen=True):
    """A role that was granted SELECT on a view of an index, or on its chunks.

    :ivar relation: which, as SQL writes it.
    :ivar of_vectors: whether it is the view of vectors.
    :ivar invoker: whether it is a view that reads with its caller's privileges.
    :ivar role: None is PUBLIC.
    :ivar sees_all: whether the role sees every row of the chunks, whatever their row-level security.
    :ivar held: whether row-level security of a source's table holds the role, as far as the target can tell: in another
        database, a role of the same name may be somebody else.
    :ivar reads_tables: whether the role may read the tables that the view reads.
    """

    relation: str
    view: bool
    of_vectors: bool
    invoker: bool
    role: str | None
    sees_all: bool
    held: bool
    reads_tables: bool


async def reader_findings(
    connection: Connection, schema: str, stored: Entry, secured: Sequence[Table], serve_role: str | None
) -> list[Finding]:
    """Say who reads rows of an index that row-level security, of its chunks or of its source's tables, is to hide.

    :param schema: that of our own tables.
    :param secured: the source's tables that have row-level security.
    :param serve_role: the role of the tool server.
    """
    names = Names(schema, stored.relations)
    chunks = str(QualifiedName(schema, names.chunks_name))
    vectors = str(QualifiedName(schema, f"{stored.relations}_vectors_{stored.generation}"))
    rows = await fetch_rows(
        connection,
        _READERS,
        {
            "index": f"cdcsync index {stored.name}: ",
            "of_chunks": f"cdcsync chunks of index {stored.name}: ",
            "chunks": chunks,
            "vectors": vectors,
            # By their names in the catalog: our role of the target may lack the privilege to look into their schemas.
            "schemas": [one.name.schema for one in secured],
            "tables": [one.name.name for one in secured],
            "oids": [one.oid for one in secured],
        },
    )
    readers = [_Reader(*row) for row in rows]
    by_views = [one for one in readers if one.view and not one.invoker]
    version = connection.info.server_version
    where = f"indexes.{stored.name}.view"
    if await guarded(connection, names.chunks):
        past = [one for one in by_views if not one.sees_all]
        message = (
            f"{_roles(past)} may read {_relations(past)} past the row-level security of {chunks}: a view reads with the"
            " privileges of its owner, so it shows every row"
        )
        hint = _revoked(past) if version < INVOKER_VERSION else _invoking(by_views, chunks, vectors)
        return [Finding.warning(where, message, f"{hint}; {_CHAPTER}")] if past else []
    serving = [one for one in readers if one.role is not None and one.role == serve_role and not one.view]
    open_to = [one for one in readers if one.held and one not in serving and (one in by_views or not one.view)]
    if not open_to:
        return []
    message = (
        f"the source holds readers of {named(str(one.name) for one in secured)} to row-level security, and nothing in"
        f" the target does: {_roles(open_to)} may read every row in {_relations(open_to)}"
    )
    hint = (
        f"CREATE POLICY readers ON {chunks} FOR SELECT TO {_roles(open_to)} USING (…), with the condition by which they"
        " see rows, or true if they may see every row"
    )
    if serve_role is not None:
        hint += f"; CREATE POLICY serving ON {chunks} FOR SELECT TO {quote(serve_role)} USING (true)"
    hint += f"; ALTER TABLE {chunks} ENABLE ROW LEVEL SECURITY"
    if held := [one for one in by_views if one.held]:
        hint += f"; {_revoked(held) if version < INVOKER_VERSION else _invoking(by_views, chunks, vectors)}"
    return [Finding.warning(where, message, f"{hint}; {_CHAPTER}")]


def _invoking(readers: Sequence[_Reader], chunks: str, vectors: str) -> str:
    """Return the statements by which views read with the privileges of their readers, who all go on reading them."""
    statements = [f"ALTER VIEW {view} SET (security_invoker = true)" for view in _views(readers)]
    if lacking := [one for one in readers if not one.reads_tables]:
        tables = f"{chunks}, {vectors}" if any(one.of_vectors for one in lacking) else chunks
        statements.append(f"GRANT SELECT ON {tables} TO {_roles(lacking)}")
    return "; ".join(statements)


def _revoked(readers: Sequence[_Reader]) -> str:
    """Return the statements that take views from readers, where no view can read with its reader's privileges."""
    statements = [
        f"REVOKE SELECT ON {view} FROM {_roles([one for one in readers if one.relation == view])}"
        for view in _views(readers)
    ]
    instead = "the search function reads with its caller's privileges, as a view can from PostgreSQL 15 on"
    return "; ".join([*statements, instead])


def _views(readers: Collection[_Reader]) -> list[str]:
    return list(dict.fromkeys(one.relation for one in readers))


def _roles(readers: Collection[_Reader]) -> str:
    return ", ".join(dict.fromkeys("PUBLIC" if one.role is None else quote(one.role) for one in readers))


def _relations(readers: Collection[_Reader]) -> str:
    return named(_views(readers))
