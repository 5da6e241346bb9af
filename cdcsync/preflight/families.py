"""An index over many equal tables: whether each of them is like the others, and can be followed.

A table that is unlike the others and was never followed is left out, with the reason: one tenant's mistake is not to
stop the index for all. A table that is followed already and can be no longer pauses the index, because its documents
would go stale beside others that do not.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from cdcsync.config import QualifiedName
from cdcsync.config.names import quote
from cdcsync.documents.lexer import Unreadable, named_columns, tokens
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan, key_faults
from cdcsync.preflight.sending import sending_findings
from cdcsync.preflight.source import publication_faults
from cdcsync.preflight.tables import column_faults, kind_faults, needed_columns, read_faults
from cdcsync.preflight.tables import key_faults as row_faults
from cdcsync.source.catalog import Catalog
from cdcsync.source.relations import Table
from cdcsync.target.entries import Entry


def followed_catalog(plan: Plan, catalog: Catalog, wanted: Collection[QualifiedName], stored: Entry | None) -> Catalog:
    """Return the catalog without the tables that an index over many leaves out, and note these in the plan.

    Of an index that does not exist yet, most of the tables say what the others are to be like.

    :param wanted: the tables of all indexes.
    :param stored: the index as it exists.
    """
    plan.left_out = {}
    family = plan.index.table_name
    members = [catalog.tables[one] for one in catalog.members.get(family, ()) if one in catalog.tables]
    followed = [one for one in members if stored is not None and str(one.oid) in stored.leaves]
    if not followed:
        read = _read_of_each(plan, members)
        fit = [one for one in members if not _errors(list(_of_one(plan, one.key, read, one, catalog, wanted)))]
        alike = Counter(_likeness(one, read) for one in fit).most_common(1)
        followed = [one for one in fit if _likeness(one, read) == alike[0][0]]
    if not followed:
        return catalog
    key = stored.key[1:] if stored is not None else followed[0].key
    read = _read_of_each(plan, followed)
    for member in members:
        if member in followed:
            continue
        findings = list(_of_one(plan, key, read, member, catalog, wanted))
        findings += _unequal_types(plan, (*key, *read), [followed[0], member])
        error = next((one for one in findings if one.level == "error"), None)
        if error is not None:
            plan.left_out[member.name] = error
    return catalog.limited(family, [one.name for one in members if one.name not in plan.left_out])


def left_out_findings(plan: Plan) -> Iterator[Finding]:
    """Say which tables an index over many continues without."""
    for error in plan.left_out.values():
        yield Finding.warning(error.where, f"{error.message}; the index continues without that table", error.hint)


def family_findings(
    plan: Plan, family: Table, catalog: Catalog, wanted: Collection[QualifiedName], stored: Entry | None
) -> Iterator[Finding]:
    """Say everything that is to be said of an index over many equal tables.

    :param catalog: without those that it leaves out.
    """
    if catalog.publication is not None:
        yield from publication_faults(catalog.publication)
    members = [catalog.tables[leaf.name] for leaf in family.leaves]
    key = stored.key[1:] if stored is not None else Counter(one.key for one in members).most_common(1)[0][0]
    read = _read_of_each(plan, members)
    findings = [finding for member in members for finding in _of_one(plan, key, read, member, catalog, wanted)]
    if not _errors(findings):
        findings += _unequal_types(plan, (*key, *read), members)
    if not _errors(findings):
        findings += column_faults(plan.name, plan.index, plan.documents, family)
    if stored is not None:
        findings += key_faults(plan.name, stored, family)
    yield from findings


def _likeness(member: Table, read: Sequence[str]) -> tuple[object, ...]:
    return member.key, *(member.columns[column].type for column in (*member.key, *read))


def _errors(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def _of_one(
    plan: Plan,
    key: tuple[str, ...],
    read: Sequence[str],
    member: Table,
    catalog: Catalog,
    wanted: Collection[QualifiedName],
) -> Iterator[Finding]:
    """Say whether one of many tables can be followed, and has what the index reads.

    :param key: that of the others.
    :param read: the columns that are read besides.
    """
    where = f"indexes.{plan.name}.tables"
    if faults := kind_faults(where, member):
        yield from faults
        return
    if member.kind == "p":
        hint = "name it in an index of its own, or narrow the pattern"
        yield Finding.error(where, f"{member.name} is partitioned, unlike the other tables", hint)
        return
    needed = needed_columns(plan.index, plan.documents, member)
    for column in read:
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
    if member.key and member.key != key:
        mine, others = (", ".join(map(quote, one)) for one in (member.key, key))
        yield Finding.error(
            where,
            f"the key of {member.name} is ({mine}), and that of the other tables is ({others})",
            "give all tables the same primary key, or narrow the pattern",
        )
    too = [member.columns[column] for column in read if column in member.columns]
    yield from read_faults(member, [*dict.fromkeys((*needed, *too))], catalog.role)
    yield from row_faults(member)
    yield from sending_findings(member, needed, catalog, wanted)


def _read_of_each(plan: Plan, members: Sequence[Table]) -> tuple[str, ...]:
    """Return the columns that are read of each of many tables, besides the key.

    Of the words of a condition, those are columns that are columns of any of them.
    """
    read = plan.documents.columns if plan.documents is not None else ()
    decided_by: tuple[str, ...] = ()
    with contextlib.suppress(Unreadable):  # for which it is refused
        known = {name: None for member in members for name in member.columns}
        decided_by = named_columns(tokens(plan.index.where or ""), known)
    return tuple(dict.fromkeys((*plan.index.columns, *read, *decided_by)))


def _unequal_types(plan: Plan, columns: Sequence[str], members: Sequence[Table]) -> Iterator[Finding]:
    """Say which columns are not of one type in all of many tables."""
    for column in dict.fromkeys(columns):
        types = {one.columns[column].type: one.name for one in members if column in one.columns}
        if len(types) > 1:
            told = ", ".join(f"{type_} in {table}" for type_, table in types.items())
            yield Finding.error(
                f"indexes.{plan.name}.tables",
                f"the column {quote(column)} is not of one type in all tables: {told}",
                "give it the same type in all of them, or narrow the pattern",
            )
