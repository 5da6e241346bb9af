"""The status flow: how a pipeline and its indexes are, for `cdcsync status`, the worker's `/status` and its page.

    model        what a status says: `Status` and its parts
    counting     how many chunks, vectors and waiting chunks an index has
    reading      `read_status`: one reading of both servers
    rendering    `render_table`: the same for a terminal

Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.status.model import VERSION, BackfillStatus, IndexStatus, SlotStatus, Status, WorkerStatus
from cdcsync.status.reading import read_status
from cdcsync.status.rendering import render_table

__all__ = [
    "VERSION",
    "BackfillStatus",
    "IndexStatus",
    "SlotStatus",
    "Status",
    "WorkerStatus",
    "read_status",
    "render_table",
]
