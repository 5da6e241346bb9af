"""The source's tables as its catalog describes them: keys, indexes, replica identity, partitions.

Only the tables that are asked for are read, with what they descend from and what they are divided into. Nothing is
assumed of any other table in the database.

Source: PostgreSQL, "System Catalogs" (pg_class, pg_index, pg_inherits); "ALTER TABLE" (REPLICA IDENTITY).
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.postgres.locking import LOCKED
from cdcsync.postgres.sessions import Connection
from cdcsync.source.columns import Column, Type, reachable_types, read_columns, read_types


class TableIndex(msgspec.Struct, frozen=True):
    """An index by whose first columns rows can be looked up: one of all rows, which sorts or hashes.

    :ivar unique: whether it proves that no two rows have the same values in its columns, at any moment.
    :ivar oid: that of its constraint, if it has one, which `REINDEX CONCURRENTLY` keeps; else its own.
    """

    columns: tuple[str, ...]
    unique: bool
    name: str = ""
    oid: int = 0


class Partition(msgspec.Struct, frozen=True):
    """A leaf of a partitioned table: kind, persistence and replica identity are its own, not the root's.

    :ivar file: its relfilenode, which TRUNCATE changes, and so does everything that rewrites it.
    :ivar attached: the transactions that attached it and its ancestors.
    :ivar bounds: the condition that its rows fulfil; None if it takes all, or cannot be asked because it is locked.
    :ivar written_by: the transaction that last wrote its entry in pg_class, as 32 bits.
    :ivar parent: what it is a partition of, which may be one itself.
    :ivar columns: of one of many equal tables, which has columns of its own: attribute number, type, modifier, and the
        OID of the expression.
    :ivar collations: of the same, the collations of its columns.
    :ivar columns_written: of the same, the transactions that last wrote its columns' entries.
    :ivar proven_by: of the same, see `Table.proven_by`.
    """

    name: QualifiedName
    kind: str
    persistence: str
    identity_mode: str
    identity: tuple[str, ...]
    oid: int = 0
    file: int = 0
    attached: str = ""
    bounds: str | None = None
    written_by: int = 0
    parent: QualifiedName | None = None
    columns: dict[str, tuple[int, int, int, int | None]] = {}
    collations: dict[str, str] = {}
    columns_written: dict[str, int] = {}
    proven_by: tuple[int, ...] = ()


class Table(msgspec.Struct, frozen=True):
    """A source table.

    :ivar kind: pg_class.relkind: "r" table, "p" partitioned, "v" view, "m" materialised view, "f" foreign table.
    :ivar persistence: pg_class.relpersistence: "p" permanent, "u" unlogged, "t" temporary.
    :ivar identity_mode: pg_class.relreplident: "d" default, "i" an index, "f" full, "n" nothing.
    :ivar identity: the columns that come with the old key of an UPDATE or DELETE.
    :ivar readable: whether the role may select all columns.
    :ivar row_security: whether policies would hide rows from the role.
    :ivar secured: whether it has row-level security, for whichever roles.
    :ivar reachable: whether the role may use the table's schema.
    :ivar ancestors: the partitioned tables that this one is a partition of, the nearest first.
    :ivar children: the tables that inherit from this one, which is not partitioned.
    :ivar leaves: a partitioned table's partitions that hold rows.
    :ivar file: its relfilenode; 0 if it is partitioned.
    :ivar types: the user-defined types that its columns are made of, by OID.
    :ivar written_by: the transaction that last wrote its entry in pg_class, as 32 bits.
    :ivar indexes: those by which rows can be looked up.
    :ivar named: the key that an index of ours names.
    :ivar ordered: the same columns in the order in which that index has them already, if it does.
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
    children: tuple[str, ...] = ()
    leaves: tuple[Partition, ...] = ()
    file: int = 0
    types: dict[int, Type] = {}
    written_by: int = 0
    indexes: tuple[TableIndex, ...] = ()
    named: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    secured: bool = False

    @property
    def inheritable(self) -> bool:
        """Whether other tables can inherit from it, whose rows are not its own."""
        return self.kind == "r"

    @property
    def example(self) -> QualifiedName:
        """A name for SQL: that of the table, or of the first of many."""
        return self.leaves[0].name if self.name.patterns else self.name

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a row for the index.

        Those that it names, or else those of the replica identity's own index, or else the primary key. Named ones come
        in the order of a unique index on them, so that pages in the order of the key need no sort; but an index that
        exists keeps its order, whatever becomes of that unique index.
        """
        if self.named and set(self.ordered) == set(self.named):
            return self.ordered
        if self.named:
            proven = next((one.columns for one in self.proofs), ())
            return (*proven, *(one for one in self.named if one not in proven))
        if self.identity_mode == "i" and self.identity:
            return self.identity
        return self.primary_key

    @property
    def proofs(self) -> list[TableIndex]:
        """The unique indexes that show that the named key names one row, those on most of its columns first."""
        found = [one for one in self.indexes if one.unique and set(one.columns) <= set(self.named)]
        return sorted(found, key=lambda one: (-len(one.columns), one.name))

    @property
    def proven_by(self) -> tuple[int, ...]:
        """The OIDs of these unique indexes: while there is one of them, the key has been unique at every moment."""
        return tuple(sorted(one.oid for one in self.proofs))

    def keyed_by(self, columns: tuple[str, ...], ordered: tuple[str, ...] = ()) -> Table:
        """Return the table as an index sees it that names its key; with no columns, the table itself.

        :param ordered: the key of that index, if it exists.
        """
        return msgspec.structs.replace(self, named=columns, ordered=ordered) if columns else self


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


_INDEX_COLUMNS = """
    SELECT array_agg(a.attname::text ORDER BY k.place)
    FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)
    JOIN pg_attribute a ON a.attnum = k.attnum
    WHERE i.indrelid = c.oid AND a.attrelid = c.oid AND k.place <= i.indnkeyatts AND
"""
# A deferrable primary key identifies nothing: while a change is made it need not be unique. Under one, two rows may
# have one key until the transaction ends, and no order of changes by key is right.
_PRIMARY_KEY = f"({_INDEX_COLUMNS} i.indisprimary AND i.indimmediate)"
_IDENTITY = (
    "CASE c.relreplident WHEN 'f' THEN"
    " (SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute"
    " WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)"
    f" WHEN 'd' THEN {_PRIMARY_KEY}"
    f" WHEN 'i' THEN ({_INDEX_COLUMNS} i.indisreplident) END"
)
"""SQL for the replica identity's columns of `pg_class c`; NULL when it has none."""


TELLS_ROWS_APART = """(
    i.indisunique AND i.indimmediate AND NOT EXISTS (
        SELECT FROM unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[])
            WITH ORDINALITY AS k (attnum, opclass, collated, place)
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        JOIN pg_opclass o ON o.oid = k.opclass
        LEFT JOIN pg_collation l ON l.oid = a.attcollation
        WHERE k.place <= i.indnkeyatts AND (
            k.collated <> a.attcollation AND NOT l.collisdeterministic
            OR (SELECT amopopr FROM pg_amop WHERE amopfamily = o.opcfamily AND amopstrategy = 3
                AND amoplefttype = o.opcintype AND amoprighttype = o.opcintype) IS DISTINCT FROM (
                SELECT e.amopopr FROM pg_opclass d JOIN pg_amop e ON e.amopfamily = d.opcfamily AND e.amopstrategy = 3
                    AND e.amoplefttype = d.opcintype AND e.amoprighttype = d.opcintype
                WHERE d.opcdefault AND d.opcmethod = o.opcmethod AND d.opcintype IN (o.opcintype, (
                    WITH RECURSIVE made_of (oid) AS (
                        SELECT a.atttypid UNION ALL
                        SELECT t.typbasetype FROM made_of m JOIN pg_type t ON t.oid = m.oid WHERE t.typtype = 'd')
                    SELECT m.oid FROM made_of m JOIN pg_type t ON t.oid = m.oid WHERE t.typtype <> 'd'))
                ORDER BY d.opcintype = o.opcintype LIMIT 1))))"""
"""SQL that says whether `pg_index i` keeps rows apart as their columns' types do, at any moment.

One that compares otherwise (citext by `text_ops`, a nondeterministic collation by another) has rows beside each other
whose keys are equal.
"""

_INDEXES = f"""(
    SELECT json_agg(json_build_object('name', x.relname, 'oid', coalesce((
        SELECT o.oid FROM pg_constraint o
        WHERE o.conrelid = i.indrelid AND o.conindid = i.indexrelid AND o.contype IN ('p', 'u')
    ), i.indexrelid)::int8, 'unique', {TELLS_ROWS_APART}, 'columns', (
        SELECT json_agg(a.attname ORDER BY k.place)
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE k.place <= i.indnkeyatts)))
    FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND m.amname IN ('btree', 'hash')
        AND 0 <> ALL(i.indkey::int2[]))
"""
"""SQL for the indexes of `pg_class c` that rows can be looked up by."""


async def read_table(connection: Connection, name: QualifiedName) -> Table | None:
    """Return the table, or None when there is no table (or partitioned table, or foreign table, …) of that name."""
    return (await read_tables(connection, [name])).get(name)


async def read_tables(connection: Connection, names: Collection[QualifiedName]) -> dict[QualifiedName, Table]:
    """Return those of the tables that exist, in a fixed number of statements."""
    cursor = await connection.execute(
        f"""
        SELECT n.nspname, c.relname, c.oid::int8, c.relkind::text, c.relpersistence::text, c.relreplident::text,
               has_table_privilege(c.oid, 'SELECT'), pg_has_role(c.relowner, 'USAGE'),
               c.relrowsecurity AND NOT (SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user)
                   AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')),
               greatest(c.reltuples, 0)::int8, has_schema_privilege(n.oid, 'USAGE'),
               array(SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = c.oid AND c.relkind <> 'p'
                     ORDER BY 1),
               c.relfilenode::int8, c.xmin::text::int8, c.relrowsecurity, {_PRIMARY_KEY}, {_IDENTITY}, {_INDEXES}
        FROM unnest(%s::text[], %s::text[]) AS wanted (schema, name)
        JOIN pg_namespace n ON n.nspname = wanted.schema
        JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
        """,
        [[name.schema for name in names], [name.name for name in names]],
    )
    found = await cursor.fetchall()
    oids = [row[2] for row in found]
    columns = await read_columns(connection, oids)
    ancestors = await _ancestors(connection, oids)
    leaves = await _leaves(connection, [row[2] for row in found if row[3] == "p"])
    types = await read_types(connection, {one.wire_type[0] for of in columns.values() for one in of.values()})
    tables = {}
    for schema, name, oid, kind, persistence, mode, *facts in found:
        readable, owned, row_security, estimate, reachable, children, file, xmin, secured, *by = facts
        primary_key, identity, indexes = by
        qualified = QualifiedName(schema, name)
        mine = columns.get(oid, {})
        tables[qualified] = Table(
            oid=oid,
            name=qualified,
            kind=kind,
            persistence=persistence,
            columns=mine,
            primary_key=tuple(primary_key or ()),
            identity_mode=mode,
            identity=tuple(identity or ()),
            readable=bool(readable),
            owned=bool(owned),
            row_security=row_security,
            estimated_rows=estimate,
            reachable=bool(reachable),
            ancestors=ancestors.get(oid, ()),
            children=tuple(children),
            leaves=leaves.get(oid, ()),
            file=file,
            types=reachable_types(types, [one.wire_type[0] for one in mine.values()]),
            written_by=xmin,
            indexes=msgspec.convert(indexes or (), tuple[TableIndex, ...]),
            secured=secured,
        )
    return tables


async def _ancestors(connection: Connection, oids: Collection[int]) -> dict[int, tuple[QualifiedName, ...]]:
    cursor = await connection.execute(
        """
        SELECT wanted.oid::int8, n.nspname, c.relname
        FROM unnest(%s::int8[]::oid[]) AS wanted (oid),
             pg_partition_ancestors(wanted.oid) WITH ORDINALITY AS a (relid, place)
        JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid <> wanted.oid ORDER BY a.place
        """,
        [list(oids)],
    )
    ancestors: dict[int, tuple[QualifiedName, ...]] = {}
    for oid, schema, name in await cursor.fetchall():
        ancestors[oid] = (*ancestors.get(oid, ()), QualifiedName(schema, name))
    return ancestors


async def _leaves(connection: Connection, roots: Collection[int]) -> dict[int, tuple[Partition, ...]]:
    if not roots:
        return {}
    cursor = await connection.execute(
        f"""
        WITH RECURSIVE tree (root, oid, parent) AS (
            SELECT root, root, NULL::oid FROM unnest(%s::int8[]::oid[]) AS root
            UNION ALL SELECT t.root, i.inhrelid, i.inhparent FROM tree AS t JOIN pg_inherits AS i ON i.inhparent = t.oid
            WHERE NOT i.inhdetachpending
        ), locked (oids) AS MATERIALIZED (SELECT {LOCKED})
        SELECT tree.root::int8, n.nspname, c.relname, above.nspname, parent.relname,
               c.relkind::text, c.relpersistence::text, c.relreplident::text, {_IDENTITY},
               c.oid::int8, c.relfilenode::int8,
               (SELECT string_agg(i.xmin::text, ' ' ORDER BY a.place)
                FROM pg_partition_ancestors(c.oid) WITH ORDINALITY AS a (relid, place)
                JOIN pg_inherits AS i ON i.inhrelid = a.relid),
               CASE WHEN NOT EXISTS (SELECT FROM pg_partition_ancestors(c.oid) AS a (oid), locked
                                     WHERE a.oid = ANY(locked.oids)) THEN pg_get_partition_constraintdef(c.oid) END,
               c.xmin::text::int8
        FROM tree JOIN pg_class c ON c.oid = tree.oid JOIN pg_namespace n ON n.oid = c.relnamespace
             JOIN pg_class AS parent ON parent.oid = tree.parent
             JOIN pg_namespace AS above ON above.oid = parent.relnamespace
        WHERE c.relkind <> 'p' ORDER BY 2, 3
        """,
        [list(roots)],
    )
    leaves: dict[int, list[Partition]] = {}
    for row in await cursor.fetchall():
        root, schema, name, above, parent, kind, persistence, mode, identity, oid, file, attached, bounds, xmin = row
        leaf = Partition(
            QualifiedName(schema, name),
            kind,
            persistence,
            mode,
            tuple(identity or ()),
            oid,
            file,
            attached or "",
            bounds,
            xmin,
            QualifiedName(above, parent),
        )
        leaves.setdefault(root, []).append(leaf)
    return {root: tuple(found) for root, found in leaves.items()}
