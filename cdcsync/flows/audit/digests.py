"""Digests of documents, computed by each server over its own rows, a page at a time.

A digest covers a document's key, its carried columns and its text, all as the server renders them. The source is read
in the order of its keys; the index is asked for the same keys, so it does not matter that two servers may sort text
differently. No snapshot is held for longer than a page takes.

Source: PostgreSQL, "Binary String Functions" (sha256), "Composite Types" (their text form).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import cast

import anyio.to_thread
import msgspec
import psycopg
from psycopg import sql

from cdcsync.config.names import quote
from cdcsync.documents.chunks.sizes import WHITE_SPACE
from cdcsync.documents.related import own_rows
from cdcsync.errors import DocumentError
from cdcsync.model.rows import Key, Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons, in_parts, parts_after
from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.process.memory import largest_value
from cdcsync.source.many import unless_dropped
from cdcsync.source.related import computed
from cdcsync.source.related import operators as related_operators
from cdcsync.source.sizes import read_within
from cdcsync.source.tables import SourceTable
from cdcsync.source.unreadable import of_a_row
from cdcsync.target.keys import stored_digests

MADE_HERE_ROWS = 1_000
"""Rows of a page at most where documents are made by code: their texts are all in memory here."""

MADE_HERE_BYTES = 4 * 1024 * 1024
"""How large a page is at most whose rows are read here, unless a single row is larger."""

TOO_LARGE = 64 * 1024 * 1024
"""The size in bytes above which no digest is made of a value: the server's functions need up to eight times as much
memory and fail beyond a gigabyte, and reading the value takes seconds. Such documents are compared one by one."""

NO_DOCUMENT = 0
"""Stands for a document that no digest can be made of: what the index stores is not likely to have it."""


class Digests(msgspec.Struct, frozen=True):
    """A page of the source: the digest of each key, None where its row has no place in the index."""

    by_key: dict[Key, int | None]
    repeated: list[Key]
    """Keys that several rows have: the index's key no longer identifies the source's rows."""
    after: Key | None
    """Where the next page begins."""
    last: bool


async def source_digests(
    connection: Connection, spec: IndexSpec, after: Key | None, limit: int, *, keys: Sequence[Key] | None = None
) -> Digests:
    """Return the digests of up to `limit` rows of the source with keys above `after`; a page is of one table.

    :param keys: only rows with one of these, of any table.
    """
    found = Digests({}, [], after, last=True)
    for one in spec.each:
        source = one.shape.source
        mine = keys if keys is None or source is None else [key for key in keys if key[0] == source]
        if (keys is not None and not mine) or (source is not None and after is not None and source < after[0]):
            continue
        start = after if source is None or after is None or source == after[0] else None
        if source is None:
            page = await _digests_apart(connection, one, start, limit, mine)
        else:
            nothing = Digests({}, [], None, last=True)
            page = await unless_dropped(one.shape.table, nothing, _digests_apart, connection, one, start, limit, mine)
        if keys is None and (page.by_key or not page.last):
            return msgspec.structs.replace(page, last=page.last and one is spec.each[-1])
        found = Digests(found.by_key | page.by_key, found.repeated + page.repeated, page.after or after, page.last)
    return found


async def _digests_apart(
    connection: Connection, spec: IndexSpec, after: Key | None, limit: int, keys: Sequence[Key] | None
) -> Digests:
    """Return the digests of one table. Rows at which the server fails have digests of no document."""
    table = SourceTable.of(spec)
    if spec.documents.by_code and keys is None:
        limit = await table.fitting(connection, after, min(limit, MADE_HERE_ROWS), MADE_HERE_BYTES)
    try:
        return await _table_digests(connection, spec, after, limit, keys)
    except psycopg.Error as error:
        if not _of_a_row(error):
            raise
    if keys is None:
        limit = await table.fitting(connection, after, limit, MADE_HERE_BYTES)
    page = await (table.page(connection, after, limit) if keys is None else table.by_keys(connection, keys))
    readable = [spec.shape.key_of(row) for row in page.rows]
    following = page.last or (readable[-1] if readable else after)
    last = len(readable) < limit and not page.more
    found = Digests(dict.fromkeys([*readable, *page.unread], NO_DOCUMENT), [], following, last)
    if not readable:
        return found
    try:
        whole = await _table_digests(connection, spec, None, len(readable), list(dict.fromkeys(readable)), apart=True)
    except psycopg.Error as error:
        if not _of_a_row(error):
            raise
        return found  # another row fails by now, or the digest itself: all are compared one by one
    return msgspec.structs.replace(found, by_key=found.by_key | whole.by_key)


def _of_a_row(error: psycopg.Error) -> bool:
    """Say whether a digest may have failed for a single row.

    The server's functions fail with an internal error for texts of more than some hundred million characters.
    """
    return of_a_row(error) or isinstance(error, psycopg.errors.InternalError_)


class _Page(msgspec.Struct, frozen=True):
    """A page of one table's rows, as SQL.

    :ivar read: the rows, in the order of their keys, as a subquery of `FROM` whose name is t.
    :ivar key: the key's columns.
    :ivar ordered: those of them that the rows are ordered by.
    :ivar arguments: of the whole statement.
    """

    read: sql.Composable
    key: list[sql.Composable]
    ordered: list[sql.Composable]
    arguments: list[object]


async def _table_digests(
    connection: Connection,
    spec: IndexSpec,
    after: Key | None,
    limit: int,
    keys: Sequence[Key] | None,
    *,
    apart: bool = False,
) -> Digests:
    """Return the digests of one table's rows.

    :param apart: whether conditions are not even asked of rows without one of these keys, each of which is one row's.
    """
    page = await _page(connection, spec, after, limit, keys, apart=apart)
    found = await (_digests_by_code if spec.documents.by_code else _digests_in_sql)(connection, spec, page)
    repeated = [key for key, times in Counter(key for key, _ in found).items() if times > 1]
    return Digests(dict(found), repeated, found[-1][0] if found else after, len(found) < limit)


async def _page(
    connection: Connection, spec: IndexSpec, after: Key | None, limit: int, keys: Sequence[Key] | None, *, apart: bool
) -> _Page:
    """Return up to `limit` rows with keys above `after`, or those with one of these keys; see `_table_digests`."""
    columns: list[sql.Composable] = [sql.Identifier("t", name) for name in spec.shape.key]
    types = list(enumerate(spec.source_key_types, start=1))
    operators = await comparisons(connection, spec.source_key_types)
    # The name of one of many tables is the same for all its rows.
    fixed = 0 if spec.shape.source is None else 1
    if spec.shape.source is not None:
        columns[0] = sql.SQL("{}::text").format(sql.Literal(spec.shape.source))
    arguments: list[object] = []
    arguments += (after or ())[fixed:]
    above: list[sql.Composable] = [sql.SQL("")]
    rows_of = published(spec)
    if keys is not None:
        arguments = [[key[at] for key in keys] for at in range(len(columns))]
        # A condition's bare names can be no column of these.
        places = [sql.Identifier("w", f"cdcsync key {at}") for at, _ in types]
        wanted = sql.SQL("unnest({}) AS w({})").format(
            sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at, _ in types),
            sql.SQL(", ").join(sql.Identifier(f"cdcsync key {at}") for at, _ in types),
        )
        same = sql.SQL(" AND ").join(
            sql.SQL("{} {} {}::{}").format(column, one.equal, place, sql.SQL(type_))
            for column, one, place, (_, type_) in zip(columns, operators, places, types, strict=True)
        )
        if apart:
            rows_of = published(spec, wanted, same)
        else:
            above = [sql.SQL("WHERE EXISTS (SELECT FROM {} WHERE {})").format(wanted, same)]
    elif after is not None:
        values = [sql.SQL(f"${at - fixed}::text::{type_}") for at, type_ in types[fixed:]]
        parts_of_page = parts_after(columns[fixed:], values, operators[fixed:])
        above = [sql.SQL("WHERE {}").format(part) for part in parts_of_page]
    ordered = sql.SQL(", ").join(columns[fixed:])
    own = sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.own)
    of = [sql.SQL("{} AS t {}").format(rows_of, part) for part in above]
    rows = of[0] if len(of) == 1 else sql.SQL("{} AS t").format(in_parts(own, of, ordered, limit))
    read = sql.SQL("{} ORDER BY {} LIMIT {}").format(rows, ordered, sql.Literal(limit))
    if spec.documents.related:
        equal = await related_operators(connection, spec.facts)
        rows_read = sql.SQL("SELECT {} FROM {}").format(own, read)
        whole = computed(rows_read, spec.shape, spec.documents.related, spec.facts, equal, apart=apart)
        read = sql.SQL("{} AS t ORDER BY {}").format(whole, ordered)
    return _Page(read, columns, columns[fixed:], arguments)


async def _digests_by_code(connection: Connection, spec: IndexSpec, page: _Page) -> list[tuple[Key, int | None]]:
    """Return the digests of a page's rows, whose documents are made by code here, in the order of the rows."""
    within = read_within(spec.shape.columns[len(page.key) :], spec.shape, largest_value())
    rows = await fetch_texts(
        connection,
        sql.SQL("SELECT ROW({key})::text, ROW({carried})::text, {columns} FROM {read}").format(
            key=sql.SQL(", ").join(page.key),
            carried=sql.SQL(", ").join(within[: len(spec.shape.carried)]),
            columns=sql.SQL(", ").join([*page.key, *within]),
            read=page.read,
        ),
        page.arguments,
    )
    return await anyio.to_thread.run_sync(_made_here, spec, rows)


async def _digests_in_sql(connection: Connection, spec: IndexSpec, page: _Page) -> list[tuple[Key, int | None]]:
    """Return the digests of a page's rows, which the server makes with their documents, in the order of the rows."""
    others = [name for name in dict.fromkeys(spec.shape.columns) if name not in spec.shape.key]
    bounded = read_within(others, spec.shape, TOO_LARGE)
    large = sql.Identifier("t", "cdcsync too large") if others else sql.SQL("false")
    within = [*page.ordered, *map(_named, bounded, (*others, "cdcsync too large"))]
    blank = WHITE_SPACE if connection.info.parameter_status("server_encoding") == "UTF8" else " \t\n\v\f\r"
    named = [sql.Identifier(f"k{at}") for at in range(len(page.key))]
    rows = await fetch_texts(
        connection,
        sql.SQL(
            "SELECT CASE WHEN r.too_large THEN {none} WHEN btrim(r.document, {blank}) <> '' THEN {digest} END,"
            " {listed} FROM ("
            " SELECT {keys}, row_number() OVER (ORDER BY {ordered}) AS place,"
            " ROW({key})::text AS key_text, ROW({carried})::text AS carried_text,"
            " {document} AS document, {document_hash} AS document_hash, {too_large} AS too_large"
            " FROM (SELECT {within} FROM {read}) AS t) AS r ORDER BY r.place"
        ).format(
            none=sql.Literal(NO_DOCUMENT),
            blank=sql.Literal(blank),
            digest=digest("r.key_text", "r.carried_text", "r.document_hash"),
            listed=sql.SQL(", ").join(sql.SQL("r.{}").format(name) for name in named),
            keys=sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(key, name) for key, name in zip(page.key, named, strict=True)
            ),
            ordered=sql.SQL(", ").join(page.ordered),
            key=sql.SQL(", ").join(page.key),
            carried=sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.carried),
            document=sql.SQL(spec.documents.sql(lambda name: f"t.{quote(name)}")),
            document_hash=sql.SQL(spec.documents.hash_sql(lambda name: f"t.{quote(name)}")),
            too_large=large,
            within=sql.SQL(", ").join(within),
            read=page.read,
        ),
        page.arguments,
    )
    return [(cast(Key, tuple(key)), None if one is None else int(cast(str, one))) for one, *key in rows]


def _named(value: sql.Composable, name: str) -> sql.Composable:
    return sql.SQL("{} AS {}").format(value, sql.Identifier(name))


def _made_here(spec: IndexSpec, page: Sequence[Row]) -> list[tuple[Key, int | None]]:
    """Return what the server's SQL would, for documents that are made by code.

    A row that a function fails for, or that has a value too large to be read, should have a document: its digest is of
    no document that the index could hold.
    """
    found: list[tuple[Key, int | None]] = []
    width = len(spec.shape.columns)
    for key_text, carried_text, *values in cast(Sequence[Sequence[str | None]], page):
        row: Row = tuple(values[:width])
        if values[width:] == ["t"]:
            found.append((spec.shape.key_of(row), NO_DOCUMENT))
            continue
        try:
            made = spec.render(row)
            document_hash: bytes | None = made.hash if made.text.strip(WHITE_SPACE) else None
        except DocumentError:
            document_hash = b""
        key = spec.shape.key_of(row)
        if document_hash is None:
            found.append((key, None))
        else:
            whole = hashlib.sha256(f"{key_text} {carried_text}".encode() + document_hash).digest()
            found.append((key, int.from_bytes(whole[:8], signed=True)))
    return found


async def differing(target: Connection, schema: str, spec: IndexSpec, source: Digests) -> list[Key]:
    """Return the keys of a page of the source whose documents the index does not have alike just now."""
    own = digest('c."key text"', 'c."carried text"', "c.document_hash")
    stored = await stored_digests(target, schema, spec, list(source.by_key), own)
    return [key for key, one in source.by_key.items() if stored.get(key) != one]


def published(
    spec: IndexSpec, wanted: sql.Composable | None = None, same: sql.Composable | None = None
) -> sql.Composable:
    """Return SQL of the rows that the index has, as a subquery; the role may be allowed no other columns.

    :param wanted: only rows for which `same` holds with a row of this; nothing else is asked of others.
    """
    filter_: sql.Composable = sql.SQL("(" + spec.condition + ")") if spec.condition else sql.SQL("true")
    of: sql.Composable = sql.SQL(own_rows(spec.shape.table, inheritable=spec.shape.inheritable) + " AS t")
    if wanted is not None and same is not None:
        of = sql.SQL("{} JOIN {} ON {}").format(of, wanted, same)
        filter_ = sql.SQL("CASE WHEN {} THEN {} END").format(same, filter_)
    columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.own)
    return sql.SQL("(SELECT {} FROM {} WHERE {})").format(columns, of, filter_)


def digest(key: str, carried: str, document_hash: str) -> sql.Composable:
    """Return SQL of a 64-bit digest of a document."""
    text = f"convert_to({key} || ' ' || {carried}, 'UTF8')"
    return sql.SQL(f"('x' || encode(substring(sha256({text} || {document_hash}), 1, 8), 'hex'))::bit(64)::int8")
