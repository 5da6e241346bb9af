"""The decoder against all bytes, and against an encoder that shares no line with it.

The encoder builds each message from the protocol's chapter, field by field, with `int.to_bytes` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, assert_never

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdcsync.errors import MalformedMessage
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import (
    Keepalive,
    XLogData,
    decode_frame,
)
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
    Origin,
    PgoutputMessage,
    Prepare,
    Relation,
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
)

Read = TypeVar("Read")

TAGS = b"BCORYIUDTMSEcAbPKrp"

uint32s = st.integers(0, 2**32 - 1)
lsns = st.integers(0, 2**64 - 1).map(Lsn)
times = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
schemas = names.map(lambda name: name or "pg_catalog")
tuples = st.lists(st.one_of(texts, st.binary(max_size=40), st.none(), st.just(UNCHANGED)), max_size=8).map(tuple)
columns = st.builds(Column, st.booleans(), names, uint32s, st.integers(-(2**31), 2**31 - 1))
no_flags = st.just(0)


def messages(*, streamed: bool, abort_info: bool) -> st.SearchStrategy[PgoutputMessage]:
    """Every message that a server could send in this situation."""
    xids = uint32s if streamed else st.none()
    prepared = (no_flags, lsns, lsns, times, uint32s, names)
    return st.one_of(
        st.builds(Begin, lsns, times, uint32s),
        st.builds(Commit, no_flags, lsns, lsns, times),
        st.builds(Origin, lsns, names),
        st.builds(
            Relation, xids, uint32s, schemas, names, st.sampled_from("dnfi"), st.lists(columns, max_size=5).map(tuple)
        ),
        st.builds(Type, xids, uint32s, schemas, names),
        st.builds(Insert, xids, uint32s, tuples),
        st.builds(Update, xids, uint32s, st.none(), st.none(), tuples),
        st.builds(Update, xids, uint32s, st.sampled_from("KO"), tuples, tuples),
        st.builds(Delete, xids, uint32s, st.sampled_from("KO"), tuples),
        st.builds(Truncate, xids, st.lists(uint32s, max_size=5).map(tuple), st.booleans(), st.booleans()),
        st.builds(Message, xids, st.booleans(), lsns, names, st.binary(max_size=40)),
        st.builds(StreamStart, uint32s, st.booleans()),
        st.builds(StreamStop),
        st.builds(StreamCommit, uint32s, no_flags, lsns, lsns, times),
        st.builds(StreamAbort, uint32s, uint32s, lsns if abort_info else st.none(), times if abort_info else st.none()),
        st.builds(BeginPrepare, lsns, lsns, times, uint32s, names),
        st.builds(Prepare, *prepared),
        st.builds(CommitPrepared, *prepared),
        st.builds(RollbackPrepared, no_flags, lsns, lsns, times, times, uint32s, names),
        st.builds(StreamPrepare, *prepared),
    )


def u8(value: int) -> bytes:
    return value.to_bytes(1, "big")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def i32(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)


def i64(value: int) -> bytes:
    return value.to_bytes(8, "big", signed=True)


def zstring(text: str) -> bytes:
    return text.encode() + b"\0"


def maybe_xid(xid: int | None) -> bytes:
    return b"" if xid is None else u32(xid)


def schema(name: str) -> bytes:
    return b"\0" if name == "pg_catalog" else zstring(name)


def cells(row: Tuple) -> bytes:
    written = u16(len(row))
    for value in row:
        if value is None:
            written += b"n"
        elif value is UNCHANGED:
            written += b"u"
        elif isinstance(value, str):
            written += b"t" + u32(len(value.encode())) + value.encode()
        elif value is TOO_LARGE:
            raise AssertionError("only a reader that asks for small values gets this")
        else:
            written += b"b" + u32(len(value)) + value
    return written


def encode(message: PgoutputMessage) -> bytes:
    match message:
        case Begin(final_lsn, time_us, xid):
            return b"B" + u64(final_lsn) + i64(time_us) + u32(xid)
        case Commit(flags, commit_lsn, end_lsn, time_us):
            return b"C" + u8(flags) + u64(commit_lsn) + u64(end_lsn) + i64(time_us)
        case Origin(lsn, name):
            return b"O" + u64(lsn) + zstring(name)
        case Relation(maybe, oid, namespace, name, identity, described):
            head = b"R" + maybe_xid(maybe) + u32(oid) + schema(namespace) + zstring(name) + identity.encode()
            return (
                head
                + u16(len(described))
                + b"".join(
                    u8(column.key) + zstring(column.name) + u32(column.type_oid) + i32(column.typmod)
                    for column in described
                )
            )
        case Type(maybe, oid, namespace, name):
            return b"Y" + maybe_xid(maybe) + u32(oid) + schema(namespace) + zstring(name)
        case Insert(maybe, oid, new):
            return b"I" + maybe_xid(maybe) + u32(oid) + b"N" + cells(new)
        case Update(maybe, oid, kind, old, new):
            before = b"" if kind is None or old is None else kind.encode() + cells(old)
            return b"U" + maybe_xid(maybe) + u32(oid) + before + b"N" + cells(new)
        case Delete(maybe, oid, kind, old):
            return b"D" + maybe_xid(maybe) + u32(oid) + kind.encode() + cells(old)
        case Truncate(maybe, oids, cascade, restart):
            options = u8(1 * cascade + 2 * restart)
            return b"T" + maybe_xid(maybe) + u32(len(oids)) + options + b"".join(map(u32, oids))
        case Message(maybe, transactional, lsn, prefix, content):
            head = b"M" + maybe_xid(maybe) + u8(transactional) + u64(lsn) + zstring(prefix)
            return head + u32(len(content)) + content
        case StreamStart(xid, first):
            return b"S" + u32(xid) + u8(first)
        case StreamStop():
            return b"E"
        case StreamCommit(xid, flags, commit_lsn, end_lsn, time_us):
            return b"c" + u32(xid) + u8(flags) + u64(commit_lsn) + u64(end_lsn) + i64(time_us)
        case StreamAbort(xid, subxid, abort_lsn, time_us):
            info = b"" if abort_lsn is None or time_us is None else u64(abort_lsn) + i64(time_us)
            return b"A" + u32(xid) + u32(subxid) + info
        case BeginPrepare(prepare_lsn, end_lsn, time_us, xid, gid):
            return b"b" + u64(prepare_lsn) + u64(end_lsn) + i64(time_us) + u32(xid) + zstring(gid)
        case Prepare(flags, lsn, end_lsn, time_us, xid, gid):
            return b"P" + u8(flags) + u64(lsn) + u64(end_lsn) + i64(time_us) + u32(xid) + zstring(gid)
        case CommitPrepared(flags, lsn, end_lsn, time_us, xid, gid):
            return b"K" + u8(flags) + u64(lsn) + u64(end_lsn) + i64(time_us) + u32(xid) + zstring(gid)
        case RollbackPrepared(flags, lsn, end_lsn, prepare_us, rollback_us, xid, gid):
            head = b"r" + u8(flags) + u64(lsn) + u64(end_lsn) + i64(prepare_us) + i64(rollback_us)
            return head + u32(xid) + zstring(gid)
        case StreamPrepare(flags, lsn, end_lsn, time_us, xid, gid):
            return b"p" + u8(flags) + u64(lsn) + u64(end_lsn) + i64(time_us) + u32(xid) + zstring(gid)
        case _:
            assert_never(message)


def outcome(read: Callable[[], Read]) -> Read | MalformedMessage:
    try:
        return read()
    except MalformedMessage as error:
        return error


def assert_message_or_malformed(data: bytes, situation: Mapping[str, bool]) -> None:
    message = outcome(lambda: decode(data, **situation))

    if isinstance(message, MalformedMessage):
        assert message.tag == data[:1].decode("latin-1")
        assert 0 <= message.offset <= len(data)
    else:
        # Not the same bytes: servers shorten the schema pg_catalog, though it may be spelled out.
        assert decode(encode(message), **situation) == message


situations = st.fixed_dictionaries({"streamed": st.booleans(), "abort_info": st.booleans()})


@given(st.data(), situations)
def test_a_message_reads_back_as_it_was_written(data: st.DataObject, situation: dict[str, bool]) -> None:
    message = data.draw(messages(**situation))

    assert decode(encode(message), **situation) == message


likely_bytes = st.one_of(
    st.binary(max_size=80),
    st.builds(lambda tag, rest: bytes([tag]) + rest, st.sampled_from(TAGS), st.binary(max_size=80)),
)


@given(likely_bytes, situations)
@example(b"", {"streamed": False, "abort_info": False})
def test_any_bytes_give_a_message_or_a_malformed_message(data: bytes, situation: dict[str, bool]) -> None:
    assert_message_or_malformed(data, situation)


@given(st.data(), situations)
def test_a_message_with_a_changed_byte_gives_a_message_or_a_malformed_message(
    data: st.DataObject, situation: dict[str, bool]
) -> None:
    written = bytearray(encode(data.draw(messages(**situation))))
    at = data.draw(st.integers(0, len(written) - 1))
    written[at] ^= data.draw(st.integers(1, 255))

    assert_message_or_malformed(bytes(written), situation)


@given(st.data(), situations)
def test_no_message_is_the_beginning_of_another(data: st.DataObject, situation: dict[str, bool]) -> None:
    written = encode(data.draw(messages(**situation)))
    size = data.draw(st.integers(0, len(written) - 1))

    with pytest.raises(MalformedMessage) as caught:
        decode(written[:size], **situation)
    assert caught.value.offset == size


frames = st.one_of(
    st.builds(XLogData, lsns, lsns, times, st.binary(max_size=40)),
    st.builds(Keepalive, lsns, times, st.booleans()),
)


def encode_frame(frame: XLogData | Keepalive) -> bytes:
    if isinstance(frame, XLogData):
        return b"w" + u64(frame.wal_start) + u64(frame.wal_end) + i64(frame.sent_at_us) + frame.payload
    return b"k" + u64(frame.wal_end) + i64(frame.sent_at_us) + u8(frame.reply_requested)


@given(frames)
def test_a_frame_reads_back_as_it_was_written(frame: XLogData | Keepalive) -> None:
    assert decode_frame(encode_frame(frame)) == frame
    assert decode_frame(memoryview(encode_frame(frame))) == frame


@given(st.builds(lambda tag, rest: tag + rest, st.sampled_from([b"", b"w", b"k", b"r"]), st.binary(max_size=40)))
def test_any_bytes_give_a_frame_or_a_malformed_message(data: bytes) -> None:
    frame = outcome(lambda: decode_frame(data))

    if isinstance(frame, MalformedMessage):
        assert frame.tag == data[:1].decode("latin-1")
        assert 0 <= frame.offset <= len(data)
    else:
        assert encode_frame(frame) == data
