"""The filters that each column allows: the operators that its type has, qualified, and the type of its values.

A filter is data: `{"tenant": 3, "status": ["open", "new"], "created_at": {"gte": "2026-01-01"}}`. The search function
makes conditions of it; every value becomes a literal of the column's type, or of the type of its elements.

Source: PostgreSQL, "B-Tree Indexes" (B-Tree Strategies), "Operator Classes and Operator Families", "Array Functions and
Operators", "JSON Functions and Operators".
"""

from __future__ import annotations

from typing import LiteralString, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.texts import is_text

OF_THE_SERVER: tuple[LiteralString, ...] = ("08", "25", "40", "42501", "53", "55", "57", "58", "XX")
"""How the SQLSTATEs of errors begin that are no fault of a value: by any other, an input function refuses it."""

STRATEGIES = {"lt": (1, "<"), "lte": (2, "<="), "eq": (3, "="), "gte": (4, ">="), "gt": (5, ">")}
"""The operators that a type is sorted by: B-tree's number of each, and its name in pg_catalog."""

CONTAINS, OVERLAPS = "OPERATOR(pg_catalog.@>)", "OPERATOR(pg_catalog.&&)"

FILTER_OPERATORS = ("eq", "ne", "in", "lt", "lte", "gt", "gte", "like", "contains", "overlaps", "null")
"""The operators of a filter, in the order in which people are told of them."""

DESCRIBED = (
    "By column: a value, a list of values of which it has any, null, or values by operator"
    f" ({', '.join(FILTER_OPERATORS)}): "
    '{"status": ["open", "new"], "created_at": {"gte": "2026-01-01"}, "closed_at": null}.'
    " Columns of arrays and jsonb: contains, all of these elements, or this JSON; overlaps, any of these elements: "
    '{"tags": {"contains": ["urgent"]}, "groups": {"overlaps": [3, 7]}, "extra": {"contains": {"lang": "en"}}}.'
)
"""A filter as programs and agents are told of it."""


class Column(msgspec.Struct, frozen=True):
    """A column that a filter can name.

    :ivar type: its type as SQL, without a length: a value is compared whole, and not cut to fit.
    :ivar shown: its type as people write it.
    :ivar operators: SQL for each operator of a filter.
    :ivar array: whether it holds arrays.
    :ivar element: the type of an array's elements as SQL, if it can be asked for them.
    :ivar json: whether it holds jsonb, or arrays whose elements are jsonb.
    """

    type: str
    shown: str
    operators: dict[str, str]
    array: bool = False
    element: str | None = None
    json: bool = False

    @property
    def takes_values(self) -> bool:
        """Whether a value as JSON has it, such as an answer of the tool server names, can be compared for equality.

        Arrays and jsonb are compared with their text.
        """
        return "eq" in self.operators and not self.array and self.type != "pg_catalog.jsonb"

    def equals(self, name: str, value: sql.Composable) -> sql.Composed:
        """Return the condition that the column has a value, whose text is SQL, as a filter compares it."""
        if "eq" not in self.operators:
            return sql.SQL("{}::pg_catalog.text OPERATOR(pg_catalog.=) {}").format(sql.Identifier(name), value)
        return sql.SQL("{} {} {}::{}").format(
            sql.Identifier(name), sql.SQL(self.operators["eq"]), value, sql.SQL(self.type)
        )


async def read_value(connection: Connection, column: Column, text: str) -> str | None:
    """Return the text of the value that a text is of a column's type, such as `1` for `01`; None if it is none."""
    if not is_text(text):
        return None
    statement = sql.SQL("SELECT ({}::{})::pg_catalog.text").format(sql.Literal(text), sql.SQL(column.type))
    try:
        async with connection.transaction():
            return cast(str, await fetch_value(connection, statement))
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate.startswith(OF_THE_SERVER):
            raise
        return None


async def read_columns(connection: Connection, spec: IndexSpec) -> dict[str, Column]:
    """Return what a filter can say of each key and carried column."""
    columns = dict(zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True))
    cursor = await connection.execute(
        """
        WITH RECURSIVE sorted (oid, family) AS MATERIALIZED (
            SELECT c.opcintype, c.opcfamily FROM pg_opclass c JOIN pg_am a ON a.oid = c.opcmethod
            WHERE a.amname = 'btree' AND c.opcdefault
        ), made_of (place, oid, whole, element) AS (
            SELECT place, to_regtype(name)::oid, true, false
            FROM unnest(%s::text[]) WITH ORDINALITY AS wanted (name, place)
            UNION
            -- A domain is what it is made of; so are an array's elements if they are of one.
            SELECT m.place, part.oid, m.whole AND t.typtype = 'd',
                m.element AND t.typtype = 'd' OR m.whole AND t.typtype <> 'd' AND t.typelem <> 0
            FROM made_of m JOIN pg_type t USING (oid) CROSS JOIN LATERAL (
                SELECT t.typbasetype WHERE t.typtype = 'd'
                UNION ALL SELECT t.typelem WHERE t.typsubscript = 'array_subscript_handler'::regproc
                UNION ALL SELECT attribute.atttypid FROM pg_attribute attribute
                WHERE t.typtype = 'c' AND attribute.attrelid = t.typrelid AND attribute.attnum > 0
                    AND NOT attribute.attisdropped
            ) AS part (oid)
            WHERE NOT EXISTS (SELECT FROM sorted s WHERE s.oid = t.oid)
        ), typed AS (
            SELECT m.place, m.whole, m.element, t.oid, t.typelem, t.typtype,
                format('%%I.%%I', n.nspname, t.typname) AS type,
                t.typsubscript = 'array_subscript_handler'::regproc AS array,
                EXISTS (SELECT FROM sorted s WHERE s.oid = t.oid)
                    OR EXISTS (SELECT FROM pg_cast k JOIN sorted s ON s.oid = k.casttarget
                               WHERE k.castsource = t.oid AND k.castmethod = 'b' AND k.castcontext = 'i') AS sorted
            FROM made_of m JOIN pg_type t USING (oid) JOIN pg_namespace n ON n.oid = t.typnamespace
        )
        SELECT b.place, b.type,
            -- An array or a composite is compared by what it is made of; a range has a subtype that is sorted.
            (SELECT bool_and(p.sorted OR p.array OR p.typtype IN ('d', 'e', 'r', 'm', 'c'))
             FROM typed p WHERE p.place = b.place),
            (SELECT jsonb_object_agg(x.amopstrategy, format('OPERATOR(%%I.%%s)', n.nspname, o.oprname))
             FROM sorted s JOIN pg_amop x ON x.amopfamily = s.family
                 AND x.amoplefttype = b.oid AND x.amoprighttype = b.oid
             JOIN pg_operator o ON o.oid = x.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
             WHERE s.oid = b.oid),
            (SELECT format('OPERATOR(%%I.%%s)', n.nspname, o.oprname)
             FROM sorted s JOIN pg_amop x ON x.amopfamily = s.family AND x.amopstrategy = 3
                 AND x.amoplefttype = b.oid AND x.amoprighttype = b.oid
             JOIN pg_operator e ON e.oid = x.amopopr JOIN pg_operator o ON o.oid = e.oprnegate
             JOIN pg_namespace n ON n.oid = o.oprnamespace
             WHERE s.oid = b.oid LIMIT 1),
            b.array,
            (SELECT format('%%I.%%I', n.nspname, e.typname) FROM pg_type e JOIN pg_namespace n ON n.oid = e.typnamespace
             WHERE b.array AND e.oid = b.typelem AND e.typarray = b.oid),
            EXISTS (SELECT FROM typed e WHERE e.place = b.place AND e.oid = 'jsonb'::regtype
                    AND (e.element OR e.oid = b.oid))
        FROM typed b WHERE b.whole AND b.typtype <> 'd' ORDER BY b.place
        """,
        [list(columns.values())],
    )
    found: dict[str, Column] = {}
    names = list(columns)
    for place, type_, comparable, own, differs, array, element, json in await cursor.fetchall():
        operators = {"like": "", "null": ""}
        if comparable:
            for name, (strategy, sign) in STRATEGIES.items():
                operators[name] = (own or {}).get(str(strategy), f"OPERATOR(pg_catalog.{sign})")
            operators["ne"] = differs or "OPERATOR(pg_catalog.<>)"
            operators["in"] = operators["eq"]
            if element is not None:
                operators |= {"contains": CONTAINS, "overlaps": OVERLAPS}
            elif json:
                operators["contains"] = CONTAINS
        column = names[place - 1]
        found[column] = Column(
            cast(str, type_),
            columns[column],
            operators,
            bool(array),
            element if "contains" in operators else None,
            bool(json),
        )
    return found
