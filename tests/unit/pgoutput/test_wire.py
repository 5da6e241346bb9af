from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest

from cdcsync.errors import MalformedMessage
from cdcsync.pgoutput.wire import Cursor, from_datetime, to_datetime

PAIR = struct.Struct(">Bh")


def test_a_cursor_reads_fields_in_order_from_behind_the_tag() -> None:
    cursor = Cursor(b"X\x01\xff\xfe\x12\x34\x89\xab\xcd\xefh\xc3\xa9\x00xyz")

    assert cursor.unpack(PAIR) == (1, -2)
    assert cursor.uint16() == 0x1234
    assert cursor.uint32() == 0x89ABCDEF
    assert cursor.string() == "hé"
    assert cursor.take(3) == b"xyz"
    cursor.end()


def test_an_empty_message_has_no_tag_to_name() -> None:
    with pytest.raises(MalformedMessage) as caught:
        Cursor(b"")

    assert (caught.value.tag, caught.value.offset) == ("", 0)


@pytest.mark.parametrize(
    ("read", "size"),
    [
        (lambda cursor: cursor.unpack(PAIR), 3),
        (Cursor.uint16, 2),
        (Cursor.uint32, 4),
        (lambda cursor: cursor.take(5), 5),
    ],
    ids=["unpack", "uint16", "uint32", "take"],
)
def test_a_field_that_ends_early_is_noticed_where_the_message_ends(read: Callable[[Cursor], object], size: int) -> None:
    for left in range(size):
        with pytest.raises(MalformedMessage, match="ends within a field") as caught:
            read(Cursor(b"X" + bytes(left)))
        assert (caught.value.tag, caught.value.offset) == ("X", 1 + left)


def test_a_string_without_its_zero_byte_ends_early() -> None:
    with pytest.raises(MalformedMessage, match="ends within a field") as caught:
        Cursor(b"Xabc").string()

    assert caught.value.offset == 4


def test_text_that_is_not_utf8_is_noticed_at_the_byte() -> None:
    with pytest.raises(MalformedMessage, match="not UTF-8") as caught:
        Cursor(b"Xab\xff\x00").string()

    assert caught.value.offset == 3


def test_bytes_behind_the_last_field_are_noticed() -> None:
    cursor = Cursor(b"Xa\x00b")
    cursor.string()

    with pytest.raises(MalformedMessage, match="bytes follow") as caught:
        cursor.end()
    assert caught.value.offset == 3


@pytest.mark.parametrize(
    ("us", "instant"),
    [
        (0, datetime(2000, 1, 1, tzinfo=UTC)),
        (-1, datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (799_459_200_000_001, datetime(2025, 5, 2, 0, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_times_count_microseconds_from_the_year_2000(us: int, instant: datetime) -> None:
    assert to_datetime(us) == instant
    assert to_datetime(us).tzinfo is UTC
    assert from_datetime(instant) == us


@pytest.mark.parametrize("us", [2**63 - 1, 400_000 * 365 * 86_400 * 1_000_000])
def test_times_past_the_end_of_datetime_become_its_last_instant(us: int) -> None:
    assert to_datetime(us) == datetime.max.replace(tzinfo=UTC)


@pytest.mark.parametrize("us", [-(2**63), -4000 * 365 * 86_400 * 1_000_000])
def test_times_before_datetime_begins_become_its_first_instant(us: int) -> None:
    assert to_datetime(us) == datetime.min.replace(tzinfo=UTC)


def test_an_instant_is_the_same_in_every_time_zone() -> None:
    cairo = timezone(timedelta(hours=3))

    assert from_datetime(datetime(2000, 1, 1, 3, tzinfo=cairo)) == 0


def test_a_datetime_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        from_datetime(datetime(2000, 1, 1))
