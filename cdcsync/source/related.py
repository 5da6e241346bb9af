"""Statements over the tables of an index that has several.

    computed   rows of the index's table, with the columns that rows of related tables make
    LookUps    the documents that a changed row of a related table belongs to

Operators are those of the columns' types, wherever they live: our sessions have no search path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import cast

from psycopg import sql

from cdcsync.documents.related import Facts, RelatedRows, TableFacts, computed_columns, own_rows
from cdcsync.model.links import Link, Values
from cdcsync.model.rows import Key, Shape
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.comparisons import comparisons
from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import Connection

MOST_FILTERED = 1_000
"""Values that one condition names at most: more of them are as good as all."""


async def operators(connection: Connection, facts: Facts) -> Callable[[str, str], str]:
    """Return the function that names the operator by which values of two types are compared for equality."""
    types = sorted({type_ for one in facts.values() for type_ in one.types.values()})
    found = {
        type_: one.equal.as_string(None) for type_, one in zip(types, await comparisons(connection, types), strict=True)
    }

    def equal(mine: str, theirs: str) -> str:
        same = _unmodified(mine) == _unmodified(theirs)
        return found.get(mine, "OPERATOR(pg_catalog.=)") if same else "OPERATOR(pg_catalog.=)"

    return equal


def _unmodified(type_: str) -> str:
    return re.sub(r"\(.*?\)", "", type_)


def computed(
    rows: sql.Composable,
    shape: Shape,
    related: Sequence[RelatedRows],
    facts: Facts,
    equal: Callable[[str, str], str],
    *,
    apart: bool = False,
) -> sql.Composed:
    """Return a subquery of rows with all columns of a shape, those of related tables included.

    :param rows: a statement that gives the shape's own columns.
    :param apart: whether conditions are not even asked of rows that are related to others only.
    """
    # The rows are settled first, and only then is anything looked up for each: no planner joins all of a table.
    types = facts.get(shape.table, TableFacts()).types
    own = [sql.Identifier("t", name) for name in shape.own]
    made = [
        sql.SQL("{} AS {}").format(sql.SQL(of), sql.Identifier(name)) for name, of in computed_columns(related).items()
    ]
    joined = " ".join(one.lateral("t", facts, types, equal, apart=apart) for one in related)
    return sql.SQL("(WITH t AS MATERIALIZED ({}) SELECT {} FROM t {})").format(
        rows, sql.SQL(", ").join([*own, *made]), sql.SQL(joined)
    )


class LookUps:
    """Finds the documents of changed related rows, for one index."""

    def __init__(self, shape: Shape, links: Sequence[Link], facts: Facts) -> None:
        self._shape = shape
        self._links = links
        self._facts = facts
        self._equal: Callable[[str, str], str] | None = None

    async def keys(
        self, connection: Connection, link: Link, values: Sequence[Values], most: int
    ) -> tuple[Snapshot, dict[Values, list[Key]]]:
        """Return the keys of the documents that rows with these values belong to; of each value up to `most`.

        Besides, the snapshot under which they were found.
        """
        equal = await self._operators(connection)
        wanted = [f"wanted.v{at}::{link.types[column]}" for at, column in enumerate(link.columns)]
        listed = ", ".join(f"v{at}" for at in range(len(link.columns)))
        statement = sql.SQL(
            "SELECT pg_current_snapshot(), found.* FROM (SELECT) AS always LEFT JOIN"
            " (SELECT wanted.place, k.* FROM unnest({}) WITH ORDINALITY AS wanted({}, place) CROSS JOIN LATERAL"
            " (SELECT {} FROM {} WHERE {} LIMIT {}) AS k) AS found ON true"
        ).format(
            sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at in range(1, len(link.columns) + 1)),
            sql.SQL(listed),
            sql.SQL(", ").join(sql.Identifier("t", name) for name in self._shape.key),
            sql.SQL(self._way(link, equal)),
            sql.SQL(self._matched(link, wanted, equal)),
            sql.Literal(most),
        )
        arguments = [[one[at] for one in values] for at in range(len(link.columns))]
        rows = await fetch_texts(connection, statement, arguments, prepare=False)
        found: dict[Values, list[Key]] = {}
        for _, place, *key in rows:
            if place is not None:
                found.setdefault(values[int(cast(str, place)) - 1], []).append(cast(Key, tuple(key)))
        return Snapshot.parse(cast(str, rows[0][0])), found

    async def condition(self, connection: Connection, link: Link, values: Sequence[Values]) -> str | None:
        """Return the condition of the rows `t` whose documents rows with these values belong to; None for all."""
        if len(values) > MOST_FILTERED:
            return None
        equal = await self._operators(connection)
        either = []
        for one in values:
            wanted = [
                f"{sql.Literal(value).as_string(connection)}::{link.types[column]}"
                for value, column in zip(one, link.columns, strict=True)
            ]
            either.append(f"({self._matched(link, wanted, equal)})")
        matched = " OR ".join(either)
        if len(link.steps) == 1:
            return matched
        between = ", ".join(self._tables(link))
        joins = " AND ".join([*self._joins(link, equal), f"({matched})"])
        return f"EXISTS (SELECT FROM {between} WHERE {joins})"

    async def _operators(self, connection: Connection) -> Callable[[str, str], str]:
        if self._equal is None:
            self._equal = await operators(connection, self._facts)
        return self._equal

    def _way(self, link: Link, equal: Callable[[str, str], str]) -> str:
        """Return SQL of the index's table, joined to those before the link's."""
        own = own_rows(self._shape.table, inheritable=self._shape.inheritable)
        tables = [f"{own} AS t", *self._tables(link)]
        joins = self._joins(link, equal)
        first, *others = tables
        return " ".join([first, *(f"JOIN {one} ON {on}" for one, on in zip(others, joins, strict=True))])

    def _tables(self, link: Link) -> list[str]:
        between = [step.table for step in link.steps[:-1]]
        return [
            f'{own_rows(table, inheritable=self._facts.get(table, TableFacts()).inheritable)} AS "step {at}"'
            for at, table in enumerate(between)
        ]

    def _joins(self, link: Link, equal: Callable[[str, str], str]) -> list[str]:
        return [
            " AND ".join(
                f"{_column(at, mine)} {equal(self._type(link, at, mine), self._type(link, at - 1, theirs))}"
                f" {_column(at - 1, theirs)}"
                for mine, theirs in step.on
            )
            for at, step in enumerate(link.steps[:-1])
        ]

    def _matched(self, link: Link, wanted: Sequence[str], equal: Callable[[str, str], str]) -> str:
        """Return the condition that the columns which the link's rows name equal the wanted values."""
        before = len(link.steps) - 2
        return " AND ".join(
            f"{_column(before, theirs)} {equal(self._type(link, before, theirs), link.types[mine])} {value}"
            for (mine, theirs), value in zip(link.steps[-1].on, wanted, strict=True)
        )

    def _type(self, link: Link, step: int, column: str) -> str:
        table = self._shape.table if step < 0 else link.steps[step].table
        return self._facts.get(table, TableFacts()).types.get(column, "")


def _column(step: int, name: str) -> str:
    return sql.Identifier("t" if step < 0 else f"step {step}", name).as_string(None)
