"""Related tables: whose rows take part in the documents of an index, besides the row of the index's own table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from cdcsync.config.names import QualifiedName
from cdcsync.config.shape import Section
from cdcsync.config.values import Expression, Name, Relation, RelationName

On = dict[Name, Name]
"""Columns of a related table, and the columns that they equal in the table that it is related to."""


class Via(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table between the index's table and a related one: each of its rows names one of either.

    :param table: the table between, as in SQL: `schema.table`.
    :param on: columns of the table between, and the columns that they equal in the index's table: { post_id = "id" }.
    """

    table: Relation
    on: On

    def faults(self) -> Iterator[tuple[str, str]]:
        """A table that nothing is compared with would join every row with every other."""
        if not self.on:
            yield "on", _NEEDS_A_PAIR


class Related(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A related table.

    :param table: the related table, as in SQL: `schema.table`.
    :param on: its columns, and the columns that they equal in the index's table: { ticket_id = "id" }. Over a table
        between, the columns that they equal there.
    :param via: a table between, where rows of both tables belong to several of the other.
    :param text: the template of one related row: its columns in braces. {NAME} in the index's templates stands for the
        texts of all of them.
    :param columns: the columns that a function in `documents` gets of each related row; left out, those of `text`.
    :param order_by: their order, as in SQL: "created_at DESC"; left out, and among equal ones, by the primary key.
    :param limit: the most related rows in a document, the first ones in that order.
    :param separator: what stands between the texts of two related rows.
    :param where: a condition in SQL on the related row: only rows that fulfil it take part.
    :param related: tables that are related to this one in turn, for its own `text`.
    """

    table: Relation
    on: On
    via: Via | None = None
    text: str = ""
    columns: tuple[Name, ...] = ()
    order_by: Expression = ""
    limit: Annotated[int, Meta(ge=1, le=100_000)] = 1_000
    separator: str = "\n"
    where: Expression = ""
    related: dict[RelationName, Related] = msgspec.field(default_factory=dict)

    @property
    def tables(self) -> tuple[QualifiedName, ...]:
        """The tables that are read for it, from the index's table on."""
        between = () if self.via is None else (QualifiedName.parse(self.via.table),)
        below = tuple(table for one in self.related.values() for table in one.tables)
        return (*between, QualifiedName.parse(self.table), *below)

    @property
    def expressions(self) -> tuple[str, ...]:
        """The conditions and orders in SQL, those of its own related tables included."""
        below = tuple(text for one in self.related.values() for text in one.expressions)
        return (*filter(None, (self.where, self.order_by)), *below)

    def faults(self) -> Iterator[tuple[str, str]]:
        """A table that nothing is compared with would join every row with every other; text holds no NUL."""
        if not self.on:
            yield "on", _NEEDS_A_PAIR
        if "\0" in self.separator:
            yield "separator", "a text cannot hold a zero byte"
        for name in sorted({name for name in self.columns if self.columns.count(name) > 1}):
            yield "columns", f"{name!r} is there more than once"


_NEEDS_A_PAIR = 'names at least one column of the table and the column that it equals, such as { ticket_id = "id" }'
