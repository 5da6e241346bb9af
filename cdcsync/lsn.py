"""Log sequence numbers: positions in PostgreSQL's write-ahead log.

An LSN is a byte position, but adding two of them means nothing, so it is a type of its own and never
a bare `int`. It prints the way PostgreSQL prints `pg_lsn`.

Source: PostgreSQL, "pg_lsn Type"; src/include/access/xlogdefs.h.
"""

from __future__ import annotations

import re
from typing import Self

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


class Lsn(int):
    """A byte position in the write-ahead log, ordered and printed like PostgreSQL's `pg_lsn`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the `X/X` form.

        :raises ValueError: the text is not two hexadecimal numbers of at most 32 bits around a slash.
        """
        if (halves := _TEXT.fullmatch(text)) is None:
            raise ValueError(f"not an LSN: {text!r}")
        return cls(int(halves[1], 16) << 32 | int(halves[2], 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({str(self)!r})"

    def bytes_since(self, earlier: int) -> int:
        """Return how many bytes of WAL lie between `earlier` and here; never negative."""
        return max(0, int(self) - int(earlier))


INVALID_LSN = Lsn(0)
"""PostgreSQL's InvalidXLogRecPtr: no position."""
