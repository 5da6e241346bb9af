"""Keys whose order has changed: the server's library sorts texts otherwise than it did when indexes were sorted.

A key is looked up, and pages are read in its order, by an index. One that was sorted by another version of the
collation misses rows: a load leaves them out, a comparison does not see that, and a unique index of the target takes a
key that it has already. Only what such an index is used for is told: an integer or a uuid has no collation, and "C"
never changes.

Source: PostgreSQL, "ALTER COLLATION" (Notes); "System Catalogs" (pg_index).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cdcsync.config import QualifiedName
from cdcsync.config.names import named, own_name, quote
from cdcsync.documents.related import RelatedRows
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.postgres.collations import Outdated, outdated_collations
from cdcsync.postgres.queries import fetch_rows
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan
from cdcsync.source.catalog import Catalog
from cdcsync.source.relations import Table
from cdcsync.target.ddl.names import Names


def key_findings(plan: Plan, table: Table, catalog: Catalog, *, stored: bool) -> Iterator[Finding]:
    """Say which columns, by which rows of the source are looked up, are sorted by a collation that has changed.

    Those of the key, and those by which related rows and their documents are found.

    :param table: as the index sees it, with its key.
    :param stored: whether the index exists.
    """
    related = plan.documents.related if plan.documents is not None else ()
    looked_up = [(table.name, table.key), *_joined(related, table.name)]
    found: dict[str, dict[str, None]] = {}
    for name, columns in looked_up:
        for member in catalog.single([name]):
            known = catalog.tables[member].columns if member in catalog.tables else {}
            for column in columns:
                if column != SOURCE_TABLE and column in known and known[column].collation in catalog.collations:
                    found.setdefault(known[column].collation, {})[f"{member}.{quote(column)}"] = None
    for collation, sorted_by_it in found.items():
        outdated = catalog.collations[collation]
        yield _finding(
            plan.name,
            f"indexes.{plan.name}.{'tables' if plan.index.tables else 'table'}",
            f"rows are looked up by {named(sorted_by_it)}, in {outdated}: an index that the earlier version sorted can"
            " miss rows, and so can loads and comparisons",
            outdated,
            stored=stored,
        )


async def stored_findings(connection: Connection, schema: str, name: str, stem: str) -> list[Finding]:
    """Say which indexes of an index's chunks in the target are sorted by a collation that has changed.

    :param schema: that of our own tables.
    :param stem: how the names of the index's relations begin.
    """
    chunks = QualifiedName(schema, Names(schema, stem).chunks_name)
    rows = await fetch_rows(
        connection,
        """
        SELECT DISTINCT x.relname::text, format('%%I.%%I', n.nspname, c.collname)
        FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid CROSS JOIN unnest(i.indcollation::oid[]) AS used (oid)
        JOIN pg_collation c ON c.oid = used.oid JOIN pg_namespace n ON n.oid = c.collnamespace
        WHERE i.indrelid = to_regclass(%s) ORDER BY 1
        """,
        [str(chunks)],
    )
    changed = await outdated_collations(connection, {collation for _, collation in rows})
    return [
        _finding(
            name,
            f"indexes.{name}",
            f"{chunks} in the target has indexes that are sorted by {outdated}, so that look-ups can miss documents,"
            " and two can be stored under one key:"
            f" {named(quote(index) for index, collation in rows if collation == outdated.name)}",
            outdated,
            stored=True,
        )
        for outdated in changed.values()
    ]


def _joined(related: Sequence[RelatedRows], of: QualifiedName) -> Iterator[tuple[QualifiedName, Sequence[str]]]:
    """Return the columns by which related rows are found, and those by which the rows that they belong to are."""
    for one in related:
        before = of
        for step in one.steps:
            yield step.table, [mine for mine, _ in step.on]
            yield before, [theirs for _, theirs in step.on]
            before = step.table
        yield from _joined(one.related, before)


def _finding(name: str, where: str, message: str, outdated: Outdated, *, stored: bool) -> Finding:
    compare = f", then compare: cdcsync verify {own_name(name)}" if stored else ""
    return Finding.warning(
        where,
        message,
        f"as {outdated.owner}: {outdated.rebuild}, then {outdated.refresh}{compare}; docs/operations.md,"
        ' "Another version of the operating system", has more',
    )
