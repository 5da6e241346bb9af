"""Checks what a publication sends of an index's table: the table at all, under its own name, and every needed column.

And what a publication would do to the table: `failing_writes` says which UPDATE and DELETE the server would refuse.

These functions know no server.

Source: PostgreSQL, "Logical Replication" (Publication, Row Filters, Column Lists, Generated Column Replication);
"CREATE PUBLICATION"; src/backend/commands/publicationcmds.c (pub_contains_invalid_column);
src/backend/executor/execReplication.c (CheckCmdReplicaIdentity).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from cdcsync.config import QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.source import SourceFacts
from cdcsync.source.catalog import Catalog
from cdcsync.source.columns import Column
from cdcsync.source.publications import (
    FILTERS_VERSION,
    GENERATED_COLUMNS_VERSION,
    Publication,
    Published,
    create_publication_statement,
)
from cdcsync.source.relations import Table


def creation_faults(source: SourceFacts) -> Iterator[Finding]:
    """Say why the role could not create the publication of the tables of all indexes."""
    reasons = []
    if not source.server.may_create:
        reasons.append(f"may not create one in the database {quote(source.server.database)}")
    tables = source.catalog.tables
    foreign = [str(name) for name in sorted(source.wanted) if name in tables and not tables[name].owned]
    if foreign:
        reasons.append(f"does not own {named(foreign)}")
    if reasons:
        name = source.catalog.publication_name
        statement = create_publication_statement(name, sorted(source.wanted), version=source.server.version)
        yield Finding.error(
            f"publication {name}",
            f"does not exist, and the role {quote(source.server.role)} {' and '.join(reasons)}",
            f"as an owner of the tables: {statement.as_string(None)}",
        )


def sending_findings(
    table: Table, needed: Sequence[Column], catalog: Catalog, wanted: Collection[QualifiedName]
) -> Iterator[Finding]:
    """Say which changes of the table would not arrive, or not under its name, or not with every column.

    :param wanted: the tables of all indexes, which `run` publishes.
    """
    publication = catalog.publication
    where = f"publication {catalog.publication_name}"
    via_root = publication is None or publication.via_root
    published = wanted if publication is None else {*publication.tables, *wanted}
    yield from unsendable_columns(table, needed, catalog.version)
    if above := [ancestor for ancestor in table.ancestors if via_root and ancestor in published]:
        yield Finding.error(
            where,
            f"sends the changes of the partition {table.name} as those of {above[0]}",
            f"index {above[0]} and not its partition, or name another publication with source.publication",
        )
    elif table.kind == "p" and not via_root:
        yield Finding.error(
            where,
            f"sends the changes of the partitioned table {table.name} under the names of its partitions",
            f"ALTER PUBLICATION {quote(catalog.publication_name)} SET (publish_via_partition_root = true)",
        )
    elif publication is not None:
        yield from published_findings(table, needed, publication, catalog.version)
    yield from write_findings(table, catalog)


def unsendable_columns(table: Table, needed: Sequence[Column], version: int) -> Iterator[Finding]:
    """Say which columns no publication of this server sends."""
    instead = "use the columns that it is computed from instead"
    if virtual := _generated(needed, "v"):
        yield Finding.error(
            str(table.name),
            f"a virtual generated column is never sent: {named(virtual)}",
            f"{instead}, or make it STORED",
        )
    stored = _generated(needed, "s")
    if stored and version < GENERATED_COLUMNS_VERSION:
        yield Finding.error(
            str(table.name),
            f"before PostgreSQL {GENERATED_COLUMNS_VERSION // 10000} no generated column is sent: {named(stored)}",
            instead,
        )


def published_findings(
    table: Table, needed: Sequence[Column], publication: Publication, version: int
) -> Iterator[Finding]:
    """Say what an existing publication does not send of the table, and `run` cannot change."""
    where = f"publication {publication.name}"
    alter = f"ALTER PUBLICATION {quote(publication.name)}"
    sent = publication.tables.get(table.name)
    if sent is None and not addable(table, publication):
        yield Finding.error(
            where,
            f"does not send {table.name}, and the role is not an owner of both, who could add it",
            f"{alter} ADD TABLE {table.name}",
        )
    stored = _generated(needed, "s")
    unlisted = sent is None or not sent.listed
    if version >= GENERATED_COLUMNS_VERSION and not publication.generated and unlisted and stored:
        yield Finding.error(
            where,
            f"does not send the generated columns of {table.name}: {named(stored)}",
            f"{alter} SET (publish_generated_columns = stored)",
        )
    if sent is None:
        return
    sendable = ("", "s") if version >= GENERATED_COLUMNS_VERSION else ("",)
    missing = [one.name for one in needed if one.generated in sendable and one.name not in sent.columns]
    if sent.listed and missing:
        yield Finding.error(
            where,
            f"the publication's column list for {table.name} lacks {named(map(quote, missing))}",
            _listed_anew(alter, table, sent, (*sent.columns, *missing)),
        )
    if sent.row_filter:
        yield Finding.ok(where, f"sends only the rows of {table.name} where {sent.row_filter}")


def addable(table: Table, publication: Publication) -> bool:
    """Say whether `run` can add a table to a publication that does not send it."""
    return not publication.all_tables and publication.owned and table.owned


def write_findings(table: Table, catalog: Catalog) -> Iterator[Finding]:
    """Say which writes of the application the publication makes, or would make, fail.

    Where the table is published already nothing that we do makes that worse, so it is a warning.
    """
    publication = catalog.publication
    sent = publication.tables.get(table.name) if publication is not None else None
    for problem, fix in failing_writes(table, publication, sent, catalog.version):
        if sent is not None:
            message = f"UPDATE and DELETE of {table.name} fail: {problem}"
            yield Finding("warning", f"publication {catalog.publication_name}", message, fix, fails=True)
        else:
            message = f"once it sends {table.name}, its UPDATEs fail, and its DELETEs: {problem}"
            yield Finding.error(f"publication {catalog.publication_name}", message, fix)


def failing_writes(
    table: Table, publication: Publication | None, sent: Published | None, version: int
) -> Iterator[tuple[str, str]]:
    """Say what makes every UPDATE and DELETE of a table fail under a publication, each with its remedy.

    :param publication: None for the one that `run` creates.
    :param sent: how it sends the table; None if it is yet to be added, with all its columns and rows.
    """
    if publication is not None and not publication.operations & {"update", "delete"}:
        return
    name = publication.name if publication is not None else None
    alter = "" if name is None else f"ALTER PUBLICATION {quote(name)}"
    own = [(table.name, table.identity_mode, table.identity)]
    leaves = [(leaf.name, leaf.identity_mode, leaf.identity) for leaf in table.leaves if leaf.kind == "r"]
    tables = leaves if table.kind == "p" else own
    # A column list holds for all partitions, so one that is to cover the identity of one has to cover that of each.
    logged = [column for _, mode, identity in tables if mode != "f" for column in identity]
    for one, mode, identity in tables:
        default = f"ALTER TABLE {one} REPLICA IDENTITY DEFAULT"
        if not identity and mode != "f":
            # A table that is yet to be added is refused for that anyway: nothing would tell its rows apart.
            if sent is not None:
                # Of a partition that logs less than its root promises, NULLs would be taken for values.
                whole = table.kind == "p" and table.identity_mode == "f"
                fix = f"ALTER TABLE {one} REPLICA IDENTITY FULL" if whole else f"{default}, with a primary key"
                yield f"{one} has no replica identity", fix
            continue
        if version >= GENERATED_COLUMNS_VERSION:
            columns = [table.columns[column] for column in identity if column in table.columns]
            if virtual := _generated(columns, "v"):
                yield f"the replica identity of {one} holds virtual generated columns, {named(virtual)}", default
            stored = _generated(columns, "s")
            if stored and publication is not None and not publication.generated and (sent is None or not sent.listed):
                fix = f"{alter} SET (publish_generated_columns = stored)"
                yield f"the replica identity of {one} holds generated columns that are not sent, {named(stored)}", fix
        if version < FILTERS_VERSION or sent is None:
            continue
        if sent.listed and (mode == "f" or not set(identity) <= set(sent.columns)):
            if mode == "f":
                fix = f"{default}; or, to send every column: {_listed_anew(alter, table, sent, ())}"
            else:
                fix = _listed_anew(alter, table, sent, tuple(dict.fromkeys((*sent.columns, *logged))))
                fix += f"; or: {default}" if mode == "i" else ""
            yield f"the column list for {table.name} does not cover the replica identity of {one}", fix
        if mode != "f" and (outside := [column for column in sent.filter_columns if column not in identity]):
            fix = f"ALTER TABLE {one} REPLICA IDENTITY FULL, or a row filter by columns of the replica identity"
            names = named(map(quote, outside))
            yield f"the row filter for {table.name} reads columns outside the replica identity of {one}, {names}", fix


def _listed_anew(alter: str, table: Table, sent: Published, columns: Sequence[str]) -> str:
    """Return the statements that give one table of a publication another column list, or none.

    They can be pasted as they are. SET TABLE would have to name all of the publication's tables.
    """
    listed = f" ({', '.join(map(quote, columns))})" if columns else ""
    rows = f" WHERE ({sent.row_filter})" if sent.row_filter else ""
    return f"BEGIN; {alter} DROP TABLE {table.name}; {alter} ADD TABLE {table.name}{listed}{rows}; COMMIT"


def _generated(columns: Iterable[Column], how: str) -> list[str]:
    return [quote(column.name) for column in columns if column.generated == how]
