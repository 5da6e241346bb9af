"""The changes that one batch makes in one index, and the result of applying them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cdcsync.documents.chunks import Chunk
from cdcsync.model.rows import Key, Row
from cdcsync.model.vectors import FloatVector

LIVE, BACKFILL = 0, 1
"""Lanes of the backlog: live changes are embedded first."""


class Document(msgspec.Struct, frozen=True, gc=False):
    """A document whose chunks are to be replaced.

    :ivar commit_lsn: of the last transaction that changed it.
    :ivar since: a position no later than the commit that brought its text, where that may be an earlier one.
    """

    key: Key
    carried: Row
    hash: bytes
    chunks: Sequence[Chunk]
    commit_lsn: int
    lane: int
    existed: bool
    since: int | None = None

    @property
    def text_lsn(self) -> int:
        """A position no later than the commit that brought its text."""
        return self.commit_lsn if self.since is None else self.since


class Kept(msgspec.Struct, frozen=True, gc=False):
    """A document that did not change: only its carried columns may have."""

    key: Key
    carried: Row


class FailedDocument(msgspec.Struct, frozen=True, gc=False):
    """A row that no document could be made of, by the change at `commit_lsn`; the error names no value of the row."""

    key: Key
    error: str
    commit_lsn: int


class Rebuild(msgspec.Struct, frozen=True):
    """Documents that are to be rebuilt by a request, which commits with the batch: more than the batch takes.

    :ivar relation: the related table that changed, if there is one.
    :ivar condition: which rows' documents, in SQL on the row `t`; None for all, unless there are keys.
    :ivar keys: the documents themselves, where they are known.
    :ivar rewrite: whether they are chunked again even where they are unchanged.
    :ivar read: a request that is being served, and the last key that it had read when this was found; see `Deliveries`.
    """

    relation: str | None
    condition: str | None = None
    keys: tuple[Key, ...] | None = None
    rewrite: bool = False
    read: tuple[int, Key] | None = None


class ChangeSet(msgspec.Struct, frozen=True):
    """All that one batch changes in one index, with at most one entry per key."""

    truncated: bool
    deleted: list[Key]
    kept: list[Kept]
    documents: list[Document]
    vectors: Mapping[bytes, FloatVector]
    """Vectors computed already, by the hash of their chunk's text."""
    new: bool = False
    """Whether the index most likely has none of the documents: apply copies them in without looking, and starts over
    with the usual statements if the server finds one of them there."""
    absent: Sequence[Key] = ()
    """Keys that the source was found to lack. A row that has since come may be equal to the server and written
    differently (1.00 for 1.0): only what the index writes just so is deleted."""
    cleared: Sequence[str] = ()
    """Names of source tables that were truncated, of an index over many. Their documents are deleted before anything
    else is written."""
    failed: Sequence[FailedDocument] = ()
    """Which of `documents` could not be made, and why; they have no chunks."""
    rebuilds: Sequence[Rebuild] = ()
    touched: Mapping[str, int] = {}
    """How many changes of rows of related tables it follows from, by relation."""
    staged: Sequence[bytes] | None = None
    """Its rows as they are copied to the target, if they were written down ahead."""

    @property
    def rows(self) -> int:
        """How many rows apply has to look at: chunks, and documents that go or stay."""
        of_documents = sum(len(document.chunks) or 1 for document in self.documents)
        return len(self.deleted) + len(self.absent) + len(self.kept) + of_documents

    def hashes_after(self, stored: Mapping[Key, bytes]) -> dict[Key, bytes]:
        """Return the document hashes that the index holds once this is applied, of these keys and of those in here.

        Equal keys have to be written in one way only.

        :param stored: hashes of some keys from before it.
        """
        after = {} if self.truncated else {key: one for key, one in stored.items() if key[0] not in self.cleared}
        for key in (*self.deleted, *self.absent):
            after.pop(key, None)
        for document in self.documents:
            if document.chunks:
                after[document.key] = document.hash
            else:
                after.pop(document.key, None)
        return after


class Applied(msgspec.Struct, frozen=True):
    """The result of an apply."""

    chunks: int
    deleted: int
    reused: int
    inline: int
    queued: int
    beside: int = 0
    """Texts that wait for a vector of another generation than the live one."""
