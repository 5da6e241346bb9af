"""From a batch to what is to be written: the part of apply that needs no target transaction.

    batch ─► rows of the index, whole ─► documents ─► stored hashes ─► chunks of what changed ─► vectors that are ready
    in time

Reading the stored hashes outside the apply transaction is safe because the lock's holder is the only writer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import assert_never

import anyio
import anyio.to_thread
import msgspec
import structlog

from cdcsync.documents.chunks import Chunk, Chunker
from cdcsync.documents.templates import Rendering
from cdcsync.errors import DocumentError
from cdcsync.flows.backfill.preparing import Prepared
from cdcsync.flows.embed import Dispatcher
from cdcsync.metrics import Metrics
from cdcsync.model.batch import IndexChanges
from cdcsync.model.changeset import BACKFILL, LIVE, ChangeSet, Document, FailedDocument, Kept
from cdcsync.model.rows import Delete, Key, Row, Upsert, complete
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.sessions import Session, speaking_of
from cdcsync.source.tables import SourceTable
from cdcsync.target.apply import IndexWriter

log = structlog.get_logger()

THREAD_CHARACTERS = 20_000
"""More text than this is chunked in a thread: below it, the hand-over costs more than the splitting."""

REPORTED_ERRORS = 10
"""Errors of a batch that are logged: what fails for all rows may say something else of each."""

VISIBILITY_POLL_S = 0.05
"""How often a re-read is repeated while the source still hides the transaction: mostly it is a matter of
microseconds."""


class _Rendered(msgspec.Struct, frozen=True):
    """An upsert with its document."""

    change: Upsert
    lane: int
    document: Rendering


class Preparer:
    """Prepares the batches of one index."""

    def __init__(
        self,
        spec: IndexSpec,
        chunker: Chunker,
        dispatcher: Dispatcher,
        table: SourceTable,
        source: Session,
        metrics: Metrics,
    ) -> None:
        self._spec = spec
        self._chunker = chunker
        self._dispatcher = dispatcher
        self._table = table
        self._source = source
        self._metrics = metrics

    async def prepare(self, changes: IndexChanges, writer: IndexWriter) -> ChangeSet:
        """Return what the changes of this index come to.

        :raises SourceUnavailable, TargetUnavailable: nothing is lost by preparing the same changes again.
        """
        deleted, absent = list[Key](), list[Key]()
        upserts = list[tuple[Upsert, int]]()
        for change in changes.live.values():
            match change:
                case Upsert():
                    upserts.append((change, LIVE))
                case Delete():
                    (absent if change.as_written else deleted).append(change.key)
                case _:
                    assert_never(change)
        upserts += [(change, BACKFILL) for change in changes.filled.values()]
        upserts = await self._complete(upserts, deleted)
        failed: dict[Key, DocumentError] = {}
        rendered = await self._render(upserts, failed)
        stored: dict[Key, bytes] = {}
        if not (changes.truncated or changes.new):
            with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
                stored = await writer.stored_hashes([*deleted, *absent, *(one.change.key for one in rendered)])
        kept = []
        changed = []
        for one in rendered:
            if stored.get(one.change.key) == one.document.hash and not (changes.rewrite and one.lane == BACKFILL):
                kept.append(Kept(one.change.key, self._carried(one.change), one.change.lsn))
            else:
                changed.append(one)
        self._metrics.documents_unchanged.labels(self._spec.name).inc(len(kept))
        split = iter(await self._split([one for one in changed if not isinstance(one.change, Prepared)], failed))
        self._report(failed)
        chunks = [one.change.chunks if isinstance(one.change, Prepared) else next(split) for one in changed]
        documents = [
            Document(
                one.change.key,
                self._carried(one.change),
                one.document.hash,
                cut,
                one.change.lsn,
                one.lane,
                one.change.key in stored,
            )
            for one, cut in zip(changed, chunks, strict=True)
        ]
        self._dispatcher.tracing.follow((one.commit_lsn, chunk.hash) for one in documents for chunk in one.chunks)
        vectors = await self._vectors_in_time(documents, writer)
        pages = {id(change.vectors): change.vectors for change, _ in upserts if isinstance(change, Prepared)}
        made = {one: vector for page in pages.values() for one, vector in page.items()}
        vectors |= {chunk.hash: made[chunk.hash] for one in documents for chunk in one.chunks if chunk.hash in made}
        return ChangeSet(
            truncated=changes.truncated,
            deleted=[] if changes.truncated else deleted,
            kept=kept,
            documents=documents,
            vectors=vectors,
            new=changes.new,
            absent=[] if changes.truncated else absent,
            failed=[
                FailedDocument(one.key, str(failed[one.key]), one.commit_lsn) for one in documents if one.key in failed
            ],
        )

    def _carried(self, change: Upsert) -> Row:
        return self._spec.shape.carried_of(change.row)

    async def _complete(self, upserts: list[tuple[Upsert, int]], deleted: list[Key]) -> list[tuple[Upsert, int]]:
        """Return the rows that the index has, whole; the keys of those that it does not have go to `deleted`.

        Rows are read again where only the source can tell whether the index has them, and where unchanged TOAST values
        are not in the batch. What such a reading does not find is not in the index at that moment: it is gone, or does
        not fulfil the condition. If there is no condition, it is left out: the change that took it away is still to
        come.
        """
        spec = self._spec
        ours: list[tuple[Upsert, int]] = []
        unknown: list[Upsert] = []
        for change, lane in upserts:
            # A page has only rows that the source has decided on.
            holds = lane == BACKFILL or spec.where is None or spec.holds(change.row)
            if holds is False:
                deleted.append(change.key)
                continue
            ours.append((change, lane))
            if holds is None or not complete(change.row):
                unknown.append(change)
        if not unknown:
            return ours
        rows = await self._reread(unknown)
        self._metrics.rereads.labels(self._spec.name).inc(len(unknown))
        reread = {change.key for change in unknown}
        completed = []
        for change, lane in ours:
            if change.key not in reread:
                completed.append((change, lane))
            elif (row := rows.get(change.key)) is not None:
                completed.append((Upsert(change.shape, change.key, row, change.xid, change.lsn), lane))
            elif spec.where is not None:
                deleted.append(change.key)
        return completed

    async def _reread(self, changes: Sequence[Upsert]) -> Mapping[Key, Row]:
        keys = [change.key for change in changes]
        while True:
            table, index = self._spec.shape.table, self._spec.name
            with speaking_of("source", where=str(table), index=index):
                page = await self._table.by_keys(await self._source.connection(), keys)
            hidden = {change.xid for change in changes if not page.snapshot.sees(change.xid)}
            if not hidden:
                return {self._spec.shape.key_of(row): row for row in page.rows}
            # Delivered before it is visible: it waits for a synchronous standby.
            log.debug("reread_waits", index=self._spec.name, transactions=len(hidden))
            await anyio.sleep(VISIBILITY_POLL_S)

    async def _render(self, upserts: Sequence[tuple[Upsert, int]], failed: dict[Key, DocumentError]) -> list[_Rendered]:
        """Make documents; that of a row which fails is empty, and noted in `failed`."""
        render = self._spec.render

        def all_of_them() -> list[_Rendered]:
            rendered = []
            for change, lane in upserts:
                try:
                    document = change.document if isinstance(change, Prepared) else render(change.row)
                except DocumentError as error:
                    failed[change.key] = error
                    document = Rendering("")
                rendered.append(_Rendered(change, lane, document))
            return rendered

        return await anyio.to_thread.run_sync(all_of_them) if self._spec.documents.by_code else all_of_them()

    async def _split(self, rendered: Sequence[_Rendered], failed: dict[Key, DocumentError]) -> list[list[Chunk]]:
        """Cut documents; one that fails has no chunks, and is noted in `failed`."""

        def fail(place: int, error: DocumentError) -> None:
            failed[rendered[place].change.key] = error

        documents = [one.document for one in rendered]
        if sum(len(document.text) for document in documents) < THREAD_CHARACTERS and not self._chunker.by_code:
            return self._chunker.split_all(documents, fail)
        return await anyio.to_thread.run_sync(self._chunker.split_all, documents, fail)

    def _report(self, failed: Mapping[Key, DocumentError]) -> None:
        """Say why rows have no place in the index now; which they are, the target knows from the next commit on."""
        name = self._spec.name
        self._metrics.document_failures.labels(name).inc(len(failed))
        for error, rows in Counter(map(str, failed.values())).most_common(REPORTED_ERRORS):
            log.warning("document_failed", index=name, error=error, failed=rows, fix=f"cdcsync failures {name} list")

    async def _vectors_in_time(self, documents: Sequence[Document], writer: IndexWriter) -> dict[bytes, FloatVector]:
        """Embed a small live batch here and now, if the dispatcher is free and the budget allows."""
        texts = {chunk.hash: chunk.text for one in documents if one.lane == LIVE for chunk in one.chunks}
        budget_s = self._spec.config.inline_budget_ms / 1000
        if not 0 < len(texts) <= self._spec.config.inline_max_chunks or not self._dispatcher.free_within(budget_s / 2):
            return {}
        with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
            for known in await writer.known_vectors(list(texts)):
                del texts[known]
        return self._spec.usable(await self._dispatcher.embed_within(texts, budget_s))
