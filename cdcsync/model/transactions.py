"""From protocol messages to the changes of whole transactions.

The rules:

1. Outside a transaction only Begin, Relation, Type, Origin and Message may come; inside, anything but Begin.
2. A transaction whose commit record begins before the checkpoint is skipped whole: a checkpoint is always the end of
   a record, so that transaction ended at or before it.
3. Relation messages belong to the connection. A new connection needs a new assembler.
4. The stream tells tables apart by OID and the configuration by name. When a name passes from one to another, or a
   table loses what an index needs, that index is lost: it would miss changes, or mix two tables. The others continue.
   Of a table that was looked at in the catalog the OID tells, whatever it is called in the stream: names may have been
   exchanged and exchanged back. If they were not, the next look at the catalog sees that.
5. The rows of a partition come under its root's OID. That it is one is told by what precedes its first row: the
   descriptions of the root and of the partition. An index remembers it as a part of its table, as it may be gone by the
   time that somebody looks at the catalog. It logs old rows by its own replica identity, whatever the root's
   description promises of them. An index that would take for NULL what such a partition leaves out is lost.
6. Marks are logical messages under our prefix, written inside a transaction of their own: each is delivered after every
   transaction that committed before it.

Source: PostgreSQL, "Logical Streaming Replication Protocol"; src/backend/replication/pgoutput/pgoutput.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.errors import IndexFault, ProtocolError, SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.links import Link, LinkProjection, Touch
from cdcsync.model.rows import AGAIN, Change, Projection, Shape, check_partition
from cdcsync.pgoutput.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    Message,
    Origin,
    PgoutputMessage,
    Relation,
    Truncate,
    Type,
    Update,
)

MARK_PREFIX = "cdcsync"
"""The prefix of our own logical messages."""


class Mark(msgspec.Struct, frozen=True):
    """One of our own messages: a place in the stream that a backfill waits for."""

    content: str
    lsn: int


class Began(msgspec.Struct, frozen=True):
    """The beginning of a transaction; what follows up to its `Committed` is of it.

    :param commit_lsn: where its commit record begins.
    :param commit_time_us: microseconds since 2000-01-01 UTC.
    """

    commit_lsn: Lsn
    commit_time_us: int

    @property
    def ahead(self) -> Lsn:
        """The position just after the beginning of the commit record.

        A server that branched off there or later has the whole record, as branches begin between records.
        """
        return Lsn(self.commit_lsn + 1)


class Committed(msgspec.Struct, frozen=True):
    """The end of a transaction: everything of it has been delivered.

    :param end_lsn: the position to resume from once the transaction is in the target.
    :param commit_time_us: microseconds since 2000-01-01 UTC.
    """

    end_lsn: Lsn
    commit_time_us: int


class Lost(msgspec.Struct, frozen=True):
    """From here on an index cannot follow its table: its changes are left out."""

    index: str
    error: IndexFault


class Part(msgspec.Struct, frozen=True):
    """A partition of a table that an index reads has rows in the stream."""

    index: str
    table: QualifiedName
    oid: int


Event = Began | Change | Touch | Mark | Committed | Lost | Part

NOTHING: tuple[Event, ...] = ()


class Assembler:
    """Follows one connection's messages and tells what they mean for the indexes."""

    def __init__(
        self,
        tables: Mapping[tuple[str, str], Sequence[Shape | Link]],
        checkpoint: Lsn,
        *,
        known: Mapping[int, tuple[str, str]] | None = None,
        described: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin at `checkpoint`; `tables` maps (schema, name) as the stream says it to what indexes need of it.

        :param known: the followed tables by OID: what one of them was sent while it had another name belongs to it, and
            what another table was sent while it had its name does not.
        :param described: called when a table is described again, so that it is time to look at the catalog.
        """
        self._known = known or {}
        self._known_names = set(self._known.values())
        self._described = described
        self._tables = tables
        self._checkpoint = checkpoint
        self._projections: dict[int, tuple[Projection | LinkProjection, ...]] = {}
        self._oids: dict[tuple[str, str], int] = {}
        self._described_as: dict[int, tuple[str, str]] = {}
        """By OID, the name that a table was last described by."""
        self._types: dict[tuple[str, int | None], dict[str, tuple[int, int]]] = {}
        self._lost: set[str] = set()
        self._newest: tuple[Relation | None, Relation] | None = None
        """The last two tables that were described, while no change followed."""
        self._xid: int | None = None
        self._lsn = 0
        self._skipping = False

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun and not ended."""
        return self._xid is not None

    def feed(self, message: PgoutputMessage) -> Sequence[Event]:
        """Take the next message and return what follows from it, in order.

        :raises ProtocolError: the message may not come here.
        """
        kind = type(message)
        if kind is Insert or kind is Update or kind is Delete:
            return self._row(message)  # type: ignore[arg-type]
        match message:
            case Begin():
                return self._begin(message)
            case Commit():
                return self._commit(message)
            case Relation():
                return self._describe(message)
            case Truncate():
                xid = self._inside("Truncate")
                self._newest = None
                if not self._skipping:
                    return [
                        projection.truncated(xid, self._lsn)
                        for oid in message.relation_oids
                        for projection in self._of(oid)
                    ]
            case Message():
                if message.prefix == MARK_PREFIX and not self._skipping:
                    return (Mark(message.content.decode("utf-8", "replace"), message.lsn),)
            case Type() | Origin():
                pass
            case _:
                raise ProtocolError(f"unexpected {kind.__name__} message: streaming and two-phase were not requested")
        return NOTHING

    def _describe(self, relation: Relation) -> Sequence[Event]:
        """Find each index's columns in a table, or say why an index cannot follow it any more."""
        name = (relation.namespace, relation.name)
        self._newest = None if self._newest is None else self._newest[1], relation
        lost: list[Event] = []
        if relation.oid in self._projections:
            self._described()
        before = self._described_as.get(relation.oid, name)
        if before != name:
            lost += self._lose(before, f"the table is called {QualifiedName(*name)} now")
        if self._oids.get(name, relation.oid) != relation.oid:
            lost += self._lose(name, "another table has this name now")
        shapes = self._tables.get(self._known.get(relation.oid, name), ())
        if relation.oid not in self._known and name in self._known_names:
            shapes = ()
            self._described()
        shapes = [shape for shape in shapes if shape.index not in self._lost]
        types = {column.name: (column.type_oid, column.typmod) for column in relation.columns}
        projections: list[Projection | LinkProjection] = []
        for shape in shapes:
            try:
                made = LinkProjection(shape, relation) if isinstance(shape, Link) else Projection(shape, relation)
                projections.append(made)
                self._check_types(shape, types)
            except IndexFault as error:
                lost.append(self._lost_event(shape, error))
        self._oids[name] = relation.oid
        self._described_as[relation.oid] = name
        self._projections[relation.oid] = tuple(one for one in projections if one.shape.index not in self._lost)
        return lost

    def restore(self, relations: Sequence[Relation]) -> Sequence[Event]:
        """Take descriptions, which came before, for those that hold from here on; see `model/descriptions`."""
        events = [event for relation in relations for event in self._describe(relation)]
        if relations:
            self._newest = None
        return events

    def _check_types(self, shape: Shape | Link, types: Mapping[str, tuple[int, int]]) -> None:
        """Notice that a column has another type than before: what that made of the old rows is not in the stream.

        Before is at first when the table was looked at, which may be later than what the stream brings now: then the
        values do not fit the types that the index was given.
        """
        if isinstance(shape, Link):
            mine, place = {name: types[name] for name in shape.columns}, shape.place
            looked_at = {}
        else:
            mine, place = {name: types[name] for name in shape.own}, None
            looked_at = dict(zip(shape.own, shape.types, strict=False))
        before = self._types.setdefault((shape.index, place), looked_at or mine)
        if changed := [name for name, type_ in mine.items() if before[name] != type_]:
            raise IndexFault(
                f"column {', '.join(changed)} changed its type",
                index=shape.index,
                where=str(shape.table),
                hint=AGAIN,
                passing=True,
            )

    def _lose(self, name: tuple[str, str], what: str) -> list[Event]:
        """Say which indexes cannot follow a table any more that has another name, or whose name another one has.

        One of an index's many tables may: what belongs under which name is found by looking at the catalog.
        """
        events = []
        for shape in self._tables.get(name, ()):
            if isinstance(shape, Shape) and shape.source is not None:
                self._described()
            elif shape.index not in self._lost:
                hint = f"give {shape.table} its name back: {AGAIN}; or configure a new index on the other one"
                error = IndexFault(what, index=shape.index, where=str(shape.table), hint=hint, passing=True)
                events.append(self._lost_event(shape, error))
        return events

    def _lost_event(self, shape: Shape | Link, error: IndexFault) -> Event:
        self._lost.add(shape.index)
        for oid, projections in self._projections.items():
            self._projections[oid] = tuple(one for one in projections if one.shape.index != shape.index)
        return Lost(shape.index, error)

    def _row(self, message: Insert | Update | Delete) -> Sequence[Event]:
        # Written for speed, as each row of the stream passes here.
        xid = self._xid
        if xid is None:
            raise _outside(type(message).__name__)
        projections = self._of(message.relation_oid)
        if self._newest is not None:
            (root, part), self._newest = self._newest, None
            if root is not None and root.oid == message.relation_oid != part.oid:
                return [*self._parts(root, part, projections), *self._row(message)]
        if self._skipping or not projections:
            return NOTHING
        values = message.old if isinstance(message, Delete) else message.new
        if len(values) != projections[0].width:
            raise self._misfit(message.relation_oid, len(values), projections[0].width)
        lsn = self._lsn
        try:
            if isinstance(message, Update):
                return [one.updated(message.old_kind, message.old, values, xid, lsn) for one in projections]
            if isinstance(message, Insert):
                return [one.inserted(values, xid, lsn) for one in projections]
            return [one.deleted(values, xid, lsn) for one in projections]
        except IndexFault as error:
            # A row without its key: of two indexes on the table, the other one meets the same row.
            return [*self._lost_by(error, projections), *self._row(message)]

    def _misfit(self, oid: int, columns: int, described: int) -> SourceUnavailable:
        """Return the refusal of a row that has more or fewer columns than its table was described with.

        Values would be taken for others. On a new connection every table is described again.
        """
        return SourceUnavailable(
            f"the source sent a row of {columns} columns, and had described the table with {described}",
            where=f"table {QualifiedName(*self._described_as[oid])}",
            hint="the worker connects again, and the source then describes the table anew",
        )

    def _parts(
        self, root: Relation, part: Relation, projections: Sequence[Projection | LinkProjection]
    ) -> Iterator[Event]:
        """Yield the indexes of whose table this one is a partition, and those that cannot follow it.

        One of many equal tables is none.
        """
        for one in projections:
            if one.shape.source is not None:
                continue
            yield Part(one.shape.index, one.table, part.oid)
            try:
                check_partition(root, part, one.identifying, index=one.shape.index, table=one.table)
            except IndexFault as error:
                if one.shape.index not in self._lost:
                    yield self._lost_event(one.shape, error)

    def _lost_by(self, error: IndexFault, projections: Sequence[Projection | LinkProjection]) -> list[Event]:
        return [self._lost_event(one.shape, error) for one in projections if one.shape.index == error.index]

    def _begin(self, message: Begin) -> Sequence[Event]:
        if self._xid is not None:
            raise ProtocolError("a transaction began inside another one")
        self._xid = message.xid
        self._lsn = message.final_lsn
        self._skipping = message.final_lsn < self._checkpoint
        return NOTHING if self._skipping else (Began(message.final_lsn, message.commit_time_us),)

    def _commit(self, message: Commit) -> Sequence[Event]:
        self._inside("Commit")
        self._xid = None
        if self._skipping:
            self._skipping = False
            return NOTHING
        return (Committed(message.end_lsn, message.commit_time_us),)

    def _inside(self, name: str) -> int:
        if self._xid is None:
            raise _outside(name)
        return self._xid

    def _of(self, oid: int) -> tuple[Projection | LinkProjection, ...]:
        try:
            return self._projections[oid]
        except KeyError:
            raise ProtocolError(f"a change of relation {oid} came before its description") from None


def _outside(name: str) -> ProtocolError:
    return ProtocolError(f"a {name} message came outside any transaction")
