"""The apply session: the one connection that writes chunks and checkpoint, under lock and fence.

It holds the pipeline's advisory lock for as long as it lives. What a batch changes, the cursors of the backfill
pages in it and the checkpoint commit in one transaction, or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from cdcsync.errors import IndexFault, TablesChanged, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import Applied, ChangeSet, Document, Kept
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Part
from cdcsync.postgres.errors import REFUSALS, speaking_of
from cdcsync.postgres.liveness import Backend, WatchedConnection, same_server
from cdcsync.postgres.locking import WRITERS_WAIT, Lock, exclusive_locks
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.postgres.temporary import TemporaryTables
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.apply import IndexWriter
from cdcsync.target.ddl.names import written_tables
from cdcsync.target.ddl.searching import RENAMED
from cdcsync.target.failures.documents import FailedDocuments, close_list
from cdcsync.target.keys import discard_vectors
from cdcsync.target.locked_session import LOCK_WAIT_MS, LockedSession
from cdcsync.target.look_ups import LookUps
from cdcsync.target.registry import Registry
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.rebuilds import Rebuilds
from cdcsync.target.requests.submission import Requests


class ApplySession(LockedSession):
    """Writes batches."""

    def __init__(self, dsn: str, schema: str, slot: str, *, before: LockedSession | None = None) -> None:
        super().__init__(dsn, schema, slot, before=before)
        self._registry = Registry(schema)
        self._requests = Requests(schema)
        self._rebuilds = Rebuilds(schema)
        self._queue = Queue(schema)
        self._writers: dict[str, IndexWriter] = {}
        self._closed: set[str] = set()
        """The indexes whose writers could not be opened, for a reason that is theirs alone."""
        self._stages: TemporaryTables | None = None
        self._put_off: set[int] = set()
        """Requests of which a page had to be left out: their later pages wait for it."""
        self._beside = Session(
            dsn, "target", application_name=f"cdcsync look-up {slot}", lock_wait_ms=LOCK_WAIT_MS, works=True
        )
        """Looks up for the next batch while this one is written."""
        self._look_ups: tuple[Connection | None, dict[str, LookUps]] = None, {}
        """The look-ups over that connection, by index."""
        self._failed: dict[str, FailedDocuments] = {}
        self._source: Backend | None = None
        self._tells_wal_end = False
        """Whether the connection can tell where the WAL ends."""
        self.wal_end: Lsn | None = None
        """Where the WAL ended as the last commit was written, with `one_wal`."""

    def take_changes_of(self, source: WatchedConnection) -> None:
        """Note the server that the changes come from, to whose WAL this session may write as well."""
        self._source = source.backend

    @property
    def one_wal(self) -> bool:
        """Whether this session writes to the WAL that the changes come from, and can tell where that ends."""
        return (
            self._tells_wal_end and self._connection is not None and same_server(self._connection.backend, self._source)
        )

    async def prepare(self, specs: Sequence[IndexSpec]) -> None:
        """Create the connection's stages for these indexes, except where an index's own tables are in the way.

        Such an index is met again by `open_writers`, for a batch that concerns it.
        """
        with speaking_of("target"):
            self._writers = {spec.name: IndexWriter(self.connection, self._schema, spec) for spec in specs}
            self._closed = set(self._writers)
            try:
                self._tells_wal_end = await self._pipelines.tells_wal_end(self.connection)
                for index in self._writers:
                    try:
                        await self.open_writers([index])
                    except (IndexFault, TargetUnavailable) as error:
                        if error.index != index:
                            raise
            except BaseException:
                await self.aclose()
                raise
            self._stages = TemporaryTables(self.connection)
            self._failed = {
                spec.name: FailedDocuments(self.connection, self._schema, spec.name, len(spec.shape.key))
                for spec in specs
            }

    async def open_writers(self, indexes: Collection[str]) -> None:
        """Create the stages of these indexes that could not be created before.

        :raises TargetUnavailable: the tables of one are still locked; the others' changes can be applied.
        :raises IndexFault: those of one are not as it needs them.
        """
        for index in sorted(self._closed.intersection(indexes)):
            with speaking_of("target", where=f"index {index}", index=index):
                await self._writers[index].open()
            self._closed.discard(index)

    async def see_unrenamed(self, index: str) -> None:
        """See that the types of an index's columns still have the names by which its statements know them.

        :raises TablesChanged: somebody has renamed or moved one.
        """
        with speaking_of("target"):
            if await self._writers[index].renamed():
                raise TablesChanged(RENAMED, where=f"index {index}")

    async def lockers(self, index: str) -> list[Lock]:
        """Return who keeps this session from writing to the tables of an index."""
        spec = self._writers[index].spec
        tables = written_tables(self._schema, spec)
        with speaking_of("target"):
            return await exclusive_locks(self.connection, tables, modes=WRITERS_WAIT)

    def writer(self, index: str) -> IndexWriter:
        """Return the writer of one index, for its look-ups."""
        return self._writers[index]

    async def look_ups(self, index: str) -> LookUps:
        """Return look-ups in one index that do not wait for what is being written, and see all that is committed.

        A DSN of several hosts leads to the next one if the first has no connection to spare. On a standby that is
        behind, a document that has changed since would seem to be what it was.

        :raises TargetUnavailable: the target does not answer now, or is another server.
        """
        with speaking_of("target"):
            connection = await self._beside.connection()
            if not await self._pipelines.shows(connection, self._held):
                await self._beside.aclose()
                raise TargetUnavailable(
                    "the connection for look-ups does not show what was committed last",
                    where=f"slot {self._slot}",
                    hint="if target.dsn names several hosts, add target_session_attrs=read-write",
                )
            if self._look_ups[0] is not connection:
                self._look_ups = connection, {}
            found = self._look_ups[1].get(index)
            if found is None:
                found = LookUps(connection, self._schema, self._writers[index].spec)
                await found.open()
                self._look_ups[1][index] = found
        return found

    async def begin_at(
        self,
        checkpoint: Lsn,
        system_identifier: str,
        timeline: int,
        started: datetime | None = None,
        *,
        doubted: Sequence[str] = (),
    ) -> None:
        """Store where the pipeline starts and which cluster it follows.

        :param started: when the server was started.
        :param doubted: indexes to compare with the source in any case.
        """
        with speaking_of("target"):
            async with self._chain():
                self._chained.proposed = await self._pipelines.begin_at(
                    self.connection, self._held, checkpoint, system_identifier, timeline, started
                )
                for index in doubted:
                    await self._requests.compare(self.connection, index)
                crash_point("beginning written")
            crash_point("beginning stored")

    async def forget_position(self, resync: Sequence[str]) -> None:
        """Forget the checkpoint, and in the same transaction ask for a resync of these indexes."""
        with speaking_of("target"):
            async with self._chain():
                self._chained.proposed = await self._pipelines.forget(self.connection, self._held)
                for index in resync:
                    await self._requests.reload(self.connection, index, rewrite=False)
                crash_point("position forgotten")
            crash_point("forgotten position committed")

    async def apply(
        self,
        changes: Mapping[str, ChangeSet],
        pages: Sequence[PageEnd],
        checkpoint: Lsn | None,
        *,
        ahead: Lsn | None = None,
        parts: Collection[Part] = (),
        paused: Mapping[str, Pause] | None = None,
        commit_time: datetime | None,
        caught_up: bool,
    ) -> dict[str, Applied]:
        """Commit a batch: changes, page cursors and checkpoint in one transaction.

        :param ahead: the position just after the commit record of a transaction that the batch has a part of.
        :param parts: the partitions that rows of the batch are of, as far as they are noted nowhere yet.
        :raises TargetUnavailable: nothing or everything was committed; applying again is safe.
        :raises LeaseLost: nothing was committed.
        :raises IndexFault: the target refuses a value of one index; nothing was committed.
        """
        try:
            return await self._apply(
                changes,
                pages,
                checkpoint,
                ahead,
                parts=parts,
                paused=paused or {},
                commit_time=commit_time,
                caught_up=caught_up,
            )
        except IndexFault as error:
            if isinstance(error.__cause__, REFUSALS):
                with speaking_of("target"):
                    error.key = await self._refused(self._writers[error.index], changes[error.index])
            raise

    async def _refused(self, writer: IndexWriter, changes: ChangeSet) -> Key | None:
        """Return the key of a row that the target refuses, by trying halves; None where no single one is at fault."""
        rows: list[Kept | Document] = [*changes.kept, *changes.documents]
        while len(rows) > 1:
            half = rows[: len(rows) // 2]
            rows = rows[len(half) :] if await self._takes(writer, half) else half
        return None if not rows or await self._takes(writer, rows) else rows[0].key

    async def _takes(self, writer: IndexWriter, rows: Sequence[Kept | Document]) -> bool:
        kept = [row for row in rows if isinstance(row, Kept)]
        documents = [row for row in rows if isinstance(row, Document)]
        try:
            async with self.connection.transaction(force_rollback=True):
                await writer.apply(ChangeSet(False, [], kept, documents, {}))
        except REFUSALS:
            return False
        return True

    async def _apply(
        self,
        changes: Mapping[str, ChangeSet],
        pages: Sequence[PageEnd],
        checkpoint: Lsn | None,
        ahead: Lsn | None,
        *,
        parts: Collection[Part],
        paused: Mapping[str, Pause],
        commit_time: datetime | None,
        caught_up: bool,
    ) -> dict[str, Applied]:
        if not self._usable:
            raise TargetUnavailable("the apply connection is not usable", where="target", hint="it is opened again")
        applied = {}
        with speaking_of("target"):
            if self._stages is not None:
                await self._stages.freeze()
            async with self._chain():
                for index, change_set in changes.items():
                    with speaking_of("target", where=f"index {index}", index=index):
                        applied[index] = await self._writers[index].apply(change_set)
                        await self._failed[index].apply(change_set)
                for part in parts:
                    await self._registry.note_part(self.connection, part.index, str(part.table), part.oid)
                for index, pause in paused.items():
                    await self._registry.pause(self.connection, index, pause)
                for page in pages:
                    await self._end_page(page, paused)
                # After the pages: a request asks how far the one that is being served has come.
                for index, change_set in changes.items():
                    for rebuild in change_set.rebuilds:
                        await self._rebuilds.ask(self.connection, index, rebuild)
                self._chained.proposed, self.wal_end = await self._pipelines.commit(
                    self.connection,
                    self._held,
                    checkpoint,
                    ahead=ahead,
                    commit_time=commit_time,
                    caught_up=caught_up,
                    wal_end=self.one_wal,
                )
                crash_point("batch written")
            crash_point("batch committed")
        return applied

    async def _end_page(self, page: PageEnd, paused: Collection[str]) -> None:
        if page.force_embed and page.index in paused:
            self._put_off.add(page.backfill_id)
        if page.backfill_id in self._put_off:
            return  # its vectors cannot be discarded now: the request is served from here on, once the index is resumed
        if page.force_embed and page.index in self._writers:
            with speaking_of("target", where=f"index {page.index}", index=page.index):
                await discard_vectors(self.connection, self._schema, self._writers[page.index].spec, page.force_embed)
        request = await self._queue.end_page(self.connection, page)
        if request is not None and page.done and request.read_all:
            await close_list(self.connection, self._schema, request.index, request.started_at)

    async def aclose(self) -> None:
        """End the session, which frees the lock."""
        await self._beside.aclose()
        await super().aclose()
