"""The columns of the source's tables as its catalog describes them, and the types that they are made of.

Source: PostgreSQL, "System Catalogs" (pg_attribute, pg_attrdef, pg_collation, pg_type, pg_enum, pg_range).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from cdcsync.postgres.sessions import Connection


class Type(msgspec.Struct, frozen=True):
    """The catalog facts that determine the text of a user-defined type's values.

    :ivar name: as format_type prints it.
    :ivar kind: pg_type.typtype: "e" enum, "c" composite, "d" domain, "r" range, "m" multirange, "b" array.
    :ivar labels: an enum's, by the OID of each: a renamed label keeps its OID.
    :ivar parts: attribute number, type and modifier of each attribute; of one thing for the other kinds.
    :ivar written: which transaction (32 bits) last wrote the entry of each label or attribute, by the label's OID or
        the attribute's number.
    """

    name: str
    kind: str
    labels: dict[str, str] = {}
    parts: tuple[tuple[int, int, int], ...] = ()
    written: dict[str, int] = {}


class Column(msgspec.Struct, frozen=True):
    """A column of a source table.

    :ivar type: as format_type prints it, with its modifier.
    :ivar not_null: whether no row has NULL in it.
    :ivar generated: "s" (stored), "v" (virtual) or "" (not generated).
    :ivar base_type: what a domain is made of; None for other types.
    :ivar labels: an enum's.
    :ivar wire_type: OID and modifier, as the stream tells them.
    :ivar number: pg_attribute.attnum; a column that was dropped and added under its name has another one.
    :ivar expression: the OID of a generated column's expression, which a new expression changes; else None.
    :ivar written_by: the transaction that last wrote its entry in the catalog, as 32 bits.
    :ivar collation: with its schema; "" if its type has none.
    :ivar deterministic: whether that collation takes only the same text for equal.
    """

    name: str
    type: str
    not_null: bool
    generated: str
    readable: bool = True
    base_type: str | None = None
    labels: tuple[str, ...] = ()
    wire_type: tuple[int, int] = (0, -1)
    number: int = 0
    expression: int | None = None
    written_by: int = 0
    collation: str = ""
    deterministic: bool = True

    @property
    def value_type(self) -> str:
        """The type that a stored value surely is of: what a domain is made of, as its checks may be newer than rows."""
        return self.base_type or self.type


def reachable_types(types: Mapping[int, Type], roots: Collection[int]) -> dict[int, Type]:
    """Return the user-defined types that values of these types are made of, with these types themselves."""
    found: dict[int, Type] = {}
    left = list(roots)
    while left:
        oid = left.pop()
        if oid in types and oid not in found:
            found[oid] = types[oid]
            left += [part for _, part, _ in types[oid].parts]
    return found


async def read_columns(connection: Connection, oids: Collection[int]) -> dict[int, dict[str, Column]]:
    """Return the columns of each table by name, in the order that they have there."""
    # A family may have tens of thousands of columns, and few of them are of a domain or an enum. CASE keeps the
    # subqueries from being run for the others.
    cursor = await connection.execute(
        """
        SELECT a.attrelid::int8, a.attname, format_type(a.atttypid, a.atttypmod),
               -- From PostgreSQL 18 on, a constraint may be NOT VALID: rows of before may have NULL.
               a.attnotnull AND NOT EXISTS (
                   SELECT FROM pg_constraint c WHERE c.conrelid = a.attrelid AND c.contype = 'n' AND NOT c.convalidated
                   AND a.attnum = ANY(c.conkey)),
               a.attgenerated::text,
               coalesce(has_column_privilege(a.attrelid, a.attnum, 'SELECT'), false),
               CASE WHEN y.typtype = 'd' THEN (
                WITH RECURSIVE domains(type, modifier) AS (
                    SELECT y.typbasetype, y.typtypmod
                    UNION ALL
                    SELECT t.typbasetype, t.typtypmod FROM domains d JOIN pg_type t ON t.oid = d.type
                    WHERE t.typtype = 'd'
                )
                SELECT format_type(d.type, d.modifier) FROM domains d JOIN pg_type t ON t.oid = d.type
                WHERE t.typtype <> 'd') END,
               CASE WHEN y.typtype = 'e' THEN
                   ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = a.atttypid ORDER BY enumsortorder)
                   ELSE '{}' END,
               a.atttypid::int8, a.atttypmod, a.attnum::int4,
               CASE WHEN a.attgenerated <> '' THEN
                   (SELECT d.oid::int8 FROM pg_attrdef d WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum) END,
               a.xmin::text::int8, coalesce(quote_ident(n.nspname) || '.' || quote_ident(l.collname), ''),
               coalesce(l.collisdeterministic, true)
        FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
        LEFT JOIN pg_collation l ON l.oid = a.attcollation LEFT JOIN pg_namespace n ON n.oid = l.collnamespace
        WHERE a.attrelid = ANY(%s::int8[]::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
        """,
        [list(oids)],
    )
    columns: dict[int, dict[str, Column]] = {}
    for oid, *told, labels, type_oid, modifier, number, expression, xmin, collation, equal in await cursor.fetchall():
        rest = tuple(labels), (type_oid, modifier), number, expression, xmin, collation, equal
        column = Column(*[*told, *rest])
        columns.setdefault(oid, {})[column.name] = column
    return columns


async def read_types(connection: Connection, oids: Collection[int]) -> dict[int, Type]:
    """Return what these types, and the types that they are made of, are; built-in scalar types are left out."""
    cursor = await connection.execute(
        """
        WITH RECURSIVE used (oid) AS (
            SELECT unnest(%s::int8[]::oid[])
            UNION
            SELECT part.oid FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL (
                SELECT t.typelem WHERE t.typelem <> 0
                UNION ALL SELECT t.typbasetype WHERE t.typtype = 'd'
                UNION ALL SELECT a.atttypid FROM pg_attribute a
                          WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
                UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
            ) AS part (oid)
        )
        SELECT t.oid::int8, format_type(t.oid, NULL), t.typtype::text,
               ARRAY(SELECT ARRAY[e.oid::text, e.enumlabel::text] FROM pg_enum e WHERE e.enumtypid = t.oid ORDER BY 1),
               CASE t.typtype
                   WHEN 'c' THEN ARRAY(
                       SELECT ARRAY[a.attnum::int8, a.atttypid::int8, a.atttypmod::int8] FROM pg_attribute a
                       WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
                   WHEN 'd' THEN ARRAY[ARRAY[0::int8, t.typbasetype::int8, t.typtypmod::int8]]
                   WHEN 'e' THEN '{}'
                   WHEN 'b' THEN ARRAY[ARRAY[0::int8, t.typelem::int8, -1::int8]]
                   ELSE ARRAY(SELECT ARRAY[0::int8, r.rngsubtype::int8, -1::int8] FROM pg_range r
                              WHERE t.oid IN (r.rngtypid, r.rngmultitypid))
               END,
               CASE t.typtype
                   WHEN 'c' THEN (
                       SELECT json_object_agg(a.attnum, a.xmin::text::int8) FROM pg_attribute a
                       WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped)
                   WHEN 'e' THEN (
                       SELECT json_object_agg(e.oid, e.xmin::text::int8) FROM pg_enum e WHERE e.enumtypid = t.oid)
               END
        FROM used JOIN pg_type t USING (oid)
        WHERE t.typtype <> 'b' AND t.oid >= 16384 OR t.typtype = 'b' AND t.typelem >= 16384 AND t.typlen = -1
        """,
        [list(oids)],
    )
    return {
        oid: Type(name, kind, dict(labels), tuple(tuple(part) for part in parts), written or {})
        for oid, name, kind, labels, parts, written in await cursor.fetchall()
    }
