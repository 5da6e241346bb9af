"""Values that are too large for the worker's memory: the server leaves them out of what it sends.

The server compares the size first. For nearly every value it knows that from the size in the table, without reading
the value; only a value that may be compressed is read, by the server alone.

Source: PostgreSQL, "Database Object Management Functions" (pg_column_size); "TOAST".
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

COMPRESSED = 256
"""Compression makes a value at most this many times smaller, so a value that is stored in less is not measured."""

MOST_BYTES = 1024**3
"""No value in PostgreSQL is larger."""


def read_within(values: Sequence[sql.Composable], largest: int) -> list[sql.Composable]:
    """Return SQL of these values, and after them SQL that says whether any of them is too large.

    A value that is too large is NULL. If no value can be, nothing is added.

    :param largest: the size in bytes, as text, that a value may have.
    """
    if largest >= MOST_BYTES or not values:
        return list(values)
    small, most = sql.Literal(largest // COMPRESSED), sql.Literal(largest)
    larger = [
        sql.SQL(
            "CASE WHEN pg_catalog.pg_column_size({value}) OPERATOR(pg_catalog.<=) {small} THEN false"
            " WHEN pg_catalog.pg_column_size({value}) OPERATOR(pg_catalog.>) {most} THEN true"
            " ELSE pg_catalog.octet_length(pg_catalog.concat({value})) OPERATOR(pg_catalog.>) {most} END"
        ).format(value=value, small=small, most=most)
        for value in values
    ]
    read = [
        sql.SQL("CASE WHEN {} THEN NULL ELSE {} END").format(is_larger, value)
        for is_larger, value in zip(larger, values, strict=True)
    ]
    return [*read, sql.SQL("({})").format(sql.SQL(" OR ").join(larger))]
