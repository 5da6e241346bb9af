"""The engine: takes requests, sends pages, and hands the stream what belongs at each mark."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

import anyio
import msgspec
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff, backoff_s
from cdcsync.crashpoints import crash_point
from cdcsync.errors import CdcsyncError, Retry, SourceUnavailable
from cdcsync.flows.backfill.checking import check
from cdcsync.flows.backfill.pages import PAGE_BYTES, Page, PageReader, Pages
from cdcsync.flows.backfill.preparing import Made, PagePreparer
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, PageEnd, PageRows
from cdcsync.model.rows import Delete, Key, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Mark
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.postgres.sessions import Connection, Session, connect, speaking_of
from cdcsync.source.catalog import current_snapshot
from cdcsync.source.tables import SourceTable, emit_mark
from cdcsync.target.requests import Problem, Request, Requests

log = structlog.get_logger()

PAGES_IN_FLIGHT = 2
"""One page is read while the other is applied; more would only grow what a crash repeats."""

BESIDE_LIVE_ROWS = 32
BESIDE_LIVE_BYTES = 128 * 1024
"""While changes come in, pages are this small, and one at a time: a change waits for the page that is being applied,
some 5 ms, which is about as long as it takes itself."""

LIVE_RECENTLY_S = 1.0
"""Changes are taken to come in for so long after the last one."""

POLL_S = 5.0
"""How often requests are looked for without being notified of one."""

PAUSE_POLL_S = 0.5
"""How soon a slowed-down backfill notices that it was paused or cancelled; others look after each page."""

CHECK_ROUNDS = 8
"""How often a document that changes just then is compared, over some two seconds; one that changed each time is
reported as undecided."""

COUNT_UP_TO = 200_000
"""Tables with fewer rows than this by the planner's estimate are counted exactly for the progress bar."""


class _Pending(msgspec.Struct):
    """A page whose mark is under way; without an `end` nothing of it is applied, only waited for."""

    request: Request
    spec: IndexSpec
    page: Page
    end: PageEnd | None
    applied: anyio.Event
    made: Made | None = None
    lost: bool = False

    async def wait(self) -> None:
        """Return once the page is in the target.

        :raises SourceUnavailable: it never gets there: the stream began anew, or overtook too many rows of it.
        """
        await self.applied.wait()
        if self.lost:
            raise SourceUnavailable("a page has to be read again", where=str(self.spec.shape.table))


FIRST_PAGE_ROWS = 100
"""The first page is small: nobody knows yet how large the rows are."""


def next_limit(limit: int, most: int, page: Page, *, beside_live: bool = False) -> int:
    """Return how many rows the next page should have: twice as many, as long as their bytes allow.

    :param beside_live: whether changes come in, which are not to wait for a page.
    """
    size = sum(len(value) for _, row in page.entries if row is not None for value in row if isinstance(value, str))
    fitting = len(page.entries) * (BESIDE_LIVE_BYTES if beside_live else PAGE_BYTES) // size if size else most
    return max(1, min(most, BESIDE_LIVE_ROWS if beside_live else limit * 2, fitting))


class _Pace:
    """Spreads rows evenly over time."""

    def __init__(self, rows_per_s: Callable[[], int | None]) -> None:
        self._rows_per_s = rows_per_s
        self._due = anyio.current_time()

    @property
    def rows_per_s(self) -> int | None:
        """The most rows a second just now; None for any number."""
        return self._rows_per_s()

    def left_s(self, rows: int) -> float:
        """Note that rows were read and return how long to wait before the next ones, in seconds."""
        rows_per_s = self.rows_per_s
        if rows_per_s is None:
            return 0.0
        now = anyio.current_time()
        self._due = max(self._due, now - 1.0) + rows / rows_per_s
        return max(0.0, self._due - now)


def _made_ahead(request: Request) -> bool:
    """Say whether what the rows come to is most likely not in the index yet."""
    return _new(request) or request.rewrite


def _new(request: Request) -> bool:
    """Say whether the index most likely has none of the rows to be read."""
    return request.kind == "initial" and not request.rewrite


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
        self._source = Session(source_dsn, "source", application_name="cdcsync backfill")
        self._target_dsn = target_dsn
        self._schema = schema
        self._requests = Requests(schema)
        self._specs = specs
        self._tables = tables
        self._page_preparers = page_preparers
        self._deliveries = deliveries
        self._page_rows = page_rows
        self._metrics = metrics
        self._max_rows_per_s = max_rows_per_s
        self._forget_vectors = forget_vectors
        self._pending: dict[str, _Pending] = {}
        self._run = secrets.token_hex(4)
        self._sequence = 0
        self._live_at = float("-inf")
        self._pages: dict[str, Pages] = {
            name: Pages(self._source, schema, spec, tables[name], deliveries[name], self._forget)
            for name, spec in specs.items()
        }

    def limit(self, page_rows: int, max_rows_per_s: int | None) -> None:
        """Read at most so much at a time, and in a second, from the next page on."""
        self._page_rows = page_rows
        self._max_rows_per_s = max_rows_per_s

    @property
    def waiting_for(self) -> list[str]:
        """The source sessions that the present page waits for."""
        return [session for pages in self._pages.values() for session in pages.waiting_for]

    # -- called by the stream -----------------------------------------------------------------------------------

    def page_at(self, mark: Mark) -> PageRows | None:
        """Return what belongs at this mark: its page, without the rows that the stream overtook.

        None for the mark of an earlier process, or of a page that is given up or in the target already.
        """
        pending = self._pending.get(mark.content)
        if pending is None:
            return None
        shape, deliveries = pending.spec.shape, self._deliveries[pending.spec.name]
        if deliveries.unseen(pending.page.snapshot):
            # More was delivered under this page than is remembered by key: nobody knows which rows it overtook.
            self._lose(pending.request)
            return None
        if pending.end is None:
            return PageRows(shape, (), None, mark.content)
        rows: list[Upsert | Delete] = []
        for place, (key, row) in enumerate(pending.page.entries):
            if deliveries.hides(key, pending.page.snapshot):
                continue
            if row is None:
                rows.append(Delete(shape, key, 0, mark.lsn, as_written=True))
            elif pending.made is not None:
                rows.append(pending.made.place(shape, place, key, row, mark.lsn))
            else:
                rows.append(Upsert(shape, key, row, 0, mark.lsn))
        self._metrics.backfill_overtaken.labels(shape.index).inc(len(pending.page.entries) - len(rows))
        return PageRows(
            shape, rows, pending.end, mark.content, rewrite=pending.request.rewrite, new=_new(pending.request)
        )

    def note_applied(self, batch: Batch) -> None:
        """Note what is in the target: the pages of this batch, and whether changes come in."""
        if batch.oldest_us is not None:
            self._live_at = anyio.current_time()
        for mark in batch.marks:
            pending = self._pending.pop(mark, None)
            if pending is None:
                continue
            self._forget(pending.page.snapshot)
            self._metrics.backfill_rows.labels(pending.spec.name).inc(len(pending.page.entries))
            pending.applied.set()

    def interrupt(self) -> None:
        """Give up the pages under way: the stream began anew, and their marks may never come.

        The request is served again from its stored cursor.
        """
        self._lose(None)

    def _lose(self, request: Request | None) -> None:
        """Give up the pages of a request that are under way, or of all."""
        lost = {mark: one for mark, one in self._pending.items() if request is None or one.request.id == request.id}
        for mark, pending in lost.items():
            del self._pending[mark]
            pending.lost = True
            pending.applied.set()

    def _forget(self, snapshot: Snapshot) -> None:
        """Forget what this snapshot sees, the oldest one that a page is still to be read under.

        Every index forgets what the oldest snapshot that still matters to it sees, or a long backfill of one would let
        the memory of the others grow.
        """
        for name, deliveries in self._deliveries.items():
            waiting = [one.page.snapshot for one in self._pending.values() if one.spec.name == name]
            deliveries.forget_seen(min(waiting, key=lambda one: one.xmax, default=snapshot))

    # -- the task -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve requests until cancelled, connecting again whenever a server was away."""
        backoff = Backoff(lambda failure: log.warning("backfill_waits", error=str(failure.error)))
        while True:
            async with backoff, AsyncExitStack() as stack:
                stack.push_async_callback(self._source.aclose)
                target = await connect(self._target_dsn, "target", application_name="cdcsync backfill")
                stack.push_async_callback(target.close)
                with speaking_of("target"):
                    await target.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._requests.channel)))
                backoff.succeeded()
                while True:
                    await self._serve_next(target)

    async def _serve_next(self, target: Connection) -> None:
        with speaking_of("target"):
            request = await self._requests.oldest_open(target, list(self._specs))
        if request is None:
            await self._prune()
            with speaking_of("target"):
                async for _ in target.notifies(timeout=POLL_S, stop_after=1):
                    pass
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
        with speaking_of("target"):
            await self._requests.prune(target)

    async def _serve(self, target: Connection, request: Request) -> None:
        spec, table, pages = self._specs[request.index], self._tables[request.index], self._pages[request.index]
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
        if request.force_embed:
            self._forget_vectors(request.index)
        read = pages.keyed(target, self._requests, request) if request.keyed else pages.rows(request.filter)
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
                finished = await self._send_all(target, request, pages.orphans(target)) is not None
        if finished:
            log.info("backfill_done", index=request.index, backfill=request.id)

    def _pace(self, request: Request) -> _Pace:
        return _Pace(lambda: min(filter(None, (self._max_rows_per_s, request.max_rows_per_s)), default=None))

    async def _send_all(self, target: Connection, request: Request, read: PageReader) -> int | None:
        """Send every page of a phase and wait until all are applied.

        :returns: the rows of the request so far; None when someone paused or cancelled it.
        """
        spec, pace = self._specs[request.index], self._pace(request)
        limit = FIRST_PAGE_ROWS
        cursor, done = request.cursor, request.rows_done
        closes = request.phase == "orphans" or request.kind != "resync"
        in_flight: list[_Pending] = []
        last = False
        while not last:
            most = min(self._page_rows, pace.rows_per_s or self._page_rows)
            if _made_ahead(request):
                most = self._page_preparers[request.index].page_rows(most)
            page = await read(cursor, min(limit, most))
            cursor, last = page.cursor, page.last
            done += len(page.entries)
            limit = next_limit(limit, most, page, beside_live=self._beside_live)
            made = await self._make(target, request, page)
            forced = tuple(key for key, row in page.entries if row is not None) if request.force_embed else ()
            end = PageEnd(request.id, request.phase, cursor, done, last and closes, request.index, forced)
            in_flight.append(await self._send(_Pending(request, spec, page, end, anyio.Event(), made)))
            while len(in_flight) >= (1 if last or self._beside_live else PAGES_IN_FLIGHT):
                await in_flight.pop(0).wait()
            if not last and not await self._may_go_on(target, request, pace.left_s(len(page.entries))):
                for pending in in_flight:
                    await pending.wait()
                log.info("backfill_stopped", index=request.index, backfill=request.id, rows=done)
                return None
        return done

    @property
    def _beside_live(self) -> bool:
        return anyio.current_time() - self._live_at < LIVE_RECENTLY_S

    async def _make(self, target: Connection, request: Request, page: Page) -> Made | None:
        """Make of a page's rows what they come to, where that is not just what the index has already."""
        rows = [row for _, row in page.entries if row is not None]
        if not _made_ahead(request) or len(rows) < len(page.entries) or not rows:
            return None
        return await self._page_preparers[request.index].make(target, rows)

    async def _checks(self, target: Connection, request: Request, read: PageReader) -> bool:
        """Compare every page of a verification at its mark, one at a time; False when someone paused or cancelled."""
        pace = self._pace(request)
        cursor, done, last = request.cursor, request.rows_done, False
        while not last:
            page = await read(cursor, min(self._page_rows, pace.rows_per_s or self._page_rows))
            cursor, last = page.cursor, page.last
            done += len(page.entries)
            found = await self._check(target, request, page)
            with speaking_of("target"):
                await self._requests.note(target, request, found, cursor=cursor, rows_done=done, done=last)
            if not last and not await self._may_go_on(target, request, pace.left_s(len(page.entries))):
                return False
        return True

    async def _check(self, target: Connection, request: Request, page: Page) -> list[tuple[Key, Problem]]:
        spec, deliveries = self._specs[request.index], self._deliveries[request.index]
        found: list[tuple[Key, Problem]] = []
        changed: list[Key] = []
        for attempt in range(CHECK_ROUNDS):
            sent = await self._send(_Pending(request, spec, page, None, anyio.Event()))
            await sent.wait()
            differ, changed = await check(target, self._schema, spec, page, deliveries.hides)
            found += differ
            if not changed:
                return found
            await anyio.sleep(backoff_s(attempt, first=0.02, most=1))
            page = await self._pages[request.index].of_keys(changed)
        return found + [(key, "undecided") for key in changed]

    async def _may_go_on(self, target: Connection, request: Request, wait_s: float) -> bool:
        """Wait as long as the pace asks for; False as soon as someone has paused or cancelled."""
        until = anyio.current_time() + wait_s
        while True:
            with speaking_of("target"):
                state = await self._requests.state(target, request)
            if state not in ("requested", "running"):
                return False
            left = until - anyio.current_time()
            if left <= 0:
                return True
            await anyio.sleep(min(left, PAUSE_POLL_S))

    async def _estimate(self, table: SourceTable, request: Request) -> int | None:
        """Return how many rows there are to read; None where finding out would cost too much."""
        if request.rows_total is not None or request.keyed:
            return request.rows_total
        connection = await self._source.connection()
        estimate = await table.estimate(connection)
        if request.filter is None and estimate > COUNT_UP_TO:
            return estimate
        return await table.count(connection, request.filter) if estimate <= COUNT_UP_TO else None

    async def _send(self, pending: _Pending) -> _Pending:
        """Register a page and write its mark."""
        self._sequence += 1
        mark = f"{self._run}:{pending.request.id}:{self._sequence}"
        self._pending[mark] = pending
        with speaking_of("source"):
            await emit_mark(await self._source.connection(), mark)
            crash_point("mark written")
        return pending

    async def _prune(self) -> None:
        if sum(deliveries.size for deliveries in self._deliveries.values()) == 0:
            for deliveries in self._deliveries.values():
                deliveries.forget_snapshot()
            return
        with speaking_of("source"):
            snapshot = await current_snapshot(await self._source.connection())
        self._forget(snapshot)
