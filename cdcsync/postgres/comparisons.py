"""How two values of a key are compared: by the operators that its type is sorted by, wherever those live.

Our sessions have no search path, so a bare `=` means pg_catalog's. For citext that is the operator of text, to which
another unique index and another order belong: a page read by it would miss rows. For ltree there is none at all.

Source: PostgreSQL, "Operator Classes and Operator Families"; "Row and Array Comparisons" (Row Constructor Comparison).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from psycopg import sql

from cdcsync.postgres.sessions import Connection

_STRATEGIES = {3: "=", 4: ">=", 5: ">"}
"""B-tree's numbers for what we ask, and the operators' names in pg_catalog.

Source: PostgreSQL, "B-Tree Indexes" (B-Tree Strategies)."""

_PLAIN = {strategy: ("pg_catalog", name) for strategy, name in _STRATEGIES.items()}
"""For types without an operator class of their own: varchar is compared as text, an enum or array by its kind."""


class Comparison(msgspec.Struct, frozen=True):
    """The operators for one column of a key; `plain` when they are pg_catalog's."""

    equal: sql.Composable
    at_least: sql.Composable
    above: sql.Composable
    plain: bool


async def comparisons(connection: Connection, types: Sequence[str]) -> list[Comparison]:
    """Return how values of each of these types are compared on this server."""
    cursor = await connection.execute(
        """
        WITH RECURSIVE made_of (place, oid) AS (
            SELECT place, to_regtype(name)::oid FROM unnest(%s::text[]) WITH ORDINALITY AS wanted (name, place)
            UNION ALL
            SELECT m.place, t.typbasetype FROM made_of m JOIN pg_type t USING (oid) WHERE t.typtype = 'd'
        )
        SELECT m.place, a.amopstrategy, n.nspname, o.oprname
        FROM made_of m
        JOIN pg_opclass c ON c.opcintype = m.oid AND c.opcdefault
        JOIN pg_am method ON method.oid = c.opcmethod AND method.amname = 'btree'
        JOIN pg_amop a ON a.amopfamily = c.opcfamily AND a.amoplefttype = m.oid AND a.amoprighttype = m.oid
        JOIN pg_operator o ON o.oid = a.amopopr
        JOIN pg_namespace n ON n.oid = o.oprnamespace
        WHERE a.amopstrategy = ANY(%s)
        """,
        [list(types), list(_STRATEGIES)],
    )
    found: list[dict[int, tuple[str, str]]] = [dict(_PLAIN) for _ in types]
    for place, strategy, schema, name in await cursor.fetchall():
        found[place - 1][strategy] = (schema, name)
    return [Comparison(_operator(*of[3]), _operator(*of[4]), _operator(*of[5]), plain=of == _PLAIN) for of in found]


def follows(
    columns: Sequence[sql.Composable], values: Sequence[sql.Composable], compared: Sequence[Comparison]
) -> sql.Composable:
    """Return SQL that says whether a key comes after another in the key's own order, and that an index can serve.

    :param values: may appear several times in the result.
    """
    if all(one.plain for one in compared):
        return sql.SQL("({}) > ({})").format(sql.SQL(", ").join(columns), sql.SQL(", ").join(values))
    # A row comparison takes its operators from one schema, so it is spelled out.
    *outer, (column, value, last) = zip(columns, values, compared, strict=True)
    condition: sql.Composable = sql.SQL("{} {} {}").format(column, last.above, value)
    for column, value, one in reversed(outer):
        condition = sql.SQL("{column} {least} {value} AND ({column} {above} {value} OR {condition})").format(
            column=column, value=value, least=one.at_least, above=one.above, condition=condition
        )
    return sql.SQL("({})").format(condition)


def parts_after(
    columns: Sequence[sql.Composable], values: Sequence[sql.Composable], compared: Sequence[Comparison]
) -> list[sql.Composable]:
    """Return the conditions of the keys that `follows` is about, in parts that come one after another.

    For each part an index leads to its first row at once. The single condition that is not a row comparison has it read
    everything that has the same first column, so that pages over few values of that would take the square of the time.
    """
    if all(one.plain for one in compared):
        return [follows(columns, values, compared)]
    typed = list(zip(columns, values, compared, strict=True))
    parts: list[sql.Composable] = []
    for at in reversed(range(len(typed))):
        operators = [*(one.equal for _, _, one in typed[:at]), typed[at][2].above]
        parts.append(
            sql.SQL(" AND ").join(
                sql.SQL("{} {} {}").format(column, operator, value)
                for (column, value, _), operator in zip(typed, operators, strict=False)
            )
        )
    return parts


def in_parts(
    selected: sql.Composable, rows: Sequence[sql.Composable], order: sql.Composable, limit: int
) -> sql.Composable:
    """Return the first rows of each of several parts, as a subquery of a statement that orders and limits them again.

    :param selected: the columns, with those that `order` names; `rows`: of each part, what follows FROM.
    """
    return sql.SQL("({})").format(
        sql.SQL(" UNION ALL ").join(
            sql.SQL("(SELECT {} FROM {} ORDER BY {} LIMIT {})").format(selected, part, order, sql.Literal(limit))
            for part in rows
        )
    )


def _operator(schema: str, name: str) -> sql.Composable:
    return sql.SQL("OPERATOR({}." + name + ")").format(sql.Identifier(schema))
