"""Fields on the wire: a cursor that checks every bound, and PostgreSQL's clock.

Integers are big-endian; strings are UTF-8 (the walsender's `client_encoding` is pinned to it) and end with a
zero byte; times are microseconds since 2000-01-01 UTC.

Source: PostgreSQL, "Message Data Types"; src/include/datatype/timestamp.h.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cdcsync.errors import MalformedMessage

ENDS_EARLY: Final = "the message ends within a field"
TRAILING_BYTES: Final = "bytes follow the message's last field"
NOT_UTF8: Final = "the text is not UTF-8"

_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Cursor:
    """Reads the fields of one message in order; whatever does not fit is a `MalformedMessage`.

    It starts behind the tag, the message's first byte. Call `end` when the last field is read.

    :raises MalformedMessage: there is no first byte.
    """

    __slots__ = ("_at", "_data", "_tag")

    def __init__(self, data: bytes) -> None:
        if not data:
            raise MalformedMessage("", 0, "the message is empty")
        self._data = data
        self._tag = chr(data[0])
        self._at = 1

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read the fixed-size fields that `layout` describes.

        :raises MalformedMessage: fewer bytes are left than the layout has.
        """
        try:
            fields = layout.unpack_from(self._data, self._at)
        except struct.error:
            raise self.fault(ENDS_EARLY, at=len(self._data)) from None
        self._at += layout.size
        return fields

    def uint16(self) -> int:
        """Read an unsigned integer of two bytes.

        :raises MalformedMessage: fewer bytes are left.
        """
        value: int = self.unpack(_UINT16)[0]
        return value

    def uint32(self) -> int:
        """Read an unsigned integer of four bytes: an OID, an xid or a length.

        :raises MalformedMessage: fewer bytes are left.
        """
        value: int = self.unpack(_UINT32)[0]
        return value

    def take(self, length: int) -> bytes:
        """Read `length` bytes as they are.

        :raises MalformedMessage: fewer bytes are left.
        """
        end = self._at + length
        if end > len(self._data):
            raise self.fault(ENDS_EARLY, at=len(self._data))
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def string(self) -> str:
        """Read a string up to its zero byte, which is consumed and not returned.

        :raises MalformedMessage: there is no zero byte, or the text is not UTF-8.
        """
        start = self._at
        end = self._data.find(0, start)
        if end < 0:
            raise self.fault(ENDS_EARLY, at=len(self._data))
        try:
            text = self._data[start:end].decode()
        except UnicodeDecodeError as error:
            raise self.fault(NOT_UTF8, at=start + error.start) from None
        self._at = end + 1
        return text

    def end(self) -> None:
        """Check that the message has no byte left.

        :raises MalformedMessage: it has.
        """
        if self._at != len(self._data):
            raise self.fault(TRAILING_BYTES)

    def fault(self, problem: str, *, at: int | None = None) -> MalformedMessage:
        """Return the error that names this message, for the caller to raise.

        :param at: the offset to name; where the cursor stands when there is none.
        """
        return MalformedMessage(self._tag, self._at if at is None else at, problem)


def to_datetime(us: int) -> datetime:
    """Return the instant that a message's time stands for, in UTC.

    PostgreSQL's clock reaches from 4714 BC to AD 294276 and has two infinities (the ends of its 64 bits); what
    `datetime` cannot say becomes the earliest or latest instant that it can.

    :param us: microseconds since 2000-01-01 UTC.
    """
    try:
        return _EPOCH + us * _MICROSECOND
    except OverflowError:
        return (datetime.min if us < 0 else datetime.max).replace(tzinfo=UTC)


def from_datetime(instant: datetime) -> int:
    """Return an instant as the protocol says it: microseconds since 2000-01-01 UTC.

    :raises ValueError: the datetime has no time zone, so it is not an instant.
    """
    if instant.utcoffset() is None:
        raise ValueError("a datetime without a time zone is not an instant")
    return (instant - _EPOCH) // _MICROSECOND
