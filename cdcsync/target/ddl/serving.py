"""The privileges of the tool server's role: it reads what searches and fetches need, and writes the record of calls.

`config/roles.sql` grants the same on what is there. A worker that knows the role grants it on what is created later,
and a table that succeeds another has the grants of that (`grants`, `generations`).

Source: PostgreSQL, "Privileges".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString

from psycopg import sql

from cdcsync.config.names import quote
from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row, fetch_rows
from cdcsync.postgres.sessions import Connection
from cdcsync.target import calls, entries, generations
from cdcsync.target.ddl.grants import opens
from cdcsync.target.ddl.names import Names, function_name, words_name

SHARED = (entries.TABLE, "pipelines", generations.TABLE)
"""The tables of all indexes that the server reads."""

READ = f"^({'|'.join(SHARED)}|.+_(chunks|words|vectors_[0-9]+(_fresh|_settled)?))$"
"""The names of all tables that it reads, as a regular expression of PostgreSQL."""

FUNCTIONS = ("wait_for", "standing")
"""The functions of all indexes that it calls."""

_Privilege = tuple[LiteralString, LiteralString]
"""How to ask whether a role has a privilege, and how to grant it."""

_SCHEMA: _Privilege = ("has_schema_privilege({}, to_regnamespace({}), 'USAGE')", "USAGE ON SCHEMA")
_TABLE: _Privilege = ("has_table_privilege({}, to_regclass({}), 'SELECT')", "SELECT ON")
_CALLS: _Privilege = (
    "has_table_privilege({0}, to_regclass({1}), 'INSERT') AND has_table_privilege({0}, to_regclass({1}), 'DELETE')"
    " AND has_column_privilege({0}, to_regclass({1}), 'at', 'SELECT')",
    "INSERT, DELETE, SELECT (at) ON",
)
_FUNCTION: _Privilege = (
    "has_function_privilege({}, to_regproc({}), 'EXECUTE')",
    "EXECUTE ON FUNCTION",
)


async def grant_serving(connection: Connection, schema: str, spec: IndexSpec, role: str | None, *, new: bool) -> None:
    """Grant the server's role what it lacks of an index, if there is such a role and it may read the chunks.

    The caller's transaction commits.

    :param new: the index is, so nobody has granted its chunks or taken them away.
    """
    chunks = Names(schema, spec.relations).chunks
    may = sql.SQL("SELECT has_table_privilege(oid, to_regclass({}), 'SELECT') FROM pg_roles WHERE rolname = {}")
    reads = await fetch_row(connection, may.format(sql.Literal(chunks.as_string(connection)), sql.Literal(role)))
    if reads is None or not (new or reads[0]):
        return
    opened = await _opened(connection, schema, spec)
    needs = [one for one in _needs(schema, spec, await schemas_named(connection, schema, spec)) if one[1] not in opened]
    asked = [
        sql.SQL(check).format(sql.Literal(role), sql.Literal(on.as_string(connection))) for (check, _), on in needs
    ]
    held = await fetch_row(connection, sql.SQL("SELECT {}").format(sql.SQL(", ").join(asked)))
    lacking = [(grant, on) for ((_, grant), on), has in zip(needs, held or (), strict=True) if has is False]
    if lacking:  # two sessions that grant on one table at the same time are in each other's way
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdcsync grants ' || %s, 0))", [schema])
    for grant, on in lacking:
        await connection.execute(sql.SQL("GRANT " + grant + " {} TO {}").format(on, sql.Identifier(str(role))))


async def schemas_named(connection: Connection, schema: str, spec: IndexSpec) -> list[str]:
    """Return the schemas, besides our own, that searches of an index name: pgvector's, and those of columns' types.

    A filter names the type of its column; a column of a domain is compared as what that is made of.
    """
    names = Names(schema, spec.relations)
    tables = [names.chunks, *(names.vectors(one.generation) for one in spec.generations)]
    rows = await fetch_rows(
        connection,
        "SELECT DISTINCT n.nspname::text FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid"
        " JOIN pg_type t ON t.oid IN (d.oid, d.typbasetype) JOIN pg_namespace n ON n.oid = t.typnamespace"
        " WHERE a.attrelid = ANY(SELECT to_regclass(name) FROM unnest(%s::text[]) AS name) AND a.attnum > 0"
        " AND NOT a.attisdropped AND n.nspname <> 'pg_catalog' ORDER BY 1",
        [[table.as_string(connection) for table in tables]],
    )
    return [name for (name,) in rows]


async def require_schemas(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """See that the session's role may use the schemas that searches of an index name.

    :raises SetupError: it may not; the hint is the GRANT.
    """
    named = await schemas_named(connection, schema, spec)
    rows = await fetch_rows(
        connection,
        "SELECT name, current_user::text FROM unnest(%s::text[]) AS name WHERE NOT has_schema_privilege(name, 'USAGE')",
        [named],
    )
    if rows:
        lacking = ", ".join(quote(name) for name, _ in rows)
        raise SetupError(
            f"searches name types in {lacking}, which this role may not use",
            where=f"index {spec.name}",
            hint=f"GRANT USAGE ON SCHEMA {lacking} TO {quote(rows[0][1])}",
        )


async def _opened(connection: Connection, schema: str, spec: IndexSpec) -> list[sql.Identifier]:
    """Return the vectors that would open to the role what an operator guards in those that are searched."""
    names = Names(schema, spec.relations)
    return [
        new
        for one in spec.others
        for old, new in zip(names.all_vectors(spec.generation), names.all_vectors(one.generation), strict=True)
        if await opens(connection, new, old=old)
    ]


def _needs(schema: str, spec: IndexSpec, named: Sequence[str]) -> list[tuple[_Privilege, sql.Identifier]]:
    names = Names(schema, spec.relations)
    tables = [*(sql.Identifier(schema, one) for one in SHARED), names.chunks]
    for one in spec.generations:
        tables += names.all_vectors(one.generation)
    if spec.config.search is not None:
        tables.append(words_name(schema, spec.relations))
    functions = [*(sql.Identifier(schema, one) for one in FUNCTIONS), function_name(schema, spec.name)]
    return [
        *((_SCHEMA, sql.Identifier(one)) for one in (schema, *named)),
        *((_TABLE, one) for one in tables),
        (_CALLS, sql.Identifier(schema, calls.TABLE)),
        *((_FUNCTION, one) for one in functions),
    ]
