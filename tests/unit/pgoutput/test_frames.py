from __future__ import annotations

import pytest

from cdcsync.errors import MalformedMessage
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.frames import (
    Keepalive,
    XLogData,
    decode_frame,
    encode_status_update,
)

XLOG_DATA = b"w" + bytes.fromhex("0000000001964ac8 00000001ffffffff fffffffffffffff6") + b"payload"
KEEPALIVE = b"k" + bytes.fromhex("0000000001964ac8 0000000000000007 01")
STATUS_UPDATE = b"r" + bytes.fromhex("0000000000000003 0000000000000002 0000000100000000 000000000000002a 00")


@pytest.mark.parametrize("form", [bytes, memoryview], ids=["bytes", "memoryview"])
def test_an_xlogdata_frame_holds_positions_and_a_payload(form: type[bytes] | type[memoryview]) -> None:
    frame = decode_frame(form(XLOG_DATA))

    assert frame == XLogData(Lsn.parse("0/1964AC8"), Lsn.parse("1/FFFFFFFF"), -10, b"payload")
    assert isinstance(frame, XLogData)
    assert isinstance(frame.wal_start, Lsn)
    assert isinstance(frame.payload, bytes)


def test_an_xlogdata_frame_does_not_print_its_payload() -> None:
    shown = repr(decode_frame(XLOG_DATA))

    assert shown == "XLogData(wal_start=Lsn('0/1964AC8'), wal_end=Lsn('1/FFFFFFFF'), sent_at_us=-10, payload=binary[7])"


def test_an_xlogdata_frame_may_carry_nothing() -> None:
    frame = decode_frame(XLOG_DATA[:25])

    assert isinstance(frame, XLogData)
    assert frame.payload == b""


@pytest.mark.parametrize(("flag", "requested"), [(b"\x00", False), (b"\x01", True)])
@pytest.mark.parametrize("form", [bytes, memoryview], ids=["bytes", "memoryview"])
def test_a_keepalive_says_whether_it_wants_a_reply(
    form: type[bytes] | type[memoryview], flag: bytes, requested: bool
) -> None:
    assert decode_frame(form(KEEPALIVE[:-1] + flag)) == Keepalive(Lsn.parse("0/1964AC8"), 7, requested)


@pytest.mark.parametrize("head", [XLOG_DATA[:25], KEEPALIVE], ids=["XLogData", "Keepalive"])
def test_every_truncation_of_a_frame_is_malformed(head: bytes) -> None:
    for size in range(len(head)):
        with pytest.raises(MalformedMessage) as caught:
            decode_frame(head[:size])
        assert (caught.value.tag, caught.value.offset) == (chr(head[0]) if size else "", size)


def test_a_keepalive_with_a_byte_too_many_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="bytes follow") as caught:
        decode_frame(KEEPALIVE + b"\x00")

    assert (caught.value.tag, caught.value.offset) == ("k", 18)


def test_a_reply_flag_that_is_neither_yes_nor_no_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="neither 0 nor 1") as caught:
        decode_frame(KEEPALIVE[:-1] + b"\x02")

    assert (caught.value.tag, caught.value.offset) == ("k", 17)


@pytest.mark.parametrize("tag", [b"r", b"h", b"W", b"\x00", b"\xff"])
def test_a_frame_that_servers_do_not_send_is_malformed(tag: bytes) -> None:
    with pytest.raises(MalformedMessage, match="do not send") as caught:
        decode_frame(tag + bytes(40))

    assert (caught.value.tag, caught.value.offset) == (tag.decode("latin-1"), 0)


def test_a_status_update_has_the_layout_that_servers_read() -> None:
    written = encode_status_update(received=Lsn(3), flushed=Lsn(2), applied=Lsn(2**32), at_us=42)

    assert written == STATUS_UPDATE
