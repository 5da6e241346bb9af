"""How a row of a related table tells which documents it belongs to.

A *link* is one table on the way from the index's table to a related one: its rows belong to rows of the table before
it, by columns that are equal. A change of a row names, by those columns as they were and as they are, where the row was
and where it is. Often that is the document's key itself. Else the server finds the documents from there: on the way
back there are only tables whose own changes are followed too, so what it finds later than the change is complete, or a
change that is still to come completes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.documents.related import Facts, RelatedRows, Step, TableFacts
from cdcsync.errors import IndexFault
from cdcsync.model.rows import AGAIN, Row, Shape, fill, picker, positions_in
from cdcsync.pgoutput.messages import TOO_LARGE, UNCHANGED, Relation, Tuple

Values = tuple[str, ...]
"""A row's values in a link's columns, as the server renders them."""

NUMBERS = ("smallint", "integer", "bigint")
"""From the narrowest to the widest."""


class Link(msgspec.Struct, frozen=True):
    """One table on the way to a related one.

    :ivar relation: the relation's name, after those that it is within.
    :ivar place: among the links of the index.
    :ivar steps: the tables from the index's own to this one, which is the last.
    """

    shape: Shape
    relation: str
    place: int
    steps: tuple[Step, ...]
    types: dict[str, str] = {}
    """The types of the columns, as format_type prints them."""
    key: tuple[int, ...] = ()
    """Where in a row's values the key of its document stands, if they are that key; empty if the server has to tell."""

    @property
    def index(self) -> str:
        """The index."""
        return self.shape.index

    @property
    def table(self) -> QualifiedName:
        """The table whose rows have the columns."""
        return self.steps[-1].table

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that tell which rows of the table before it a row belongs to."""
        return self.steps[-1].columns


class Touch(msgspec.Struct, frozen=True, gc=False):
    """A change of a related row: the documents that it belonged to, or belongs to now, are to be rebuilt.

    :ivar values: what it has in the link's columns, before the change and after it; None for rows of every document.
    """

    shape: Shape
    place: int
    values: tuple[Values, ...] | None
    xid: int
    lsn: int


def links_of(shape: Shape, related: Sequence[RelatedRows], facts: Facts) -> tuple[Link, ...]:
    """Return the links of an index, each table on each way once."""
    links: list[Link] = []
    own = facts.get(shape.table, TableFacts()).types

    def add(relations: Sequence[RelatedRows], way: tuple[Step, ...]) -> None:
        for one in relations:
            for upto in range(1, len(one.steps) + 1):
                steps = (*way, *one.steps[:upto])
                types = facts.get(steps[-1].table, TableFacts()).types
                mine = {column: types.get(column, "text") for column in steps[-1].columns}
                key = _key_in(shape, steps, mine, own)
                links.append(Link(shape, ".".join(one.path), len(links), steps, mine, key))
            add(one.related, (*way, *one.steps))

    add(related, ())
    return tuple(links)


def _key_in(shape: Shape, steps: Sequence[Step], types: Mapping[str, str], own: Mapping[str, str]) -> tuple[int, ...]:
    """Return where in the values of a link's columns a document's key stands; see `Link.key`.

    :param own: the types of the index's table.
    """
    (step, *further) = steps
    places = {theirs: at for at, (_, theirs) in enumerate(step.on)}
    if further or shape.source is not None or len(step.on) != len(shape.key) or places.keys() != set(shape.key):
        return ()
    if not all(_is_key(types[mine], own.get(theirs, "")) for mine, theirs in step.on):
        return ()
    return tuple(places[column] for column in shape.key)


def _is_key(mine: str, key: str) -> bool:
    """Say whether every value of a type is one of the key's type, and equal to it just where their texts are.

    A number that is too large for the key belongs to no document, and the target would refuse it.
    """
    if mine in NUMBERS and key in NUMBERS:
        return NUMBERS.index(mine) <= NUMBERS.index(key)
    return mine == key == "uuid"


class LinkProjection:
    """Turns a relation's tuples into the touches of one link.

    :raises IndexFault: the relation lacks a column of the link, or its identity does not cover them.
    """

    def __init__(self, link: Link, relation: Relation) -> None:
        positions = positions_in(relation, link.columns, index=link.index, table=link.table)
        identity = {column.name for column in relation.columns if column.key}
        if not set(link.columns) <= identity:
            raise IndexFault(
                f"the replica identity ({', '.join(sorted(identity))}) does not cover ({', '.join(link.columns)}),"
                " so changes do not tell which documents a row belonged to",
                index=link.index,
                where=str(link.table),
                hint=f"ALTER TABLE {link.table} REPLICA IDENTITY FULL; {AGAIN}",
                passing=True,
            )
        self.shape = link.shape
        self.table = link.table
        self.width = len(relation.columns)
        self.identifying = link.columns
        self._link = link
        self._values = picker([positions[name] for name in link.columns])

    def inserted(self, new: Tuple, xid: int, lsn: int) -> Touch:
        """Return what an INSERT touches."""
        return self._touch((self._values(new),), xid, lsn)

    def updated(self, old_kind: str | None, old: Tuple | None, new: Tuple, xid: int, lsn: int) -> Touch:
        """Return what an UPDATE touches; without an old tuple the columns, which the identity covers, are unchanged."""
        after = self._values(new)
        if old is None:
            return self._touch((after,), xid, lsn)
        before = self._values(old)
        return self._touch((before, fill(after, before)), xid, lsn)

    def deleted(self, old: Tuple, xid: int, lsn: int) -> Touch:
        """Return what a DELETE touches."""
        return self._touch((self._values(old),), xid, lsn)

    def truncated(self, xid: int, lsn: int) -> Touch:
        """Return what a TRUNCATE touches."""
        return Touch(self.shape, self._link.place, None, xid, lsn)

    def _touch(self, places: Sequence[Row], xid: int, lsn: int) -> Touch:
        found = dict.fromkeys(places)
        if any(TOO_LARGE in values for values in found):
            raise IndexFault(
                f"a value of the columns ({', '.join(self._link.columns)}) is larger than a sixteenth of the worker's"
                " memory, so the documents that it belongs to cannot be looked up",
                index=self._link.index,
                where=str(self._link.table),
                hint=f"give the worker more memory; {AGAIN}",
                passing=True,
            )
        if any(UNCHANGED in values for values in found):
            raise IndexFault(
                f"a change arrived without the columns ({', '.join(self._link.columns)})",
                index=self._link.index,
                where=str(self._link.table),
                hint=f"ALTER TABLE {self._link.table} REPLICA IDENTITY FULL; {AGAIN}",
                passing=True,
            )
        # A row with NULL there belongs nowhere.
        known = tuple(values for values in found if None not in values)
        return Touch(self.shape, self._link.place, known, xid, lsn)  # type: ignore[arg-type]
