"""The messages of the `pgoutput` plugin, one frozen struct each.

They say what the server said and no more. Positions are `Lsn`; times are microseconds since 2000-01-01 UTC (see
`wire.to_datetime`); xids have 32 bits and wrap around; OIDs name a relation or type of the source database.

`flags` is 0 in each message that has it: no protocol version gives it a meaning, and `decode` refuses others.

`xid` is None except in what lies between a StreamStart and its StreamStop; there it is the transaction or
subtransaction that the message belongs to, so that a StreamAbort can take it back.

Values never show in a `repr`: messages end up in logs and tracebacks, rows must not.

Source: PostgreSQL, "Logical Replication Message Formats"; src/backend/replication/logical/proto.c.
"""

# `gc=False` throughout: a message holds only strings, bytes, numbers and tuples of these, and is frozen before anyone
# else sees it, so no reference cycle can run through it and the collector need not look.

from __future__ import annotations

import enum
from typing import Any, Final, Literal, TypeAlias

import msgspec

from cdcsync.lsn import Lsn


class Unchanged(enum.Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged.UNCHANGED
"""Stands where the server left out a large value (TOAST) that an UPDATE did not touch. Not NULL; compare with `is`."""


class TooLarge(enum.Enum):
    """The type of `TOO_LARGE`."""

    TOO_LARGE = "too large"

    def __repr__(self) -> str:
        return "TOO_LARGE"


TOO_LARGE: Final = TooLarge.TOO_LARGE
"""Stands where a value was too large to be taken in. Compare with `is`."""

Value: TypeAlias = str | bytes | Unchanged | TooLarge | None
"""One column: text as the server renders it, bytes in the type's binary form, None for NULL, or one of those above."""
Tuple: TypeAlias = tuple[Value, ...]
"""One version of a row, in the order of its relation's columns."""

OldKind: TypeAlias = Literal["K", "O"]
"""The kind of an old tuple: `K` holds the replica identity (other columns are None), `O` the whole old row."""
ReplicaIdentity: TypeAlias = Literal["d", "n", "f", "i"]
"""`pg_class.relreplident`: default (the primary key), nothing, full (all columns) or a chosen index."""


class _Shown(str):
    """A text that prints without quotes."""

    __slots__ = ()

    __repr__ = str.__str__


def _elided(value: Any) -> Any:
    """Return what to print in place of a cell or a tuple of cells: kinds and lengths."""
    if isinstance(value, tuple):
        return tuple(_elided(cell) for cell in value)
    if isinstance(value, str):
        return _Shown(f"text[{len(value)}]")
    if isinstance(value, bytes):
        return _Shown(f"binary[{len(value)}]")
    return value


_PRIVATE: Final = frozenset({"old", "new", "content"})
"""The fields that hold what users wrote."""


class _Elided(msgspec.Struct, frozen=True, gc=False):
    """Base of the messages that hold users' data: prints their private fields as kinds and lengths."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={shown!r}' for name, shown in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [(name, _elided(value) if name in _PRIVATE else value) for name, value in fields]


class Begin(msgspec.Struct, frozen=True, gc=False):
    """A committed transaction follows, whole and in one piece, up to its Commit.

    `final_lsn` is where its commit record starts: the `commit_lsn` of the Commit.
    """

    final_lsn: Lsn
    commit_time_us: int
    xid: int


class Commit(msgspec.Struct, frozen=True, gc=False):
    """The end of the transaction; `end_lsn` is the position to checkpoint, acknowledge and resume from."""

    flags: int
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_time_us: int


class Origin(msgspec.Struct, frozen=True, gc=False):
    """The transaction was itself replicated: from where, and its commit position there."""

    lsn: Lsn
    name: str


class Column(msgspec.Struct, frozen=True, gc=False):
    """A column of a relation: whether it belongs to the replica identity, its name, type and type modifier (or -1)."""

    key: bool
    name: str
    type_oid: int
    typmod: int


class Relation(msgspec.Struct, frozen=True, gc=False):
    """The meaning of an OID on this connection from here on; sent before the first change, and again after DDL."""

    xid: int | None
    oid: int
    namespace: str
    name: str
    replica_identity: ReplicaIdentity
    columns: tuple[Column, ...]


class Type(msgspec.Struct, frozen=True, gc=False):
    """The name of a type that is not built in; for a domain, that of its base type."""

    xid: int | None
    oid: int
    namespace: str
    name: str


class Insert(_Elided, frozen=True, gc=False):
    """A new row."""

    xid: int | None
    relation_oid: int
    new: Tuple


class Update(_Elided, frozen=True, gc=False):
    """A row that changed; without an old tuple, its replica identity did not."""

    xid: int | None
    relation_oid: int
    old_kind: OldKind | None
    old: Tuple | None
    new: Tuple


class Delete(_Elided, frozen=True, gc=False):
    """A row that is gone."""

    xid: int | None
    relation_oid: int
    old_kind: OldKind
    old: Tuple


class Truncate(msgspec.Struct, frozen=True, gc=False):
    """All rows of these relations are gone."""

    xid: int | None
    relation_oids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class Message(_Elided, frozen=True, gc=False):
    """A message that `pg_logical_emit_message` wrote; outside of any transaction when it is not transactional."""

    xid: int | None
    transactional: bool
    lsn: Lsn
    prefix: str
    content: bytes


class StreamStart(msgspec.Struct, frozen=True, gc=False):
    """A block of changes of an open transaction follows; `xid` is the top-level one."""

    xid: int
    first_segment: bool


class StreamStop(msgspec.Struct, frozen=True, gc=False):
    """The end of the block."""


class StreamCommit(msgspec.Struct, frozen=True, gc=False):
    """The streamed transaction has committed: its blocks, without what was aborted, are now changes."""

    xid: int
    flags: int
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_time_us: int


class StreamAbort(msgspec.Struct, frozen=True, gc=False):
    """The subtransaction `subxid` of a streamed transaction is undone; all of it when `subxid` is `xid`.

    Position and time are None unless protocol 4 streams with `streaming 'parallel'`.
    """

    xid: int
    subxid: int
    abort_lsn: Lsn | None
    abort_time_us: int | None


class BeginPrepare(msgspec.Struct, frozen=True, gc=False):
    """A prepared transaction follows, whole, up to its Prepare."""

    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_time_us: int
    xid: int
    gid: str


class Prepare(msgspec.Struct, frozen=True, gc=False):
    """The transaction is prepared under the name `gid`; whether it commits is not yet known."""

    flags: int
    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_time_us: int
    xid: int
    gid: str


class CommitPrepared(msgspec.Struct, frozen=True, gc=False):
    """The prepared transaction has committed."""

    flags: int
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_time_us: int
    xid: int
    gid: str


class RollbackPrepared(msgspec.Struct, frozen=True, gc=False):
    """The prepared transaction is undone."""

    flags: int
    prepare_end_lsn: Lsn
    rollback_end_lsn: Lsn
    prepare_time_us: int
    rollback_time_us: int
    xid: int
    gid: str


class StreamPrepare(msgspec.Struct, frozen=True, gc=False):
    """The streamed transaction is prepared under the name `gid`."""

    flags: int
    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_time_us: int
    xid: int
    gid: str


PgoutputMessage: TypeAlias = (
    Begin
    | Commit
    | Origin
    | Relation
    | Type
    | Insert
    | Update
    | Delete
    | Truncate
    | Message
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
    | BeginPrepare
    | Prepare
    | CommitPrepared
    | RollbackPrepared
    | StreamPrepare
)
"""Everything that `decode` can return."""
