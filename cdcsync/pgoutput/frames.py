"""Frames of a replication connection: what the CopyData messages of `START_REPLICATION` hold.

The server sends `XLogData` and `Keepalive`; the client answers with status updates. What an `XLogData` frame
carries is one message of the output plugin, see `decode`.

Source: PostgreSQL, "Streaming Replication Protocol"; src/backend/replication/walsender.c.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from cdcsync.errors import MalformedMessage
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.wire import ENDS_EARLY, TRAILING_BYTES

_XLOG_DATA: Final = ord("w")
_KEEPALIVE: Final = ord("k")
_STATUS_UPDATE: Final = ord("r")

_XLOG_DATA_HEAD = struct.Struct(">xQQq")
_KEEPALIVE_FRAME = struct.Struct(">xQqB")
_STATUS_UPDATE_FRAME = struct.Struct(">BQQQqB")


class XLogData(msgspec.Struct, frozen=True, gc=False):
    """One message of the output plugin, and its place in the log.

    `wal_start` and `wal_end` are the same: where the change is, for a Commit the end of the transaction. A Begin bears
    the place of its first change, and what is sent ahead of another message (a Relation, a Type) bears 0/0. So neither
    says how far the stream has come: only Commit's `end_lsn` does.
    """

    wal_start: Lsn
    wal_end: Lsn
    sent_at_us: int
    payload: bytes

    def __repr__(self) -> str:
        return (
            f"XLogData(wal_start={self.wal_start!r}, wal_end={self.wal_end!r}, sent_at_us={self.sent_at_us}, "
            f"payload=binary[{len(self.payload)}])"
        )


class Keepalive(msgspec.Struct, frozen=True, gc=False):
    """The server is there, has sent all up to `wal_end`, and may ask for a status update at once.

    `wal_end` may be acknowledged only when no delivered transaction is unfinished.
    """

    wal_end: Lsn
    sent_at_us: int
    reply_requested: bool


def decode_frame(data: bytes | memoryview) -> XLogData | Keepalive:
    """Read one frame that the server sent.

    :param data: the contents of one CopyData message; a `memoryview` saves copying the payload twice.
    :raises MalformedMessage: the bytes are no such frame.
    """
    size = len(data)
    if not size:
        raise MalformedMessage("", 0, "the frame is empty")
    tag = data[0]
    if tag == _XLOG_DATA:
        try:
            wal_start, wal_end, sent_at_us = _XLOG_DATA_HEAD.unpack_from(data)
        except struct.error:
            raise MalformedMessage("w", size, ENDS_EARLY) from None
        start = Lsn(wal_start)
        end = start if wal_end == wal_start else Lsn(wal_end)
        return XLogData(start, end, sent_at_us, bytes(data[_XLOG_DATA_HEAD.size :]))
    if tag == _KEEPALIVE:
        if size != _KEEPALIVE_FRAME.size:
            early = size < _KEEPALIVE_FRAME.size
            raise MalformedMessage("k", min(size, _KEEPALIVE_FRAME.size), ENDS_EARLY if early else TRAILING_BYTES)
        wal_end, sent_at_us, reply = _KEEPALIVE_FRAME.unpack(data)
        if reply > 1:
            raise MalformedMessage("k", size - 1, "a flag that is neither 0 nor 1")
        return Keepalive(Lsn(wal_end), sent_at_us, reply == 1)
    raise MalformedMessage(chr(tag), 0, "a frame of a kind that servers do not send")


def encode_status_update(
    *, received: Lsn, flushed: Lsn, applied: Lsn, at_us: int, reply_requested: bool = False
) -> bytes:
    """Write the frame that tells the server how far this client has come.

    Each position is that of the last byte plus one, which is what `end_lsn` and `Keepalive.wal_end` already are.
    The server moves the slot to `flushed` and may discard the log before it.

    :param at_us: the client's clock, microseconds since 2000-01-01 UTC; the server only reports it.
    :param reply_requested: whether the server should answer with a keepalive at once.
    """
    return _STATUS_UPDATE_FRAME.pack(_STATUS_UPDATE, received, flushed, applied, at_us, reply_requested)
