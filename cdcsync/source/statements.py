"""The SQL that reads one index's table: its columns, its rows, its order, and the rows of wanted keys.

Rows come as the shape's tuples with every value in the text that its type's output function renders, which is what
the stream carries too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import LiteralString

from psycopg import sql

from cdcsync.documents.related import Facts, RelatedRows, own_rows
from cdcsync.model.rows import SOURCE_TABLE, Key, Shape
from cdcsync.postgres.comparisons import Comparison, comparisons, follows, in_parts, parts_after
from cdcsync.postgres.sessions import Connection
from cdcsync.process.memory import largest_value
from cdcsync.source.related import computed, operators
from cdcsync.source.sizes import read_within

PLACE = sql.Identifier("cdcsync place")
"""The column that tells which of several keys is meant."""

RELATIONS: LiteralString = (
    "(WITH RECURSIVE tree (oid) AS (SELECT %(table)s::regclass::oid UNION ALL SELECT i.inhrelid FROM tree"
    " JOIN pg_inherits AS i ON i.inhparent = tree.oid WHERE NOT i.inhdetachpending) SELECT oid FROM tree)"
)
"""A table with its partitions. The server's own function for it would wait for one that is locked."""


class Statements:
    """Parts of statements over one table, and statements over the rows of some keys."""

    def __init__(
        self,
        shape: Shape,
        key_types: Sequence[str],
        condition: str | None,
        *,
        related: Sequence[RelatedRows],
        facts: Facts,
    ) -> None:
        self.shape = shape
        self.all_rows = condition is None
        """Whether the index has every row of the table."""
        self.related = related
        self._facts = facts
        self._equal: Callable[[str, str], str] | None = None
        self.files = list(
            dict.fromkeys(
                [str(shape.table), *(str(step.table) for top in related for one in top.walk() for step in one.steps)]
            )
        )
        self._table = sql.SQL(own_rows(shape.table, inheritable=shape.inheritable))
        # In the table of one of many, its name is not a column.
        self._fixed = 0 if shape.source is None else 1
        keys: list[sql.Composable] = [sql.Identifier("t", name) for name in shape.key]
        if shape.source is not None:
            keys[0] = sql.SQL("{}::text").format(sql.Literal(shape.source))
        self._columns = sql.SQL(", ").join([*keys, *read_within(shape.columns[len(keys) :], shape, largest_value())])
        """The expressions that are read of a row: NULL for a value that is too large, and whether there is one."""
        self._sent = _condition(condition) if condition else sql.SQL("true")
        # As a subquery, so that the condition's bare column names cannot be taken for those of what it is joined to; of
        # only the columns that the index needs, because the role may not be allowed to read the other columns.
        needed = sql.SQL(", ").join(sql.Identifier("t", name) for name in shape.own)
        self.needed = needed
        self.selected = needed if related else self._columns
        self.bare = sql.SQL("{} AS t WHERE true").format(self._table)
        """All rows of the table, whether they belong to the index or not."""
        self._published = sql.SQL("(SELECT {} FROM {} AS t WHERE {})").format(needed, self._table, self._sent)
        self.rows = sql.SQL("{} AS t WHERE {}").format(self._table, self._sent)
        self.named = self.rows
        """The rows with the table's name among them, for conditions that tell tables apart."""
        if shape.source is not None:
            of_all = sql.SQL("SELECT {}::text AS {}, t.* FROM {} AS t WHERE {}").format(
                sql.Literal(shape.source), sql.Identifier(SOURCE_TABLE), self._table, self._sent
            )
            self.named = sql.SQL("({}) AS t WHERE true").format(of_all)
        self.keys = keys
        self.key_types = tuple(key_types)
        self._comparisons: list[Comparison] = []
        # A condition's bare names can be no column of these.
        places = [f"cdcsync key {at}" for at in range(len(keys))]
        self.wanted = [
            sql.SQL("{}::{}").format(sql.Identifier("wanted", place), sql.SQL(type_))
            for place, type_ in zip(places, key_types, strict=True)
        ]
        self.wanted_from = sql.SQL("unnest({}) WITH ORDINALITY AS wanted({}, {})").format(
            sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at in range(1, len(keys) + 1)),
            sql.SQL(", ").join(map(sql.Identifier, places)),
            PLACE,
        )

    @property
    def ordered(self) -> Sequence[sql.Composable]:
        """The columns that order the table's rows."""
        return self.keys[self._fixed :]

    def place(self, after: Key | None) -> list[str]:
        """Return the values of the ordering columns."""
        return list(after[self._fixed :]) if after is not None else []

    def arrays(self, keys: Sequence[Key]) -> list[list[str]]:
        """Return keys as the arguments of `wanted_from`: one array for each column."""
        return [[key[at] for key in keys] for at in range(len(self.shape.key))]

    async def keyed(
        self, connection: Connection, selected: sql.Composable, *, apart: bool, where: str | None = None
    ) -> sql.Composed:
        """Return a statement over the rows with wanted keys.

        :param apart: whether the condition is not even asked of other rows, for which it may fail, whatever the
            planner would do first.
        :param where: a further condition; with it, they are always asked of these rows only.
        """
        same = await self._same(connection)
        if not (apart or where):
            of: sql.Composable = self._published
            holds: sql.Composable = sql.SQL("true")
        else:
            of = self._table
            if where and self.shape.source is not None:
                of = sql.SQL("(SELECT {}::text AS {}, t.* FROM {} AS t)").format(
                    sql.Literal(self.shape.source), sql.Identifier(SOURCE_TABLE), self._table
                )
            conditions = sql.SQL(" AND ").join([self._sent, *([_condition(where)] if where else [])])
            holds = sql.SQL("CASE WHEN {} THEN {} END").format(same, conditions)
        return sql.SQL("SELECT {} FROM {} AS t JOIN {} ON {} WHERE {}").format(
            selected, of, self.wanted_from, same, holds
        )

    async def with_related(self, connection: Connection, rows: sql.Composed, *, apart: bool = False) -> sql.Composed:
        """Return a statement that gives the same rows with all columns, those of related tables included."""
        if not self.related:
            return rows
        if self._equal is None:
            self._equal = await operators(connection, self._facts)
        whole = computed(rows, self.shape, self.related, self._facts, self._equal, apart=apart)
        return sql.SQL("SELECT {} FROM {} AS t").format(self._columns, whole)

    async def page(
        self,
        connection: Connection,
        selected: sql.Composable,
        rows: sql.Composed,
        after: Key | None,
        limit: int,
        where: str | None = None,
        *,
        needed: sql.Composable,
    ) -> sql.Composed:
        """Return a statement over the first rows that follow a key, in the order of keys.

        :param rows: those among which they are.
        :param needed: the columns that `selected` and the order are made of.
        """
        conditions = [_condition(where)] if where else []
        order = sql.SQL(", ").join(self.ordered)
        parts: list[sql.Composable] = [sql.SQL("true")]
        if after is not None:
            parts = parts_after(*await self._compared_with(connection))
        of: list[sql.Composable] = [sql.SQL(" AND ").join([rows, part, *conditions]) for part in parts]
        if len(of) > 1:
            of = [sql.SQL("{} AS t").format(in_parts(needed, of, order, limit))]
        return sql.SQL("SELECT {} FROM {} ORDER BY {} LIMIT {}").format(selected, of[0], order, sql.Literal(limit))

    async def _compared_with(
        self, connection: Connection
    ) -> tuple[Sequence[sql.Composable], list[sql.Composable], list[Comparison]]:
        """Return the ordering columns, the arguments that they are compared with, and how."""
        types = self.key_types[self._fixed :]
        values: list[sql.Composable] = [sql.SQL(f"${at}::text::{type_}") for at, type_ in enumerate(types, start=1)]
        return self.ordered, values, (await self._compared(connection))[self._fixed :]

    async def up_to(self, connection: Connection, key: Key) -> str:
        """Return the condition of the rows up to a key in the order of pages, in SQL on the row `t`."""
        typed = zip(self.place(key), self.key_types[self._fixed :], strict=True)
        values = [sql.SQL("{}::text::{}").format(sql.Literal(value), sql.SQL(type_)) for value, type_ in typed]
        compared = (await self._compared(connection))[self._fixed :]
        return sql.SQL("NOT ({})").format(follows(self.ordered, values, compared)).as_string(connection)

    def fulfilling(self, where: str | None) -> sql.Composable:
        """Return the rows that a condition holds for, too."""
        return sql.SQL(" AND ").join([self.named, _condition(where)]) if where else self.rows

    async def _same(self, connection: Connection) -> sql.Composed:
        """Return SQL that says whether a row has a wanted key."""
        compared = await self._compared(connection)
        return sql.SQL(" AND ").join(
            sql.SQL("{} {} {}").format(key, one.equal, wanted)
            for key, one, wanted in zip(self.keys, compared, self.wanted, strict=True)
        )

    async def _compared(self, connection: Connection) -> list[Comparison]:
        """Return the key's operators, which are looked up once."""
        if not self._comparisons:
            self._comparisons = await comparisons(connection, self.key_types)
        return self._comparisons


def _condition(text: str) -> sql.Composable:
    """Return a condition that someone wrote."""
    return sql.SQL("(" + text + ")")
