"""Readings of the source that see what the stream has delivered.

The rules:

1. A reading that a change asks for sees the transaction that made the change. A commit is delivered before snapshots
   show it: mostly for microseconds, with a synchronous standby for as long as that takes.
2. Where documents have related rows, a reading also sees every transaction whose own rows were applied without one. A
   deletion is applied at once; a related row that changes meanwhile would otherwise bring the document back.
3. Nobody waits long, because all indexes of the stream would wait: what cannot be read soon is put off, to a request.
   Its pages wait for the same transactions.
4. A transaction that the stream delivered has an id that its server has given out. If the server that is read has not,
   it is another one, and what it shows is not taken.

Source: PostgreSQL, src/backend/access/transam/xact.c (RecordTransactionCommit, then ProcArrayEndTransaction).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

import anyio
import structlog

from cdcsync.errors import SourceUnavailable
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import XID_SPAN, Snapshot
from cdcsync.postgres.errors import locked_out, speaking_of
from cdcsync.postgres.locking import LockedOut
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.source.transactions import blockers, current_snapshot, in_doubt, running_transactions

log = structlog.get_logger()

T = TypeVar("T")

FIRST_LOOK_S = 0.000_5
VISIBILITY_POLL_S = 0.05
"""A reading is repeated while the source still hides a transaction. The pause grows from the first of these to the
other."""

HIDDEN_S = 1.0
"""How long that is done before the reading is put off."""

MOST_UNREAD = 10_000
"""Transactions that are remembered before the source is asked which of them are visible by now."""


class PutOff(Exception):
    """A reading is left to a request: a table is locked, or a transaction is not visible yet."""


async def snapshot_only(connection: Connection) -> tuple[Snapshot, None]:
    """Read nothing."""
    return await current_snapshot(connection), None


class Sight:
    """The readings that batches of one index ask for."""

    def __init__(self, spec: IndexSpec, source: Session, locked: LockedOut) -> None:
        self._spec = spec
        self._source = source
        self._locked = locked
        self._unread: set[int] | None = None
        """The transactions of rule 2 that no reading has seen yet; None before those of an earlier worker are known."""

    @property
    def poor(self) -> bool:
        """Whether a reading was put off just now, so that the next one is not worth an attempt."""
        return self._locked.lately

    async def applied(self, xids: Iterable[int]) -> None:
        """Note transactions whose rows are applied, perhaps without a reading; 0 is that of a page, which has none.

        :raises SourceUnavailable: nothing is lost by noting them again.
        """
        if not self._spec.shape.computed:
            return
        if self._unread is None:
            with self._speaking():
                self._unread = await in_doubt(await self._source.connection())
        self._unread.update(xid for xid in xids if xid)
        if len(self._unread) > MOST_UNREAD:
            with self._speaking():
                snapshot = await current_snapshot(await self._source.connection())
            self._unread = {xid for xid in self._unread if not snapshot.sees(xid)}

    async def read(self, xids: Collection[int], read: Callable[[Connection], Awaitable[tuple[Snapshot, T]]]) -> T:
        """Read until the snapshot sees these transactions, and those of rule 2.

        :param xids: delivered by the stream as it is now.
        :raises PutOff: a table is locked, or one of the transactions stays hidden.
        :raises SourceUnavailable: nothing is lost by reading again.
        """
        if self.poor:
            raise PutOff
        wanted, until, pause_s = {*xids, *(self._unread or ())}, anyio.current_time() + HIDDEN_S, FIRST_LOOK_S
        looks = 0
        while True:
            async with self.putting_off():
                with self._speaking():
                    snapshot, found = await read(await self._source.connection())
            hidden = {xid for xid in wanted if not snapshot.sees(xid)}
            if not hidden:
                if self._unread:
                    self._unread.clear()
                return found
            log.debug("reread_waits", index=self._spec.name, transactions=len(hidden))
            looks += 1
            if looks > 1 and anyio.current_time() >= until:
                wanted -= await self._over(hidden, set(xids))
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, VISIBILITY_POLL_S)

    @asynccontextmanager
    async def putting_off(self) -> AsyncIterator[None]:
        """Put off what meets a locked table in a block.

        :raises PutOff: it has met one.
        """
        try:
            yield
        except SourceUnavailable as error:
            if locked_out(error) and await self._locked.note(error, self._source):
                raise PutOff from error
            raise

    async def _over(self, hidden: Collection[int], delivered: Collection[int]) -> set[int]:
        """Return hidden transactions that do not run any more, if that is all of them.

        Those of rule 2 may be older than half of all ids, which look as if they were still to come, or may have been
        lost with the server before.

        :param delivered: by the stream as it is now.
        :raises PutOff: some of them run.
        :raises SourceUnavailable: some that were delivered have never begun on the server that is read.
        """
        with self._speaking():
            connection = await self._source.connection()
            running = {xid % XID_SPAN for xid in await running_transactions(connection)}
            # An id was drawn for that, so whatever began before has a lower one.
            snapshot = await current_snapshot(connection)
            if any(snapshot.widen(xid) >= snapshot.xmax for xid in hidden if xid in delivered):
                await self._source.aclose()
                raise SourceUnavailable(
                    "the server has not given out the id of a transaction that the stream has delivered",
                    where=str(self._spec.shape.table),
                    hint="let source.dsn lead to one server, the primary, for sessions and replication alike",
                )
            left = {xid for xid in hidden if xid % XID_SPAN in running}
            sessions = [str(one) for one in await blockers(connection, left)] if left else []
        over = {xid for xid in hidden if xid not in left}
        if self._unread:
            self._unread -= over
        if not left:
            return over
        self._locked.wait()
        log.warning("reread_put_off", index=self._spec.name, transactions=len(left), sessions=sessions)
        raise PutOff

    def _speaking(self) -> AbstractContextManager[None]:
        return speaking_of("source", where=str(self._spec.shape.table), index=self._spec.name)
