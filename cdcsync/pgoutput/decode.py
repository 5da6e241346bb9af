"""From the bytes of one `pgoutput` message to its struct.

Theory of operation: a message does not say how it is laid out. Two facts come from outside: whether it lies in a
streamed block (then each change, Relation, Type and Message carries an xid) and whether the server adds position and
time to a StreamAbort. Row changes, which are nearly all of a stream, have readers of their own: they check no bound
per field, because a length that points past the end shows at the next field or, at the latest, when the end does not
come out even. Everything else goes through a `Cursor`.

A layout is known in full, so a byte too many, a flag or an enumeration letter without a meaning is an error: it is
better to stop than to guess at what a server said.

Source: PostgreSQL, "Logical Replication Message Formats"; src/backend/replication/logical/proto.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from cdcsync.errors import MalformedMessage
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.messages import (
    TOO_LARGE,
    UNCHANGED,
    Begin,
    BeginPrepare,
    Column,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    Message,
    OldKind,
    Origin,
    PgoutputMessage,
    Prepare,
    Relation,
    ReplicaIdentity,
    RollbackPrepared,
    StreamAbort,
    StreamCommit,
    StreamPrepare,
    StreamStart,
    StreamStop,
    Truncate,
    Tuple,
    Type,
    Update,
    Value,
)
from cdcsync.pgoutput.wire import ENDS_EARLY, NOT_UTF8, TRAILING_BYTES, Cursor

_NEW: Final = ord("N")
_OLD_KINDS: Final[dict[int, OldKind]] = {ord("K"): "K", ord("O"): "O"}
_REPLICA_IDENTITIES: Final[dict[int, ReplicaIdentity]] = {ord("d"): "d", ord("n"): "n", ord("f"): "f", ord("i"): "i"}

_TEXT: Final = ord("t")
_NULL: Final = ord("n")
_UNCHANGED: Final = ord("u")
_BINARY: Final = ord("b")
_LENGTH = struct.Struct(">I")

ANY_SIZE: Final = 2**32
"""No value is larger than this, as its length has four bytes."""

_COLUMN_KEY: Final = 1
_MESSAGE_TRANSACTIONAL: Final = 1
_FIRST_SEGMENT: Final = 1
_TRUNCATE_CASCADE: Final = 1
_TRUNCATE_RESTART_IDENTITY: Final = 2

_STREAM_ABORT_TAG: Final = ord("A")

# Tag, xid when streamed, relation OID, and the letter that says which tuple comes first.
_ROW_HEAD = struct.Struct(">xIB")
_STREAMED_ROW_HEAD = struct.Struct(">xIIB")

# The fixed parts of the other messages, behind the tag (and behind the xid that streaming adds).
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")
_ORIGIN = struct.Struct(">Q")
_COLUMN = struct.Struct(">Ii")
_TRUNCATE = struct.Struct(">IB")
_MESSAGE = struct.Struct(">BQ")
_STREAM_START = struct.Struct(">IB")
_STREAM_COMMIT = struct.Struct(">IBQQq")
_STREAM_ABORT = struct.Struct(">II")
_STREAM_ABORT_INFO = struct.Struct(">Qq")
_BEGIN_PREPARE = struct.Struct(">QQqI")
_PREPARED = struct.Struct(">BQQqI")
_ROLLBACK_PREPARED = struct.Struct(">BQQqqI")
_BYTE = struct.Struct(">B")


def decode(
    data: bytes, *, streamed: bool = False, abort_info: bool = False, largest: int = ANY_SIZE
) -> PgoutputMessage:
    """Read one message.

    :param data: the payload of one `XLogData` frame, or one row of `pg_logical_slot_get_binary_changes`.
    :param streamed: whether it came after a StreamStart and before its StreamStop.
    :param abort_info: whether the connection uses protocol 4 (or later) with `streaming 'parallel'`.
    :param largest: values of more bytes are `TOO_LARGE`.
    :raises MalformedMessage: the bytes are no such message, or it has bytes left over.
    """
    if not data:
        raise MalformedMessage("", 0, "the message is empty")
    tag = data[0]
    if (row := _ROWS.get(tag)) is not None:
        return row(data, streamed, largest)
    cursor = Cursor(data)
    message: PgoutputMessage
    if (other := _OTHERS.get(tag)) is not None:
        message = other(cursor)
    elif (change := _CHANGES.get(tag)) is not None:
        message = change(cursor, cursor.uint32() if streamed else None)
    elif tag == _STREAM_ABORT_TAG:
        message = _stream_abort(cursor, abort_info)
    else:
        raise MalformedMessage(chr(tag), 0, "a message of an unknown kind")
    cursor.end()
    return message


# -- rows --------------------------------------------------------------------------------------------------------------


def _insert(data: bytes, streamed: bool, largest: int) -> Insert:
    xid, relation_oid, kind, at = _row_head(data, streamed)
    if kind != _NEW:
        raise _misfit(data, at - 1, "an Insert without a new tuple")
    new, at = _tuple(data, at, largest)
    if at != len(data):
        raise _uneven(data, at)
    return Insert(xid, relation_oid, new)


def _update(data: bytes, streamed: bool, largest: int) -> Update:
    xid, relation_oid, kind, at = _row_head(data, streamed)
    old_kind: OldKind | None = None
    old: Tuple | None = None
    if kind != _NEW:
        old_kind = _OLD_KINDS.get(kind)
        if old_kind is None:
            raise _misfit(data, at - 1, "an Update whose first tuple is neither old nor new")
        old, at = _tuple(data, at, largest)
        if at >= len(data):
            raise _uneven(data, at)
        if data[at] != _NEW:
            raise _misfit(data, at, "an Update without a new tuple")
        at += 1
    new, at = _tuple(data, at, largest)
    if at != len(data):
        raise _uneven(data, at)
    return Update(xid, relation_oid, old_kind, old, new)


def _delete(data: bytes, streamed: bool, largest: int) -> Delete:
    xid, relation_oid, kind, at = _row_head(data, streamed)
    old_kind = _OLD_KINDS.get(kind)
    if old_kind is None:
        raise _misfit(data, at - 1, "a Delete without an old tuple")
    old, at = _tuple(data, at, largest)
    if at != len(data):
        raise _uneven(data, at)
    return Delete(xid, relation_oid, old_kind, old)


def _row_head(data: bytes, streamed: bool) -> tuple[int | None, int, int, int]:
    """Return xid, relation OID, the first tuple's letter and the offset behind it."""
    try:
        if streamed:
            xid, relation_oid, kind = _STREAMED_ROW_HEAD.unpack_from(data)
            return xid, relation_oid, kind, _STREAMED_ROW_HEAD.size
        relation_oid, kind = _ROW_HEAD.unpack_from(data)
    except struct.error:
        raise _misfit(data, len(data), ENDS_EARLY) from None
    return None, relation_oid, kind, _ROW_HEAD.size


def _tuple(data: bytes, at: int, largest: int) -> tuple[Tuple, int]:
    """Read the tuple at `at`, and return it with the offset behind it.

    That offset lies past the end of `data` when the last value is cut short: the caller has to compare them.
    """
    # Written for speed: a value costs one unpack, one slice and one append. A slice that comes out short needs no check
    # of its own, since every read behind it fails.
    length_at = _LENGTH.unpack_from
    values: list[Value] = []
    append = values.append
    start = at
    try:
        columns = data[at] << 8 | data[at + 1]
        at += 2
        for _ in range(columns):
            kind = data[at]
            at += 1
            if kind == _TEXT:
                start = at + 4
                at = start + length_at(data, at)[0]
                append(data[start:at].decode() if at - start <= largest else TOO_LARGE)
            elif kind == _NULL:
                append(None)
            elif kind == _UNCHANGED:
                append(UNCHANGED)
            elif kind == _BINARY:
                start = at + 4
                at = start + length_at(data, at)[0]
                append(data[start:at] if at - start <= largest else TOO_LARGE)
            else:
                raise _misfit(data, at - 1, "a value of an unknown kind")
    except UnicodeDecodeError as error:
        if at > len(data):
            raise _uneven(data, at) from None
        raise _misfit(data, start + error.start, NOT_UTF8) from None
    except (IndexError, struct.error):
        raise _misfit(data, len(data), ENDS_EARLY) from None
    return tuple(values), at


def _uneven(data: bytes, at: int) -> MalformedMessage:
    """Return the error for a message whose last field ends at `at` and not at its end."""
    if at < len(data):
        return _misfit(data, at, TRAILING_BYTES)
    return _misfit(data, len(data), ENDS_EARLY)


def _misfit(data: bytes, at: int, problem: str) -> MalformedMessage:
    return MalformedMessage(chr(data[0]), at, problem)


# -- transactions ------------------------------------------------------------------------------------------------------


def _begin(cursor: Cursor) -> Begin:
    final_lsn, commit_time_us, xid = cursor.unpack(_BEGIN)
    return Begin(Lsn(final_lsn), commit_time_us, xid)


def _commit(cursor: Cursor) -> Commit:
    flags, commit_lsn, end_lsn, commit_time_us = cursor.unpack(_COMMIT)
    return Commit(_no_flags(cursor, flags), Lsn(commit_lsn), Lsn(end_lsn), commit_time_us)


def _origin(cursor: Cursor) -> Origin:
    (lsn,) = cursor.unpack(_ORIGIN)
    return Origin(Lsn(lsn), cursor.string())


def _stream_start(cursor: Cursor) -> StreamStart:
    xid, first = cursor.unpack(_STREAM_START)
    return StreamStart(xid, _flags(cursor, first, _FIRST_SEGMENT) == _FIRST_SEGMENT)


def _stream_stop(cursor: Cursor) -> StreamStop:
    return StreamStop()


def _stream_commit(cursor: Cursor) -> StreamCommit:
    xid, flags, commit_lsn, end_lsn, commit_time_us = cursor.unpack(_STREAM_COMMIT)
    return StreamCommit(xid, _no_flags(cursor, flags), Lsn(commit_lsn), Lsn(end_lsn), commit_time_us)


def _stream_abort(cursor: Cursor, abort_info: bool) -> StreamAbort:
    xid, subxid = cursor.unpack(_STREAM_ABORT)
    if not abort_info:
        return StreamAbort(xid, subxid, None, None)
    abort_lsn, abort_time_us = cursor.unpack(_STREAM_ABORT_INFO)
    return StreamAbort(xid, subxid, Lsn(abort_lsn), abort_time_us)


def _begin_prepare(cursor: Cursor) -> BeginPrepare:
    prepare_lsn, end_lsn, prepare_time_us, xid = cursor.unpack(_BEGIN_PREPARE)
    return BeginPrepare(Lsn(prepare_lsn), Lsn(end_lsn), prepare_time_us, xid, cursor.string())


def _prepared(cursor: Cursor) -> tuple[int, Lsn, Lsn, int, int, str]:
    """Read what Prepare, CommitPrepared and StreamPrepare have in common, which is all they have."""
    flags, at_lsn, end_lsn, time_us, xid = cursor.unpack(_PREPARED)
    return _no_flags(cursor, flags), Lsn(at_lsn), Lsn(end_lsn), time_us, xid, cursor.string()


def _rollback_prepared(cursor: Cursor) -> RollbackPrepared:
    flags, prepare_end_lsn, rollback_end_lsn, prepare_time_us, rollback_time_us, xid = cursor.unpack(_ROLLBACK_PREPARED)
    return RollbackPrepared(
        _no_flags(cursor, flags),
        Lsn(prepare_end_lsn),
        Lsn(rollback_end_lsn),
        prepare_time_us,
        rollback_time_us,
        xid,
        cursor.string(),
    )


# -- descriptions and other changes, which carry an xid when streamed --------------------------------------------------


def _relation(cursor: Cursor, xid: int | None) -> Relation:
    oid = cursor.uint32()
    namespace, name = _qualified_name(cursor)
    (letter,) = cursor.unpack(_BYTE)
    replica_identity = _REPLICA_IDENTITIES.get(letter)
    if replica_identity is None:
        raise cursor.fault("a Relation with an unknown replica identity")
    columns = tuple([_column(cursor) for _ in range(cursor.uint16())])
    return Relation(xid, oid, namespace, name, replica_identity, columns)


def _column(cursor: Cursor) -> Column:
    (flags,) = cursor.unpack(_BYTE)
    key = _flags(cursor, flags, _COLUMN_KEY) == _COLUMN_KEY
    name = cursor.string()
    type_oid, typmod = cursor.unpack(_COLUMN)
    return Column(key, name, type_oid, typmod)


def _type(cursor: Cursor, xid: int | None) -> Type:
    return Type(xid, cursor.uint32(), *_qualified_name(cursor))


def _truncate(cursor: Cursor, xid: int | None) -> Truncate:
    count, flags = cursor.unpack(_TRUNCATE)
    _flags(cursor, flags, _TRUNCATE_CASCADE | _TRUNCATE_RESTART_IDENTITY)
    # The bytes are taken before anything is made of the count, so that a wild one costs nothing.
    oids = struct.unpack(f">{count}I", cursor.take(count * 4))
    return Truncate(xid, oids, bool(flags & _TRUNCATE_CASCADE), bool(flags & _TRUNCATE_RESTART_IDENTITY))


def _message(cursor: Cursor, xid: int | None) -> Message:
    flags, lsn = cursor.unpack(_MESSAGE)
    transactional = _flags(cursor, flags, _MESSAGE_TRANSACTIONAL) == _MESSAGE_TRANSACTIONAL
    prefix = cursor.string()
    return Message(xid, transactional, Lsn(lsn), prefix, cursor.take(cursor.uint32()))


def _qualified_name(cursor: Cursor) -> tuple[str, str]:
    """Read schema and name; servers shorten the schema `pg_catalog` to nothing."""
    return cursor.string() or "pg_catalog", cursor.string()


def _flags(cursor: Cursor, flags: int, known: int) -> int:
    if flags & ~known:
        raise cursor.fault("flags without a meaning")
    return flags


def _no_flags(cursor: Cursor, flags: int) -> int:
    return _flags(cursor, flags, 0)


_RowReader: TypeAlias = Callable[[bytes, bool, int], PgoutputMessage]
_ChangeReader: TypeAlias = Callable[[Cursor, int | None], PgoutputMessage]
_OtherReader: TypeAlias = Callable[[Cursor], PgoutputMessage]

_ROWS: Final[dict[int, _RowReader]] = {ord("I"): _insert, ord("U"): _update, ord("D"): _delete}
_CHANGES: Final[dict[int, _ChangeReader]] = {
    ord("R"): _relation,
    ord("Y"): _type,
    ord("T"): _truncate,
    ord("M"): _message,
}
_OTHERS: Final[dict[int, _OtherReader]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("O"): _origin,
    ord("S"): _stream_start,
    ord("E"): _stream_stop,
    ord("c"): _stream_commit,
    ord("b"): _begin_prepare,
    ord("P"): lambda cursor: Prepare(*_prepared(cursor)),
    ord("K"): lambda cursor: CommitPrepared(*_prepared(cursor)),
    ord("r"): _rollback_prepared,
    ord("p"): lambda cursor: StreamPrepare(*_prepared(cursor)),
}
