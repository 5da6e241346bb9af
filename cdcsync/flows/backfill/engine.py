"""The engine: takes requests, reads their pages, and sends them to the stream by way of their marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

import anyio
import msgspec
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff, backoff_s
from cdcsync.errors import CdcsyncError, Retry
from cdcsync.flows.backfill.checking import check
from cdcsync.flows.backfill.marks import Marks, Pending
from cdcsync.flows.backfill.pace import FIRST_PAGE_ROWS, Pace, next_limit
from cdcsync.flows.backfill.pages import Page, PageReader, Pages
from cdcsync.flows.backfill.preparing import Made, PagePreparer
from cdcsync.flows.blocked import noted
from cdcsync.metrics import Metrics
from cdcsync.model.batch import PageEnd
from cdcsync.model.requests import Problem, Request
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS, LockedOut
from cdcsync.postgres.sessions import IDLE_S, Connection, Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.marks import emit_mark
from cdcsync.source.tables import SourceTable
from cdcsync.source.transactions import current_snapshot
from cdcsync.target.ddl.names import written_tables
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests

log = structlog.get_logger()

PAGES_IN_FLIGHT = 2
"""One page is read while the other is applied; more would only grow what a crash repeats."""

POLL_S = 5.0
"""How often requests are looked for without being notified of one."""

PRUNE_EVERY_S = 60.0
"""How often at most what ended requests leave is looked for: many short ones may end in a second."""

PAUSE_POLL_S = 0.5
"""How soon a slowed-down backfill notices that it was paused or cancelled, or has to give way; others look after each
page."""

TURN_S = 5.0
"""A request that gave way has so much time before it does so again."""

CHECK_ROUNDS = 8
"""How often a document that changes just then is compared, over some two seconds; one that changed each time is
reported as undecided."""

COUNT_UP_TO = 200_000
"""Tables with fewer rows than this by the planner's estimate are counted exactly for the progress bar."""


class Backfills:
    """Serves backfill requests for ever, one at a time."""

    def __init__(
        self,
        *,
        source_dsn: str,
        target_dsn: str,
        schema: str,
        specs: Mapping[str, IndexSpec],
        tables: Mapping[str, SourceTable],
        page_preparers: Mapping[str, PagePreparer],
        deliveries: Mapping[str, Deliveries],
        page_rows: int,
        metrics: Metrics,
        max_rows_per_s: int | None = None,
        forget_vectors: Callable[[str], None] = lambda index: None,
    ) -> None:
        """Make the engine of a worker.

        :param max_rows_per_s: holds for every request, besides the request's own.
        :param forget_vectors: called when vectors of an index are to be made anew, so that none comes from memory.
        """
        self._source = Session(source_dsn, "source", application_name="cdcsync backfill", idle_s=IDLE_S)
        self._target = Session(
            target_dsn, "target", application_name="cdcsync backfill", lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
        )
        self._schema = schema
        self._queue = Queue(schema)
        self._requests = Requests(schema)
        self._specs = specs
        self._tables = tables
        self._page_preparers = page_preparers
        self._deliveries = deliveries
        self._page_rows = page_rows
        self._max_rows_per_s = max_rows_per_s
        self._backoff = Backoff(
            lambda failure: log.warning("backfill_waits", error=str(failure.error)), waits="backfills wait"
        )
        self._own_pace: int | None = None
        """That of the request which is served."""
        self._served: str | None = None
        """The index of the request that was served last."""
        self._gave_way = set[int]()
        """Requests that stopped so that another one could be served."""
        self._turn_ends = 0.0
        """When the request that is served may have to give way."""
        self._to_prune = False
        """Whether a request was served since ended ones were last pruned."""
        self._next_prune = 0.0
        """The earliest time of the next pruning."""
        self._forget_vectors = forget_vectors
        self._locked = {
            name: LockedOut(name, spec.single_tables, written_tables(schema, spec)) for name, spec in specs.items()
        }
        self.marks = Marks(deliveries, metrics)
        self.problems: dict[str, str] = {}
        """Whose transactions a page of an index waits for."""
        self._pages: dict[str, Pages] = {
            name: Pages(
                *(self._source, schema, spec, tables[name], deliveries[name], self.marks.forget),
                noted(self.problems, name),
            )
            for name, spec in specs.items()
        }

    def limit(self, page_rows: int, max_rows_per_s: int | None) -> None:
        """Read at most so much at a time, and in a second, from the next page on."""
        self._page_rows = page_rows
        self._max_rows_per_s = max_rows_per_s

    async def run(self) -> None:
        """Serve requests until cancelled, connecting again whenever a server was away."""
        while True:
            async with self._backoff, AsyncExitStack() as stack:
                stack.push_async_callback(self._source.aclose)
                stack.push_async_callback(self._target.aclose)
                target = await self._target.connection()
                with speaking_of("target"):
                    await target.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._queue.channel)))
                while True:
                    await self._serve_next(target)
                    self._backoff.succeeded()

    async def _serve_next(self, target: Connection) -> None:
        request = await self._next(target)
        if request is None:
            await self._forget_deliveries()
            await self._prune(target)
            with speaking_of("target"):
                async for _ in target.notifies(timeout=POLL_S, stop_after=1):
                    pass
            return
        deliveries = self._deliveries[request.index]
        deliveries.record(rewriting=request.rewrite)
        try:
            await self._serve(target, request)
        except CdcsyncError as error:
            if await self._locked[request.index].note(error, self._source, self._target):
                return  # others are served meanwhile
            if error.retry is Retry.AUTOMATIC:
                raise
            log.error("backfill_failed", index=request.index, backfill=request.id, error=str(error))
            with speaking_of("target"):
                async with target.transaction():
                    if await self._queue.fail(target, request, str(error)) and request.once:
                        await self._requests.reload(target, request.index, rewrite=request.rewrite)
                    crash_point("request given up")
                crash_point("request that was given up committed")
        finally:
            self.marks.drop(request)
            deliveries.stop()
        if request.keyed:
            with speaking_of("target"):
                await self._queue.forget_keys(target, request)
        self._to_prune = True
        await self._prune(target)

    async def _next(self, target: Connection) -> Request | None:
        """Return the request to serve now: of another index than the last one, if any has one.

        One that gave way has some time then, however many short ones keep coming.
        """
        others = [index for index in self._readable if index != self._served]
        with speaking_of("target"):
            request = await self._queue.next_open(target, others)
            if request is None:
                request = await self._queue.next_open(target, self._readable)
        if request is not None:
            self._served = request.index
            self._turn_ends = anyio.current_time() + (TURN_S if request.id in self._gave_way else 0)
            self._gave_way.discard(request.id)
        return request

    @property
    def _readable(self) -> list[str]:
        """The indexes of which nobody is known to hold a table locked."""
        return [index for index, locked in self._locked.items() if not locked.lately]

    async def _serve(self, target: Connection, request: Request) -> None:
        spec, table, pages = self._specs[request.index], self._tables[request.index], self._pages[request.index]
        with speaking_of("source", where=str(spec.shape.table)):
            source = await self._source.connection()
            if request.up_to is not None:
                bound = await table.up_to(source, request.up_to)
                bound = bound if request.filter is None else f"({request.filter}) AND ({bound})"
                request = msgspec.structs.replace(request, filter=bound)
            total = await self._estimate(table, request)
        with speaking_of("target"):
            if not await self._queue.start(target, request, total):
                return  # the next look finds what it is now
        log.info(
            "backfill_started",
            index=request.index,
            backfill=request.id,
            kind=request.kind,
            resumed_at=request.rows_done,
        )
        if request.force_embed and not request.rows_done:
            self._forget_vectors(request.index)
        read = pages.keyed(target, self._queue, request) if request.keyed else pages.rows(request.filter)
        if request.kind == "verify":
            finished = await self._checks(target, request, read)
        else:
            finished = True
            if request.phase == "rows":
                rows = await self._send_all(target, request, read)
                finished = rows is not None
                if rows is not None and request.kind == "resync":
                    request = msgspec.structs.replace(request, phase="orphans", cursor=None, rows_done=rows)
            if request.phase == "orphans":
                await self._delivered(request)
                finished = await self._send_all(target, request, pages.orphans(target)) is not None
        if finished:
            log.info("backfill_done", index=request.index, backfill=request.id)

    def _pace(self, request: Request) -> Pace:
        self._own_pace = request.max_rows_per_s
        return Pace(lambda: min(filter(None, (self._max_rows_per_s, self._own_pace)), default=None))

    async def _send_all(self, target: Connection, request: Request, read: PageReader) -> int | None:
        """Send every page of a phase and wait until all are applied.

        :returns: the rows of the request so far; None if it was paused or cancelled, or gives way to another one.
        """
        spec, pace = self._specs[request.index], self._pace(request)
        deliveries = self._deliveries[request.index]
        limit = FIRST_PAGE_ROWS
        cursor, done = request.cursor, request.rows_done
        closes = request.phase == "orphans" or request.kind != "resync"
        in_flight: list[Pending] = []
        last = False
        while not last:
            most = min(self._page_rows, pace.rows_per_s or self._page_rows)
            if request.changes_texts:
                most = self._page_preparers[request.index].page_rows(most)
            deliveries.read_to = None
            page = await read(cursor, min(limit, most))
            cursor, last = page.cursor, page.last
            if cursor is not None and not (last or request.keyed) and request.phase == "rows":
                deliveries.read_to = request.id, cursor
            done += len(page.entries)
            limit = next_limit(limit, most, page, beside_live=self.marks.rows_beside_live)
            made = await self._make(target, request, page)
            forced = tuple(key for key, row in page.entries if isinstance(row, tuple)) if request.force_embed else ()
            end = PageEnd(request.id, request.phase, cursor, done, last and closes, request.index, forced)
            while in_flight and self.marks.beside_live:
                await in_flight.pop(0).wait()
            in_flight.append(await self._send(Pending(request, spec, page, end, anyio.Event(), made)))
            while len(in_flight) >= (1 if last else PAGES_IN_FLIGHT):
                await in_flight.pop(0).wait()
            if not last and not await self._may_go_on(target, request, pace.left_s(len(page.entries))):
                for pending in in_flight:
                    await pending.wait()
                log.info("backfill_stopped", index=request.index, backfill=request.id, rows=done)
                return None
        return done

    async def _make(self, target: Connection, request: Request, page: Page) -> Made | None:
        """Make of a page's rows what they come to, where that is not just what the index has already."""
        rows = [row for _, row in page.entries if isinstance(row, tuple)]
        if not request.changes_texts or len(rows) < len(page.entries) or not rows:
            return None
        return await self._page_preparers[request.index].make(target, rows)

    async def _checks(self, target: Connection, request: Request, read: PageReader) -> bool:
        """Compare every page of a verification at its mark, one at a time; False if it does not go on for now."""
        pace = self._pace(request)
        cursor, done, last = request.cursor, request.rows_done, False
        while not last:
            page = await read(cursor, min(self._page_rows, pace.rows_per_s or self._page_rows))
            cursor, last = page.cursor, page.last
            done += len(page.entries)
            found = await self._check(target, request, page)
            with speaking_of("target"):
                await self._queue.note(target, request, found, cursor=cursor, rows_done=done, done=last)
            if not last and not await self._may_go_on(target, request, pace.left_s(len(page.entries))):
                return False
        return True

    async def _delivered(self, request: Request) -> None:
        """Return once the index has what the stream was still to bring, of which a key may be an orphan, too.

        The rows of a partition that went are in the stream before what took it away.
        """
        page = await self._pages[request.index].of_keys([])
        await (await self._send(Pending(request, self._specs[request.index], page, None, anyio.Event()))).wait()

    async def _check(self, target: Connection, request: Request, page: Page) -> list[tuple[Key, Problem]]:
        spec, deliveries = self._specs[request.index], self._deliveries[request.index]
        chunker = self._page_preparers[request.index].chunker
        found: list[tuple[Key, Problem]] = []
        changed = [key for key, _ in page.entries]
        for attempt in range(CHECK_ROUNDS):
            sent = await self._send(Pending(request, spec, page, None, anyio.Event()))
            await sent.wait()
            differ, changed = await check(target, self._schema, spec, chunker, page, deliveries.hides)
            if differ and spec.documents.related:
                with speaking_of("target"):
                    rebuilding = await self._queue.rebuilding(target, request)
                if rebuilding:
                    differ, changed = [], changed + [key for key, _ in differ]
            found += differ
            if not changed:
                return found
            await anyio.sleep(backoff_s(attempt, first=0.02, most=1))
            page = await self._pages[request.index].of_keys(changed)
        return found + [(key, "undecided") for key in changed]

    async def _may_go_on(self, target: Connection, request: Request, wait_s: float) -> bool:
        """Wait after a page for as long as the pace asks.

        :returns: False as soon as somebody pauses or cancels the request, or another one goes first.
        """
        self._backoff.succeeded()  # only now: a server may let us in and then fail each page
        until = anyio.current_time() + wait_s
        while True:
            indexes = self._readable if anyio.current_time() >= self._turn_ends else [request.index]
            with speaking_of("target"):
                following = await self._queue.next_open(target, indexes)
            if following is None or following.id != request.id:
                self._gave_way.add(request.id)
                return False
            self._own_pace = following.max_rows_per_s
            left = until - anyio.current_time()
            if left <= 0:
                return True
            await anyio.sleep(min(left, PAUSE_POLL_S))

    async def _estimate(self, table: SourceTable, request: Request) -> int | None:
        """Return how many rows there are to read, of a large table by the planner's estimate."""
        if request.rows_total is not None or request.keyed:
            return request.rows_total
        connection = await self._source.connection()
        small = await table.estimate(connection) <= COUNT_UP_TO
        return await (table.count if small else table.expected)(connection, request.filter)

    async def _send(self, pending: Pending) -> Pending:
        """Register a page and write its mark."""
        mark = self.marks.register(pending)
        with speaking_of("source"):
            await emit_mark(await self._source.connection(), mark)
            crash_point("mark written")
        return pending

    async def _prune(self, target: Connection) -> None:
        """Forget what ended requests leave, once in a while."""
        if not self._to_prune or anyio.current_time() < self._next_prune:
            return
        with speaking_of("target"):
            await self._queue.prune(target)
        self._to_prune, self._next_prune = False, anyio.current_time() + PRUNE_EVERY_S

    async def _forget_deliveries(self) -> None:
        if sum(deliveries.size for deliveries in self._deliveries.values()) == 0:
            for deliveries in self._deliveries.values():
                deliveries.forget_snapshot()
            return
        with speaking_of("source"):
            snapshot = await current_snapshot(await self._source.connection())
        self.marks.forget(snapshot)
