"""An index's related tables: whether they have what it asks for, and tell which documents their changes are of.

All but `examine_statement` know no server.

Source: PostgreSQL, "ALTER TABLE" (REPLICA IDENTITY), "CREATE INDEX" (CONCURRENTLY).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec
import psycopg

from cdcsync.config import QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.documents.related import LISTED, ONE, Facts, RelatedRows, columns_read
from cdcsync.model.rows import Shape
from cdcsync.postgres.errors import first_line, locked_out, translate
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan
from cdcsync.preflight.sending import sending_findings
from cdcsync.preflight.tables import (
    incomparable,
    kind_faults,
    named_back,
    no_column,
    read_faults,
    unsent_faults,
    unsent_leaves,
)
from cdcsync.source.catalog import Catalog
from cdcsync.source.columns import Column
from cdcsync.source.conditions import Refused, examine_condition, examine_order
from cdcsync.source.relations import Table
from cdcsync.source.tables import SourceTable
from cdcsync.source.unreadable import of_no_trial
from cdcsync.target.entries import Entry

LARGE_ROWS = 1_000
"""Tables with fewer rows by the planner's estimate are looked through quickly enough without an index."""


def related_findings(
    plan: Plan, table: Table, catalog: Catalog, wanted: Collection[QualifiedName], stored: Entry | None
) -> Iterator[Finding]:
    """Return everything that is to be said of the tables that are related to an index's own.

    :param wanted: the tables of all indexes.
    :param stored: the index as it exists, if it does.
    """
    related = plan.documents.related if plan.documents is not None else ()
    for one in related:
        if one.name in table.columns:
            yield Finding.error(
                f"indexes.{plan.name}.related.{one.name}",
                f"{table.name} has a column of the same name, so {{{one.name}}} could be either",
                "give the section another name",
            )
        yield from _one_relation(f"indexes.{plan.name}", one, table, catalog, stored)
    read = columns_read(related)
    for name, columns in read.items():
        other = catalog.tables.get(name)
        if other is None or kind_faults("", other):
            continue
        needed = [other.columns[column] for column in columns if column in other.columns]
        yield from read_faults(other, needed, catalog.role)
        if name != table.name:
            links = [step.columns for top in related for one in top.walk() for step in one.steps if step.table == name]
            sent = dict.fromkeys(column for columns in links for column in columns if column in other.columns)
            yield from sending_findings(other, [other.columns[column] for column in sent], catalog, wanted)


def _one_relation(
    where: str, one: RelatedRows, parent: Table, catalog: Catalog, stored: Entry | None
) -> Iterator[Finding]:
    """Say what is wrong with a relation, and with those within it."""
    where = f"{where}.related.{one.name}"
    before = parent
    for step in one.steps:
        between = step is not one.steps[-1]
        place = f"{where}.via" if between else where
        table = catalog.tables.get(step.table)
        if table is None:
            yield _missing_table(f"{place}.table", step.table, catalog, stored)
            return
        if faults := kind_faults(f"{place}.table", table):
            yield from faults
            return
        mine, theirs = [column for column, _ in step.on], [column for _, column in step.on]
        missing = [*_missing(f"{place}.on", table, mine, stored), *_missing(f"{place}.on", before, theirs, stored)]
        yield from missing
        if not missing:
            yield from _collation_faults(f"{place}.on", table, before, step.on)
            yield from incomparable(f"{place}.on", table, mine)
            yield from incomparable(f"{place}.on", before, theirs)
            yield from identity_faults(table, mine)
            yield from _index_findings(place, table, mine, "the related rows of a document")
            yield from _index_findings(place, before, theirs, "the documents of a related row")
        before = table
    used = [*(one.text.columns if one.text is not None else ()), *one.listed, *one.values]
    below = {name for inner in one.related for name in inner.computed}
    yield from _missing(where, before, [column for column in used if column not in below], stored)
    if one.values and one.limit > 1 and (len(one.steps) > 1 or not _unique(before, one.steps[-1].columns)):
        yield Finding.error(
            where,
            f"{{{one.name}{ONE}{one.values[0]}}} is a value of one row, and nothing keeps {before.name} from having"
            f" several with the same ({', '.join(map(quote, one.steps[-1].columns))})",
            f"set {where}.limit = 1, and order_by to say which one; or use {{{one.name}}} for all of them",
        )
    for inner in one.related:
        yield from _one_relation(where, inner, before, catalog, stored)


def _missing_table(where: str, name: QualifiedName, catalog: Catalog, stored: Entry | None) -> Finding:
    """Say what became of a related table, as far as the index has known it."""
    oid = stored.oids.get(str(name)) if stored is not None else None
    called = None if oid is None else catalog.called.get(oid)
    if called is not None:
        return Finding.error(
            where,
            f"the table {name} is called {called} now",
            f"{named_back(called, name)}, or name {called} in the configuration",
        )
    return Finding.error(
        where,
        f"there is no table {name} in the source database" if oid is None else f"the table {name} was dropped",
        "create it, or correct the name; cdcsync does not create source tables",
    )


def _missing(where: str, table: Table, columns: Sequence[str], stored: Entry | None) -> Iterator[Finding]:
    for column in dict.fromkeys(columns):
        if column not in table.columns:
            yield no_column(where, table, column, stored)


def _collation_faults(where: str, table: Table, before: Table, on: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Say where a row belongs to a document by one collation, and the document would be looked up by another."""
    for mine, theirs in on:
        one, other = table.columns[mine], before.columns[theirs]
        if one.collation == other.collation or (one.deterministic and other.deterministic):
            continue
        yield Finding.error(
            where,
            f"{table.name} has {quote(mine)} in the collation {one.collation or 'none'} and {before.name} has"
            f" {quote(theirs)} in {other.collation or 'none'}, and not both take only the same text for equal: a row"
            " could be part of a document that its changes do not find",
            f"give both columns one collation: ALTER TABLE {before.name} ALTER COLUMN {quote(theirs)} TYPE {other.type}"
            f" COLLATE {one.collation or other.collation}, for one",
        )


def identity_faults(table: Table, columns: Sequence[str]) -> Iterator[Finding]:
    """Say where a change of a related row would not tell which documents the row belonged to."""
    listed = ", ".join(map(quote, columns))
    if not set(columns) <= set(table.identity):
        smaller = ""
        if all(table.columns[column].not_null for column in columns) and table.primary_key:
            key = ", ".join(map(quote, dict.fromkeys((*columns, *table.primary_key))))
            name = quote(f"{table.name.name}_identity"[:60])
            smaller = (
                f"; with less WAL, if the table is not indexed itself: CREATE UNIQUE INDEX {name} ON {table.name}"
                f" ({key}); ALTER TABLE {table.name} REPLICA IDENTITY USING INDEX {name}"
            )
        yield Finding.error(
            str(table.name),
            f"the replica identity of {table.name} does not cover ({listed}): UPDATE and DELETE do not say which"
            " documents the row belonged to",
            f"ALTER TABLE {table.name} REPLICA IDENTITY FULL{smaller}",
        )
        return
    unsent = unsent_leaves(table)
    yield from unsent_faults(table, unsent)
    # An old row is announced as whole when the root says FULL, and the NULLs of a leaf that logs only its key would be
    # taken for values.
    blind = [
        leaf
        for leaf in table.leaves
        if leaf not in unsent
        and (not set(columns) <= set(leaf.identity) or (table.identity_mode == "f" and leaf.identity_mode != "f"))
    ]
    if blind:
        yield Finding.error(
            str(table.name),
            f"replica identities of partitions do not cover ({listed}): {named(str(one.name) for one in blind)}",
            f"ALTER TABLE {blind[0].name} REPLICA IDENTITY FULL, and so on for each",
        )


def _index_findings(where: str, table: Table, columns: Sequence[str], finds: str) -> Iterator[Finding]:
    """Say that a table would be read whole for every look-up."""
    if table.estimated_rows < LARGE_ROWS or any(set(one.columns[:1]) & set(columns) for one in table.indexes):
        return
    listed = ", ".join(map(quote, columns))
    concurrently = "" if table.kind == "p" else " CONCURRENTLY"
    yield Finding.warning(
        where,
        f"{table.name} has some {table.estimated_rows:,} rows and no index on ({listed}), by which {finds} are found:"
        " all of it is read each time",
        f"CREATE INDEX{concurrently} ON {table.name} ({listed})",
    )


def _unique(table: Table, columns: Sequence[str]) -> bool:
    keys = [table.primary_key, *(one.columns for one in table.indexes if one.unique)]
    return any(key and set(key) <= set(columns) for key in keys)


def computed_types(related: Sequence[RelatedRows], catalog: Catalog) -> dict[str, Column]:
    """Return the columns that are made of related rows: texts, or values of the type that they have there."""
    found = {}
    for one in related:
        table = catalog.tables.get(one.table)
        for name in one.computed:
            column = name.removeprefix(one.name + ONE)
            if name in (one.name, one.name + LISTED):
                found[name] = Column(name, "text", not_null=False, generated="")
            elif table is not None and column in table.columns:
                found[name] = msgspec.structs.replace(table.columns[column], name=name, not_null=False)
    return found


async def _examine_conditions(
    connection: Connection, where: str, one: RelatedRows, facts: Facts, in_use: Collection[str]
) -> list[Finding]:
    """Say which conditions on related rows cannot be used, by the rules for the condition of an index."""
    where = f"{where}.related.{one.name}"
    findings = []
    for key, text in (("where", one.where), ("order_by", one.order_by)):
        if not text or one.table not in facts:
            continue
        try:
            if key == "where":
                await examine_condition(connection, one.table, text, (), in_use=text in in_use)
            else:
                await examine_order(connection, one.table, text)
        except Refused as error:
            hint = f"GRANT SELECT ON {one.table} TO the role of source.dsn" if error.privilege else error.hint
            findings.append(Finding.error(f"{where}.{key}", f"it cannot be used: {error.message}", hint))
    for inner in one.related:
        findings += await _examine_conditions(connection, where, inner, facts, in_use)
    return findings


async def examine_statement(connection: Connection, plan: Plan, table: Table, *, in_use: bool = False) -> list[Finding]:
    """Run the statement that reads a document on the source, for each relation by itself, on a row if there is one.

    :param in_use: whether the index goes by these relations already, so that it does without while a table is locked.
    """
    findings = []
    assert plan.documents is not None
    for one in plan.documents.related:
        shape = Shape(
            plan.name,
            table.name,
            table.key,
            (),
            tuple(one.computed),
            computed=frozenset(one.computed),
            joined=tuple(theirs for _, theirs in one.steps[0].on),
            inheritable=table.inheritable,
        )
        findings += await _examine_conditions(connection, f"indexes.{plan.name}", one, plan.facts, plan.in_use)
        types = [table.columns[column].value_type for column in table.key]
        try:
            await SourceTable(shape, types, related=(one,), facts=plan.facts).page(connection, None, 1)
        except psycopg.Error as error:
            if in_use and locked_out(error):
                continue
            if of_no_trial(error):
                raise translate(error, "source", where=str(one.table)) from error
            findings.append(_unreadable(plan, one, table, error))
    return findings


def _unreadable(plan: Plan, one: RelatedRows, table: Table, error: psycopg.Error) -> Finding:
    """Say why the rows of a relation, or of those within it, cannot be read."""
    where = f"indexes.{plan.name}.related.{one.name}"
    if isinstance(error, psycopg.errors.UndefinedFunction):
        unlike = next(_unlike(plan.facts, one, table.name), None)
        if unlike is not None:
            return Finding.error(f"{where}.on", *unlike)
    return Finding.error(
        where,
        f"its rows cannot be read: {first_line(error)}",
        error.diag.message_hint or "correct its where and order_by; they may only read",
    )


def _unlike(facts: Facts, one: RelatedRows, before: QualifiedName) -> Iterator[tuple[str, str]]:
    """Yield the pairs of columns that have two types, with a fix."""
    for step in one.steps:
        for mine, theirs in step.on:
            type_, other = facts[step.table].types[mine], facts[before].types[theirs]
            if type_ != other:
                yield (
                    f"{step.table} has {quote(mine)} as {type_} and {before} has {quote(theirs)} as {other}, which"
                    " cannot be compared",
                    f"give both columns one type: ALTER TABLE {step.table} ALTER COLUMN {quote(mine)} TYPE {other}"
                    f" USING {quote(mine)}::{other}, for one",
                )
        before = step.table
    for inner in one.related:
        yield from _unlike(facts, inner, before)
