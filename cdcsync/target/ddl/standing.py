"""Statements that are left out where they would change nothing.

CREATE INDEX IF NOT EXISTS and COMMENT lock their table before they look. An autovacuum is in their way, which may take
hours, and they would end it for nothing at each start. The caller's transaction commits.

Source: PostgreSQL, "Explicit Locking"; "Comment Information Functions" (obj_description); "Sequence Manipulation
Functions"; "Restrictions" (of logical replication).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection


async def create_index(connection: Connection, schema: str, name: str, definition: sql.Composable) -> None:
    """Create an index unless it is there.

    :param name: of the index, which is in the schema of its table.
    :param definition: the table, and what is indexed of it, as they follow after ON.
    """
    index = sql.Identifier(schema, name).as_string(connection)
    if await fetch_value(connection, "SELECT to_regclass(%s) IS NULL", [index]):
        await connection.execute(sql.SQL("CREATE INDEX {} ON {}").format(sql.Identifier(name), definition))


async def describe_table(connection: Connection, table: sql.Identifier, comment: str) -> None:
    """Give a table its comment unless it has it."""
    present = await fetch_value(
        connection, "SELECT obj_description(to_regclass(%s), 'pg_class')", [table.as_string(connection)]
    )
    if present != comment:
        await connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, sql.Literal(comment)))


async def describe_column(connection: Connection, table: sql.Identifier, column: str, comment: str) -> bool:
    """Give a column its comment unless it has it; returns whether it had another, or none."""
    present = await fetch_value(
        connection,
        "SELECT col_description(attrelid, attnum) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s",
        [table.as_string(connection), column],
    )
    if present == comment:
        return False
    statement = sql.SQL("COMMENT ON COLUMN {}.{} IS {}")
    await connection.execute(statement.format(table, sql.Identifier(column), sql.Literal(comment)))
    return True


async def continue_numbers(connection: Connection, table: sql.Identifier, column: str) -> None:
    """Let an identity column continue after the highest number that its table has.

    Logical replication copies rows and not sequences, so in a target that was moved that way the numbers would begin
    anew, and each new row would be refused.
    """
    await connection.execute(
        sql.SQL(
            "SELECT setval(s.name::regclass, k.highest) FROM pg_get_serial_sequence({}, {}) AS s (name),"
            " LATERAL (SELECT max({}) FROM {}) AS k (highest)"
            " WHERE k.highest > coalesce(pg_sequence_last_value(s.name::regclass), 0)"
        ).format(sql.Literal(table.as_string(connection)), sql.Literal(column), sql.Identifier(column), table)
    )
