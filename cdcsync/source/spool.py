"""The spool: what the server streams of transactions that are still open, on disk until they commit.

The rules:

1. One file per top-level transaction, without a name: it goes with the process, however that ends. A record is a
   length and a message, exactly as it came.
2. An aborted subtransaction takes with it everything from its first record on: while it runs, only it and its own
   subtransactions write, so nothing behind that point belongs to anyone else.
3. A spool belongs to its connection. It is emptied when a connection begins, because the server then streams from
   the start again.

Source: PostgreSQL, "Streaming of Large Transactions for Logical Decoding"; src/backend/replication/logical/worker.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from cdcsync.errors import ProtocolError, SpoolUnusable

_LENGTH = struct.Struct("!I")

_XIDS = 2**32
"""Transaction ids wrap around here; those of subtransactions follow that of their transaction."""


class _Transaction:
    """One open transaction's file, and where each of its subtransactions begins in it.

    A transaction may have millions of subtransactions, one for each row of a loop that catches errors. So what is
    known of each takes sixteen bytes: how far its id is from the transaction's, rising, with its first record's place,
    and that id once more in the order of the file, which is nearly the same order.
    """

    def __init__(self, xid: int, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self._xid = xid
        self._newest: int | None = None
        self._steps = array("I")
        self._starts = array("Q")
        self._order = array("I")
        self.descriptions: list[tuple[int, int]] = []
        """Of each description of a table its place in the file, and its number."""

    def note(self, xid: int) -> None:
        """Remember that a record of `xid` comes at the end of the file."""
        if xid == self._newest:
            return
        self._newest = xid
        step = (xid - self._xid) % _XIDS
        place = bisect_left(self._steps, step)  # nearly always the end
        if place == len(self._steps) or self._steps[place] != step:
            self._steps.insert(place, step)
            self._starts.insert(place, self.size)
            self._order.append(step)

    def forget(self, xid: int) -> int | None:
        """Forget a subtransaction and what began after it; returns its first record's place, None if it has none."""
        step = (xid - self._xid) % _XIDS
        place = bisect_left(self._steps, step)
        if place == len(self._steps) or self._steps[place] != step:
            return None
        start = self._starts[place]
        last = None
        while last != step:
            last = self._order.pop()
            place = bisect_left(self._steps, last)
            del self._steps[place], self._starts[place]
        self._newest = None
        return start


class Spool:
    """The open transactions of one connection.

    :param directory: where their files are made; empty means the system's directory for temporary files.
    :param limit_bytes: the most that they may take together.
    """

    def __init__(self, directory: str, limit_bytes: int) -> None:
        self._directory = directory or tempfile.gettempdir()
        self._limit = limit_bytes
        self._open: dict[int, _Transaction] = {}
        self._current: _Transaction | None = None
        self.bytes = 0
        self.usable = True
        """Whether it has worked so far: once it has not, the source should not stream open transactions."""

    @property
    def receiving(self) -> bool:
        """Whether the messages that come now belong to an open transaction."""
        return self._current is not None

    @property
    def transactions(self) -> int:
        """How many open transactions are spooled."""
        return len(self._open)

    def begin(self) -> None:
        """Throw everything away, for a new connection, and see that files can be made.

        :raises SpoolUnusable: they cannot: better now than in the middle of a transaction.
        """
        self.clear()
        if self.usable:
            self._make_file().close()

    def clear(self) -> None:
        """Throw everything away."""
        for xid in list(self._open):
            self.drop(xid)
        self._current = None

    def enter(self, xid: int) -> None:
        """Begin to receive a block of transaction `xid`.

        :raises ProtocolError: the block before has not ended.
        :raises SpoolUnusable: a file for it cannot be made.
        """
        if self._current is not None:
            raise ProtocolError("a stream block began inside another one")
        transaction = self._open.get(xid)
        if transaction is None:
            transaction = self._open[xid] = _Transaction(xid, self._make_file())
        self._current = transaction

    def append(self, xid: int, payload: bytes, *, description: int | None = None) -> None:
        """Keep a message of the present block; `xid` is the (sub)transaction that it belongs to.

        :param description: its number if it describes a table.
        :raises SpoolUnusable: the spool would grow beyond its limit, or cannot be written.
        """
        transaction = self._current
        assert transaction is not None
        size = _LENGTH.size + len(payload)
        if self.bytes + size > self._limit:
            self.usable = False
            raise SpoolUnusable(
                f"open transactions need more than {self._limit:,} bytes of spool",
                where=self._directory,
                hint="the source keeps them until the next start; to spool them here, raise source.spool_bytes",
            )
        transaction.note(xid)
        if description is not None:
            transaction.descriptions.append((transaction.size, description))
        try:
            transaction.file.write(_LENGTH.pack(len(payload)))
            transaction.file.write(payload)
        except OSError as error:
            raise self._unusable(error) from error
        transaction.size += size
        self.bytes += size

    def leave(self) -> None:
        """End the present block.

        :raises ProtocolError: none has begun.
        """
        if self._current is None:
            raise ProtocolError("a stream block ended that had not begun")
        self._current = None

    def abort(self, xid: int, subxid: int) -> None:
        """Forget a subtransaction, or with `subxid` equal to `xid` the whole transaction.

        :raises SpoolUnusable: the spool cannot be written.
        """
        transaction = self._open.get(xid)
        if transaction is None:
            return
        if xid == subxid:
            self.drop(xid)
            return
        start = transaction.forget(subxid)
        if start is None:
            return
        try:
            transaction.file.seek(start)
            transaction.file.truncate()
        except OSError as error:
            raise self._unusable(error) from error
        self.bytes -= transaction.size - start
        transaction.size = start
        while transaction.descriptions and transaction.descriptions[-1][0] >= start:
            transaction.descriptions.pop()

    def descriptions(self, xid: int) -> list[int]:
        """Return the numbers of the descriptions that `replay` yields, in their order."""
        transaction = self._open.get(xid)
        return [] if transaction is None else [number for _, number in transaction.descriptions]

    def replay(self, xid: int) -> Iterator[bytes]:
        """Yield the messages of a transaction in their order; the caller drops it afterwards.

        :raises SpoolUnusable: the part of the file that is still in memory cannot be written, or a part cannot be read.
        """
        transaction = self._open.get(xid)
        if transaction is None:
            return
        file = transaction.file
        try:
            file.seek(0)
        except OSError as error:
            raise self._unusable(error) from error
        left = transaction.size
        while left:
            (length,) = _LENGTH.unpack(self._read(file, _LENGTH.size))
            yield self._read(file, length)
            left -= _LENGTH.size + length

    def _read(self, file: BinaryIO, size: int) -> bytes:
        try:
            found = file.read(size)
        except OSError as error:
            raise self._unusable(error) from error
        if len(found) < size:
            raise self._unusable(OSError(errno.EIO, os.strerror(errno.EIO)))
        return found

    def drop(self, xid: int) -> None:
        """Throw a transaction's file away."""
        transaction = self._open.pop(xid, None)
        if transaction is not None:
            self.bytes -= transaction.size
            with contextlib.suppress(OSError):  # a full disk does not matter for bytes that nobody wants
                transaction.file.close()

    def _make_file(self) -> BinaryIO:
        try:
            return cast("BinaryIO", TemporaryFile(prefix="cdcsync-spool-", dir=self._directory))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> SpoolUnusable:
        self.usable = False
        return SpoolUnusable(
            f"open transactions cannot be kept on disk: {error.strerror or error}",
            where=self._directory,
            hint="the source keeps them until the next start; free disk space or descriptors,"
            " or set source.spool_directory to where the worker may write",
        )
