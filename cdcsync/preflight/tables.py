"""An index's source table: whether it has what the index asks for, can be read, and names the row of each change.

The functions here know no server, but for two that look further into what the catalog does not tell.

Source: PostgreSQL, "Logical Replication" (Publication, Restrictions), "Row Security Policies", "Table Partitioning".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import psycopg
from psycopg import sql

from cdcsync.config import Index, QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.documents.documents import Documents
from cdcsync.documents.related import ONE
from cdcsync.model.conditions import Where
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding, nearest
from cdcsync.source.catalog import Catalog
from cdcsync.source.columns import Column, Type
from cdcsync.source.conditions import Refused, examine_condition
from cdcsync.source.publications import GENERATED_COLUMNS_VERSION, Published
from cdcsync.source.relations import Partition, Table, TableIndex, similar_tables
from cdcsync.target.ddl.relations import RESERVED
from cdcsync.target.entries import Entry

SYSTEM_SCHEMAS = ("pg_catalog", "information_schema", "pg_toast")
"""Schemas that PostgreSQL never publishes."""

_WRONG_KINDS = {
    "v": ("is a view: it has no changes of its own", "index the table that the view reads"),
    "m": ("is a materialised view: it has no changes of its own", "index the table that the view reads"),
    "f": ("is a foreign table: its changes happen on another server", "point source.dsn at the server that holds it"),
}


async def no_such_table(connection: Connection, where: str, table: QualifiedName) -> Finding:
    """Say that there is no such table, and which one was meant."""
    similar = await similar_tables(connection, table)
    by_name = {other.name: other for other in similar if other.schema == table.schema}
    elsewhere = next((other for other in similar if other.name == table.name), None)
    best = elsewhere or by_name.get(nearest(table.name, by_name) or "")
    hint = f"did you mean {best}?" if best else "create it, or correct the name; cdcsync does not create source tables"
    return Finding.error(where, f"there is no table {table} in the source database", hint)


async def examine_row_filter(connection: Connection, table: Table, sent: Published, role: str) -> list[Finding]:
    """Say whether the role could not read the columns by which a publication chooses the table's rows.

    Of a table that somebody holds locked, the first reading tells.
    """
    if sent.row_filter is None or table.readable or not table.reachable:
        return []
    try:
        await connection.execute(
            sql.SQL("SELECT FROM {} AS t WHERE ({}) LIMIT 0").format(
                sql.Identifier(table.name.schema, table.name.name),
                sql.SQL(sent.row_filter),
            )
        )
    except psycopg.errors.LockNotAvailable:
        return []
    except psycopg.errors.InsufficientPrivilege:
        return [
            Finding.error(
                str(table.name),
                f"the role {quote(role)} may not read every column by which the publication chooses rows:"
                f" {sent.row_filter}",
                f"GRANT SELECT ON {table.name} TO {quote(role)}, or only on the columns that are named there",
            )
        ]
    return []


async def examine_where(
    connection: Connection,
    name: str,
    index: Index,
    table: Table,
    catalog: Catalog,
    in_use: Collection[str],
    findings: list[Finding],
) -> Where | None:
    """Return the index's condition on its rows; None if it has none, or one that cannot be used, which is noted.

    :param in_use: the conditions that the index goes by already.
    """
    if not index.where or not table.reachable:
        return None
    try:
        sent = sendable(table, catalog)
        exact = [one.name for one in table.columns.values() if one.deterministic] if table.name.patterns else None
        in_use_too = index.where in in_use
        return await examine_condition(connection, table.example, index.where, sent, in_use=in_use_too, exact=exact)
    except Refused as error:
        role = quote(catalog.role)
        findings.append(
            Finding.error(
                f"indexes.{name}.where",
                f"the condition cannot be used: {error.message}",
                f"GRANT SELECT ON {table.example} TO {role}" if error.privilege else error.hint,
            )
        )
        return None


def sendable(table: Table, catalog: Catalog) -> list[str]:
    """Return the columns of a table that the publication sends, or will send once the table is added to it."""
    publication = catalog.publication
    sent = publication.tables.get(table.name) if publication is not None else None
    if sent is not None:
        return list(sent.columns)
    stored = catalog.version >= GENERATED_COLUMNS_VERSION and (publication is None or publication.generated)
    return [one.name for one in table.columns.values() if not one.generated or (one.generated == "s" and stored)]


def kind_faults(where: str, table: Table) -> list[Finding]:
    """Say why a relation cannot be published at all."""
    wrong = _WRONG_KINDS.get(table.kind)
    if table.name.schema in SYSTEM_SCHEMAS:
        wrong = ("belongs to the system: PostgreSQL does not publish it", "index a table of your own")
    elif wrong is None and table.persistence == "u":
        wrong = ("is unlogged: its changes are not in the WAL", f"ALTER TABLE {table.name} SET LOGGED")
    elif wrong is None and table.persistence == "t":
        wrong = ("is temporary", "index a table that lasts")
    elif wrong is None and table.children:
        told = named(table.children)
        wrong = (
            f"is inherited from by {told}: their rows are read with it, but their changes come under other names",
            f"ALTER TABLE {table.children[0]} NO INHERIT {table.name}; or make it a partitioned table, or give each"
            " child an index of its own and this table no index",
        )
    return [Finding.error(where, f"{table.name} {wrong[0]}", wrong[1])] if wrong else []


def needed_columns(index: Index, documents: Documents | None, table: Table) -> list[Column]:
    """Return the columns of the table that the index reads, without those that are missing."""
    used = (*table.key, *index.columns, *((*documents.columns, *documents.joined) if documents else ()))
    return [table.columns[column] for column in dict.fromkeys(used) if column in table.columns]


def table_faults(
    name: str, index: Index, documents: Documents | None, table: Table, role: str, stored: Entry | None
) -> list[Finding]:
    """Say what the index needs and the table lacks, independently of the publication.

    :param stored: the index as it exists, if it does.
    """
    return [
        *column_faults(name, index, documents, table, stored),
        *read_faults(table, needed_columns(index, documents, table), role),
        *(named_key_faults(name, table, stored) if table.named else key_faults(table)),
    ]


def no_column(where: str, table: Table, column: str, stored: Entry | None, meant: str | None = None) -> Finding:
    """Say that a table has no such column.

    :param meant: the fix if it was misspelled, by default by the table's columns; not so if the index has read it.
    """
    message = f"{table.name} has no column {quote(column)}"
    known = stored.numbers.get((str(table.name), column)) if stored is not None else None
    if known is None:
        return Finding.error(where, message, meant or _meant(column, table.columns, "its columns are"))
    called = next((quote(one.name) for one in table.columns.values() if (table.oid, one.number) == known), None)
    if called is None:
        return Finding.error(where, message, f"add the column again, or take it out of {where}")
    rename = f"ALTER TABLE {table.name} RENAME COLUMN {called} TO {quote(column)}"
    return Finding.error(where, f"{message}: it is called {called} now", f"{rename}, or name {called} in {where}")


def column_faults(
    name: str, index: Index, documents: Documents | None, table: Table, stored: Entry | None = None
) -> Iterator[Finding]:
    """Say which columns are missing, named twice, or named like ours."""
    read = () if documents is None else documents.body.columns
    named = "text" if index.documents is None else "document_columns"
    around = [column for column in (documents.columns if documents else ()) if column not in read]
    computed = documents.computed if documents is not None else frozenset()
    for key, columns in (("columns", index.columns), (named, read), ("chunk_text", around)):
        for column in dict.fromkeys(columns):
            # Of a section that cannot be read it is unknown what it makes.
            unread = documents is None and column.partition(ONE)[0] in index.related
            if column not in table.columns and column not in computed and not unread:
                meant = _related_meant(name, index, column, table)
                yield no_column(f"indexes.{name}.{key}", table, column, stored, meant)
    for column in dict.fromkeys(index.columns):
        if column in table.key:
            yield Finding.error(
                f"indexes.{name}.columns",
                f"{quote(column)} belongs to the key, which is carried anyway",
                f'remove "{column}" from indexes.{name}.columns',
            )
    held = (*table.key, *index.columns)
    for column in dict.fromkeys(held):
        if column in RESERVED:
            in_key = column in table.key
            yield Finding.error(
                str(table.name) if in_key else f"indexes.{name}.columns",
                f"{quote(column)} is the name of a column of cdcsync's own in the index",
                f"give [indexes.{name}.related.{column}] another name"
                if column in index.related
                else f"ALTER TABLE {table.example} RENAME COLUMN {quote(column)} TO …"
                + (" and so for each table" if table.name.patterns else "")
                + ("" if in_key else f', or remove "{column}" from indexes.{name}.columns'),
            )
    for column in index.indexed:
        if column not in held:
            yield Finding.error(
                f"indexes.{name}.indexed",
                f"{quote(column)} is not a column of the index",
                f'add "{column}" to indexes.{name}.columns'
                if column in table.columns
                else _meant(column, held, "the index has"),
            )


def named_back(called: QualifiedName, name: QualifiedName) -> str:
    """Return the statements that give a table the name back that it had."""
    renamed = QualifiedName(called.schema, name.name)
    statements = [] if called == renamed else [f"ALTER TABLE {called} RENAME TO {quote(name.name)}"]
    if called.schema != name.schema:
        statements.append(f"ALTER TABLE {renamed} SET SCHEMA {quote(name.schema)}")
    return "; ".join(statements)


def _related_meant(name: str, index: Index, column: str, table: Table) -> str | None:
    """Say which value of a related row was meant, or which section, by a name that is not nearly a column's."""
    if nearest(column, table.columns):
        return None
    section, dot, of = column.partition(ONE)
    best = nearest(section, index.related)
    if best is not None:
        return f'did you mean "{best}{dot}{of}"?'
    return f"relate a table: [indexes.{name}.related.{section}]" if dot else None


def _meant(word: str, known: Sequence[str] | dict[str, Column], listing: str) -> str:
    best = nearest(word, known)
    return f'did you mean "{best}"?' if best else f"{listing} {named(known)}"


def read_faults(table: Table, needed: Sequence[Column], role: str) -> Iterator[Finding]:
    """Say why the role could not read the table's rows, or not all of them."""
    role = quote(role)
    if not table.reachable:
        schema = quote(table.name.schema)
        yield Finding.error(
            str(table.name),
            f"the role {role} may not use the schema {schema}",
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
        )
    hidden = [quote(column.name) for column in needed if not column.readable]
    if hidden and not table.readable:
        yield Finding.error(
            str(table.name),
            f"the role {role} may not read {named(hidden)}",
            f"GRANT SELECT ON {table.name} TO {role}",
        )
    if table.row_security:
        yield Finding.error(
            str(table.name),
            f"row-level security would hide rows from the role {role} that replication sends",
            f"ALTER ROLE {role} BYPASSRLS",
        )


def key_faults(table: Table) -> Iterator[Finding]:
    """Say why a change would not identify its row."""
    key = ", ".join(map(quote, table.key))
    alter = f"ALTER TABLE {table.name} REPLICA IDENTITY"
    if not table.key:
        fix = f"{alter} USING INDEX …"
        if (unique := _identifying(table)) is not None:
            listed = ", ".join(f'"{column}"' for column in unique.columns)
            fix = f"{alter} USING INDEX {quote(unique.name)}, or {alter} FULL with key = [{listed}] for the index"
        yield Finding.error(
            str(table.name),
            "has no usable primary key (deferrable keys do not count)",
            f"ALTER TABLE {table.name} ADD PRIMARY KEY (…), or with a unique index on NOT NULL columns: {fix}",
        )
    elif not set(table.key) <= set(table.identity):
        why, fix = {
            "n": ("is NOTHING", f"{alter} DEFAULT"),
        }.get(table.identity_mode, ("is an index that was dropped", f"{alter} DEFAULT"))
        yield Finding.error(
            str(table.name), f"its replica identity {why}: UPDATE and DELETE do not send the key ({key})", fix
        )
    else:
        yield from _null_faults(str(table.name), table)
        yield from incomparable(str(table.name), table, table.key)
        if table.identity_mode == "i" and not _told_apart(table):
            yield Finding.error(
                str(table.name),
                f"the index that is its replica identity compares ({key}) in another way than the columns' types do, so"
                " that rows with equal keys may be beside each other",
                f"{_unique_index(table, key)}, without an operator class or a collation, and {alter} USING INDEX with"
                " that one",
            )
        yield from leaf_faults(table, key)


def _told_apart(table: Table) -> bool:
    """Say whether a unique index keeps apart the rows that the replica identity is to name."""
    return any(one.unique and set(one.columns) <= set(table.identity) for one in table.indexes)


def _identifying(table: Table) -> TableIndex | None:
    """Return a unique index by which every row can be named, if there is one."""
    known = table.columns
    of_all = (one for one in table.indexes if one.unique and all(known[column].not_null for column in one.columns))
    return min(of_all, key=lambda one: (len(one.columns), one.name), default=None)


def _null_faults(where: str, table: Table) -> Iterator[Finding]:
    """Say which columns of the key may be NULL, so that they name no row."""
    if nullable := [quote(column) for column in table.key if not table.columns[column].not_null]:
        yield Finding.error(
            where,
            f"{named(nullable)} of {table.name} may be NULL, so it cannot identify a row",
            f"ALTER TABLE {table.name} " + ", ".join(f"ALTER COLUMN {one} SET NOT NULL" for one in nullable),
        )


def incomparable(where: str, table: Table, columns: Collection[str]) -> Iterator[Finding]:
    """Say which columns are of a domain over an enum: PostgreSQL itself has no operator = for its values."""
    for column in (table.columns[one] for one in columns):
        if column.base_type is not None and _over_enum(table.types, column.wire_type[0]):
            yield Finding.error(
                where,
                f"{quote(column.name)} of {table.name} is of {column.type}, a domain over an enum: PostgreSQL has no"
                " operator = for its values, so no row can be looked up by it",
                f"ALTER TABLE {table.name} ALTER COLUMN {quote(column.name)} TYPE {column.base_type}; the domain's"
                " checks can be constraints of the table",
            )


def _over_enum(types: Mapping[int, Type], oid: int) -> bool:
    of = types.get(oid)
    while of is not None and of.kind == "d":
        ((_, base, _),) = of.parts
        of = types.get(base)
    return of is not None and of.kind == "e"


def named_key_faults(name: str, table: Table, stored: Entry | None) -> Iterator[Finding]:
    """Say why the key that an index names does not tell its rows apart, or does not come with their changes."""
    where = f"indexes.{name}.key"
    if missing := [column for column in table.named if column not in table.columns]:
        for column in missing:
            yield no_column(where, table, column, stored)
        return
    key = ", ".join(map(quote, table.key))
    yield from _null_faults(where, table)
    yield from incomparable(where, table, table.key)
    if not table.proofs:
        yield Finding.error(
            where,
            f"({key}) is not known to identify a row of {table.name}: that takes a unique index on these columns, or on"
            " some of them, which is neither partial nor deferrable",
            _unique_index(table, key),
        )
    if table.identity_mode == "f" or set(table.identity) == set(table.key):
        yield from leaf_faults(table, key)
        return
    alter = f"ALTER TABLE {table.name} REPLICA IDENTITY"
    exact = next((one.name for one in table.proofs if set(one.columns) == set(table.key)), None)
    identity = ", ".join(map(quote, table.identity))
    yield Finding.error(
        where,
        f"the replica identity of {table.name} is {f'({identity})' if identity else 'nothing'}:"
        f" UPDATE and DELETE do not send the key ({key})",
        f"{alter} USING INDEX {quote(exact)}, or {alter} FULL" if exact else f"{alter} FULL",
    )


def _unique_index(table: Table, key: str) -> str:
    """Return the statement that makes a unique index; of a partitioned table the server makes none CONCURRENTLY."""
    return f"CREATE UNIQUE INDEX{'' if table.kind == 'p' else ' CONCURRENTLY'} ON {table.name} ({key})"


def unsent_leaves(table: Table) -> list[Partition]:
    """Return the partitions whose changes are not sent: foreign and unlogged ones."""
    return [leaf for leaf in table.leaves if leaf.kind != "r" or leaf.persistence != "p"]


def unsent_faults(table: Table, unsent: Sequence[Partition]) -> Iterator[Finding]:
    """Say which partitions would not send their changes."""
    if unsent:
        yield Finding.error(
            str(table.name),
            f"the changes of foreign and unlogged partitions are not sent: {named(str(one.name) for one in unsent)}",
            f"ALTER TABLE {unsent[0].parent} DETACH PARTITION {unsent[0].name} and so on, or make them ordinary tables",
        )


def leaf_faults(table: Table, key: str) -> Iterator[Finding]:
    """Say which partitions would not send their changes, or not as the root promises."""
    unsent = unsent_leaves(table)
    yield from unsent_faults(table, unsent)
    blind = [leaf for leaf in table.leaves if leaf not in unsent and not set(table.key) <= set(leaf.identity)]
    keyed = set(table.primary_key) == set(table.key)
    if blind:
        logged = "DEFAULT" if keyed and table.identity_mode != "f" else "FULL"
        yield Finding.error(
            str(table.name),
            f"replica identities of partitions do not cover the key ({key}): {named(str(one.name) for one in blind)}",
            f"ALTER TABLE {blind[0].name} REPLICA IDENTITY {logged}, and so on for each",
        )
    # An old row is announced as whole when the root says FULL, and the NULLs of a leaf that logs only its key
    # would be taken for values.
    partial = [leaf for leaf in table.leaves if leaf not in (*unsent, *blind) and leaf.identity_mode != "f"]
    if table.identity_mode == "f" and partial:
        yield Finding.error(
            str(table.name),
            f"REPLICA IDENTITY is FULL and that of partitions is not: {named(str(one.name) for one in partial)}",
            (f"ALTER TABLE {table.name} REPLICA IDENTITY DEFAULT, or " if keyed else "")
            + f"ALTER TABLE {partial[0].name} REPLICA IDENTITY FULL, and so on for each partition",
        )
