"""Whether an index can follow its table, as one reading of the catalog tells it.

`check` asks it before a start, and the watch asks it while the worker runs: a table that the one refuses, the other
refuses too. What both are told is pure: they read the catalog once, for all indexes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cdcsync.config import QualifiedName
from cdcsync.config.names import quote
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan, key_faults
from cdcsync.preflight.related import related_findings
from cdcsync.preflight.sending import sending_findings
from cdcsync.preflight.source import publication_faults
from cdcsync.preflight.tables import column_faults, kind_faults, named_back, needed_columns, read_faults, table_faults
from cdcsync.preflight.tables import key_faults as row_faults
from cdcsync.source.catalog import Catalog
from cdcsync.source.relations import Table
from cdcsync.target.registry import Entry


def following_findings(
    plan: Plan, catalog: Catalog, wanted: Collection[QualifiedName], stored: Entry | None
) -> list[Finding]:
    """Return everything that is to be said of an index's table and its sending; nothing of a table that is missing.

    :param wanted: the tables of all indexes.
    :param stored: the index as it exists, if it does.
    """
    table = catalog.tables.get(plan.index.table_name)
    where = f"indexes.{plan.name}.table"
    if table is None:
        return missing_findings(plan, catalog, stored)
    if table.name.patterns:
        return family_findings(plan, table, catalog, wanted, stored)
    if faults := kind_faults(where, table):
        return faults
    table = table.keyed_by(plan.index.key)
    needed = needed_columns(plan.index, plan.documents, table)
    publication = catalog.publication
    return [
        *(publication_faults(publication) if publication is not None else ()),
        # First, because another key may make other faults, which are not the cause.
        *(key_faults(plan.name, stored, table) if stored is not None else ()),
        *table_faults(plan.name, plan.index, plan.documents, table, catalog.role),
        *sending_findings(table, needed, catalog, wanted),
        *related_findings(plan, table, catalog, wanted, stored.oids if stored is not None else {}),
    ]


def family_findings(
    plan: Plan, family: Table, catalog: Catalog, wanted: Collection[QualifiedName], stored: Entry | None
) -> list[Finding]:
    """Return everything that is to be said of an index over many equal tables."""
    where = f"indexes.{plan.name}.tables"
    publication = catalog.publication
    findings = list(publication_faults(publication)) if publication is not None else []
    members = [catalog.tables[leaf.name] for leaf in family.leaves]
    for member in members:
        if faults := kind_faults(where, member):
            findings += faults
            continue
        if member.kind == "p":
            hint = "name it in an index of its own, or narrow the pattern"
            findings.append(Finding.error(where, f"{member.name} is partitioned, unlike the other tables", hint))
            continue
        needed = needed_columns(plan.index, plan.documents, member)
        findings += member_faults(plan, family, member, catalog.role)
        findings += sending_findings(member, needed, catalog, wanted)
    if not any(finding.level == "error" for finding in findings):
        findings += unequal_types(plan, family, members)
    if not any(finding.level == "error" for finding in findings):
        findings += column_faults(plan.name, plan.index, plan.documents, family)
    if stored is not None:
        findings += key_faults(plan.name, stored, family)
    return findings


def unequal_types(plan: Plan, family: Table, members: Sequence[Table]) -> Iterator[Finding]:
    """Say which columns are not of one type in all of many tables."""
    read = plan.documents.columns if plan.documents is not None else ()
    for column in dict.fromkeys((*family.key[1:], *plan.index.columns, *read)):
        types = {one.columns[column].type: one.name for one in members if column in one.columns}
        if len(types) > 1:
            told = ", ".join(f"{type_} in {table}" for type_, table in types.items())
            yield Finding.error(
                f"indexes.{plan.name}.tables",
                f"the column {quote(column)} is not of one type in all tables: {told}",
                "give it the same type in all of them, or narrow the pattern",
            )


def member_faults(plan: Plan, family: Table, member: Table, role: str) -> Iterator[Finding]:
    """Say why one of many tables is not as the others, or cannot be followed."""
    where = f"indexes.{plan.name}.tables"
    read = plan.documents.columns if plan.documents is not None else ()
    for column in dict.fromkeys((*plan.index.columns, *read)):
        if column not in member.columns:
            yield Finding.error(
                where,
                f"{member.name} has no column {quote(column)}, which the index reads of every table",
                "add the column, or narrow the pattern",
            )
    if SOURCE_TABLE in member.columns:
        yield Finding.error(
            where,
            f"{member.name} has a column {SOURCE_TABLE}, which is what the index calls the name of the table",
            f"ALTER TABLE {member.name} RENAME COLUMN {SOURCE_TABLE} TO …, or narrow the pattern",
        )
    if member.key and not family.key:
        yield Finding.error(
            where,
            f"the key of {member.name} is ({', '.join(map(quote, member.key))}), and that of another table is not",
            "give all tables the same primary key, or narrow the pattern",
        )
    yield from read_faults(member, needed_columns(plan.index, plan.documents, member), role)
    yield from row_faults(member)


def missing_findings(plan: Plan, catalog: Catalog, stored: Entry | None) -> list[Finding]:
    """Say what became of the table of an index that exists."""
    name = plan.index.table_name
    if stored is None or stored.table_oid is None or stored.source_table != str(name):
        return []
    where = f"indexes.{plan.name}.table"
    called = catalog.called.get(stored.table_oid)
    if called is None:
        return [
            Finding.error(
                where,
                f"the table {name} was dropped",
                f"create it again, or take [indexes.{plan.name}] out of the configuration",
            )
        ]
    return [
        Finding.error(
            where,
            f"the table {name} is called {called} now",
            f"{named_back(called, name)}, or configure a new index, as [indexes.OTHER], on {called}",
        )
    ]
