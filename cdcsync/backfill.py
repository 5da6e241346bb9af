"""The backfill flow: reads a table in key order while changes stream in, without locks and without long snapshots.

    page (rows + snapshot) ─► mark in the WAL ─► the stream meets the mark ─► rows that nothing newer overtook ─► apply

A page is read in one short transaction, then a mark is written to the source's WAL. When the stream delivers the
mark, every transaction that the page's snapshot sees has been delivered before it. Those that the snapshot does not
see and that were delivered all the same have left their keys in the index's `Deliveries`: these rows are dropped,
the stream had newer ones. What is delivered after the mark is applied after the page. The cursor commits together
with the rows, so a crash repeats at most the pages in flight.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import TypeAlias, TypeVar

import anyio
import msgspec
import structlog

from cdcsync.batches import Batch, PageEnd
from cdcsync.changes import Delete, Key, Row, Upsert
from cdcsync.embed import backoff_s
from cdcsync.errors import CdcsyncError, Retry, Unavailable
from cdcsync.index.keys import page_of_keys
from cdcsync.index.requests import Request, Requests
from cdcsync.index.schema import IndexSpec
from cdcsync.metrics import Metrics
from cdcsync.postgres import Connection, Session, connect, speaking_of
from cdcsync.source.catalog import blockers, current_snapshot
from cdcsync.source.tables import SourceTable, emit_mark
from cdcsync.transactions import Mark
from cdcsync.visibility import Deliveries, Snapshot

log = structlog.get_logger()

T = TypeVar("T")


class _Page(msgspec.Struct, frozen=True):
    """Keys with the rows that the snapshot shows, None where it shows none; `cursor` is the last key looked at."""

    snapshot: Snapshot
    entries: list[tuple[Key, Row | None]]
    cursor: Key | None
    last: bool


PageReader: TypeAlias = Callable[[Key | None], Awaitable[_Page]]
"""Reads the page after a key."""

PAGES_IN_FLIGHT = 2
"""One page is read while the other is applied; more would only grow what a crash repeats."""

POLL_S = 1.0
"""How often requests are looked for; also how soon a pause or cancellation is noticed."""

COUNT_UP_TO = 200_000
"""Tables with fewer rows than this by the planner's estimate are counted exactly for the progress bar."""

PRUNE_S = 10.0
"""How often the memory of delivered transactions is rid of those that are visible by now."""

BLOCKED_REPORT_S = 10.0


class _Pending(msgspec.Struct):
    """A page whose mark is under way."""

    request: Request
    spec: IndexSpec
    page: _Page
    end: PageEnd
    applied: anyio.Event


class Backfills:
    """Serves backfill requests one after the other for ever."""

    def __init__(
        self,
        *,
        source_dsn: str,
        target_dsn: str,
        schema: str,
        specs: Mapping[str, IndexSpec],
        tables: Mapping[str, SourceTable],
        deliveries: Mapping[str, Deliveries],
        page_rows: int,
        metrics: Metrics,
    ) -> None:
        self._source = Session(source_dsn, "source", application_name="cdcsync backfill")
        self._target_dsn = target_dsn
        self._schema = schema
        self._requests = Requests(schema)
        self._specs = specs
        self._tables = tables
        self._deliveries = deliveries
        self._page_rows = page_rows
        self._metrics = metrics
        self._pending: dict[str, _Pending] = {}
        self._run = secrets.token_hex(4)
        self._sequence = 0
        self.finished = anyio.Event()
        """Set, and replaced, each time a request ends."""
        self.waiting_for: list[str] = []
        """The source sessions that the present page waits for."""

    # -- called by the stream -----------------------------------------------------------------------------------

    def take_page(self, mark: Mark, batch: Batch) -> None:
        """Put the page of this mark into the batch, without the rows that the stream overtook."""
        pending = self._pending.get(mark.content)
        if pending is None:
            return  # a mark of an earlier process, or of a page that is in the target already
        shape, deliveries = pending.spec.shape, self._deliveries[pending.spec.name]
        rows: list[Upsert | Delete] = []
        for key, row in pending.page.entries:
            if deliveries.hides(key, pending.page.snapshot):
                continue
            rows.append(Delete(shape, key, 0, mark.lsn) if row is None else Upsert(shape, key, row, 0, mark.lsn))
        self._metrics.backfill_overtaken.labels(shape.index).inc(len(pending.page.entries) - len(rows))
        batch.add_page(shape, rows, pending.end, mark=mark.content, rewrite=pending.request.rewrite)

    def page_applied(self, batch: Batch) -> None:
        """Note that the pages of this batch are in the target."""
        for mark in batch.marks:
            pending = self._pending.pop(mark, None)
            if pending is None:
                continue
            deliveries = self._deliveries[pending.spec.name]
            others = [one.page.snapshot for one in self._pending.values() if one.spec is pending.spec]
            deliveries.forget_seen(min(others, key=lambda one: one.xmax, default=pending.page.snapshot))
            self._metrics.backfill_rows.labels(pending.spec.name).inc(len(pending.page.entries))
            pending.applied.set()

    # -- the task -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve requests until cancelled, connecting again whenever a server was away."""
        attempt = 0
        while True:
            try:
                async with AsyncExitStack() as stack:
                    stack.push_async_callback(self._source.aclose)
                    target = await connect(self._target_dsn, "target", application_name="cdcsync backfill")
                    stack.push_async_callback(target.close)
                    attempt = 0
                    while True:
                        await self._serve_next(target)
            except Unavailable as error:
                log.warning("backfill_waits", error=str(error))
                await anyio.sleep(backoff_s(attempt, first=0.2, most=15))
                attempt += 1

    async def _serve_next(self, target: Connection) -> None:
        with speaking_of("target"):
            request = await self._requests.oldest_open(target, list(self._specs))
        if request is None:
            await self._prune()
            await anyio.sleep(POLL_S)
            return
        deliveries = self._deliveries[request.index]
        deliveries.record()
        try:
            await self._serve(target, request)
        except CdcsyncError as error:
            if error.retry is Retry.AUTOMATIC:
                raise
            log.error("backfill_failed", index=request.index, backfill=request.id, error=str(error))
            with speaking_of("target"):
                await self._requests.fail(target, request, str(error))
        finally:
            for mark in [mark for mark, one in self._pending.items() if one.request.id == request.id]:
                del self._pending[mark]
            deliveries.stop()
        self.finished.set()
        self.finished = anyio.Event()

    async def _serve(self, target: Connection, request: Request) -> None:
        spec, table = self._specs[request.index], self._tables[request.index]
        with speaking_of("source", where=str(spec.shape.table)):
            total = await self._estimate(table, request)
        with speaking_of("target"):
            await self._requests.start(target, request, total)
        log.info(
            "backfill_started",
            index=request.index,
            backfill=request.id,
            kind=request.kind,
            resumed_at=request.rows_done,
        )
        finished = True
        if request.phase == "rows":
            finished = await self._pages(target, request, self._rows_after(spec, table, request))
        if finished and request.kind == "resync":
            if request.phase == "rows":
                request = msgspec.structs.replace(request, phase="orphans", cursor=None)
            finished = await self._pages(target, request, self._orphans_after(spec, table, target))
        if finished:
            log.info("backfill_done", index=request.index, backfill=request.id)

    async def _pages(self, target: Connection, request: Request, read: PageReader) -> bool:
        """Send every page of a phase and wait until all are applied; False when someone paused or cancelled."""
        spec = self._specs[request.index]
        cursor, done = request.cursor, request.rows_done
        closes = request.phase == "orphans" or request.kind != "resync"
        in_flight: list[_Pending] = []
        last = False
        while not last:
            page = await read(cursor)
            cursor, last = page.cursor, page.last
            done += len(page.entries)
            end = PageEnd(request.id, request.phase, cursor, done, last and closes)
            in_flight.append(await self._send(_Pending(request, spec, page, end, anyio.Event())))
            while len(in_flight) >= (1 if last else PAGES_IN_FLIGHT):
                await in_flight.pop(0).applied.wait()
            with speaking_of("target"):
                state = await self._requests.state(target, request)
            if not last and state not in ("requested", "running"):
                for pending in in_flight:
                    await pending.applied.wait()
                log.info("backfill_stopped", index=request.index, backfill=request.id, state=state, rows=done)
                return False
        return True

    def _rows_after(self, spec: IndexSpec, table: SourceTable, request: Request) -> PageReader:
        """Return the reader of the source's rows in the order of their keys."""

        async def read(after: Key | None) -> _Page:
            async def page(connection: Connection) -> tuple[Snapshot, list[Row]]:
                found = await table.page(connection, after, self._page_rows, request.filter)
                return found.snapshot, found.rows

            snapshot, rows = await self._under_a_complete_snapshot(spec, page)
            entries: list[tuple[Key, Row | None]] = [(spec.shape.key_of(row), row) for row in rows]
            return _Page(snapshot, entries, entries[-1][0] if entries else after, len(rows) < self._page_rows)

        return read

    def _orphans_after(self, spec: IndexSpec, table: SourceTable, target: Connection) -> PageReader:
        """Return the reader of the index's keys, which says which of them the source does not have."""

        async def read(after: Key | None) -> _Page:
            with speaking_of("target", where=f"index {spec.name}"):
                keys = await page_of_keys(target, self._schema, spec, after, self._page_rows)

            async def page(connection: Connection) -> tuple[Snapshot, list[Key]]:
                return await table.absent(connection, keys)

            snapshot, absent = await self._under_a_complete_snapshot(spec, page)
            return _Page(
                snapshot, [(key, None) for key in absent], keys[-1] if keys else after, len(keys) < self._page_rows
            )

        return read

    async def _estimate(self, table: SourceTable, request: Request) -> int | None:
        """Return how many rows there are to read; None where finding out would cost too much."""
        if request.rows_total is not None:
            return request.rows_total
        connection = await self._source.connection()
        estimate = await table.estimate(connection)
        if request.filter is None and estimate > COUNT_UP_TO:
            return estimate
        return await table.count(connection, request.filter) if estimate <= COUNT_UP_TO else None

    async def _under_a_complete_snapshot(
        self, spec: IndexSpec, read: Callable[[Connection], Awaitable[tuple[Snapshot, T]]]
    ) -> tuple[Snapshot, T]:
        """Read with a snapshot that sees every transaction of which we do not know the keys."""
        deliveries = self._deliveries[spec.name]
        reported = anyio.current_time()
        attempt = 0
        try:
            while True:
                with speaking_of("source", where=str(spec.shape.table)):
                    connection = await self._source.connection()
                    unseen = deliveries.unseen(await current_snapshot(connection))
                    if not unseen:
                        snapshot, found = await read(connection)
                        unseen = deliveries.unseen(snapshot)
                        if not unseen:
                            return snapshot, found
                    self.waiting_for = await blockers(connection, unseen)
                if anyio.current_time() - reported > BLOCKED_REPORT_S:
                    reported = anyio.current_time()
                    log.warning("backfill_waits_for_transactions", index=spec.name, sessions=self.waiting_for)
                await anyio.sleep(backoff_s(attempt, first=0.02, most=1))
                attempt += 1
        finally:
            self.waiting_for = []

    async def _send(self, pending: _Pending) -> _Pending:
        """Register a page and write its mark."""
        self._sequence += 1
        mark = f"{self._run}:{pending.request.id}:{self._sequence}"
        self._pending[mark] = pending
        with speaking_of("source"):
            await emit_mark(await self._source.connection(), mark)
        return pending

    async def _prune(self) -> None:
        if sum(deliveries.size for deliveries in self._deliveries.values()) == 0:
            return
        with speaking_of("source"):
            snapshot = await current_snapshot(await self._source.connection())
        for deliveries in self._deliveries.values():
            deliveries.forget_seen(snapshot)
