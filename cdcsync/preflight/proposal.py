"""Proposes an index over a table: which columns are its text, which are carried, which are filtered by.

`look` reads the catalog and a bounded sample; `propose` decides, and knows no server. A proposal is a start for people
to correct, so it prefers few and plain columns to all that might be of use.

Source: PostgreSQL, "System Catalogs" (pg_index), "ALTER TABLE" (REPLICA IDENTITY USING INDEX).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.errors import SetupError, UsageError
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.tables import key_faults, kind_faults, no_such_table
from cdcsync.source.columns import Column
from cdcsync.source.publications import GENERATED_COLUMNS_VERSION
from cdcsync.source.relations import TELLS_ROWS_APART, Table, read_table
from cdcsync.target.ddl.relations import RESERVED

SAMPLED_ROWS = 500
"""Enough to tell prose from labels; a sample is one page or a few of a table of any size."""

PROSE_CHARACTERS = 20
"""The mean length from which on a column of different values is taken for prose."""

MOST_LABELS = 0.5
"""The share of different values among rows up to which a column of text is a label, such as a status."""

MOST_CARRIED = 8
"""So many columns are proposed to be carried, as each chunk has a copy of them."""

_TITLES = ("title", "subject", "headline", "name", "summary")
_BODIES = ("body", "content", "text", "description", "message", "abstract", "question", "answer", "comment", "notes")
_PRIVATE = re.compile(r"password|passwd|secret|token|hash|salt|api_?key|e?mail|phone|iban|ssn|ip_?address", re.I)
_PLAIN_TYPES = re.compile(
    r"smallint|integer|bigint|boolean|date|uuid|timestamp with(out)? time zone|numeric|(text|character varying|citext)"
)
_TEXT_TYPES = re.compile(r"(text|citext|character varying|character)\b")
_TEMPLATE_NAME = re.compile(r"[^{}]+")


class Sampled(msgspec.Struct, frozen=True):
    """A column of text in a sample of rows: mean length, and the share of different values among those not NULL."""

    characters: float
    different: float


class Look(msgspec.Struct, frozen=True):
    """A table, as far as a proposal depends on it.

    :ivar filtered: columns that begin one of the table's indexes: those that its queries filter by.
    :ivar identity_index: a unique index on columns that are never NULL, where the table has no usable primary key.
    :ivar sampled: by column, if the role may read them.
    :ivar sends_stored: whether the server can send stored generated columns, and not only plain ones.
    """

    table: Table
    filtered: tuple[str, ...]
    identity_index: str | None
    identity_columns: tuple[str, ...]
    sampled: dict[str, Sampled]
    sends_stored: bool = True

    def sent(self, column: Column) -> bool:
        """Say whether a publication can send a column; a virtual one is never sent."""
        return not column.generated or (column.generated == "s" and self.sends_stored)


class Proposal(msgspec.Struct, frozen=True):
    """A proposal for a new index.

    :ivar key: the columns that name a row.
    :ivar identity_index: the index that has to become the replica identity first, so that `key` holds.
    """

    text: str
    columns: tuple[str, ...]
    indexed: tuple[str, ...]
    key: tuple[str, ...]
    identity_index: str | None


async def look(connection: Connection, name: QualifiedName) -> Look:
    """Read what a proposal depends on.

    :raises SetupError: there is no such table, or it cannot be indexed at all.
    """
    table = await read_table(connection, name)
    faults = [await no_such_table(connection, "--table", name)] if table is None else kind_faults("--table", table)
    if table is None or faults:
        raise SetupError(faults[0].message, where=faults[0].where, hint=faults[0].hint)
    cursor = await connection.execute(
        f"""
        SELECT c.relname, bool_and({TELLS_ROWS_APART} AND i.indpred IS NULL AND NOT i.indisprimary
                   AND coalesce(a.attnotnull, false)),
               array_agg(a.attname::text ORDER BY k.place)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)
        LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum > 0
        WHERE i.indrelid = %s::int8::oid AND i.indisvalid AND k.place <= i.indnkeyatts
        GROUP BY c.relname, i.indkey
        ORDER BY cardinality(i.indkey::int2[]), c.relname
        """,
        [table.oid],
    )
    rows: list[tuple[str, bool, list[str | None]]] = await cursor.fetchall()
    unique = next(((index, columns) for index, usable, columns in rows if usable), None)
    needed = unique if unique and not table.key else None
    return Look(
        table=table,
        filtered=tuple(dict.fromkeys(columns[0] for _, _, columns in rows if columns[0])),
        identity_index=needed[0] if needed else None,
        identity_columns=tuple(column for column in needed[1] if column) if needed else (),
        sampled=await _sample(connection, table),
        sends_stored=connection.info.server_version >= GENERATED_COLUMNS_VERSION,
    )


async def _sample(connection: Connection, table: Table) -> dict[str, Sampled]:
    """Measure the columns of text in the first rows; nothing of their values leaves the server."""
    names = [column.name for column in table.columns.values() if _is_text(column) and column.readable]
    if not names or not table.reachable:
        return {}
    measures = sql.SQL(", ").join(
        sql.SQL("avg(pg_catalog.length({0}::text))::float8, count(DISTINCT {0}::text), count({0})").format(
            sql.Identifier(name)
        )
        for name in names
    )
    statement = sql.SQL("SELECT {} FROM (SELECT {} FROM {} LIMIT {}) AS s").format(
        measures,
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Identifier(table.name.schema, table.name.name),
        sql.Literal(SAMPLED_ROWS),
    )
    try:
        row = await (await connection.execute(statement)).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return {}
    found = iter(row or ())
    measured = zip(names, found, found, found, strict=False)
    return {name: Sampled(characters, different / count) for name, characters, different, count in measured if count}


def propose(
    seen: Look,
    *,
    text: str | None = None,
    columns: Iterable[str] | None = None,
    indexed: Iterable[str] | None = None,
) -> Proposal:
    """Return a proposal; what is given goes before what would be proposed.

    :raises SetupError: nothing identifies the table's rows.
    :raises UsageError: no column looks like text, and no template is given.
    """
    table = seen.table
    key = table.key or seen.identity_columns
    if not key:
        fault = next(key_faults(table))
        raise SetupError(fault.message, where=fault.where, hint=fault.hint)
    template = _template(seen, key) if text is None else text
    used = set(re.findall(r"\{([^{}]+)\}", template))
    carried = [
        column.name
        for column in table.columns.values()
        if column.name not in {*key, *used, *RESERVED} and _is_filter(column, seen)
    ]
    likely = sorted(carried, key=lambda name: name not in seen.filtered)[:MOST_CARRIED]
    columns = tuple([name for name in carried if name in likely] if columns is None else columns)
    if indexed is None:
        indexed = [name for name in columns if name in seen.filtered]
    return Proposal(template, columns, tuple(indexed), key, seen.identity_index)


def _template(seen: Look, key: Collection[str]) -> str:
    """Return the text to search: the columns of prose, or else the only column of text if no row tells what it holds.

    :raises UsageError: there is none.
    """
    columns = [column for column in seen.table.columns.values() if _may_be_text(column, seen)]
    others = [column for column in columns if column.name not in key]
    chosen = [column for column in others if _is_prose(column, seen)]
    if not chosen and len(others) == 1 and others[0].name not in seen.sampled:
        chosen = others
    if not chosen:
        names = [column.name for column in columns]
        some = names or [name for name in seen.table.columns if _TEMPLATE_NAME.fullmatch(name)]
        hint = f"name columns in a template, such as --text '{{{some[0] if some else 'title'}}}'"
        raise UsageError(
            f"no column of {seen.table.name} looks like text to search",
            where="--text",
            hint=f"{hint}; its columns of text are {named(map(quote, names))}" if names else hint,
        )
    chosen.sort(key=lambda column: (_rank(column.name), column.number))
    return "\n\n".join(f"{{{column.name}}}" for column in chosen)


def _is_text(column: Column) -> bool:
    return bool(_TEXT_TYPES.match(column.base_type or column.type))


def _may_be_text(column: Column, seen: Look) -> bool:
    """Say whether people could want to search a column."""
    if not _is_text(column) or _PRIVATE.search(column.name) or not _TEMPLATE_NAME.fullmatch(column.name):
        return False
    return column.readable and seen.sent(column)


def _is_prose(column: Column, seen: Look) -> bool:
    """Say whether a column, which may be, is text that people would search."""
    if column.name.lower() in (*_TITLES, *_BODIES):
        return True
    sampled = seen.sampled.get(column.name)
    return sampled is not None and sampled.characters >= PROSE_CHARACTERS and sampled.different > MOST_LABELS


def _is_filter(column: Column, seen: Look) -> bool:
    """Say whether searches might filter by a column: a plain value, and no text of its own for each row."""
    if _PRIVATE.search(column.name) or not column.readable or not seen.sent(column):
        return False
    if not _PLAIN_TYPES.match(column.type):
        return False
    if not _is_text(column):
        return True
    sampled = seen.sampled.get(column.name)
    return column.name in seen.filtered or (sampled is not None and sampled.different <= MOST_LABELS)


def _rank(name: str) -> int:
    """Titles come first: a chunk's beginning weighs most."""
    return 0 if name.lower() in _TITLES else 1


def identity_statement(proposal: Proposal, table: QualifiedName) -> str | None:
    """Return what makes the proposed key the one that changes name their rows by."""
    if proposal.identity_index is None:
        return None
    return f"ALTER TABLE {table} REPLICA IDENTITY USING INDEX {quote(proposal.identity_index)};"
