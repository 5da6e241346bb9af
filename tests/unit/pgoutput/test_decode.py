from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import pytest

from cdcsync.errors import MalformedMessage
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
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
    Type,
    Update,
)

Case = tuple[str, bytes, Mapping[str, bool], PgoutputMessage]

PLAIN: Mapping[str, bool] = {}
STREAMED: Mapping[str, bool] = {"streamed": True}
ABORT_INFO: Mapping[str, bool] = {"abort_info": True}

LSN = b"\x00\x00\x00\x00\x01\x96\x4a\xc8"
END = b"\x00\x00\x00\x16\xb3\x74\xd8\x48"
TIME = b"\x00\x02\xe1\xf4\x0a\x1b\x2c\x3d"
BEFORE_2000 = b"\xff\xff\xff\xff\xff\xff\xff\xff"
XID = b"\x00\x00\x02\xf3"
LAST_XID = b"\xff\xff\xff\xff"
OID = b"\x00\x00\x40\x01"

lsn = Lsn.parse("0/1964AC8")
end = Lsn.parse("16/B374D848")
time_us = 0x0002E1F40A1B2C3D
xid = 755
last_xid = 4_294_967_295
oid = 16385

PREPARED = b"\x00" + LSN + END + TIME + XID + b"a gid\x00"

CASES: list[Case] = [
    ("Begin", b"B" + LSN + TIME + XID, PLAIN, Begin(lsn, time_us, xid)),
    ("Begin before 2000, last xid", b"B" + LSN + BEFORE_2000 + LAST_XID, PLAIN, Begin(lsn, -1, last_xid)),
    ("Commit", b"C\x00" + LSN + END + TIME, PLAIN, Commit(0, lsn, end, time_us)),
    ("Origin", b"O" + LSN + b"node_1\x00", PLAIN, Origin(lsn, "node_1")),
    ("Origin in a block has no xid", b"O" + LSN + b"node_1\x00", STREAMED, Origin(lsn, "node_1")),
    (
        "Relation",
        b"R" + OID + b"public\x00articles\x00d\x00\x03"
        b"\x01id\x00\x00\x00\x00\x14\xff\xff\xff\xff"
        b"\x00title\x00\x00\x00\x04\x13\x00\x00\x00\x44"
        b"\x00\xc3\xa4\x00\x00\x00\x06\xa4\x00\x0a\x00\x06",
        PLAIN,
        Relation(
            None,
            oid,
            "public",
            "articles",
            "d",
            (Column(True, "id", 20, -1), Column(False, "title", 1043, 68), Column(False, "ä", 1700, 655_366)),
        ),
    ),
    ("Relation without columns", b"R" + OID + b"s\x00t\x00n\x00\x00", PLAIN, Relation(None, oid, "s", "t", "n", ())),
    (
        "Relation of pg_catalog, identity index, streamed",
        b"R" + XID + OID + b"\x00pg_class\x00i\x00\x01\x01oid\x00\x00\x00\x00\x1a\xff\xff\xff\xff",
        STREAMED,
        Relation(xid, oid, "pg_catalog", "pg_class", "i", (Column(True, "oid", 26, -1),)),
    ),
    ("Relation, identity full", b"R" + OID + b"s\x00t\x00f\x00\x00", PLAIN, Relation(None, oid, "s", "t", "f", ())),
    ("Type", b"Y" + OID + b"public\x00mood\x00", PLAIN, Type(None, oid, "public", "mood")),
    (
        "Type of pg_catalog, streamed",
        b"Y" + XID + OID + b"\x00text\x00",
        STREAMED,
        Type(xid, oid, "pg_catalog", "text"),
    ),
    (
        "Insert of every kind of value",
        b"I" + OID + b"N\x00\x05t\x00\x00\x00\x0242nub\x00\x00\x00\x02\x00\xfft\x00\x00\x00\x00",
        PLAIN,
        Insert(None, oid, ("42", None, UNCHANGED, b"\x00\xff", "")),
    ),
    (
        "Insert streamed",
        b"I" + XID + OID + b"N\x00\x01t\x00\x00\x00\x04\xf0\x9f\x90\x98",
        STREAMED,
        Insert(xid, oid, ("\N{ELEPHANT}",)),
    ),
    ("Insert of no column", b"I" + OID + b"N\x00\x00", PLAIN, Insert(None, oid, ())),
    ("Insert that ends in NULL", b"I" + OID + b"N\x00\x01n", PLAIN, Insert(None, oid, (None,))),
    (
        "Insert of a long text",
        b"I" + OID + b"N\x00\x01t\x00\x01\x11\x70" + b"x" * 70_000,
        PLAIN,
        Insert(None, oid, ("x" * 70_000,)),
    ),
    (
        "Insert of 300 columns",
        b"I" + OID + b"N\x01\x2c" + b"t\x00\x00\x00\x01a" * 300,
        PLAIN,
        Insert(None, oid, ("a",) * 300),
    ),
    (
        "Update",
        b"U" + OID + b"N\x00\x02t\x00\x00\x00\x011u",
        PLAIN,
        Update(None, oid, None, None, ("1", UNCHANGED)),
    ),
    (
        "Update of the key",
        b"U" + OID + b"K\x00\x02t\x00\x00\x00\x011nN\x00\x02t\x00\x00\x00\x012t\x00\x00\x00\x01b",
        PLAIN,
        Update(None, oid, "K", ("1", None), ("2", "b")),
    ),
    (
        "Update with identity full, streamed",
        b"U" + XID + OID + b"O\x00\x01t\x00\x00\x00\x01aN\x00\x01t\x00\x00\x00\x01b",
        STREAMED,
        Update(xid, oid, "O", ("a",), ("b",)),
    ),
    (
        "Delete by key",
        b"D" + OID + b"K\x00\x02t\x00\x00\x00\x011n",
        PLAIN,
        Delete(None, oid, "K", ("1", None)),
    ),
    (
        "Delete with identity full, streamed",
        b"D" + XID + OID + b"O\x00\x02t\x00\x00\x00\x011t\x00\x00\x00\x01b",
        STREAMED,
        Delete(xid, oid, "O", ("1", "b")),
    ),
    ("Truncate", b"T\x00\x00\x00\x01\x00" + OID, PLAIN, Truncate(None, (oid,), False, False)),
    (
        "Truncate of two tables, cascade",
        b"T\x00\x00\x00\x02\x01" + OID + b"\x00\x00\x40\x02",
        PLAIN,
        Truncate(None, (oid, 16386), True, False),
    ),
    (
        "Truncate, restart identity, streamed",
        b"T" + XID + b"\x00\x00\x00\x01\x02" + OID,
        STREAMED,
        Truncate(xid, (oid,), False, True),
    ),
    ("Truncate with both options", b"T\x00\x00\x00\x01\x03" + OID, PLAIN, Truncate(None, (oid,), True, True)),
    (
        "Message",
        b"M\x01" + LSN + b"cdcsync\x00\x00\x00\x00\x03a\x00\xff",
        PLAIN,
        Message(None, True, lsn, "cdcsync", b"a\x00\xff"),
    ),
    (
        "Message that is not transactional, empty",
        b"M\x00" + LSN + b"\x00\x00\x00\x00\x00",
        PLAIN,
        Message(None, False, lsn, "", b""),
    ),
    (
        "Message streamed",
        b"M" + XID + b"\x01" + LSN + b"p\x00\x00\x00\x00\x01c",
        STREAMED,
        Message(xid, True, lsn, "p", b"c"),
    ),
    ("StreamStart of the first block", b"S" + XID + b"\x01", PLAIN, StreamStart(xid, True)),
    ("StreamStart of a later block", b"S" + XID + b"\x00", PLAIN, StreamStart(xid, False)),
    ("StreamStop", b"E", STREAMED, StreamStop()),
    ("StreamCommit", b"c" + XID + b"\x00" + LSN + END + TIME, PLAIN, StreamCommit(xid, 0, lsn, end, time_us)),
    ("StreamAbort", b"A" + XID + LAST_XID, PLAIN, StreamAbort(xid, last_xid, None, None)),
    (
        "StreamAbort with position and time",
        b"A" + XID + XID + LSN + TIME,
        ABORT_INFO,
        StreamAbort(xid, xid, lsn, time_us),
    ),
    (
        "BeginPrepare",
        b"b" + LSN + END + TIME + XID + b"a gid\x00",
        PLAIN,
        BeginPrepare(lsn, end, time_us, xid, "a gid"),
    ),
    ("Prepare", b"P" + PREPARED, PLAIN, Prepare(0, lsn, end, time_us, xid, "a gid")),
    ("CommitPrepared", b"K" + PREPARED, PLAIN, CommitPrepared(0, lsn, end, time_us, xid, "a gid")),
    (
        "RollbackPrepared",
        b"r\x00" + LSN + END + TIME + BEFORE_2000 + XID + b"a gid\x00",
        PLAIN,
        RollbackPrepared(0, lsn, end, time_us, -1, xid, "a gid"),
    ),
    ("StreamPrepare", b"p" + PREPARED, PLAIN, StreamPrepare(0, lsn, end, time_us, xid, "a gid")),
]

every_case = pytest.mark.parametrize(
    ("data", "options", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@every_case
def test_bytes_become_their_message(data: bytes, options: Mapping[str, bool], message: PgoutputMessage) -> None:
    decoded = decode(data, **options)

    assert decoded == message
    assert type(decoded) is type(message)


def test_a_value_that_is_larger_than_wanted_is_left_out_and_the_others_are_read() -> None:
    def value(text: bytes) -> bytes:
        return b"t" + len(text).to_bytes(4, "big") + text

    row = b"\x00\x03" + value(b"four") + value(b"fives") + value(b"")
    data = b"U" + OID + b"O" + row + b"N" + row

    assert decode(data, largest=4) == Update(None, oid, "O", ("four", TOO_LARGE, ""), ("four", TOO_LARGE, ""))
    assert decode(data, largest=5) == decode(data)
    with pytest.raises(MalformedMessage):
        decode(data[:-8], largest=4)


@every_case
def test_every_truncation_is_malformed(data: bytes, options: Mapping[str, bool], message: PgoutputMessage) -> None:
    # The middle of a long value is all alike: its first and last hundred bytes stand for it.
    sizes = range(len(data)) if len(data) < 10_000 else [*range(100), *range(len(data) - 100, len(data))]
    for size in sizes:
        with pytest.raises(MalformedMessage) as caught:
            decode(data[:size], **options)
        assert caught.value.tag == (chr(data[0]) if size else "")
        assert caught.value.offset == size


@every_case
def test_a_trailing_byte_is_malformed(data: bytes, options: Mapping[str, bool], message: PgoutputMessage) -> None:
    with pytest.raises(MalformedMessage, match="bytes follow") as caught:
        decode(data + b"\x00", **options)

    assert caught.value.tag == chr(data[0])
    assert caught.value.offset == len(data)


def test_every_kind_of_message_is_in_the_table() -> None:
    seen = {type(message) for *_, message in CASES}

    assert seen == set(get_args(PgoutputMessage))


def test_positions_are_lsns() -> None:
    commit = decode(b"C\x00" + LSN + END + TIME)

    assert isinstance(commit, Commit)
    assert str(commit.end_lsn) == "16/B374D848"


TEXT = b"t\x00\x00\x00\x02"


@pytest.mark.parametrize(
    ("data", "offset", "problem"),
    [
        (b"", 0, "empty"),
        (b"Z", 0, "unknown kind"),
        (b"\xff\x00", 0, "unknown kind"),
        (b"C\x01" + LSN + END + TIME, 26, "flags"),
        (b"c" + XID + b"\x80" + LSN + END + TIME, 30, "flags"),
        (b"P\x01" + PREPARED[1:], 30, "flags"),
        (b"r\x01" + LSN + END + TIME + TIME + XID + b"g\x00", 38, "flags"),
        (b"S" + XID + b"\x02", 6, "flags"),
        (b"T\x00\x00\x00\x01\x04" + OID, 6, "flags"),
        (b"T\xff\xff\xff\xff\x00" + OID, 10, "ends within"),
        (b"M\x02" + LSN + b"p\x00\x00\x00\x00\x00", 10, "flags"),
        (b"M\x00" + LSN + b"p\x00\xff\xff\xff\xff", 16, "ends within"),
        (b"R" + OID + b"s\x00t\x00x\x00\x00", 10, "replica identity"),
        (b"R" + OID + b"s\x00t\x00d\x00\x01\x02id\x00\x00\x00\x00\x14\xff\xff\xff\xff", 13, "flags"),
        (b"R" + OID + b"s\x00\xff\x00d\x00\x00", 7, "UTF-8"),
        (b"I" + OID + b"O\x00\x00", 5, "without a new tuple"),
        (b"U" + OID + b"X\x00\x00", 5, "neither old nor new"),
        (b"U" + OID + b"K\x00\x00K\x00\x00", 8, "without a new tuple"),
        (b"D" + OID + b"N\x00\x00", 5, "without an old tuple"),
        (b"I" + OID + b"N\x00\x01x", 8, "unknown kind"),
        (b"I" + OID + b"N\x00\x01" + TEXT + b"a\xff", 14, "UTF-8"),
        (b"I" + OID + b"N\x00\x01t\xff\xff\xff\xffab", 15, "ends within"),
        (b"I" + OID + b"N\x00\x01b\x80\x00\x00\x00ab", 15, "ends within"),
        (b"I" + OID + b"N\x00\x02b\x7f\xff\xff\xffabn", 16, "ends within"),
        (b"U" + OID + b"K\x00\x01t\x00\x00\x00\x05abN\x00\x00", 18, "ends within"),
        (b"U" + OID + b"K\x00\x01t\x00\x00\x00\x09abN\x00\x00", 18, "ends within"),
    ],
)
def test_a_fault_is_named_with_the_offset_where_it_was_noticed(data: bytes, offset: int, problem: str) -> None:
    with pytest.raises(MalformedMessage, match=problem) as caught:
        decode(data)

    assert caught.value.tag == data[:1].decode("latin-1")
    assert caught.value.offset == offset


def _cases_with_xid() -> list[Case]:
    return [case for case in CASES if getattr(case[3], "xid", None) is None and hasattr(case[3], "xid")]


@pytest.mark.parametrize("case", _cases_with_xid(), ids=lambda case: str(case[0]))
def test_what_streaming_adds_is_an_xid_behind_the_tag(case: Case) -> None:
    _, data, _, message = case

    assert decode(data[:1] + XID + data[1:], streamed=True) == with_xid(message)


def with_xid(message: PgoutputMessage) -> PgoutputMessage:
    make: Callable[..., PgoutputMessage] = type(message)
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return make(**fields | {"xid": xid})
