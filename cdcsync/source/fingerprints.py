"""Fingerprints: what an index's values are made of, and what has its table sent, as the catalog tells both.

The stream tells of rows that change, not of what changes rows without an event: ALTER TABLE … USING, a column that was
dropped and added again, a renamed enum label, an edit of the publication that was undone a moment later. So both
fingerprints are stored with each index and compared with the catalog as it is now. What was altered and altered back
looks as before, but the rows that were written in between may not: so each entry of the catalog counts with the
transaction that last wrote it. A difference asks for as much as it may have changed:

    reread      values may be others, or of other types: the table is read again
    compare     rows may have changed without being sent, or were rewritten: source and index are compared by digests,
                unless a TRUNCATE that the stream brings is what rewrote them (`emptied`)
    arrived     partitions brought rows that were never sent: the rows within their bounds are read
    left        partitions went, with their rows: the source is asked which of the index's keys it still has. The
                stream tells of those that came and went between two looks at the catalog

Nothing here reads a server: see `catalog.read_catalog`.

Source: PostgreSQL, "System Catalogs"; "ALTER TABLE", "ALTER TYPE", "ALTER PUBLICATION".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.config.names import WHOLE_ROW, named
from cdcsync.model.conditions import Where
from cdcsync.model.rows import SOURCE_TABLE
from cdcsync.postgres.collations import DEFAULT_COLLATION
from cdcsync.source.catalog import Catalog
from cdcsync.source.columns import Column, Type, reachable_types
from cdcsync.source.functions import KEPT_IN_PLANS
from cdcsync.source.publications import Publication
from cdcsync.source.relations import Partition, Table

T = TypeVar("T")


class TableValues(msgspec.Struct, frozen=True):
    """The catalog facts that determine the values of one table.

    :ivar columns: of each column that the index reads: attribute number, type, modifier, and the OID of the expression
        that generates it.
    :ivar file: the table's relfilenode.
    :ivar leaves: a partitioned table's leaves by OID: the relfilenode, and the transactions that attached it. For one
        of many equal tables, its name and a digest of its columns. 0 and nothing for one whose rows the stream has
        brought before anybody saw it in the catalog.
    :ivar where: the condition on the rows that are read.
    :ivar collations: see `collations_of`. An earlier version stored none, so an index of a column that has another than
        the usual one is compared once.
    :ivar details: see `details_of`. What an earlier version did not store is not compared.
    :ivar proven_by: see `proofs_of`. The same holds for it.
    """

    oid: int
    columns: dict[str, tuple[int, int, int, int | None]]
    file: int
    leaves: dict[str, tuple[int, str]]
    where: str | None = None
    collations: dict[str, dict[str, str]] = {}
    details: dict[str, dict[str, str]] = {}
    proven_by: dict[str, tuple[int, ...]] = {}


class MadeOf(msgspec.Struct, frozen=True):
    """The catalog facts that determine an index's values and rows.

    :ivar tables: by name.
    :ivar types: the user-defined types, by OID.
    :ivar functions: digests of what its conditions call, by name.
    :ivar functions_written: which transactions last wrote that. What an earlier version did not store is not compared.
    """

    tables: dict[str, TableValues]
    types: dict[str, Type]
    functions: dict[str, str] = {}
    functions_written: dict[str, str] = {}


class SentBy(msgspec.Struct, frozen=True):
    """The reasons why an index's tables are sent: the publication as of its last edit, and what includes each table.

    Of many equal tables, each is there by itself.
    """

    publication: str
    tables: dict[str, tuple[str, ...]]


class Fingerprint(msgspec.Struct, frozen=True):
    """Both fingerprints of one index, as its row in our table `indexes` holds them."""

    made_of: MadeOf
    sent_by: SentBy


class Emptied(msgspec.Struct, frozen=True):
    """A table, or partitions of it, whose new files a TRUNCATE may have made.

    :ivar by: the transaction (32 bits) whose TRUNCATE the stream would have to bring.
    :ivar at_its_end: whether only a TRUNCATE after which that transaction changed nothing is enough.
    """

    table: QualifiedName
    by: int
    at_its_end: bool = False


class Doubt(msgspec.Struct, frozen=True):
    """Why rows may have changed without being sent, and what would explain it otherwise."""

    because: str
    emptied: Emptied | None = None


class Difference(msgspec.Struct, frozen=True):
    """The consequences of a difference between two fingerprints.

    :ivar reread: why the table has to be read again, if it has to.
    :ivar compare: why source and index have to be compared, if they have to.
    :ivar arrived: the partitions whose rows have to be read.
    :ivar left: whether partitions went.
    :ivar emptied: if the stream brings a TRUNCATE of each of these, nothing else is why they would have to be compared,
        so that they do not have to be.
    :ivar called: whether what its conditions call was changed, so that the conditions are to be examined again; or
        whether sessions may have planned by what it was for a while, so that new ones are to be opened.
    """

    reread: str | None = None
    compare: str | None = None
    arrived: tuple[Partition, ...] = ()
    left: bool = False
    emptied: tuple[Emptied, ...] = ()
    called: bool = False

    def __bool__(self) -> bool:
        return bool(self.reread or self.compare or self.arrived or self.left)


def made_of(
    table: Table, columns: Iterable[str], where: Where | None = None, key: tuple[str, ...] | None = None
) -> MadeOf:
    """Return what the values of these columns of a table are made of.

    :param where: the condition on its rows, whose columns count as well.
    :param key: of a related table, what its rows are ordered by in the end.
    """
    read = (*columns, *(where.columns if where is not None else ()), *(key or ()))
    made_up = {SOURCE_TABLE} if table.name.patterns else set()
    used = {name: table.columns[name] for name in dict.fromkeys(read) if name in table.columns.keys() - made_up}
    typed = table.columns if WHOLE_ROW in read else used
    types = reachable_types(table.types, [column.wire_type[0] for column in typed.values()])
    values = TableValues(
        table.oid,
        {name: (column.number, *column.wire_type, column.expression) for name, column in used.items()},
        table.file,
        {str(leaf.oid): (leaf.file, _attached(leaf, used)) for leaf in table.leaves},
        where.text if where is not None else None,
        collations_of(table, used),
        details_of(table, used, key, whole=WHOLE_ROW in read),
        proofs_of(table),
    )
    return MadeOf({str(table.name): values}, {str(oid): type_ for oid, type_ in types.items()})


def collations_of(table: Table, columns: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return by which collations these columns are compared, by the table's OID; of each of many tables by itself.

    The usual one, and tables where all have that, are left out. A collation decides which values a condition takes for
    equal and how they are ordered. Nothing else tells that a column has another one: its values stay as they are.
    """
    read = [*columns]
    known = _of_each(table, lambda leaf: leaf.collations, lambda column: column.collation)
    found = {
        str(oid): {name: of[name] for name in read if of.get(name, "") not in ("", DEFAULT_COLLATION)}
        for oid, of in known.items()
    }
    return {oid: of for oid, of in found.items() if of}


def details_of(
    table: Table, columns: Iterable[str], key: tuple[str, ...] | None, *, whole: bool
) -> dict[str, dict[str, str]]:
    """Return what may change values although the columns are as before, by the table's OID; of each of many by itself.

    These are the transactions (32 bits) that last wrote the columns' entries, as both of two columns have other values
    after their names were exchanged; a digest of all columns' entries where a condition reads the row as a whole; and
    the key by which related rows are ordered in the end.
    """
    read = sorted(columns)
    known = _of_each(table, lambda leaf: leaf.columns_written, lambda column: column.written_by)
    found = {}
    for oid, written in known.items():
        found[str(oid)] = {f"column {name}": str(written[name]) for name in read if name in written}
        if whole:
            found[str(oid)]["its columns"] = _digest(sorted(written.items()))
        if key is not None:
            found[str(oid)]["its primary key"] = ", ".join(key)
    return found


def proofs_of(table: Table) -> dict[str, tuple[int, ...]]:
    """Return the unique indexes by which the index's key names one row, by the table's OID; of each of many by itself.

    While there was none, two rows may have had the same key, and a deletion by that key does not tell which of them is
    gone. One that took another's place while both were there leaves no such moment.
    """
    if not table.named:
        return {}
    own = {str(leaf.oid): leaf.proven_by for leaf in table.leaves if leaf.columns}
    return own or {str(table.oid): table.proven_by}


def _of_each(
    table: Table, of_leaf: Callable[[Partition], dict[str, T]], of_column: Callable[[Column], T]
) -> dict[int, dict[str, T]]:
    """Return a fact of the columns by the table's OID; of each of many tables, which have columns of their own."""
    own = {leaf.oid: of_leaf(leaf) for leaf in table.leaves}
    return {oid: of for oid, of in own.items() if of} or {
        table.oid: {name: of_column(column) for name, column in table.columns.items()}
    }


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _attached(leaf: Partition, columns: Iterable[str]) -> str:
    if not leaf.columns:
        return leaf.attached
    read = [(name, leaf.columns.get(name)) for name in sorted(columns)]
    return f"{leaf.attached} {_digest(read)}"


def sent_by(publication: Publication | None, table: Table) -> SentBy:
    """Return what has a table sent."""
    if publication is None:
        return SentBy("", {})
    names = [leaf.name for leaf in table.leaves] if table.name.patterns else [table.name]
    brought_by = {str(name): publication.brought_by.get(name, ()) for name in names}
    return SentBy(f"{publication.oid} {publication.edited}", brought_by)


def fingerprint_of(
    catalog: Catalog,
    table: Table,
    columns: Iterable[str],
    where: Where | None = None,
    related: Mapping[QualifiedName, Iterable[str]] = MappingProxyType({}),
    expressions: Iterable[str] = (),
) -> Fingerprint:
    """Return both fingerprints of an index that reads these columns of a table, of the rows that `where` holds for.

    :param table: as `keyed_by` the index's key.
    :param related: what it reads of other tables, or of the same one besides.
    :param expressions: its conditions in SQL, which the catalog was asked about.
    """
    own = related.get(table.name)
    made = [made_of(table, (*columns, *(own or ())), where, None if own is None else table.primary_key)]
    sent = [sent_by(catalog.publication, table)]
    for name, read in related.items():
        other = catalog.tables.get(name)
        if other is not None and name != table.name:
            made.append(made_of(other, read, key=other.primary_key))
            sent.append(sent_by(catalog.publication, other))
    called = {name: defined for text in expressions for name, defined in catalog.functions[text].items()}
    return Fingerprint(
        MadeOf(
            {name: values for one in made for name, values in one.tables.items()},
            {oid: type_ for one in made for oid, type_ in one.types.items()},
            {name: defined.digest for name, defined in called.items()},
            {name: defined.written for name, defined in called.items()},
        ),
        SentBy(sent[0].publication, {name: by for one in sent for name, by in one.tables.items()}),
    )


def difference(before: Fingerprint | None, now: Fingerprint, table: Table, related: Iterable[Table] = ()) -> Difference:
    """Return what has to be done for an index whose fingerprint was `before`.

    :param before: None if an earlier version stored none: anything may have happened.
    :param table: the index's own table.
    :param related: the other tables that it reads.
    """
    if before is None:
        return Difference(compare="nothing is known of what its values were made of")
    name = str(table.name)
    was, is_ = before.made_of.tables.get(name), now.made_of.tables[name]
    reread = _reread(was, is_) or _retyped(before.made_of.types, now.made_of.types)
    others = [other for other in related if other.name != table.name]
    reread = reread or next(filter(None, (_reread_related(str(one.name), before, now) for one in others)), None)
    if reread is not None or was is None:
        return Difference(reread=reread or f"{name} was not read before")
    doubts = [Doubt("the publication was edited")] if before.sent_by.publication != now.sent_by.publication else []
    changed = _changed(before.made_of.functions, now.made_of.functions)
    rewritten = _rewritten(before.made_of.functions_written, now.made_of.functions_written)
    if changed:
        doubts.append(Doubt(f"what its conditions call was changed: {named(changed)}"))
    elif rewritten:
        doubts.append(Doubt(f"what its conditions call was defined again: {named(rewritten)}"))
    called = bool(changed) or any(name.startswith(KEPT_IN_PLANS) for name in rewritten)
    if altered := _altered_types(before.made_of.types, now.made_of.types):
        doubts.append(Doubt(f"type {', '.join(altered)} was altered"))
    doubts += [
        one for one in (_doubt(table, before, now), *(_doubt_related(one, before, now) for one in others)) if one
    ]
    explained = tuple(one.emptied for one in doubts if one.emptied is not None)
    emptied = explained if len(explained) == len(doubts) else ()
    arrived = tuple(
        leaf for leaf in table.leaves if was.leaves.get(str(leaf.oid), (0, ""))[1] != is_.leaves[str(leaf.oid)][1]
    )
    left = any(_left(leaf, attached, is_.leaves.get(leaf)) for leaf, (_, attached) in was.leaves.items())
    return Difference(None, doubts[0].because if doubts else None, arrived, left, emptied, called)


def _left(leaf: str, attached: str, now: tuple[int, str] | None) -> bool:
    """Say whether a leaf went, or rows of it may have.

    Of one that only the stream has told of, nobody has seen the file. A table's first one has the table's OID for its
    number; another one may come from a TRUNCATE of that partition, which is not sent.
    """
    if now is None:
        return True
    return now[1] != attached if attached else now[0] != int(leaf)


def _changed(was: Mapping[str, str], is_: Mapping[str, str]) -> list[str]:
    return sorted(name for name in was.keys() | is_.keys() if was.get(name) != is_.get(name))


def _rewritten(was: Mapping[str, str], is_: Mapping[str, str]) -> list[str]:
    """Return what was written by other transactions than before, of what is known of both times."""
    return sorted(name for name in was.keys() & is_.keys() if was[name] != is_[name])


def _edited(was: SentBy, is_: SentBy, table: Table) -> str | None:
    """Return the table, or the first of many, that the publication sends otherwise than before.

    One of many tables that was not there before is not among these: all its rows are read.
    """
    many = bool(table.name.patterns)
    names = sorted(was.tables.keys() & is_.tables.keys()) if many else [str(table.name)]
    return next((name for name in names if was.tables.get(name) != is_.tables.get(name)), None)


def _doubt(table: Table, before: Fingerprint, now: Fingerprint) -> Doubt | None:
    """Say why rows of a table that was read before may have changed without being sent."""
    name = str(table.name)
    if edited := _edited(before.sent_by, now.sent_by, table):
        return Doubt(f"what the publication sends of {edited} was edited")
    was, is_ = before.made_of.tables[name], now.made_of.tables[name]
    if compared := _compared_otherwise(was, is_):
        return Doubt(f"{name} has other collations: {', '.join(compared)}")
    if altered := _altered(was, is_):
        return Doubt(f"{name} was altered: {', '.join(altered)}")
    writers = _rewritten_by(was, is_, table)
    return Doubt(f"{name} was rewritten", _emptied_by(writers, table, is_.columns)) if writers else None


def _compared_otherwise(was: TableValues, is_: TableValues) -> list[str]:
    """Return the columns that have another collation than before."""
    tables = {str(is_.oid)} | (was.leaves.keys() & is_.leaves.keys())
    return sorted(
        {
            column
            for table in tables
            for column in was.columns.keys() & is_.columns.keys()
            if was.collations.get(table, {}).get(column) != is_.collations.get(table, {}).get(column)
        }
    )


def _altered(was: TableValues, is_: TableValues) -> list[str]:
    """Return the details that are others than before; what only one of both has comes with another configuration."""
    found = {
        name
        for table in was.details.keys() & is_.details.keys()
        for name in _rewritten(was.details[table], is_.details[table])
    }
    proven = [(was.proven_by[table], is_.proven_by[table]) for table in was.proven_by.keys() & is_.proven_by.keys()]
    if any(before != now and not set(before) & set(now) for before, now in proven):
        found.add("the unique index of its key")
    return sorted(found)


def _altered_types(before: Mapping[str, Type], now: Mapping[str, Type]) -> list[str]:
    """Return the types of which labels or attributes were renamed, even if they have their old names again."""
    return [
        type_.name
        for oid, type_ in now.items()
        if oid in before and any(before[oid].written.get(part, by) != by for part, by in type_.written.items())
    ]


def _doubt_related(table: Table, before: Fingerprint, now: Fingerprint) -> Doubt | None:
    """Say the same of a related table, from whose partitions nothing tells which documents are to be read.

    One that was not read before comes with another configuration, which asks for what it needs.
    """
    was, is_ = before.made_of.tables.get(str(table.name)), now.made_of.tables[str(table.name)]
    if was is None:
        return None
    if {leaf: attached for leaf, (_, attached) in was.leaves.items()} != {
        leaf: attached for leaf, (_, attached) in is_.leaves.items()
    }:
        return Doubt(f"partitions of {table.name} were attached or detached")
    return _doubt(table, before, now)


def _rewritten_by(was: TableValues, is_: TableValues, table: Table) -> set[int]:
    """Return which transactions last wrote the entries of the table and its partitions that have other files now."""
    writers = {table.written_by} if was.file != is_.file else set()
    return writers | {
        leaf.written_by for leaf in table.leaves if (was.leaves.get(str(leaf.oid)) or (0, ""))[0] not in (0, leaf.file)
    }


def _emptied_by(writers: set[int], table: Table, columns: Iterable[str]) -> Emptied | None:
    """Return the TRUNCATE that may have made all the new files, if nothing that its transaction did contradicts that.

    ALTER TABLE … USING after the TRUNCATE writes the column's entry, too. After the TRUNCATE of a partitioned table,
    which the stream brings, one of a partition by itself may follow, which it does not: so such a table must have been
    left empty (`at_its_end`).
    """
    (writer, *others) = writers
    altered = any(table.columns[name].written_by == writer for name in columns)
    return None if others or altered else Emptied(table.name, writer, bool(table.leaves))


def _reread_related(name: str, before: Fingerprint, now: Fingerprint) -> str | None:
    """Say why a change of a related table asks for all of the index to be read again."""
    reread = _reread(before.made_of.tables.get(name), now.made_of.tables[name])
    return None if reread is None else f"{name}: {reread}"


def _reread(was: TableValues | None, is_: TableValues) -> str | None:
    if was is None:
        return None
    if was.oid != is_.oid:
        return "another table has its name"
    if was.where != is_.where:
        return "the condition on its rows was changed"
    # A column that the index did not read before comes with another configuration, which asks for what it needs.
    changed = [name for name, column in is_.columns.items() if name in was.columns and was.columns[name] != column]
    return f"column {', '.join(changed)} was changed" if changed else None


def _retyped(before: dict[str, Type], now: dict[str, Type]) -> str | None:
    changed = [type_.name for oid, type_ in now.items() if oid in before and not _same_values(before[oid], type_)]
    return f"type {', '.join(changed)} was changed" if changed else None


def _same_values(before: Type, now: Type) -> bool:
    """Say whether stored values of a type still have the text that they had: labels may have been added."""
    labels = {label: now.labels.get(label) for label in before.labels}
    return (before.name, before.kind, before.parts, before.labels) == (now.name, now.kind, now.parts, labels)
