"""The version of our tables in a schema of the target, in the table `schema_version`.

`run` brings older tables to `VERSION` in one transaction, and refuses newer ones, as every command does that may write
to them (`open_target`) or that tells how an index does: whoever does not know a table or a column would write as if it
were not there. Raise `VERSION` with every change of the tables after which an earlier cdcsync must not write to them,
or would read them wrongly; a column that it may ignore needs no new version. Searches only read, and go on.

    1   before there was a version: one table of vectors for each index
    2   vectors in two tiers; what an index is made of and was configured by; approvals; tables that are not named
        after their index
"""

from __future__ import annotations

from typing import LiteralString

import msgspec
from psycopg import sql

from cdcsync import __version__
from cdcsync.config import Target
from cdcsync.errors import SetupError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection, connect

VERSION = 2

TABLE = "schema_version"

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.schema_version (
        single boolean PRIMARY KEY DEFAULT true CHECK (single),
        version int NOT NULL,
        cdcsync text NOT NULL,
        written_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "COMMENT ON TABLE {schema}.schema_version IS"
    " 'cdcsync: the version of these tables. A worker that knows only earlier ones refuses to start.'",
    "COMMENT ON COLUMN {schema}.schema_version.cdcsync IS 'The cdcsync that brought them to it.'",
)


class Stored(msgspec.Struct, frozen=True):
    """The version of a schema's tables, and which cdcsync wrote it; None if that stored no version."""

    version: int
    cdcsync: str | None = None


async def read_version(connection: Connection, schema: str) -> Stored | None:
    """Return the version of our tables; None if there are none."""
    table = sql.Identifier(schema, TABLE)
    row = await fetch_one(
        connection,
        "SELECT to_regclass(%s) IS NOT NULL, to_regclass(%s) IS NOT NULL",
        [table.as_string(connection), sql.Identifier(schema, "pipelines").as_string(connection)],
    )
    versioned, present = row
    if versioned:
        stored = await fetch_row(connection, sql.SQL("SELECT version, cdcsync FROM {}").format(table))
        if stored is not None:
            return Stored(*stored)
    return Stored(1) if present else None


def refusal(schema: str, stored: Stored | None) -> SetupError | None:
    """Return why this cdcsync must not write to tables of this version; None if it may."""
    if stored is None or stored.version <= VERSION:
        return None
    return SetupError(
        f"the tables of schema {schema} are of version {stored.version}, made by cdcsync {stored.cdcsync};"
        f" this is cdcsync {__version__}, which knows version {VERSION}",
        where="target.schema",
        hint=f"run cdcsync {stored.cdcsync} or later, or name another schema",
    )


async def open_target(target: Target, *, application_name: str, works: bool = False) -> Connection:
    """Open a session for a command that may change what our tables hold. The caller closes it.

    :param works: see `connect`.
    :raises SetupError: they are of a newer version than this cdcsync knows; or as `connect`.
    :raises TargetUnavailable: the target does not answer now.
    """
    connection = await connect(target.dsn, "target", application_name=application_name, works=works)
    try:
        with speaking_of("target"):
            await _require_known(connection, target.schema)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


async def require_ours(connection: Connection, schema: str) -> None:
    """Check that our tables, if there are any, are of the one version that a command reads rightly.

    :raises SetupError: they are of another.
    """
    stored = await _require_known(connection, schema)
    if stored is not None and stored.version < VERSION:
        raise SetupError(
            f"the tables of schema {schema} are of version {stored.version}; this is cdcsync {__version__}, which reads"
            f" version {VERSION}",
            where="target.schema",
            hint="start `cdcsync run` of this version, which upgrades them",
        )


async def _require_known(connection: Connection, schema: str) -> Stored | None:
    """Return the version of our tables; None if there are none, or if this role may not see it.

    :raises SetupError: it is newer than ours.
    """
    table = sql.Identifier(schema, TABLE).as_string(connection)
    hidden = await fetch_row(connection, "SELECT WHERE NOT has_table_privilege(to_regclass(%s), 'SELECT')", [table])
    stored = None if hidden is not None else await read_version(connection, schema)
    if (newer := refusal(schema, stored)) is not None:
        raise newer
    return stored


async def write_version(connection: Connection, schema: str) -> None:
    """Store that the tables are of our version. The caller's transaction commits both."""
    await connection.execute(
        sql.SQL(
            "INSERT INTO {} AS v (version, cdcsync) VALUES (%s, %s) ON CONFLICT (single) DO UPDATE SET"
            " (version, cdcsync, written_at) = (excluded.version, excluded.cdcsync, now())"
            " WHERE v.version <> excluded.version"
        ).format(sql.Identifier(schema, TABLE)),
        [VERSION, __version__],
    )
