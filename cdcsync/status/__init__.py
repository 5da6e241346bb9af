"""The status flow: how a pipeline and its indexes are, for `cdcsync status`, the worker's `/status` and its page.

    durations     sizes and durations as people read them
    counting      how many chunks, vectors and waiting chunks an index has
    builds        the builds of search indexes that are under way
    generations   the sets of vectors of an index, side by side
    model         what a status says: `Status` and its parts
    progress      how far loads are, and how much time they have left
    headline      the state of each index and of the whole, in a few words
    tables        our tables that there are, and that may be read
    embedders     the embedders as the worker last noted them
    indexes       the indexes as the target has them
    stream        slot, worker and lag
    reading       `read_status`: one reading of both servers
    rendering     `render_table`: the same for a terminal

Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.status.headline import as_starting, as_waiting, with_headlines, with_problems, without_problems
from cdcsync.status.model import (
    VERSION,
    BackfillStatus,
    Event,
    Freshness,
    Headline,
    IndexStatus,
    Progress,
    SlotStatus,
    Status,
    Tone,
    WorkerStatus,
)
from cdcsync.status.progress import Paces
from cdcsync.status.reading import read_status
from cdcsync.status.rendering import render_bars, render_table

__all__ = [
    "VERSION",
    "BackfillStatus",
    "Event",
    "Freshness",
    "Headline",
    "IndexStatus",
    "Paces",
    "Progress",
    "SlotStatus",
    "Status",
    "Tone",
    "WorkerStatus",
    "as_starting",
    "as_waiting",
    "read_status",
    "render_bars",
    "render_table",
    "with_headlines",
    "with_problems",
    "without_problems",
]
