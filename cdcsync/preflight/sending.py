"""What a publication sends of an index's table: the table at all, under its own name, and every column that is needed.

These functions know no server.

Source: PostgreSQL, "Logical Replication" (Publication, Row Filters, Column Lists, Generated Column Replication);
"CREATE PUBLICATION".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cdcsync.config.names import quote
from cdcsync.preflight.findings import Finding, named
from cdcsync.preflight.source import SourceFacts
from cdcsync.source.catalog import GENERATED_COLUMNS_VERSION, Publication, create_publication_statement
from cdcsync.source.relations import Column, Table


def creation_faults(tables: Iterable[Table], source: SourceFacts) -> Iterator[Finding]:
    """Say why the role could not create the publication of these tables."""
    reasons = []
    if not source.server.may_create:
        reasons.append(f"may not create one in the database {quote(source.server.database)}")
    foreign = [str(table.name) for table in tables if not table.owned]
    if foreign:
        reasons.append(f"does not own {named(foreign)}")
    if reasons:
        statement = create_publication_statement(
            source.publication_name, sorted(source.tables), version=source.server.version
        )
        yield Finding.error(
            f"publication {source.publication_name}",
            f"does not exist, and the role {quote(source.server.role)} {' and '.join(reasons)}",
            f"as an owner of the tables: {statement.as_string(None)}",
        )


def sending_findings(table: Table, needed: Sequence[Column], source: SourceFacts) -> Iterator[Finding]:
    """Say which changes of the table would not arrive, or not under its name, or not with every column."""
    publication = source.publication
    where = f"publication {source.publication_name}"
    via_root = publication is None or publication.via_root
    published = source.tables if publication is None else {*publication.tables, *source.tables}
    yield from unsendable_columns(table, needed, source.server.version)
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
            f"ALTER PUBLICATION {quote(source.publication_name)} SET (publish_via_partition_root = true)",
        )
    elif publication is not None:
        yield from published_findings(table, needed, publication, source.server.version)


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
    """Say what an existing publication does not send of the table, and `run` cannot mend."""
    where = f"publication {publication.name}"
    alter = f"ALTER PUBLICATION {quote(publication.name)}"
    sent = publication.tables.get(table.name)
    if sent is None and (publication.all_tables or not (publication.owned and table.owned)):
        yield Finding.error(
            where,
            f"does not send {table.name}, and the role is not an owner of both, who could add it",
            f"{alter} ADD TABLE {table.name}",
        )
    if version >= GENERATED_COLUMNS_VERSION and not publication.generated and (sent is None or not sent.listed):
        problem = None
        if stored := _generated(needed, "s"):
            problem = f"does not send the generated columns of {table.name}: {named(stored)}"
        elif sent is None and table.identity_mode == "f" and _generated(table.columns.values(), "s"):
            problem = (
                f"sends no generated columns: once it has {table.name}, whose identity holds one, its UPDATEs fail"
            )
        if problem is not None:
            yield Finding.error(where, problem, f"{alter} SET (publish_generated_columns = stored)")
    if sent is None:
        return
    sendable = ("", "s") if version >= GENERATED_COLUMNS_VERSION else ("",)
    missing = [one.name for one in needed if one.generated in sendable and one.name not in sent.columns]
    if sent.listed and missing:
        wanted = ", ".join(map(quote, (*sent.columns, *missing)))
        rows = f" WHERE ({sent.row_filter})" if sent.row_filter else ""
        yield Finding.error(
            where,
            f"its column list for {table.name} lacks {named(map(quote, missing))}",
            f"BEGIN; {alter} DROP TABLE {table.name}; {alter} ADD TABLE {table.name} ({wanted}){rows}; COMMIT",
        )
    if sent.row_filter:
        yield Finding.ok(where, f"sends only the rows of {table.name} where {sent.row_filter}")


def _generated(columns: Iterable[Column], how: str) -> list[str]:
    return [quote(column.name) for column in columns if column.generated == how]
