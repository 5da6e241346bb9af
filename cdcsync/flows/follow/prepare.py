"""From a batch to what is to be written: the part of apply that needs no target transaction.

    batch ─► rows of the index, whole ─► documents ─► stored hashes ─► chunks of what changed ─► vectors that are ready
    in time

Reading the stored hashes outside the apply transaction is safe because the lock's holder is the only writer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TypeVar, assert_never

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from cdcsync.documents.chunks import Chunk, Chunker
from cdcsync.documents.templates import Rendering
from cdcsync.errors import DocumentError
from cdcsync.flows.backfill.preparing import Prepared
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.follow.related import RelatedChanges
from cdcsync.flows.follow.sight import PutOff, Sight
from cdcsync.metrics import Metrics
from cdcsync.model.batch import IndexChanges, RowChange
from cdcsync.model.changeset import BACKFILL, LIVE, ChangeSet, Document, FailedDocument, Kept, Rebuild
from cdcsync.model.rows import OVERSIZED, Delete, Key, Row, Touched, Unread, UnreadRow, Upsert, complete, oversized
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput.messages import UNCHANGED
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import LockedOut
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.source.reads import Page
from cdcsync.source.tables import SourceTable
from cdcsync.target.look_ups import LookUps

T = TypeVar("T")

THREAD_CHARACTERS = 20_000
"""More text than this is chunked in a thread: below it, the hand-over costs more than the splitting."""

ONE_TEXT = frozenset({"smallint", "integer", "bigint", "oid", "uuid", "boolean", "date", "text"})
"""Types whose equal values the server writes alike. Not so numeric (1.0 and 1.00), citext, or a domain over them."""

VARCHAR = "character varying"

TURN_ROWS = 200
"""Rows handled before other tasks get a turn: half a millisecond, which the target may wait for the next statement."""

READ_AT_FIRST = 16
"""Rows with related ones that are read in the first query, while nobody knows how large they are."""

READ_AT_ONCE = 500
"""Rows that are read in one query at most."""

READ_BYTES = 4 * 1024 * 1024
"""The most bytes that one query should return. The sizes of rows are known before. Those of documents with related rows
are not, and the query before suggests how many to read."""

MOST_BYTES_READ = 32 * 1024 * 1024
"""The most bytes that are read for one batch. The other rows are left to a request."""


class _Rendered(msgspec.Struct, frozen=True, gc=False):
    """An upsert with its document, and the hash of that."""

    change: Upsert
    lane: int
    document: Rendering
    hash: bytes


async def _in_turns(rows: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Yield rows by portions, with a turn for other tasks between two of them."""
    for start in range(0, len(rows), TURN_ROWS):
        if start:
            await anyio.lowlevel.checkpoint()
        yield rows[start : start + TURN_ROWS]


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
        deliveries: Deliveries,
    ) -> None:
        """Make the preparer.

        :param deliveries: is told what is read again, and under which snapshot.
        """
        self._spec = spec
        self._chunker = chunker
        self._dispatcher = dispatcher
        self._table = table
        self._source = source
        self._metrics = metrics
        self._deliveries = deliveries
        self._sight = Sight(spec, source, LockedOut(spec.name, spec.single_tables))
        self._related = RelatedChanges(spec, source, deliveries, self._sight) if spec.documents.related else None

    @property
    def looks_ahead(self) -> bool:
        """Whether a batch can be prepared while the one before it is being written: equal keys are written alike."""
        return all(type_ in ONE_TEXT or type_.startswith(VARCHAR) for type_ in self._spec.key_types)

    async def prepare(self, changes: IndexChanges, look_ups: LookUps, before: ChangeSet | None = None) -> ChangeSet:
        """Return what the changes of this index come to.

        :param look_ups: over a connection that sees what is committed.
        :param before: what is being written meanwhile, if anything is; only where `looks_ahead` says so.
        :raises SourceUnavailable, TargetUnavailable: nothing is lost by preparing the same changes again.
        """
        deleted, absent = list[Key](), list[Key]()
        upserts = list[tuple[Upsert, int]]()
        await self._sight.applied({change.xid for change in changes.live.values()})
        live, rebuilds, xids = await self._with_touched(changes)
        for change in live.values():
            match change:
                case Upsert():
                    upserts.append((change, LIVE))
                case Delete():
                    (absent if change.as_written else deleted).append(change.key)
                case _:
                    assert_never(change)
        upserts += [(change, BACKFILL) for key, change in changes.filled.items() if key not in live]
        upserts, reread = await self._complete(upserts, deleted, rebuilds, xids, rewrite=changes.rewrite)
        unflushed = None
        if reread or changes.touched_by:
            with self._reading():
                connection = await self._source.connection()
                if not look_ups.flush_with(connection):
                    unflushed = await self._table.unflushed(connection)
        changes.resolved = not (rebuilds or changes.truncated)
        failed: dict[Key, DocumentError] = {}
        rendered = await self._render(upserts, failed)
        stored: dict[Key, bytes] = {}
        if not (changes.truncated or changes.new):
            with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
                stored = await look_ups.stored_hashes([*deleted, *absent, *(one.change.key for one in rendered)])
            if before is not None:
                stored = before.hashes_after(stored)
        if changes.cleared:
            stored = {key: one for key, one in stored.items() if key[0] not in changes.cleared}
        kept = []
        changed = []
        async for part in _in_turns(rendered):
            for one in part:
                if stored.get(one.change.key) == one.hash and not changes.rewrite:
                    kept.append(Kept(one.change.key, self._carried(one.change)))
                else:
                    changed.append(one)
        split = iter(await self._split([one for one in changed if not isinstance(one.change, Prepared)], failed))
        chunks = [one.change.chunks if isinstance(one.change, Prepared) else next(split) for one in changed]
        documents = [
            Document(
                one.change.key,
                self._carried(one.change),
                one.hash,
                cut,
                one.change.lsn,
                one.lane,
                one.change.key in stored,
                changes.since(one.change.key, one.change.lsn),
            )
            async for part in _in_turns(list(zip(changed, chunks, strict=True)))
            for one, cut in part
        ]
        self._dispatcher.tracing.follow((one.commit_lsn, chunk.hash) for one in documents for chunk in one.chunks)
        vectors = await self._vectors_in_time(documents, look_ups)
        pages = {id(change.vectors): change.vectors for change, _ in upserts if isinstance(change, Prepared)}
        made = {one: vector for page in pages.values() for one, vector in page.items()}
        if made:
            vectors |= {chunk.hash: made[chunk.hash] for one in documents for chunk in one.chunks if chunk.hash in made}
        if unflushed is not None:
            with self._reading():
                await self._table.flush(await self._source.connection(), unflushed)
        return ChangeSet(
            truncated=changes.truncated,
            deleted=[] if changes.truncated else deleted,
            kept=kept,
            documents=documents,
            vectors=vectors,
            new=changes.new,
            absent=[] if changes.truncated else absent,
            rebuilds=rebuilds,
            cleared=sorted(changes.cleared),
            failed=[
                FailedDocument(one.key, str(failed[one.key]), one.commit_lsn) for one in documents if one.key in failed
            ],
            touched=Counter(self._spec.links[place].relation for place, _ in changes.touched),
        )

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return speaking_of("source", where=str(self._spec.shape.table), index=self._spec.name)

    def _carried(self, change: Upsert) -> Row:
        return self._spec.shape.carried_of(change.row)

    async def _with_touched(self, changes: IndexChanges) -> tuple[Mapping[Key, RowChange], list[Rebuild], set[int]]:
        """Return the live changes, with those of documents whose related rows changed.

        Besides, the requests for documents that are too many, and the transactions that a reading has to see.
        """
        if self._related is None or not changes.touched_by:
            return changes.live, [], changes.overtaken
        found = await self._related.concerned(changes)
        live = dict(changes.live)
        shape = changes.shape
        unread = (UNCHANGED,) * (len(shape.columns) - len(shape.key))
        for key, touch in found.documents.items():
            # Whatever the batch says of the row itself, the source says it too, or something newer.
            own = live.get(key)
            if not isinstance(own, Upsert):
                live[key] = Touched(shape, key, (*key, *unread), touch.xid, touch.lsn)
            elif own.lsn < touch.lsn:
                live[key] = msgspec.structs.replace(own, lsn=touch.lsn)
        return live, found.rebuilds, changes.overtaken | changes.touched_by.keys()

    async def _complete(
        self,
        upserts: list[tuple[Upsert, int]],
        deleted: list[Key],
        rebuilds: list[Rebuild],
        xids: set[int],
        *,
        rewrite: bool,
    ) -> tuple[list[tuple[Upsert, int]], bool]:
        """Return the rows that the index has, whole; the keys of those that it does not have go to `deleted`.

        Besides, whether rows were read again.

        Rows are read again where only the source can tell whether the index has them, where unchanged TOAST values are
        not in the batch, and where values are made of related rows. What such a reading does not find is not in the
        index at that moment: it is gone, or does not fulfil the condition. If neither a condition nor a related row can
        be the reason, it is left out: the change that took it away is still to come.

        :param rebuilds: takes the request for those that cannot be read now: they are too large, or have to be put off.
        :param xids: transactions that the reading has to see, besides those of the changes.
        :param rewrite: whether that request is to chunk documents again, too.
        """
        spec = self._spec
        ours: list[tuple[Upsert, int]] = []
        unknown: dict[Key, None] = {}
        xids = set(xids)
        for change, lane in upserts:
            # A page has only rows that the source has decided on.
            decided = lane == BACKFILL or spec.where is None
            if isinstance(change, UnreadRow):
                ours.append((change, lane))
                continue
            holds = decided or (None if isinstance(change, Touched) else spec.holds(change.row))
            if holds is False:
                deleted.append(change.key)
                continue
            if holds and oversized(change.row):
                ours.append((UnreadRow.of(change.shape, change.key, change.xid, change.lsn, OVERSIZED), lane))
                continue
            ours.append((change, lane))
            if holds is None or not complete(change.row):
                unknown[change.key] = None
                if lane == LIVE:
                    xids.add(change.xid)
        if not unknown:
            return ours, False
        rows, left = await self._reread(list(unknown), xids, rewrite=rewrite)
        self._metrics.rereads.labels(self._spec.name).inc(len(unknown))
        if left:
            rebuilds.append(Rebuild(None, None, left, rewrite))
        unread = set(left)
        completed = []
        for change, lane in ours:
            if change.key not in unknown:
                completed.append((change, lane))
            elif isinstance(row := rows.get(change.key), Unread):
                completed.append((UnreadRow.of(change.shape, change.key, change.xid, change.lsn, row), lane))
            elif row is not None:
                completed.append((Upsert(change.shape, change.key, row, change.xid, change.lsn), lane))
            elif (spec.where is not None or change.shape.computed) and change.key not in unread:
                deleted.append(change.key)
        return completed, True

    async def _reread(
        self, keys: Sequence[Key], xids: set[int], *, rewrite: bool
    ) -> tuple[dict[Key, Row | Unread], tuple[Key, ...]]:
        """Return the rows that the source has for these keys, or why they cannot be read.

        They are read in portions, each under a snapshot of its own that sees these transactions. Reading ends once the
        rows are large together, or where it has to be put off; the keys that are left are returned.
        """

        async def read(connection: Connection) -> tuple[Snapshot, Page]:
            page = await self._table.by_keys(connection, portion)
            return page.snapshot, page

        found: dict[Key, Row | Unread] = {}
        done = size = 0
        at_once = READ_AT_FIRST if self._related is not None else READ_AT_ONCE
        while done < len(keys) and size <= MOST_BYTES_READ and not self._sight.poor:
            portion = keys[done : done + at_once]
            try:
                if self._related is None:
                    async with self._sight.putting_off():
                        with self._reading():
                            connection = await self._source.connection()
                            portion = portion[: await self._table.fitting_keys(connection, portion, READ_BYTES)]
                page = await self._sight.read(xids, read)
            except PutOff:
                break
            rows: dict[Key, Row | Unread] = {self._spec.shape.key_of(row): row for row in page.rows}
            rows.update(page.unread)
            self._deliveries.read_again((*portion, *rows), page.snapshot, rewritten=rewrite)
            found.update(rows)
            read_bytes = sum(len(value) for row in page.rows for value in row if isinstance(value, str))
            done, size = done + len(portion), size + read_bytes
            if self._related is not None:
                at_once = max(1, min(READ_AT_ONCE, 4 * at_once, at_once * READ_BYTES // max(1, read_bytes)))
        return found, tuple(keys[done:])

    async def _render(self, upserts: Sequence[tuple[Upsert, int]], failed: dict[Key, DocumentError]) -> list[_Rendered]:
        """Make documents; that of a row which fails is empty, and noted in `failed`."""
        render = self._spec.render

        def some(part: Sequence[tuple[Upsert, int]]) -> list[_Rendered]:
            rendered = []
            for change, lane in part:
                try:
                    if isinstance(change, UnreadRow):
                        raise DocumentError(change.reason)
                    document = change.document if isinstance(change, Prepared) else render(change.row)
                except DocumentError as error:
                    failed[change.key] = error
                    document = Rendering("")
                rendered.append(_Rendered(change, lane, document, document.hash))
            return rendered

        if self._spec.documents.by_code:
            return await anyio.to_thread.run_sync(some, upserts)
        return [one async for part in _in_turns(upserts) for one in some(part)]

    async def _split(self, rendered: Sequence[_Rendered], failed: dict[Key, DocumentError]) -> list[list[Chunk]]:
        """Cut documents; one that fails has no chunks, and is noted in `failed`."""

        def fail(place: int, error: DocumentError) -> None:
            failed[rendered[place].change.key] = error

        documents = [one.document for one in rendered]
        if sum(len(document.text) for document in documents) < THREAD_CHARACTERS and not self._chunker.by_code:
            return self._chunker.split_all(documents, fail)
        return await anyio.to_thread.run_sync(self._chunker.split_all, documents, fail)

    async def _vectors_in_time(self, documents: Sequence[Document], look_ups: LookUps) -> dict[bytes, FloatVector]:
        """Embed a small live batch here and now, if the dispatcher is free and the budget allows."""
        live = [one for one in documents if one.lane == LIVE and one.chunks]
        if len(live) > self._spec.config.inline_max_chunks:
            return {}
        texts = {chunk.hash: chunk.text for one in live for chunk in one.chunks}
        budget_s = self._spec.config.inline_budget_ms / 1000
        if not 0 < len(texts) <= self._spec.config.inline_max_chunks or not self._dispatcher.free_within(budget_s / 2):
            return {}
        with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
            for known in await look_ups.known_vectors(list(texts)):
                del texts[known]
        return self._spec.usable(await self._dispatcher.embed_within(texts, budget_s))
