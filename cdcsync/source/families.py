"""Many equal tables as one: a family, for an index over tables such as those of each tenant's schema.

The family stands in the catalog under the name of its patterns. It has the columns that all its members have with the
same type, the members' common key behind the name of the table, and the members as leaves, as partitions are. So a
table that appears or goes is what a partition that is attached or detached is.

Source: PostgreSQL, "System Catalogs" (pg_class, pg_namespace), "Pattern Matching" (LIKE).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.postgres.sessions import Connection
from cdcsync.source.columns import Column
from cdcsync.source.publications import Publication, Published
from cdcsync.source.relations import Partition, Table

TEXT = 25
"""The OID of the type text."""


async def members_of(connection: Connection, family: QualifiedName) -> list[QualifiedName]:
    """Return the tables that match one of a family's patterns, in the order of their names.

    Partitions are not among them, nor are our own tables, in any pipeline's schema.
    """
    patterns = [(_like(one.schema), _like(one.name)) for one in family.patterns]
    cursor = await connection.execute(
        """
        SELECT DISTINCT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN unnest(%s::text[], %s::text[]) AS wanted (schema, name)
            ON n.nspname LIKE wanted.schema AND c.relname LIKE wanted.name
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname NOT LIKE 'pg\\_%%'
            AND n.nspname <> 'information_schema'
            AND NOT EXISTS (SELECT FROM pg_class o WHERE o.relnamespace = n.oid AND o.relname = 'pipelines'
                AND obj_description(o.oid, 'pg_class') LIKE 'cdcsync:%%')
        """,
        [[schema for schema, _ in patterns], [name for _, name in patterns]],
    )
    return sorted((QualifiedName(schema, table) for schema, table in await cursor.fetchall()), key=str)


async def single_names(connection: Connection, names: Iterable[str]) -> set[str]:
    """Return names of tables with the present members in place of each family, all of them as texts."""
    found = set()
    for name in names:
        if '"' in name or not ("*" in name or ", " in name):  # the name of one table has such signs in quotes only
            found.add(name)
        else:
            found |= {str(one) for one in await members_of(connection, QualifiedName("", name))}
    return found


def _like(pattern: str) -> str:
    return pattern.replace("_", r"\_").replace("*", "%")


def as_one(family: QualifiedName, members: Sequence[Table]) -> Table:
    """Return many tables as one."""
    first, *others = members
    columns = {SOURCE_TABLE: Column(SOURCE_TABLE, "text", True, "", wire_type=(TEXT, -1))}
    for name, column in first.columns.items():
        if name == SOURCE_TABLE:
            continue
        same = [one.columns.get(name) for one in others]
        if all(one is not None and one.wire_type == column.wire_type for one in same):
            readable = column.readable and all(one is not None and one.readable for one in same)
            exact = column.deterministic and all(one is not None and one.deterministic for one in same)
            columns[name] = msgspec.structs.replace(
                column, number=0, expression=None, readable=readable, deterministic=exact
            )
    key = first.key if all(one.key == first.key for one in others) else ()
    return Table(
        oid=0,
        name=family,
        kind="r",
        persistence="p",
        columns=columns,
        primary_key=(SOURCE_TABLE, *key) if key else (),
        identity_mode="d",
        identity=(SOURCE_TABLE, *key),
        readable=all(one.readable for one in members),
        owned=all(one.owned for one in members),
        row_security=any(one.row_security for one in members),
        estimated_rows=sum(one.estimated_rows for one in members),
        reachable=all(one.reachable for one in members),
        leaves=tuple(_leaf(one) for one in members),
        types={oid: type_ for one in members for oid, type_ in one.types.items()},
    )


def _leaf(member: Table) -> Partition:
    """Return a member as a leaf; under another name it is another one."""
    name = str(member.name).replace("'", "''")
    return Partition(
        name=member.name,
        kind=member.kind,
        persistence=member.persistence,
        identity_mode=member.identity_mode,
        identity=(SOURCE_TABLE, *member.identity),
        oid=member.oid,
        file=member.file,
        attached=name,
        bounds=f"{SOURCE_TABLE} = '{name}'",
        written_by=member.written_by,
        columns={
            name: (column.number, *column.wire_type, column.expression) for name, column in member.columns.items()
        },
        collations={name: column.collation for name, column in member.columns.items()},
        columns_written={name: column.written_by for name, column in member.columns.items()},
        proven_by=member.keyed_by(member.key).proven_by,
    )


def rows_sent(publication: Publication | None, members: Sequence[QualifiedName]) -> dict[QualifiedName, str | None]:
    """Return the condition by which a publication chooses the rows of each member; None if it sends all of them."""
    sent = {name: publication.tables.get(name) if publication is not None else None for name in members}
    return {name: None if one is None else one.row_filter for name, one in sent.items()}


def sent_as_one(publication: Publication, family: QualifiedName, members: Sequence[Table]) -> Publication:
    """Return a publication with how it sends a family, if it sends all its members."""
    sent = [publication.tables.get(one.name) for one in members]
    if any(one is None for one in sent):
        return publication
    common = set.intersection(*(set(one.columns) for one in sent if one is not None))
    columns = (SOURCE_TABLE, *(name for name in members[0].columns if name in common))
    return msgspec.structs.replace(
        publication, tables={**publication.tables, family: Published(family, columns, None, listed=True)}
    )
