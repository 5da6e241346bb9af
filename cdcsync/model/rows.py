"""The part of a table's rows that one index needs, and the changes of those rows.

A `Shape` names the columns; a `Projection` finds them in a relation's tuples, whose order only the relation message
of the present connection tells. A row is a tuple of values in the shape's order: key, then carried columns, then the
columns of the text template, then those that decide whether the index has the row. Values stay the text that the server
rendered, so that they can be copied on unconverted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Self, cast

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.errors import IndexFault
from cdcsync.pgoutput.messages import TOO_LARGE, UNCHANGED, Relation, Tuple, Value

SOURCE_TABLE = "source_table"
"""The column of the key that says which of many tables a row is of."""

Row = tuple[Value, ...]
"""A shape's columns of one row version."""
Key = tuple[str, ...]
"""The key's values, in the key's order, as the server renders them."""


class Shape(msgspec.Struct, frozen=True):
    """The columns that one index needs of its table, by role."""

    index: str
    table: QualifiedName
    key: tuple[str, ...]
    carried: tuple[str, ...]
    text: tuple[str, ...]
    types: tuple[tuple[int, int], ...] = ()
    """The types of its own columns when the table was last looked at, as OID and modifier; none where nobody looked."""
    computed: frozenset[str] = frozenset()
    """The columns that are made of rows of related tables. The stream does not bring them: rows are read again."""
    joined: tuple[str, ...] = ()
    """The table's columns by which related rows are found."""
    deciding: tuple[str, ...] = ()
    """The table's columns whose values say whether the index has the row."""
    many: bool = False
    """Whether the index is over many equal tables, so that the key begins with the table's name."""
    source: str | None = None
    """The name of that table, in the shape of one of many."""
    inheritable: bool = False
    """Whether other tables can inherit from it, whose rows are not its own: it is not partitioned."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in a row's order; one that has two roles appears twice."""
        return self.key + self.carried + self.text + self.deciding

    @property
    def own(self) -> tuple[str, ...]:
        """The columns that are read of the table itself, each once."""
        made = {*self.computed, SOURCE_TABLE} if self.many else self.computed
        return tuple(dict.fromkeys(one for one in self.columns + self.joined if one not in made))

    def key_of(self, row: Row) -> Key:
        """Return the key part of a row."""
        return cast(Key, row[: len(self.key)])

    def carried_of(self, row: Row) -> Row:
        """Return the carried part of a row."""
        return row[len(self.key) : len(self.key) + len(self.carried)]

    def text_of(self, row: Row) -> Row:
        """Return the part of a row that the text template renders."""
        start = len(self.key) + len(self.carried)
        return row[start : start + len(self.text)]

    def deciding_of(self, row: Row) -> Row:
        """Return the part of a row that says whether the index has it."""
        return row[len(row) - len(self.deciding) :]


class Upsert(msgspec.Struct, frozen=True, gc=False):
    """A row as it is after a change; `moved_from` is its key before, when that differs."""

    shape: Shape
    key: Key
    row: Row
    xid: int
    lsn: int
    moved_from: Key | None = None


class Touched(Upsert, frozen=True, gc=False):
    """A row of which only the key is known: its related rows changed. UNCHANGED in it says nothing of its values."""


class Unread(msgspec.Struct, frozen=True):
    """Why a row cannot be read, or taken in. It names no value."""

    reason: str


OVERSIZED = Unread("a value of the row is larger than a sixteenth of the worker's memory")


class UnreadRow(Upsert, frozen=True, gc=False):
    """A row that cannot be read, or taken in; `row` holds its key, and NULL for all else."""

    reason: str = ""

    @classmethod
    def of(cls, shape: Shape, key: Key, xid: int, lsn: int, why: Unread) -> Self:
        """Return such a row as a change."""
        row: Row = (*key, *[None] * (len(shape.columns) - len(shape.key)))
        return cls(shape, key, row, xid, lsn, reason=why.reason)


class Delete(msgspec.Struct, frozen=True, gc=False):
    """A row that is gone.

    :ivar as_written: whether a row whose key is equal but written differently (1.00 for 1.0) is another, which stays.
    """

    shape: Shape
    key: Key
    xid: int
    lsn: int
    as_written: bool = False


class Truncation(msgspec.Struct, frozen=True, gc=False):
    """All rows are gone."""

    shape: Shape
    xid: int
    lsn: int


Change = Upsert | Delete | Truncation

AGAIN = "the worker then reads the table again and resumes the index by itself"
"""How a pause ends."""


def picker(positions: Sequence[int]) -> Callable[[Tuple], Row]:
    """Return a function that picks `positions` of a tuple, as a tuple, without a loop in Python."""
    if len(positions) == 1:
        (only,) = positions
        return lambda values: (values[only],)
    return itemgetter(*positions)


def positions_in(relation: Relation, names: Sequence[str], *, index: str, table: QualifiedName) -> dict[str, int]:
    """Return the position of each of a relation's columns, by name.

    :param names: columns that the index needs.
    :raises IndexFault: the relation lacks one of them.
    """
    positions = {column.name: at for at, column in enumerate(relation.columns)}
    if missing := [name for name in names if name not in positions]:
        raise IndexFault(
            f"column {', '.join(missing)} is no longer in what the publication sends",
            index=index,
            where=str(table),
            hint=f"restore the column: {AGAIN}; or take it out of [indexes.{index}] and restart the worker",
            passing=True,
        )
    return positions


def check_partition(root: Relation, part: Relation, names: Sequence[str], *, index: str, table: QualifiedName) -> None:
    """Check that old rows of a partition, which come under its root's name, hold the columns that identify them.

    An old row is announced as whole when the root says FULL, and what the partition does not log of it is sent as NULL.
    Of a column that the partition's description lacks nothing is known: with a column list the server counts the
    partition's columns by the root's numbers.

    :param names: columns that the index needs of an old row.
    :raises IndexFault: they do not.
    """
    lacking = [column.name for column in part.columns if column.name in names and not column.key]
    if lacking or (root.replica_identity == "f" and part.replica_identity != "f"):
        name = QualifiedName(part.namespace, part.name)
        raise IndexFault(
            f"old rows of its partition {name} arrived without "
            + (f"({', '.join(lacking)})" if lacking else f"all columns, and {table} promises all"),
            index=index,
            where=str(table),
            hint=f"ALTER TABLE {name} REPLICA IDENTITY FULL, if it is not by now; {AGAIN}",
            passing=True,
        )


class Projection:
    """Turns a relation's tuples into the changes of one index.

    :raises IndexFault: the relation lacks a column of the shape, or its identity does not cover the key.
    """

    def __init__(self, shape: Shape, relation: Relation) -> None:
        positions = positions_in(relation, shape.own, index=shape.index, table=shape.table)
        identity = {column.name for column in relation.columns if column.key}
        key = set(shape.key) - ({SOURCE_TABLE} if shape.many else set())
        # A full identity holds every column; any other one is what identifies a row, and so has to be the index's key.
        if not (key <= identity if relation.replica_identity == "f" else key == identity):
            listed = ", ".join(column.name for column in relation.columns if column.key)
            raise IndexFault(
                f"the replica identity is ({listed}), and the key of the index ({', '.join(shape.key)})"
                if identity
                else f"there is no replica identity, which has to cover the key ({', '.join(shape.key)})",
                index=shape.index,
                where=str(shape.table),
                hint=f"ALTER TABLE {shape.table} REPLICA IDENTITY DEFAULT (or USING INDEX … on the key)",
                passing=True,
            )
        self.shape = shape
        self.table = shape.table
        self.width = len(relation.columns)
        self.identifying = tuple(name for name in shape.key if name in key)
        self._key_width = len(shape.key)
        made = {*shape.computed, SOURCE_TABLE} if shape.many else shape.computed
        positions |= dict.fromkeys(made, len(relation.columns))
        constant = shape.source if shape.many else UNCHANGED

        def picked(names: Sequence[str]) -> Callable[[Tuple], Row]:
            pick = picker([positions[name] for name in names])
            return (lambda values: pick((*values, constant))) if made.intersection(names) else pick

        self._row = picked(shape.columns)
        self._key = picked(shape.key)

    def inserted(self, new: Tuple, xid: int, lsn: int) -> Upsert:
        """Return the change that an INSERT makes.

        :raises IndexFault: a column of the key is NULL, as it may be by now.
        """
        return Upsert(self.shape, self._whole(self._key(new)), self._row(new), xid, lsn)

    def updated(self, old_kind: str | None, old: Tuple | None, new: Tuple, xid: int, lsn: int) -> Upsert:
        """Return the change that an UPDATE makes.

        An old tuple is sent only when the identity is FULL or a key column changed; without one the key is unchanged.
        A full old tuple also tells what unchanged TOAST values are.

        :raises IndexFault: the key is missing.
        """
        row = self._row(new)
        sent = row[: self._key_width]
        if old is None:
            if UNCHANGED in sent:
                raise IndexFault(
                    "an UPDATE arrived without its key",
                    index=self.shape.index,
                    where=str(self.shape.table),
                    hint=f"update the source to its latest minor release: old ones omit large keys; {AGAIN}",
                )
            return Upsert(self.shape, self._whole(sent), row, xid, lsn)
        before = self._old_key(old, "an UPDATE")
        row = fill(row, self._row(old)) if old_kind == "O" else fill(sent, before) + row[self._key_width :]
        key = self._whole(self.shape.key_of(row))
        return Upsert(self.shape, key, row, xid, lsn, before if before != key else None)

    def truncated(self, xid: int, lsn: int) -> Truncation:
        """Return the change that a TRUNCATE makes."""
        return Truncation(self.shape, xid, lsn)

    def deleted(self, old: Tuple, xid: int, lsn: int) -> Delete:
        """Return the change that a DELETE makes.

        :raises IndexFault: the key is missing.
        """
        return Delete(self.shape, self._old_key(old, "a DELETE"), xid, lsn)

    def _whole(self, key: Row) -> Key:
        if None in key:
            raise IndexFault(
                f"a row arrived of which the key ({', '.join(self.shape.key)}) contains NULL, which identifies no row",
                index=self.shape.index,
                where=str(self.shape.table),
                hint="remove such rows, and set the key's columns NOT NULL again",
                passing=True,
            )
        return cast(Key, key)

    def _old_key(self, old: Tuple, operation: str) -> Key:
        key = self._key(old)
        if None in key:  # a partition may have another replica identity than the table that the stream names
            raise IndexFault(
                f"the old row of {operation} arrived without its key",
                index=self.shape.index,
                where=str(self.shape.table),
                hint=f"give {self.shape.table} and its partitions a replica identity that covers"
                f" ({', '.join(self.shape.key)}); {AGAIN}",
                passing=True,
            )
        return cast(Key, key)


def fill(row: Row, known: Row) -> Row:
    """Return `row` with each unchanged TOAST value taken from `known`, an earlier version of the same row."""
    if UNCHANGED not in row:
        return row
    return tuple(before if now is UNCHANGED else now for now, before in zip(row, known, strict=True))


def oversized(row: Row) -> bool:
    """Say whether a value of `row` was too large to be taken in."""
    return TOO_LARGE in row


def complete(row: Row) -> bool:
    """Say whether every value of `row` is known."""
    return UNCHANGED not in row
