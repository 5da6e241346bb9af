"""Values that are too large for the worker's memory: the server leaves them out of what it sends.

The server compares the size first. It knows that of texts and bytes without reading them, and of most other values from
their size in the table; only one of those that may be compressed is read, by the server alone.

Source: PostgreSQL, "Database Object Management Functions" (pg_column_size); "TOAST".
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from cdcsync.model.rows import Shape

COMPRESSED = 256
"""Compression makes a value at most this many times smaller, so a value that is stored in less is not measured."""

MOST_BYTES = 1024**3
"""No value in PostgreSQL is larger."""


BYTEA, TEXT, VARCHAR = 17, 25, 1043
"""The types, by OID, whose size the server knows without reading a value, compressed or not."""


def read_within(columns: Sequence[str], shape: Shape, largest: int) -> list[sql.Composable]:
    """Return SQL of the values of these columns of the rows `t`, and after them SQL that says if any is too large.

    A value that is too large is NULL. If no value can be, nothing is added.

    :param largest: the size in bytes, as text, that a value may have.
    """
    values = [sql.Identifier("t", name) for name in columns]
    if largest >= MOST_BYTES or not values:
        return [*values]
    types = {name: type_ for name, (type_, _) in zip(shape.own, shape.types, strict=False)}
    larger = [_larger(value, types.get(name, 0), largest) for name, value in zip(columns, values, strict=True)]
    read = [
        sql.SQL("CASE WHEN {} THEN NULL ELSE {} END").format(is_larger, value)
        for is_larger, value in zip(larger, values, strict=True)
    ]
    return [*read, sql.SQL("({})").format(sql.SQL(" OR ").join(larger))]


def _larger(value: sql.Composable, type_: int, largest: int) -> sql.Composable:
    """Return SQL that says whether a value is too large."""
    most = sql.Literal(largest)
    if type_ in (TEXT, VARCHAR):  # the cast does nothing, unless the type has changed since it was looked up
        return sql.SQL("COALESCE(pg_catalog.octet_length({}::text) OPERATOR(pg_catalog.>) {}, false)").format(
            value, most
        )
    if type_ == BYTEA:  # as hexadecimal digits
        return sql.SQL("COALESCE(pg_catalog.octet_length({}) OPERATOR(pg_catalog.>) {}, false)").format(
            value, sql.Literal(largest // 2 - 1)
        )
    return sql.SQL(
        "CASE WHEN pg_catalog.pg_column_size({value}) OPERATOR(pg_catalog.<=) {small} THEN false"
        " WHEN pg_catalog.pg_column_size({value}) OPERATOR(pg_catalog.>) {most} THEN true"
        " ELSE pg_catalog.octet_length(pg_catalog.concat({value})) OPERATOR(pg_catalog.>) {most} END"
    ).format(value=value, small=sql.Literal(largest // COMPRESSED), most=most)
