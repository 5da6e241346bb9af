"""Whether an index can follow its table, as one reading of the catalog tells it.

`check` asks it before a start, and the watch asks it while the worker runs: a table that the one refuses, the other
refuses too. What both are told is pure: they read the catalog once, for all indexes.
"""

from __future__ import annotations

from collections.abc import Collection

from cdcsync.config import QualifiedName
from cdcsync.documents.related import columns_read
from cdcsync.preflight.collations import key_findings
from cdcsync.preflight.families import family_findings
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan, key_faults
from cdcsync.preflight.related import related_findings
from cdcsync.preflight.sending import sending_findings
from cdcsync.preflight.source import publication_faults
from cdcsync.preflight.tables import kind_faults, named_back, needed_columns, table_faults
from cdcsync.source.catalog import Catalog
from cdcsync.source.fingerprints import Fingerprint, fingerprint_of
from cdcsync.target.entries import Entry


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
    if locked := locked_findings(plan, catalog):
        return locked
    if table.name.patterns:
        faults = list(family_findings(plan, table, catalog, wanted, stored))
        return [*faults, *key_findings(plan, table, catalog, stored=stored is not None)]
    if faults := kind_faults(where, table):
        return faults
    table = table.keyed_by(plan.index.key, stored.key if stored is not None else ())
    needed = needed_columns(plan.index, plan.documents, table)
    publication = catalog.publication
    return [
        *(publication_faults(publication) if publication is not None else ()),
        # First, because another key may make other faults, which are not the cause.
        *(key_faults(plan.name, stored, table) if stored is not None else ()),
        *table_faults(plan.name, plan.index, plan.documents, table, catalog.role, stored),
        *sending_findings(table, needed, catalog, wanted),
        *related_findings(plan, table, catalog, wanted, stored),
        *key_findings(plan, table, catalog, stored=stored is not None),
    ]


def locked_findings(plan: Plan, catalog: Catalog) -> list[Finding]:
    """Say of which tables nobody can tell now which rows are sent; what is known else may be wrong without that."""
    sent = catalog.publication.tables if catalog.publication is not None else {}
    locked = [one for one in catalog.single(plan.index.followed) if one in sent and sent[one].locked]
    return [
        Finding(
            "error",
            f"indexes.{plan.name}.table",
            f"{one} is locked, so the publication's condition on its rows cannot be read",
            "wait until the transaction that holds the lock ends, or end it: pg_locks names it",
            passes=True,
            locked=True,
        )
        for one in locked
    ]


def seen_fingerprint(plan: Plan, catalog: Catalog, entry: Entry) -> Fingerprint | None:
    """Return what an index that exists would be made of now, whether it can be followed or not."""
    table = catalog.tables.get(plan.index.table_name)
    if table is None:
        return None
    documents = plan.documents
    columns = (*entry.key, *entry.columns, *((*documents.columns, *documents.joined) if documents else ()))
    related = columns_read(documents.related) if documents is not None else {}
    table = table.keyed_by(entry.key)
    return fingerprint_of(catalog, table, columns, plan.where, related, plan.index.expressions)


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
