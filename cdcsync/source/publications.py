"""Publications: what one sends of the tables that are asked for, and the statements that create or extend it.

Of a publication's other tables nothing is read: there may be thousands, and of any kind.

Source: PostgreSQL, "System Catalogs" (pg_publication, pg_publication_rel, pg_publication_namespace); "Logical
Replication" (Publication, Row Filters, Column Lists, Generated Column Replication);
src/backend/catalog/pg_publication.c (GetTopMostAncestorInPublication, pg_get_publication_tables).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import LiteralString

import msgspec
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.postgres.locking import LOCKED
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection

GENERATED_COLUMNS_VERSION = 180000
"""PostgreSQL 18: a publication can send stored generated columns; earlier ones never do."""

FILTERS_VERSION = 150000
"""PostgreSQL 15: row filters, column lists, and publications of all tables in a schema."""

REFRESHED = {14: 18, 15: 13, 16: 9, 17: 5}
"""The minor release of each version from which on a change of the catalogs reaches the transactions that run during it,
as they are decoded ("Fix data loss in logical replication", May 2025). Versions that are not listed began with it."""

MADE = "made by cdcsync, which drops it with its pipeline"
"""The comment of a publication that a worker made. Without it the publication is somebody else's, and is kept."""


def fixed_in(version: int) -> str | None:
    """Return the release to upgrade a server to that may take a published table for another one; None if it does not.

    A transaction that wrote to a table before it was published, and committed after, is decoded with the catalogs of
    before. An earlier release keeps what they say: it sends nothing of the table any more, whichever transaction
    changes it, until the connection ends or the table is altered.

    :param version: 160002 is 16.2.
    """
    major, minor = divmod(version, 10000)
    first = REFRESHED.get(major, 0)
    return f"{major}.{first}" if minor < first else None


class Published(msgspec.Struct, frozen=True):
    """How a publication sends one table: which columns, and all rows if `row_filter` is None.

    :ivar listed: whether the publication names these columns; otherwise they follow the table.
    :ivar filter_columns: the columns that the row filter reads.
    :ivar locked: whether there is a row filter that could not be read, because the table is locked.
    """

    table: QualifiedName
    columns: tuple[str, ...]
    row_filter: str | None
    listed: bool = False
    filter_columns: tuple[str, ...] = ()
    locked: bool = False


class Publication(msgspec.Struct, frozen=True):
    """A publication; `tables` are those it sends of the ones that were asked for, under the names the stream uses.

    :ivar generated: whether it sends stored generated columns of tables without a column list.
    :ivar oid: its OID, and `edited` the transaction that edited it last.
    :ivar made: whether a worker made it.
    :ivar brought_by: what brings each table in, in the form that its last edit gave it: rows of pg_publication_rel
        and pg_publication_namespace of the table and its ancestors and, where the publication is of all tables or of a
        schema, their rows in pg_class, which say whether they belong to that.
    """

    name: str
    all_tables: bool
    owned: bool
    operations: frozenset[str]
    via_root: bool
    tables: dict[QualifiedName, Published]
    generated: bool = False
    oid: int = 0
    edited: str = ""
    made: bool = False
    brought_by: dict[QualifiedName, tuple[str, ...]] = {}


class _Relation(msgspec.Struct, frozen=True):
    """A table, or an ancestor of one, as far as the publication is concerned."""

    publishable: bool
    version: str
    row: str | None
    schema_row: str | None
    columns: tuple[str, ...]
    row_filter: str | None
    listed: bool
    filter_columns: tuple[str, ...]
    locked: bool


async def read_publication(
    connection: Connection, name: str, tables: Mapping[QualifiedName, Sequence[QualifiedName]] | None = None
) -> Publication | None:
    """Return the publication, or None when there is none of that name.

    :param tables: the tables to look for, each with its ancestors, the nearest first.
    """
    tables = tables or {}
    generated_columns = connection.info.server_version >= GENERATED_COLUMNS_VERSION
    row = await fetch_row(
        connection,
        sql.SQL(
            """
            SELECT puballtables, pg_has_role(pubowner, 'USAGE'), pubinsert, pubupdate, pubdelete, pubtruncate,
                   pubviaroot, oid::int8, xmin::text,
                   coalesce(obj_description(oid, 'pg_publication') = %s, false), {}
            FROM pg_publication WHERE pubname = %s
            """
        ).format(sql.SQL("pubgencols = 's'" if generated_columns else "false")),
        [MADE, name],
    )
    if row is None:
        return None
    all_tables, owned, *operations, via_root, oid, edited, made, generated = row
    relations = await _relations(connection, oid, generated, {*tables, *(one for of in tables.values() for one in of)})
    sent, brought_by = {}, {}
    for table, ancestors in tables.items():
        line = [one for one in (table, *ancestors) if one in relations]
        for place, one in enumerate(line):
            if (published := _published(line[place:], relations, all_tables=all_tables, via_root=via_root)) is not None:
                sent[one] = published
        brought_by[table] = _brought_by([relations[one] for one in line], all_tables=all_tables)
    names = ("insert", "update", "delete", "truncate")
    return Publication(
        name=name,
        all_tables=all_tables,
        owned=owned,
        operations=frozenset(operation for operation, on in zip(names, operations, strict=True) if on),
        via_root=via_root,
        tables=sent,
        generated=generated,
        oid=oid,
        edited=edited,
        made=made,
        brought_by=brought_by,
    )


def _published(
    line: Sequence[QualifiedName], relations: Mapping[QualifiedName, _Relation], *, all_tables: bool, via_root: bool
) -> Published | None:
    """Return how the first of `line` is sent under its own name, if it is; the others are its ancestors."""

    def direct(name: QualifiedName) -> bool:
        relation = relations[name]
        of_many = all_tables or relation.schema_row is not None
        return relation.row is not None or (of_many and relation.publishable)

    table, *ancestors = line
    above = any(direct(ancestor) for ancestor in ancestors)
    if (via_root and above) or not (direct(table) or above):
        return None
    mine = relations[table]
    if all_tables or mine.schema_row is not None:
        return Published(table, mine.columns, None)
    return Published(table, mine.columns, mine.row_filter, mine.listed, mine.filter_columns, mine.locked)


def _brought_by(line: Sequence[_Relation], *, all_tables: bool) -> tuple[str, ...]:
    of_many = all_tables or any(one.schema_row is not None for one in line)
    return tuple(
        version
        for one in line
        for version in (one.row, one.schema_row, one.version if of_many else None)
        if version is not None
    )


async def _relations(
    connection: Connection, publication: int, generated: bool, names: Collection[QualifiedName]
) -> dict[QualifiedName, _Relation]:
    version = connection.info.server_version
    cursor = await connection.execute(
        sql.SQL(_RELATIONS if version >= FILTERS_VERSION else _RELATIONS_BEFORE_15),
        {
            "publication": publication,
            "generated": generated,
            "schemas": [name.schema for name in names],
            "names": [name.name for name in names],
        },
    )
    return {QualifiedName(schema, name): _relation(*facts) for schema, name, *facts in await cursor.fetchall()}


def _relation(
    publishable: bool,
    version: str,
    row: str | None,
    schema_row: str | None,
    columns: Sequence[str],
    row_filter: str | None,
    listed: bool | None,
    filter_columns: Sequence[str],
    locked: bool,
) -> _Relation:
    return _Relation(
        publishable, version, row, schema_row, tuple(columns), row_filter, bool(listed), tuple(filter_columns), locked
    )


_SELECTED: LiteralString = """
    SELECT n.nspname, c.relname, c.relkind IN ('r', 'p') AND c.relpersistence = 'p',
           'table ' || c.oid || ' ' || c.xmin, 'row ' || r.oid || ' ' || r.xmin
"""
_JOINED: LiteralString = """
    FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS wanted (schema, name)
    JOIN pg_namespace n ON n.nspname = wanted.schema
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name
    LEFT JOIN pg_publication_rel r ON r.prrelid = c.oid AND r.prpubid = %(publication)s::int8::oid
"""
_RELATIONS: LiteralString = (
    _SELECTED
    + """
    , 'schema ' || s.oid || ' ' || s.xmin,
    ARRAY(SELECT attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          AND CASE WHEN r.prattrs IS NOT NULL THEN a.attnum = ANY(r.prattrs::int2[])
              ELSE a.attgenerated = '' OR a.attgenerated = 's' AND %(generated)s END
          ORDER BY a.attnum),
    CASE WHEN c.oid = ANY(locked.oids) THEN NULL ELSE pg_get_expr(r.prqual, r.prrelid) END, r.prattrs IS NOT NULL,
    ARRAY(SELECT DISTINCT a.attname::text
          FROM regexp_matches(r.prqual::text, ':varattno (\\d+)', 'g') AS used (number)
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = used.number[1]::int2 ORDER BY 1),
    coalesce(r.prqual IS NOT NULL AND c.oid = ANY(locked.oids), false)
"""
    + _JOINED
    + """
    LEFT JOIN pg_publication_namespace s ON s.pnnspid = n.oid AND s.pnpubid = %(publication)s::int8::oid
    CROSS JOIN (SELECT """
    + LOCKED
    + """ AS oids OFFSET 0) AS locked
"""
)
# The columns that a row filter reads: no function tells them, and pg_depend does not tell them from a column list.
_RELATIONS_BEFORE_15: LiteralString = (
    _SELECTED
    + """
    , NULL,
    ARRAY(SELECT attname::text FROM pg_attribute
          WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum),
    NULL, false, '{}'::text[], false
"""
    + _JOINED
)


async def published_names(connection: Connection, name: str) -> list[QualifiedName]:
    """Return the names of all tables that a publication sends."""
    cursor = await connection.execute(
        "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s", [name]
    )
    return [QualifiedName(schema, table) for schema, table in await cursor.fetchall()]


async def named_tables(connection: Connection, name: str) -> list[QualifiedName]:
    """Return the names of the tables that a publication names itself: not those that come with a schema or parent."""
    cursor = await connection.execute(
        "SELECT n.nspname, c.relname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
        " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s",
        [name],
    )
    return [QualifiedName(schema, table) for schema, table in await cursor.fetchall()]


def create_publication_statement(name: str, tables: Sequence[QualifiedName], *, version: int) -> sql.Composed:
    """Return the statement that creates a publication of `tables`, or of none yet.

    :param version: the server's. If it can, the publication sends stored generated columns: templates may use them,
        and without them UPDATE and DELETE would fail on a table that has some and REPLICA IDENTITY FULL.
    """
    generated = ", publish_generated_columns = stored" if version >= GENERATED_COLUMNS_VERSION else ""
    of = sql.SQL(" FOR TABLE {}").format(_names(tables)) if tables else sql.SQL("")
    return sql.SQL("CREATE PUBLICATION {}{} WITH (publish_via_partition_root = true" + generated + ")").format(
        sql.Identifier(name), of
    )


def mark_statement(name: str) -> sql.Composed:
    """Return the statement that marks a publication as one that a worker made."""
    return sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(sql.Identifier(name), sql.Literal(MADE))


def publish_statement(name: str, tables: Sequence[QualifiedName]) -> sql.Composed:
    """Return the statement that adds `tables` to a publication."""
    return sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(sql.Identifier(name), _names(tables))


def unpublish_statement(name: str, tables: Sequence[QualifiedName]) -> sql.Composed:
    """Return the statement that takes `tables` out of a publication."""
    return sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(sql.Identifier(name), _names(tables))


def _names(tables: Sequence[QualifiedName]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(table.schema, table.name) for table in tables)
