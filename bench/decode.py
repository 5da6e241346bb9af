"""How many row changes a second does the decoder read, on one core?

A walsender sends 75,000 to 126,000 rows of 500 bytes a second (`drain.py`). The decoder shares its core with all that
comes after it, so it should take much less time than they take to arrive. These are figures of this machine alone:
`drain.py` compares the decoder with others in one run.

Each round decodes one batch and keeps its messages, as the worker does; the best of the rounds counts, since whatever
else the machine did could only slow the others down.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import XLogData, decode_frame

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench.report import report
else:
    from report import report

BATCH_ROWS = 2_000
"""The worker's default batch: large enough that the clock's resolution does not count."""
ROUNDS = 60

RELATION_OID = 16_385


def cells(values: list[str | None]) -> bytes:
    """Return a tuple as the server writes it in text form."""
    written = struct.pack(">H", len(values))
    for value in values:
        if value is None:
            written += b"n"
        else:
            data = value.encode()
            written += b"t" + struct.pack(">I", len(data)) + data
    return written


def row(number: int, body: str) -> list[str | None]:
    """Return five columns: key, tenant, title, author and a body that makes the row as wide as it is."""
    return [str(1_000_000 + number), str(number % 50), f"The title of article {number:08}", "some author", body]


def rate(messages: list[bytes], read: Callable[[bytes], object]) -> float:
    """Return how many messages a second were read in the best round."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        kept = [read(message) for message in messages]
        best_s = min(best_s, time.perf_counter() - start_s)
        del kept
    return len(messages) / best_s


def read_frame(frame: bytes) -> object:
    """Do what the slot does with each CopyData message."""
    outer = decode_frame(frame)
    assert isinstance(outer, XLogData)
    return decode(outer.payload)


def main() -> None:
    """Measure and report."""
    head = struct.pack(">I", RELATION_OID)
    wide = [cells(row(number, "x" * 430)) for number in range(BATCH_ROWS)]
    assert 495 <= len(wide[0]) <= 515, len(wide[0])
    accented = [cells(row(number, "é" * 215)) for number in range(BATCH_ROWS)]
    narrow = [cells(row(number, "x")) for number in range(BATCH_ROWS)]
    keys = [cells([str(1_000_000 + number), None, None, None, None]) for number in range(BATCH_ROWS)]

    inserts = [b"I" + head + b"N" + new for new in wide]
    frames = [struct.pack(">cQQq", b"w", 1 << 40, 1 << 40, 1 << 49) + insert for insert in inserts]

    begin = struct.pack(">cQqI", b"B", 1 << 40, 1 << 49, 755)
    commit = struct.pack(">cBQQq", b"C", 0, 1 << 40, 1 << 40, 1 << 49)

    figures = {
        "insert_rows_per_s": rate(inserts, decode),
        "insert_non_ascii_rows_per_s": rate([b"I" + head + b"N" + new for new in accented], decode),
        "insert_small_rows_per_s": rate([b"I" + head + b"N" + new for new in narrow], decode),
        "update_rows_per_s": rate([b"U" + head + b"N" + new for new in wide], decode),
        "update_of_key_rows_per_s": rate(
            [b"U" + head + b"K" + old + b"N" + new for old, new in zip(keys, wide, strict=True)], decode
        ),
        "update_identity_full_rows_per_s": rate([b"U" + head + b"O" + new + b"N" + new for new in wide], decode),
        "delete_rows_per_s": rate([b"D" + head + b"K" + old for old in keys], decode),
        "begin_per_s": rate([begin] * BATCH_ROWS, decode),
        "commit_per_s": rate([commit] * BATCH_ROWS, decode),
        "frame_and_insert_rows_per_s": rate(frames, read_frame),
    }
    report("decode", figures)


if __name__ == "__main__":
    main()
