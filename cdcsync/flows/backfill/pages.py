"""Pages: rows of the source, each page with the snapshot that it was read under.

A page's snapshot sees every transaction whose changes the stream delivered without our noting their keys; where it
does not yet, the page is read again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

import anyio
import msgspec
import structlog

from cdcsync.backoff import backoff_s
from cdcsync.flows.blocked import Blocked, Note
from cdcsync.model.requests import Request
from cdcsync.model.rows import Key, Row, Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.source.reads import Page as Read
from cdcsync.source.tables import SourceTable
from cdcsync.source.transactions import current_snapshot
from cdcsync.target.keys import page_of_keys, written_keys
from cdcsync.target.requests.queue import Queue

log = structlog.get_logger()

T = TypeVar("T")

Entry: TypeAlias = Row | Unread | None
"""A row, why it cannot be read, or None where there is none."""


class Page(msgspec.Struct, frozen=True):
    """Keys with the rows that the snapshot shows, None where it shows none; `cursor` is where the next page begins."""

    snapshot: Snapshot
    entries: Sequence[tuple[Key, Entry]]
    cursor: Key | None
    last: bool


PageReader: TypeAlias = Callable[[Key | None, int], Awaitable[Page]]
"""Reads the page after a cursor, with at most so many entries."""


PAGE_BYTES = 4 * 1024 * 1024
"""Pages are made about this large at most; two are in memory at a time, besides the batches."""


class Pages:
    """Reads the pages of one index, over one session on the source."""

    def __init__(
        self,
        source: Session,
        schema: str,
        spec: IndexSpec,
        table: SourceTable,
        deliveries: Deliveries,
        forget: Callable[[Snapshot], None],
        note: Note = lambda why: None,
    ) -> None:
        """Make the reader.

        :param forget: called with a snapshot that is not newer than the page's, for what no page needs to know any
            more: by the time the page's mark arrives, the stream may have brought all that a late one has to bring.
        :param note: told whose transactions a page waits for.
        """
        self._source = source
        self._schema = schema
        self._spec = spec
        self._table = table
        self._deliveries = deliveries
        self._forget = forget
        self._note = note

    def rows(self, filter_: str | None) -> PageReader:
        """Return the reader of the source's rows in the order of their keys."""

        async def read(after: Key | None, limit: int) -> Page:
            async def page(connection: Connection) -> tuple[Snapshot, Read]:
                found = await self._table.page(connection, after, limit, filter_)
                return found.snapshot, found

            with speaking_of("source", where=str(self._spec.shape.table)):
                limit = await self._table.fitting(await self._source.connection(), after, limit, PAGE_BYTES, filter_)
            snapshot, found = await self._under_a_complete_snapshot(page)
            entries: list[tuple[Key, Entry]] = [(self._spec.shape.key_of(row), row) for row in found.rows]
            cursor = found.last or (entries[-1][0] if entries else after)
            last = len(found.rows) < limit and not found.more
            return Page(snapshot, [*entries, *found.unread.items()], cursor, last)

        return read

    def orphans(self, target: Connection) -> PageReader:
        """Return the reader of the index's keys, which says which of them the source does not have."""

        async def read(after: Key | None, limit: int) -> Page:
            with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
                keys = await page_of_keys(target, self._schema, self._spec, after, limit)

            async def page(connection: Connection) -> tuple[Snapshot, list[Key]]:
                return await self._table.absent(connection, keys)

            snapshot, absent = await self._under_a_complete_snapshot(page)
            return Page(snapshot, [(key, None) for key in absent], keys[-1] if keys else after, len(keys) < limit)

        return read

    def keyed(self, target: Connection, queue: Queue, request: Request) -> PageReader:
        """Return the reader of the keys that a request names; its cursor is the place of the last one."""

        async def read(after: Key | None, limit: int) -> Page:
            place = int(after[0]) if after else 0
            with speaking_of("target"):
                keys = await queue.keys(target, request, place, limit)
            with speaking_of("source", where=str(self._spec.shape.table)):
                fitting = await self._table.fitting_keys(await self._source.connection(), keys, PAGE_BYTES)
            page = await self.of_keys(keys[:fitting])
            present = {key for key, row in page.entries if row is not None}
            absent = [key for key, row in page.entries if row is None]
            with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
                written = await written_keys(target, self._schema, self._spec, absent)
            entries: list[tuple[Key, Entry]] = [(written.get(key, key), None) for key in absent]
            entries = [entry for entry in entries if entry[0] not in present]
            entries += [(key, row) for key, row in page.entries if row is not None]
            last = fitting == len(keys) < limit
            return Page(page.snapshot, entries, (str(place + fitting),), last)

        return read

    async def of_keys(self, keys: Sequence[Key]) -> Page:
        """Return the page of these keys."""

        async def page(connection: Connection) -> tuple[Snapshot, Read]:
            found = await self._table.by_keys(connection, keys)
            return found.snapshot, found

        snapshot, found = await self._under_a_complete_snapshot(page)
        entries: dict[Key, Entry] = dict.fromkeys(keys)
        entries.update((self._spec.shape.key_of(row), row) for row in found.rows)
        entries.update(found.unread)
        return Page(snapshot, list(entries.items()), None, True)

    async def _under_a_complete_snapshot(
        self, read: Callable[[Connection], Awaitable[tuple[Snapshot, T]]]
    ) -> tuple[Snapshot, T]:
        """Read with a snapshot that sees every transaction of which we do not know the keys."""
        deliveries = self._deliveries
        attempt = 0
        with Blocked("reading its table waits for", self._note, self._log) as blocked:
            while True:
                with speaking_of("source", where=str(self._spec.shape.table)):
                    connection = await self._source.connection()
                    snapshot = await current_snapshot(connection)
                    unseen = deliveries.unseen(snapshot)
                    self._forget(snapshot)
                    if not unseen:
                        snapshot, found = await read(connection)
                        unseen = deliveries.unseen(snapshot)
                        if not unseen:
                            return snapshot, found
                    await blocked.by(connection, unseen)
                await anyio.sleep(backoff_s(attempt, first=0.02, most=1))
                attempt += 1

    def _log(self, sessions: list[str]) -> None:
        log.warning("backfill_waits_for_transactions", index=self._spec.name, sessions=sessions)
