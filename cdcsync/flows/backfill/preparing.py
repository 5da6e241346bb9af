"""Prepares a backfill's rows before their mark arrives: documents, chunks and, by a quick model, vectors.

A page waits for its mark anyway, and for the page before it. What is done meanwhile need not be done while apply holds
up live changes. All of it is derived from the row alone, so it holds whenever the row is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio.to_thread
import msgspec

from cdcsync.documents.chunks import Chunk, Chunker
from cdcsync.documents.templates import Rendering
from cdcsync.errors import DocumentError
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed.pages import page_vectors
from cdcsync.model.rows import Key, Row, Shape, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.look_ups import texts_with_vector

QUICK_S = 0.25
"""A page whose texts the model takes longer for is applied without vectors, which follow from the backlog: text is not
to wait for a model. A page takes about as long to apply."""

PAGE_S = QUICK_S / 2
"""Pages are made small enough for this, so that one that takes a little longer still comes with its vectors: in the
backlog they cost several times as much."""

LEAST_ROWS = 500
"""Smaller pages cost more than they save: of a slower model, vectors come from the backlog."""


class Prepared(Upsert, frozen=True, gc=False):
    """A row of a page with what it comes to.

    :ivar vectors: of the whole page, by hash of the chunk's text; those that are missing follow from the backlog.
    """

    document: Rendering = Rendering("")
    chunks: Sequence[Chunk] = ()
    vectors: Mapping[bytes, FloatVector] = {}


class Made(msgspec.Struct, frozen=True):
    """The rendered rows of a page, in their order; `vectors` by hash of the chunk's text."""

    documents: Sequence[Rendering]
    chunks: Sequence[Sequence[Chunk]]
    vectors: Mapping[bytes, FloatVector]

    def place(self, shape: Shape, at: int, key: Key, row: Row, lsn: int) -> Prepared:
        """Return the row at a place of the page as the change that it is at a place in the stream."""
        return Prepared(shape, key, row, 0, lsn, None, self.documents[at], self.chunks[at], self.vectors)


class PagePreparer:
    """Prepares the pages of one index.

    :ivar chunker: what cuts its documents.
    """

    def __init__(self, spec: IndexSpec, schema: str, chunker: Chunker, dispatcher: Dispatcher) -> None:
        self._spec = spec
        self._schema = schema
        self.chunker = chunker
        self._dispatcher = dispatcher
        self._texts_per_row = 1.0

    def page_rows(self, most: int) -> int:
        """Return how many rows a page should have, so that its vectors can be made while it waits."""
        rows = int(self._dispatcher.texts_within(PAGE_S) / self._texts_per_row)
        return min(most, rows) if rows >= LEAST_ROWS else most

    async def make(self, target: Connection, rows: Sequence[Row]) -> Made | None:
        """Return what these rows come to; None where that can fail for a row, which apply deals with.

        :param target: to see which texts have a vector already.
        """
        if self._spec.documents.by_code or self.chunker.fallible:
            return None
        documents, cut = await anyio.to_thread.run_sync(self._cut, rows)
        texts = {chunk.hash: chunk.text for chunks in cut for chunk in chunks}
        self._texts_per_row = max(1.0, len(texts) / len(rows))
        return Made(documents, cut, await self._vectors(target, texts))

    def _cut(self, rows: Sequence[Row]) -> tuple[list[Rendering], list[list[Chunk]]]:
        documents = [self._spec.render(row) for row in rows]
        return documents, self.chunker.split_all(documents, _cannot_fail)

    async def _vectors(self, target: Connection, texts: dict[bytes, str]) -> Mapping[bytes, FloatVector]:
        if not texts or len(texts) > self._dispatcher.texts_within(QUICK_S):
            return {}
        with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
            for known in await texts_with_vector(target, self._schema, self._spec, list(texts)):
                del texts[known]
        return await page_vectors(self._dispatcher, self._spec, texts)


def _cannot_fail(place: int, error: DocumentError) -> None:
    """Such documents are not cut here."""
    raise error
