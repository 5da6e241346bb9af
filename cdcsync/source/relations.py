"""The source's tables as its catalog describes them: columns, keys, replica identity, partitions.

Source: PostgreSQL, "System Catalogs" (pg_class, pg_attribute, pg_index); "ALTER TABLE" (REPLICA IDENTITY).
"""

from __future__ import annotations

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection


class Column(msgspec.Struct, frozen=True):
    """A column of a source table.

    :ivar type: as format_type prints it, with its modifier.
    :ivar generated: "s" (stored), "v" (virtual) or "" (not generated).
    :ivar base_type: what a domain is made of; None for other types.
    :ivar labels: an enum's.
    :ivar wire_type: OID and modifier, as the stream tells them.
    """

    name: str
    type: str
    not_null: bool
    generated: str
    readable: bool = True
    base_type: str | None = None
    labels: tuple[str, ...] = ()
    wire_type: tuple[int, int] = (0, -1)


class Partition(msgspec.Struct, frozen=True):
    """A leaf of a partitioned table: kind, persistence and replica identity are its own, not the root's."""

    name: QualifiedName
    kind: str
    persistence: str
    identity_mode: str
    identity: tuple[str, ...]


class Table(msgspec.Struct, frozen=True):
    """A source table.

    :ivar kind: pg_class.relkind: "r" table, "p" partitioned, "v" view, "m" materialised view, "f" foreign table.
    :ivar persistence: pg_class.relpersistence: "p" permanent, "u" unlogged, "t" temporary.
    :ivar identity_mode: pg_class.relreplident: "d" default, "i" an index, "f" full, "n" nothing.
    :ivar identity: the columns that come with the old key of an UPDATE or DELETE.
    :ivar readable: whether the role may select all columns.
    :ivar row_security: whether policies would hide rows from the role.
    :ivar reachable: whether the role may use the table's schema.
    :ivar ancestors: the partitioned tables that this one is a partition of.
    :ivar children: whether other tables inherit from this one, which is not partitioned.
    :ivar leaves: a partitioned table's partitions that hold rows.
    """

    oid: int
    name: QualifiedName
    kind: str
    persistence: str
    columns: dict[str, Column]
    primary_key: tuple[str, ...]
    identity_mode: str
    identity: tuple[str, ...]
    readable: bool
    owned: bool
    row_security: bool
    estimated_rows: int
    reachable: bool = True
    ancestors: tuple[QualifiedName, ...] = ()
    children: bool = False
    leaves: tuple[Partition, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a row for the index: of the replica identity's own index, else the primary key."""
        if self.identity_mode == "i" and self.identity:
            return self.identity
        return self.primary_key


async def similar_tables(connection: Connection, name: QualifiedName) -> list[QualifiedName]:
    """Return the tables in the same schema, and those of the same name in others."""
    cursor = await connection.execute(
        """
        SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND (n.nspname = %s OR c.relname = %s) ORDER BY 1, 2
        """,
        [name.schema, name.name],
    )
    return [QualifiedName(schema, table) for schema, table in await cursor.fetchall()]


async def read_table(connection: Connection, name: QualifiedName) -> Table | None:
    """Return the table, or None when there is no table (or partitioned table, or foreign table, …) of that name."""
    row = await fetch_row(
        connection,
        """
        SELECT c.oid::int8, c.relkind::text, c.relpersistence::text, c.relreplident::text,
               has_table_privilege(c.oid, 'SELECT'), pg_has_role(c.relowner, 'USAGE'),
               c.relrowsecurity AND NOT (SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user)
                   AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')),
               greatest(c.reltuples, 0)::int8, has_schema_privilege(n.oid, 'USAGE'),
               c.relkind <> 'p' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        """,
        [name.schema, name.name],
    )
    if row is None:
        return None
    oid, kind, persistence, mode, readable, owned, row_security, estimate, reachable, children = row
    primary_key, identity = await _keys(connection, oid)
    return Table(
        oid=oid,
        name=name,
        kind=kind,
        persistence=persistence,
        columns=await _columns(connection, oid),
        primary_key=primary_key,
        identity_mode=mode,
        identity=identity,
        readable=readable,
        owned=owned,
        row_security=row_security,
        estimated_rows=estimate,
        reachable=reachable,
        ancestors=await _ancestors(connection, oid),
        children=children,
        leaves=await _leaves(connection, oid) if kind == "p" else (),
    )


async def _columns(connection: Connection, oid: int) -> dict[str, Column]:
    cursor = await connection.execute(
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated::text,
               has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
               (WITH RECURSIVE domains(type, modifier) AS (
                    SELECT typbasetype, typtypmod FROM pg_type WHERE oid = a.atttypid AND typtype = 'd'
                    UNION ALL
                    SELECT t.typbasetype, t.typtypmod FROM domains d JOIN pg_type t ON t.oid = d.type
                    WHERE t.typtype = 'd'
                )
                SELECT format_type(d.type, d.modifier) FROM domains d JOIN pg_type t ON t.oid = d.type
                WHERE t.typtype <> 'd'),
               ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = a.atttypid ORDER BY enumsortorder),
               a.atttypid::int8, a.atttypmod
        FROM pg_attribute a WHERE a.attrelid = %s::int8::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
        """,
        [oid],
    )
    return {
        name: Column(name, type_, not_null, generated, readable, base_type, tuple(labels), (oid_of_type, modifier))
        for name, type_, not_null, generated, readable, base_type, labels, oid_of_type, modifier in (
            await cursor.fetchall()
        )
    }


_INDEX_COLUMNS = """
    SELECT array_agg(a.attname::text ORDER BY k.place)
    FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)
    JOIN pg_attribute a ON a.attnum = k.attnum
    WHERE i.indrelid = c.oid AND a.attrelid = c.oid AND k.place <= i.indnkeyatts AND
"""
# A deferrable primary key identifies nothing: while a change is made it need not be unique.
_IDENTITY = (
    "CASE c.relreplident WHEN 'f' THEN"
    " (SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute"
    " WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)"
    f" WHEN 'd' THEN ({_INDEX_COLUMNS} i.indisprimary AND i.indimmediate)"
    f" WHEN 'i' THEN ({_INDEX_COLUMNS} i.indisreplident) END"
)
"""SQL for the replica identity's columns of `pg_class c`; NULL when it has none."""


async def _keys(connection: Connection, oid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the columns of the primary key, unless it is deferrable, and those of the replica identity.

    Under a deferrable key two rows may have one key until the transaction ends: no order of changes by key is right.
    """
    cursor = await connection.execute(
        f"SELECT ({_INDEX_COLUMNS} i.indisprimary AND i.indimmediate), {_IDENTITY}"
        " FROM pg_class c WHERE c.oid = %s::int8::oid",
        [oid],
    )
    primary_key, identity = await cursor.fetchone() or (None, None)
    return tuple(primary_key or ()), tuple(identity or ())


async def _ancestors(connection: Connection, oid: int) -> tuple[QualifiedName, ...]:
    cursor = await connection.execute(
        """
        SELECT n.nspname, c.relname FROM pg_partition_ancestors(%s::int8::oid) AS a(relid)
        JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid <> %s::int8::oid
        """,
        [oid, oid],
    )
    return tuple(QualifiedName(schema, name) for schema, name in await cursor.fetchall())


async def _leaves(connection: Connection, oid: int) -> tuple[Partition, ...]:
    cursor = await connection.execute(
        f"""
        SELECT n.nspname, c.relname, c.relkind::text, c.relpersistence::text, c.relreplident::text, {_IDENTITY}
        FROM pg_partition_tree(%s::int8::oid) p JOIN pg_class c ON c.oid = p.relid
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind <> 'p' ORDER BY 1, 2
        """,
        [oid],
    )
    return tuple(
        Partition(QualifiedName(schema, name), kind, persistence, mode, tuple(identity or ()))
        for schema, name, kind, persistence, mode, identity in await cursor.fetchall()
    )
