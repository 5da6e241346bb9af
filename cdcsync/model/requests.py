"""A request to read a source table: the reasons for which it is made, and how far it is."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from cdcsync.model.rows import Key

Kind = Literal["initial", "replay", "resync", "verify", "compare", "related"]
"""The purpose of a request. "related" rebuilds the documents that rows of related tables belong to.
A comparison compares the whole index with its source, and replays the differences."""
Phase = Literal["rows", "orphans"]
RequestAction = Literal["pause", "resume", "cancel"]
Problem = Literal["missing", "stale", "orphaned", "carried", "failed", "undecided"]
"""How a document can differ from its row: failed is one that cannot be made, and is not there; undecided what changed
each time that it was looked at."""

OPEN = ("requested", "running", "paused")


class Request(msgspec.Struct, frozen=True):
    """A backfill; `cursor` is the key of the last row applied, or the place of the last key of a keyed one.

    :ivar up_to: the key after which it ends; None if it reads the table to its end.
    :ivar owed: whether the index would be out of date without it, so that nobody may cancel it; said of replays.
    """

    id: int
    index: str
    kind: Kind
    rewrite: bool
    filter: str | None
    state: str
    phase: Phase
    cursor: tuple[str, ...] | None
    rows_done: int
    rows_total: int | None
    started_at: datetime | None
    force_embed: bool = False
    keyed: bool = False
    max_rows_per_s: int | None = None
    error: str | None = None
    through: str | None = None
    finished_at: datetime | None = None
    up_to: Key | None = None
    owed: bool = False

    @property
    def once(self) -> bool:
        """Whether nobody asks again for what it was to bring."""
        return self.owed or self.kind == "related"

    @property
    def read_all(self) -> bool:
        """Whether it is done and has read the whole table."""
        whole = (
            not self.keyed
            and self.filter is None
            and self.up_to is None
            and (self.phase == "rows" or self.kind == "resync")
        )
        return self.state == "done" and whole

    @property
    def new(self) -> bool:
        """Whether the index most likely has none of the rows to be read."""
        return self.kind == "initial" and not self.rewrite

    @property
    def changes_texts(self) -> bool:
        """Whether most documents that it reads are other ones than the index has, or are chunked again anyway."""
        return self.new or self.rewrite or self.kind == "related"

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state not in OPEN
