"""The record of calls of the tool server: one row a call, kept for a set time.

It says who called what, when, with what outcome, and how long it took. Of a query it holds the hash, and the text
only if the configuration asks for that; of a filter the names of its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, LiteralString

import msgspec
import psycopg
from psycopg import sql

from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.texts import storable
from cdcsync.process.crashpoints import crash_point

TABLE = "calls"

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.calls (
        at timestamptz NOT NULL DEFAULT now(),
        subject text NOT NULL,
        tenant text,
        tool text NOT NULL,
        index_name text,
        outcome text NOT NULL,
        hits int,
        query_hash text,
        query text,
        filters text[],
        ms real NOT NULL,
        trace_id text
    )
    """,
    "COMMENT ON TABLE {schema}.calls IS 'cdcsync: calls of the tool server (cdcsync serve); cdcsync audit reads them.'",
    # It has no key, and where a publication sends all tables, rows without an identity cannot be deleted.
    """
    DO $body$ BEGIN
        IF (SELECT relreplident <> 'f' FROM pg_class WHERE oid = to_regclass(format('%I.calls', {literal}))) THEN
            ALTER TABLE {schema}.calls REPLICA IDENTITY FULL;
        END IF;
    END $body$
    """,
    "CREATE INDEX IF NOT EXISTS calls_at ON {schema}.calls USING brin (at)",
)


class Call(msgspec.Struct, frozen=True):
    """One call.

    :ivar ms: how long it took, in milliseconds.
    """

    at: datetime
    subject: str
    tenant: str | None
    tool: str
    index_name: str | None
    outcome: str
    hits: int | None
    query_hash: str | None
    query: str | None
    filters: list[str]
    ms: float
    trace_id: str | None


_COLUMNS = Call.__struct_fields__


def storable_call(call: Call) -> Call:
    """Return a call whose texts PostgreSQL can hold, in a database whose encoding has their characters."""
    return _with_texts(call, storable)


def ascii_call(call: Call) -> Call:
    """Return a call with escapes for all characters but those that every encoding of PostgreSQL has."""
    return _with_texts(call, lambda text: text.encode("ascii", "backslashreplace").decode())


def _with_texts(call: Call, change: Callable[[str], str]) -> Call:
    """Return a call with all of its texts changed."""
    changed: dict[str, Any] = {}
    for name, value in zip(_COLUMNS, msgspec.structs.astuple(call), strict=True):
        if isinstance(value, str):
            changed[name] = change(value)
        elif isinstance(value, list):
            changed[name] = [change(one) for one in value]
    return msgspec.structs.replace(call, **changed)


async def record_calls(connection: Connection, schema: str, calls: Sequence[Call]) -> None:
    """Store calls; commits by itself."""
    async with connection.transaction():
        statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
            sql.Identifier(schema, TABLE), sql.SQL(", ").join(map(sql.Identifier, _COLUMNS))
        )
        async with connection.cursor() as cursor, cursor.copy(statement) as copy:
            for call in calls:
                await copy.write_row(msgspec.structs.astuple(call))
        crash_point("calls written")
    crash_point("calls committed")


async def forget_calls(connection: Connection, schema: str, days: int) -> None:
    """Delete calls that are older than so many days."""
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE at < now() - %s").format(sql.Identifier(schema, TABLE)), [timedelta(days=days)]
    )
    crash_point("old calls deleted")


Order = Literal["latest", "slowest"]


async def read_calls(
    connection: Connection,
    schema: str,
    *,
    subject: str | None,
    tool: str | None,
    since: timedelta,
    empty: bool,
    order: Order,
    limit: int,
) -> list[Call]:
    """Return calls, the latest or the slowest first.

    :param empty: only searches that found nothing.
    """
    statement = sql.SQL(
        "SELECT {columns} FROM {table} WHERE at > now() - %(since)s"
        " AND (%(subject)s::text IS NULL OR subject = %(subject)s)"
        " AND (%(tool)s::text IS NULL OR tool = %(tool)s) AND (NOT %(empty)s OR hits = 0)"
        " ORDER BY {order} DESC LIMIT %(limit)s"
    ).format(
        columns=sql.SQL(", ").join(map(sql.Identifier, _COLUMNS)),
        table=sql.Identifier(schema, TABLE),
        order=sql.Identifier("ms" if order == "slowest" else "at"),
    )
    wanted = {"since": since, "subject": subject, "tool": tool, "empty": empty, "limit": limit}
    try:
        cursor = await connection.execute(statement, wanted)
    except psycopg.errors.UndefinedTable:
        return []
    return [Call(*row) for row in await cursor.fetchall()]


async def read_questions(connection: Connection, schema: str, index: str, limit: int) -> list[tuple[str, str]]:
    """Return the hashes and texts of an index's questions, those first that were asked most often."""
    statement = sql.SQL(
        "SELECT query_hash, min(query) FROM {} WHERE index_name = %s AND tool = 'search'"
        " AND outcome = 'ok' AND query ~ '\\S' GROUP BY query_hash ORDER BY count(*) DESC, query_hash LIMIT %s"
    ).format(sql.Identifier(schema, TABLE))
    try:
        cursor = await connection.execute(statement, [index, limit])
    except psycopg.errors.UndefinedTable:
        return []
    return await cursor.fetchall()
