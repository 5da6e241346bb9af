"""The spool: what the server streams of transactions that are still open, on disk until they commit.

The rules:

1. One file per top-level transaction. A record is a length and a message, exactly as it came.
2. An aborted subtransaction takes with it everything from its first record on: while it runs, only it and its own
   subtransactions write, so nothing behind that point belongs to anyone else.
3. A spool belongs to its connection. It is emptied when a connection begins, because the server then streams from
   the start again.

Source: PostgreSQL, "Streaming of Large Transactions for Logical Decoding"; src/backend/replication/logical/worker.c.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cdcsync.errors import ProtocolError, SetupError

_LENGTH = struct.Struct("!I")


class _Transaction:
    """One open transaction's file, and where each of its subtransactions begins in it, in the file's order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("w+b")
        self.first: dict[int, int] = {}
        self.size = 0


class Spool:
    """The open transactions of one connection, in a directory of their own."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit = limit_bytes
        self._open: dict[int, _Transaction] = {}
        self._current: _Transaction | None = None
        self.bytes = 0

    @property
    def receiving(self) -> bool:
        """Whether the messages that come now belong to an open transaction."""
        return self._current is not None

    @property
    def transactions(self) -> int:
        """How many open transactions are spooled."""
        return len(self._open)

    def clear(self) -> None:
        """Throw everything away, and what an earlier process left.

        :raises SetupError: the directory cannot be emptied and made anew.
        """
        for xid in list(self._open):
            self.drop(xid)
        self._current = None
        try:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self._directory)
            self._directory.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise self._unusable(error) from error

    def remove(self) -> None:
        """Throw everything away, the directory too; for the end of a worker."""
        for xid in list(self._open):
            self.drop(xid)
        self._current = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def enter(self, xid: int) -> None:
        """Begin to receive a block of transaction `xid`.

        :raises ProtocolError: the block before has not ended.
        :raises SetupError: a file for it cannot be made.
        """
        if self._current is not None:
            raise ProtocolError("a stream block began inside another one")
        transaction = self._open.get(xid)
        if transaction is None:
            try:
                transaction = self._open[xid] = _Transaction(self._directory / f"{xid}.spool")
            except OSError as error:
                raise self._unusable(error) from error
        self._current = transaction

    def append(self, xid: int, payload: bytes) -> None:
        """Keep a message of the present block; `xid` is the (sub)transaction that it belongs to.

        :raises SetupError: the spool would grow beyond its limit, or cannot be written.
        """
        transaction = self._current
        assert transaction is not None
        size = _LENGTH.size + len(payload)
        if self.bytes + size > self._limit:
            raise SetupError(
                f"open transactions need more than {self._limit:,} bytes of spool",
                where=str(self._directory),
                hint="raise source.spool_bytes, or set source.streaming = false to let the server spill instead",
            )
        transaction.first.setdefault(xid, transaction.size)
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

        :raises SetupError: the spool cannot be written.
        """
        transaction = self._open.get(xid)
        if transaction is None:
            return
        if xid == subxid:
            self.drop(xid)
            return
        start = transaction.first.get(subxid)
        if start is None:
            return
        try:
            transaction.file.seek(start)
            transaction.file.truncate()
        except OSError as error:
            raise self._unusable(error) from error
        self.bytes -= transaction.size - start
        transaction.size = start
        # From the end: a transaction may have very many subtransactions, and looking at all of them at each abort would
        # take a time that grows with their square.
        while transaction.first.popitem()[0] != subxid:
            pass

    def replay(self, xid: int) -> Iterator[bytes]:
        """Yield the messages of a transaction in their order; the caller drops it afterwards.

        :raises SetupError: what is still in memory of the file cannot be written.
        """
        transaction = self._open.get(xid)
        if transaction is None:
            return
        file = transaction.file
        try:
            file.seek(0)
        except OSError as error:
            raise self._unusable(error) from error
        while header := file.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            yield file.read(length)

    def drop(self, xid: int) -> None:
        """Throw a transaction's file away."""
        transaction = self._open.pop(xid, None)
        if transaction is not None:
            self.bytes -= transaction.size
            with contextlib.suppress(OSError):  # a full disk is no reason to keep what is not wanted
                transaction.file.close()
            with contextlib.suppress(OSError):
                transaction.path.unlink()

    def _unusable(self, error: OSError) -> SetupError:
        return SetupError(
            f"open transactions cannot be kept on disk: {error.strerror or error}",
            where=str(self._directory),
            hint="free disk space there, or set source.spool_directory to where the worker may write",
        )
