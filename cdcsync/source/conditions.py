"""Conditions that somebody wrote, tried on the source: that each is one expression, reads one row, and writes nothing.

`try_condition` is for every condition. One that is asked once, for a replay, need not be more than that. One that says
which rows an index has is asked again and again, and must have the same answer for the same row each time. What shows
that, beyond the trial, is `examine_condition`:

1. The plan of the condition alone, which EXPLAIN gives without running it, scans no relation: it reads no other row.
2. Every function and operator that it names is looked up in pg_proc: VOLATILE ones are refused, as are functions that
   tell the time or the session. Functions outside of pg_catalog must be IMMUTABLE: a STABLE one may read tables, and no
   change of those would be noticed.
3. Only then it is tried, on a few rows, in a READ ONLY transaction with a time limit, and in positions where only one
   expression of type boolean can stand. The server holds functions that are not VOLATILE to reading.

Our sessions have an empty search_path, so a name without a schema is one of pg_catalog and of nothing else.

Source: PostgreSQL, "Function Volatility Categories", "SET TRANSACTION" (READ ONLY), "EXPLAIN".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import Any, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.documents.lexer import ROW, Token, Unreadable, named_columns, names, parts_of_row, tokens
from cdcsync.model.conditions import WORDS_WITH_A_VALUE, ColumnKind, Where, columns_read, understood
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.postgres.errors import locked_out, speaking_of, translate, without_values
from cdcsync.postgres.locking import until_locked
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.source.unreadable import of_a_row, of_no_trial

TRIED_ROWS = 100
"""Rows that a condition is tried on: enough to see that it neither writes nor fails at once."""

TRIAL_S = 10.0
"""How long trying may take. A condition that takes longer for these rows would hold up every page."""

ATTEMPTS = 4
"""How often a condition is tried on a table that somebody holds locked: for two seconds, as most statements that lock a
table are over by then."""

_NOW = (
    *("age", "clock_timestamp", "current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"),
    *("now", "statement_timestamp", "transaction_timestamp"),
)
_SESSION = (
    *("current_catalog", "current_database", "current_query", "current_role", "current_schema", "current_schemas"),
    *("current_setting", "current_user", "getpgusername", "inet_client_addr", "inet_client_port", "inet_server_addr"),
    *("inet_server_port", "row_security_active", "session_user", "system_user", "user", "version"),
)
CHANGING = frozenset((*_NOW, *_SESSION))
"""Functions whose value depends on the time or the session, although the server calls them stable."""

_MOMENT = re.compile(
    r"(?:[a-z]'|\$\w*\$)?[\s\d:.+,/\[({\"-]*(now|today|tomorrow|yesterday)(?![^\W\d])", re.ASCII | re.IGNORECASE
)
"""Matches a string that is another moment each time it is read as a date, a time, or a range or array of them.

Source: PostgreSQL, "Date/Time Types" (Special Values)."""

_BEFORE_TEXT = frozenset(("->", "->>", "?", "~", "~*", "like", "ilike"))
"""A string after one of these is not a date."""

READING = (
    *("pg_", "has_", "to_reg", "txid_", "col_description", "obj_description", "shobj_description"),
    *("table_to_xml", "schema_to_xml", "database_to_xml"),
)
"""How the names of stable functions begin that read tables, the catalog or the state of the server."""

SYSTEM_COLUMNS = frozenset(("ctid", "xmin", "xmax", "cmin", "cmax"))
"""They change when a row is only moved or locked."""


class Refused(Exception):
    """A condition cannot be used.

    :ivar message: why not, as a sentence whose subject is the condition.
    :ivar hint: what to do instead.
    :ivar privilege: whether it is for want of a privilege.
    """

    def __init__(self, message: str, hint: str, *, privilege: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.privilege = privilege


async def try_condition(connection: Connection, table: QualifiedName, text: str, *, source: str | None = None) -> None:
    """Ask the source to parse a condition and to try it on some rows, in a transaction that cannot write.

    It is tried in brackets and without them: what is right in both places is one expression. And it is planned after
    WHERE, where aggregates and window functions are refused.

    :param source: the value of `source_table`, if the table is one of many of an index.
    :raises Refused: it is none, or does not work.
    :raises SourceUnavailable: somebody holds the table locked.
    """
    relation: sql.Composable = sql.Identifier(table.schema, table.name)
    if source is not None:
        relation = sql.SQL("(SELECT {}::text AS {}, t.* FROM {} AS t)").format(
            sql.Literal(source), sql.Identifier(SOURCE_TABLE), relation
        )

    async def attempt() -> None:
        async with _trial(connection, table, text):
            await _try(connection, relation, text)

    with speaking_of("source", where=str(table)):
        await until_locked(attempt, table=str(table), attempts=ATTEMPTS)


async def examine_condition(
    connection: Connection,
    table: QualifiedName,
    text: str,
    sent: Sequence[str],
    *,
    in_use: bool = False,
    exact: Collection[str] | None = None,
) -> Where:
    """Return a condition that says which rows an index has, with how it can be decided.

    It is planned first, then what it calls is looked up, and only then it is tried: nothing volatile is ever called.
    If an index goes by it already, it is neither planned nor tried while somebody holds the table locked.

    :param sent: the columns whose values the stream brings.
    :param in_use: whether an index goes by it already, so that a row for which it fails costs that row alone.
    :param exact: if the table stands for many, the columns in which only the same text is equal in each of them.
    :raises Refused: it cannot be used.
    :raises SourceUnavailable: somebody holds the table locked.
    """
    with speaking_of("source", where=str(table)):
        return await until_locked(
            lambda: _examine(connection, table, text, sent, in_use=in_use, exact=exact),
            table=str(table),
            attempts=ATTEMPTS,
        )


async def _examine(
    connection: Connection,
    table: QualifiedName,
    text: str,
    sent: Sequence[str],
    *,
    in_use: bool,
    exact: Collection[str] | None,
) -> Where:
    try:
        words = tokens(text)
    except Unreadable as error:
        raise Refused(
            str(error), "give one SQL condition, without comments, its names as they are or in plain double quotes"
        ) from None
    if system := [name for name in names(words) if name in SYSTEM_COLUMNS]:
        raise Refused(
            f"it reads the system column {system[0]}, which changes without a change of the row",
            "use the table's own columns",
        )
    async with _trial(connection, table, text):
        columns = await _columns(connection, table)
        if exact is not None:
            columns = {one: "plain" if kind == "text" and one not in exact else kind for one, kind in columns.items()}
        named = named_columns(words, columns)
        async with _unless_locked(connection, in_use=in_use):
            await _refuse_other_tables(connection, table, text)
        await _refuse_changing(connection, words, named)
        utf8 = await fetch_value(connection, "SELECT current_setting('server_encoding') = 'UTF8'")
        if understood(text, words, columns, utf8=utf8).terms is None:  # Otherwise its strings are compared with texts.
            _refuse_moments(words)
        try:
            async with _unless_locked(connection, in_use=in_use):
                await _try(connection, sql.Identifier(table.schema, table.name), text)
        except psycopg.Error as error:
            if not (in_use and of_a_row(error)):
                raise
    for part in parts_of_row(words):
        if part is not None and part.kind in ("name", "quoted") and part.text not in columns:
            raise Refused(
                f"it calls {part.text} as if that were a column of the row",
                f"write {part.text}({ROW}), or name a column",
            )
    where = understood(text, words, {name: kind for name, kind in columns.items() if name in sent}, utf8=utf8)
    return msgspec.structs.replace(where, columns=columns_read(words, columns))


async def examine_order(connection: Connection, table: QualifiedName, text: str) -> None:
    """See that an order of rows, written as after ORDER BY, is the same each time.

    Whether it works at all is left to the statement that it belongs to, as it may name columns of joined tables.

    :raises Refused: it reads other rows, or calls what answers something else each time.
    """
    try:
        words = tokens(text)
    except Unreadable as error:
        raise Refused(str(error), "name columns of the related row, each with ASC or DESC") from None
    _refuse_moments(words)
    if any(_begins_query(words, at) for at in range(len(words))):
        raise Refused("it holds a query, whose tables' changes would not be noticed", "name columns of the related row")
    async with _trial(connection, table, text):
        await _refuse_changing(connection, words, named_columns(words, await _columns(connection, table)))


@contextlib.asynccontextmanager
async def _trial(connection: Connection, table: QualifiedName, text: str) -> AsyncIterator[None]:
    """Open a transaction that cannot write and does not take long; what goes wrong in it is the condition's fault."""
    try:
        await connection.execute("BEGIN READ ONLY")
        limit = sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(round(TRIAL_S * 1000)))
        await connection.execute(limit)
        yield
    except psycopg.errors.QueryCanceled:
        raise Refused(
            f"it takes more than {TRIAL_S:g} s for {TRIED_ROWS} rows",
            "simplify it, or store its outcome in a column",
        ) from None
    except psycopg.Error as error:
        if of_no_trial(error):
            raise translate(error, "source", where=str(table)) from error
        # The bracket is ours.
        ends = isinstance(error, psycopg.errors.SyntaxError) and ")" not in text and 'near ")"' in str(error)
        raise Refused(
            "it is not complete" if ends else without_values(error),
            error.diag.message_hint or f"give one condition on the columns of {table} that only reads",
            privilege=isinstance(error, psycopg.errors.InsufficientPrivilege),
        ) from None
    finally:
        if not connection.closed:
            await connection.rollback()


@contextlib.asynccontextmanager
async def _unless_locked(connection: Connection, *, in_use: bool) -> AsyncIterator[None]:
    """Do without what is inside if somebody holds the table locked, and an index goes by the condition already."""
    try:
        async with connection.transaction():
            yield
    except psycopg.Error as error:
        if not (in_use and locked_out(error)):
            raise


async def _try(connection: Connection, name: sql.Composable, text: str) -> None:
    cursor = psycopg.AsyncRawCursor(connection)
    # With a parameter the server takes a single statement only. No column is read that is not asked for: the role may
    # not be allowed to.
    condition = sql.SQL(text)
    await cursor.execute(sql.SQL("SELECT $1::int FROM {} AS t WHERE ({}) LIMIT 0").format(name, condition), [0])
    for place in ("({}) IS TRUE", "CASE WHEN {} THEN true END"):
        tried = sql.SQL("(SELECT {} AS holds FROM {} AS t LIMIT {}) AS tried").format(
            sql.SQL(place).format(condition), name, sql.Literal(TRIED_ROWS)
        )
        await cursor.execute(sql.SQL("SELECT count(holds) + $1::int FROM {}").format(tried), [0])


async def _columns(connection: Connection, table: QualifiedName) -> dict[str, ColumnKind]:
    """Return the table's columns, with what their values are to a condition."""
    cursor = await connection.execute(
        """
        SELECT a.attname, CASE
            WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) AND coalesce(l.collisdeterministic, true)
                THEN 'text'
            WHEN a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) THEN 'integer'
            WHEN a.atttypid = 'bool'::regtype THEN 'boolean'
            WHEN t.typtype IN ('c', 'd', 'p') THEN 'row' ELSE 'plain' END
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation l ON l.oid = a.attcollation
        WHERE n.nspname = %s AND c.relname = %s ORDER BY a.attnum
        """,
        [table.schema, table.name],
    )
    return cast(dict[str, ColumnKind], dict(await cursor.fetchall()))


async def _refuse_other_tables(connection: Connection, table: QualifiedName, text: str) -> None:
    """Look for relations in the plan of the condition itself; as a column of the result, none of it is pulled up."""
    name = sql.Identifier(table.schema, table.name)
    statement = sql.SQL("EXPLAIN (FORMAT JSON, COSTS OFF) SELECT ({}) FROM {} AS t").format(sql.SQL(text), name)
    cursor = psycopg.AsyncRawCursor(connection)
    await cursor.execute(statement, prepare=False)
    ((plans,),) = cast(list[tuple[list[dict[str, Any]]]], await cursor.fetchall())
    other = next((one for plan in plans for one in _relations_below(plan["Plan"], inside=False)), None)
    if other is not None:
        raise Refused(
            f"it reads the table {other}, whose changes would not be noticed",
            f"give a condition on the columns of {table} alone",
        )


def _relations_below(node: dict[str, Any], *, inside: bool) -> Iterator[str]:
    """Yield the relations that the subqueries of a plan scan."""
    inside = inside or node.get("Parent Relationship") in ("SubPlan", "InitPlan")
    if inside and "Relation Name" in node:
        yield node["Relation Name"]
    for below in node.get("Plans", ()):
        yield from _relations_below(below, inside=inside)


async def _refuse_changing(connection: Connection, words: Sequence[Token], columns: Sequence[str]) -> None:
    """Look up what the condition calls, by all that its names could mean."""
    schemas, names = _called(words, columns)
    cursor = await connection.execute(
        """
        SELECT n.nspname, p.proname, p.provolatile::text FROM unnest(%s::text[], %s::text[]) AS named (schema, name)
        JOIN pg_namespace n ON n.nspname = named.schema
        JOIN LATERAL (
            SELECT p.proname, p.provolatile FROM pg_proc p WHERE p.pronamespace = n.oid AND p.proname = named.name
            UNION ALL
            SELECT o.oprname, p.provolatile FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
            WHERE o.oprnamespace = n.oid AND o.oprname = named.name
        ) AS p ON true
        """,
        [schemas, names],
    )
    for schema, name, volatility in await cursor.fetchall():
        own = schema != "pg_catalog"
        if volatility == "v":
            raise Refused(
                f"it calls {name}, which is volatile: it may do anything, and answer something else each time",
                f"declare {schema}.{name} IMMUTABLE if its answer depends on its arguments alone"
                if own
                else "give a condition whose outcome depends on the row alone",
            )
        if own and volatility == "s":
            raise Refused(
                f"it calls {schema}.{name}, which is STABLE: it may read tables, whose changes would not be noticed",
                f"declare {schema}.{name} IMMUTABLE if its answer depends on its arguments alone",
            )
        if not own and (name in CHANGING or (volatility == "s" and name.startswith(READING))):
            raise _changing(name)
    used = {word.text for word in words if word.kind == "name" and not _is_column(word, columns)}
    if changing := sorted(used & CHANGING):
        raise _changing(changing[0])


def _refuse_moments(words: Sequence[Token]) -> None:
    """Refuse strings that are today one date or time, and tomorrow another."""
    for at, word in enumerate(words):
        moment = _MOMENT.match(word.text) if word.kind in ("string", "other") else None
        if moment is None or (at and words[at - 1].kind != "quoted" and words[at - 1].text in _BEFORE_TEXT):
            continue
        colon, following = Token("mark", ":"), list(words[at + 1 : at + 5])
        if following[:3] == [colon, colon, Token("name", "text")] and following[3:] != [colon]:
            continue
        refused = _changing(f"'{moment[1]}'", with_time=True)
        raise Refused(refused.message, f"{refused.hint}; if it is meant as a text, write '{moment[1]}'::text")


def _begins_query(words: Sequence[Token], at: int) -> bool:
    """Say whether a word is SELECT, TABLE or VALUES, and not a name in quotes or after a dot, or a column `values`."""
    if words[at].kind != "name" or (at and words[at - 1] == Token("mark", ".")):
        return False
    following = words[at + 1] if at + 1 < len(words) else None
    return words[at].text in ("select", "table") or (words[at].text == "values" and following == Token("mark", "("))


def _is_column(word: Token, columns: Sequence[str]) -> bool:
    return word.text in columns and not (word.kind == "name" and word.text in WORDS_WITH_A_VALUE)


def _changing(name: str, *, with_time: bool = False) -> Refused:
    when = "with time" if with_time or name in _NOW else "with the session, or with what is read,"
    return Refused(
        f"its outcome changes {when} ({name}), and no change of a row would tell",
        "carry the column with `columns`, and filter searches by it",
    )


def _called(words: Sequence[Token], columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return schema and name of each function and operator that the words may mean."""
    found: dict[tuple[str, str], None] = {}
    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) else None
        if word.kind not in ("name", "quoted", "operator"):
            continue
        if _is_column(word, columns) and following != Token("mark", "("):
            continue
        found["pg_catalog", word.text] = None
        if at >= 2 and words[at - 1] == Token("mark", ".") and words[at - 2].kind in ("name", "quoted"):
            found[words[at - 2].text, word.text] = None
    return [schema for schema, _ in found], [name for _, name in found]
