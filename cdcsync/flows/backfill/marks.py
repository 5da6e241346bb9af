"""The pages whose marks are under way: what lies between the engine, which sends them, and the stream that meets them.

The engine registers a page, writes its mark to the source's WAL, and waits. The stream asks what belongs at a mark when
it meets one, and says which batches are in the target.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import anyio
import msgspec

from cdcsync.errors import SourceUnavailable
from cdcsync.flows.backfill.pace import Fit
from cdcsync.flows.backfill.pages import Page
from cdcsync.flows.backfill.preparing import Made
from cdcsync.metrics import Metrics
from cdcsync.model.batch import Batch, PageEnd, PageRows
from cdcsync.model.requests import Request
from cdcsync.model.rows import Delete, Unread, UnreadRow, Upsert
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Mark
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.pgoutput.messages import UNCHANGED

LIVE_RECENTLY_S = 1.0
"""Changes are taken to come in while the last two batches of them are so recent, the time not counted in which pages
were applied: none could be applied then, and a client that waits for each of its changes sends none. If it were
counted, large pages would make changes rare, which makes pages large. A single batch does not say that more will
follow: it may be what asked for the pages."""


class Pending(msgspec.Struct):
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
            raise self.to_read_again()

    def to_read_again(self) -> SourceUnavailable:
        """Return the error that has the request served again from its stored cursor."""
        return SourceUnavailable("a page has to be read again", where=str(self.spec.shape.table))


class Marks:
    """The pages under way of all requests."""

    def __init__(self, deliveries: Mapping[str, Deliveries], metrics: Metrics) -> None:
        self._deliveries = deliveries
        self._metrics = metrics
        self._pending: dict[str, Pending] = {}
        self._lost: set[int] = set()
        """Requests of which a page was given up, while they are still being served."""
        self._run = secrets.token_hex(4)
        self._sequence = 0
        self._live_at = self._live_before = float("-inf")
        self._applying_s = 0.0
        """The time that applying pages has taken."""
        self._applying_since: float | None = None
        """When the page began that is being applied; None if none is."""
        self._fit = Fit()

    @property
    def beside_live(self) -> bool:
        """Whether changes come in, which are not to wait for a page."""
        return self._now() - self._live_before < LIVE_RECENTLY_S

    @property
    def rows_beside_live(self) -> int | None:
        """How many rows a page may have that changes wait for; None if none come in."""
        return self._fit.rows if self.beside_live else None

    def _now(self) -> float:
        """Return the time on a clock that stands still while pages are applied."""
        now = anyio.current_time() if self._applying_since is None else self._applying_since
        return now - self._applying_s

    def register(self, pending: Pending) -> str:
        """Expect a page's mark, and return what the mark is to say.

        :raises SourceUnavailable: a page of the same request was given up while this one was read. The cursor of this
            one would pass over its rows.
        """
        if pending.request.id in self._lost:
            raise pending.to_read_again()
        self._sequence += 1
        mark = f"{self._run}:{pending.request.id}:{self._sequence}"
        self._pending[mark] = pending
        return mark

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
            self.lose(pending.request)
            return None
        if pending.end is None:
            return PageRows(shape, (), None, mark.content)
        rows: list[Upsert | Delete] = []
        unread = (UNCHANGED,) * (len(shape.columns) - len(shape.key))
        overtaken_by = deliveries.overtaking(pending.page.snapshot)
        for place, (key, row) in enumerate(pending.page.entries):
            if deliveries.hides(key, pending.page.snapshot):
                continue
            if row is None:
                rows.append(Delete(shape, key, 0, mark.lsn, as_written=True))
            elif overtaken_by:
                rows.append(Upsert(shape, key, (*key, *unread), 0, mark.lsn))
            elif isinstance(row, Unread):
                rows.append(UnreadRow.of(shape, key, 0, mark.lsn, row))
            elif pending.made is not None:
                rows.append(pending.made.place(shape, place, key, row, mark.lsn))
            else:
                rows.append(Upsert(shape, key, row, 0, mark.lsn))
        self._metrics.backfill_overtaken.labels(shape.index).inc(len(pending.page.entries) - len(rows))
        return PageRows(
            shape,
            rows,
            pending.end,
            mark.content,
            rewrite=pending.request.rewrite,
            new=pending.request.new,
            overtaken_by=overtaken_by,
        )

    def note_applying(self, batch: Batch) -> None:
        """Note that a batch is about to be applied."""
        self._no_longer_applying()
        if batch.marks:
            self._applying_since = anyio.current_time()

    def _no_longer_applying(self) -> None:
        if self._applying_since is not None:
            self._applying_s += anyio.current_time() - self._applying_since
            self._applying_since = None

    def note_applied(self, batch: Batch, seconds: float) -> None:
        """Note what is in the target: the pages of this batch, and whether changes come in.

        :param seconds: how long applying it took.
        """
        self._no_longer_applying()
        if batch.oldest_us is not None:
            self._live_before, self._live_at = self._live_at, self._now()
            if not batch.marks:
                self._fit.change_took(seconds)
        rows = 0
        for mark in batch.marks:
            pending = self._pending.pop(mark, None)
            if pending is None:
                continue
            if pending.end is not None:
                rows += len(pending.page.entries)
            self.forget(pending.page.snapshot)
            self._metrics.backfill_rows.labels(pending.spec.name).inc(len(pending.page.entries))
            pending.applied.set()
        if rows and batch.oldest_us is None:
            self._fit.page_took(rows, seconds)

    def interrupt(self) -> None:
        """Give up the pages under way: the stream began anew, and their marks may never come.

        The request is served again from its stored cursor.
        """
        self._no_longer_applying()
        self.lose(None)

    def lose(self, request: Request | None) -> None:
        """Give up the pages of a request that are under way, or of all."""
        lost = {mark: one for mark, one in self._pending.items() if request is None or one.request.id == request.id}
        for mark, pending in lost.items():
            del self._pending[mark]
            self._lost.add(pending.request.id)
            pending.lost = True
            pending.applied.set()

    def forget(self, snapshot: Snapshot) -> None:
        """Forget what this snapshot sees, the oldest one that a page is still to be read under.

        Every index forgets what the oldest snapshot that still matters to it sees, or a long backfill of one would let
        the memory of the others grow.
        """
        for name, deliveries in self._deliveries.items():
            waiting = [one.page.snapshot for one in self._pending.values() if one.spec.name == name]
            deliveries.forget_seen(min(waiting, key=lambda one: one.xmax, default=snapshot))

    def drop(self, request: Request) -> None:
        """Forget the pages of a request that is not served any more."""
        self._lost.discard(request.id)
        for mark in [mark for mark, one in self._pending.items() if one.request.id == request.id]:
            del self._pending[mark]
