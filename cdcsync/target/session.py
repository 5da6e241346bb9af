"""The apply session: the one connection that writes chunks and checkpoint, under lock and fence.

It holds the pipeline's advisory lock for as long as it lives. What a batch changes, the cursors of the backfill
pages in it and the checkpoint commit in one transaction, or not at all.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Self

import anyio
import psycopg

from cdcsync.crashpoints import crash_point
from cdcsync.errors import RunError, SchemaChanged, TargetUnavailable
from cdcsync.logs import get_logger
from cdcsync.lsn import Lsn
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import Applied, ChangeSet, Document, Kept
from cdcsync.model.pauses import Pause
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.model.transactions import Part
from cdcsync.postgres.interrupts import INTERRUPT_EVERY_S, interrupt
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import REFUSALS, Connection, Session, connect, speaking_of
from cdcsync.target.apply import IndexWriter
from cdcsync.target.failures.documents import FailedDocuments, close_list
from cdcsync.target.keys import discard_vectors
from cdcsync.target.look_ups import LookUps
from cdcsync.target.pipelines import Lease, Pipelines, PipelineState
from cdcsync.target.registry import Registry
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.rebuilds import Rebuilds
from cdcsync.target.requests.submission import Requests

log = get_logger()

OLD_SESSION_S = 2.0
"""A server needs a moment to end a session whose client is gone, and to free its lock."""


def worker_name() -> str:
    """Return what an operator finds this process by."""
    return f"{socket.gethostname()}:{os.getpid()}"


class ApplySession:
    """Writes batches; made by `open`, which needs the lock, and by `reopen` after the connection broke."""

    def __init__(self, dsn: str, schema: str, slot: str) -> None:
        self._dsn = dsn
        self._schema = schema
        self._slot = slot
        self._pipelines = Pipelines(schema, slot)
        self._registry = Registry(schema)
        self._requests = Requests(schema)
        self._rebuilds = Rebuilds(schema)
        self._queue = Queue(schema)
        self._lease: Lease | None = None
        self._proposed: Lease | None = None
        """The lease as a commit will have made it whose answer has not come yet."""
        self._ending = False
        self._connection: WatchedConnection | None = None
        self._pid: int | None = None
        """The server process of the last connection."""
        self._writers: dict[str, IndexWriter] = {}
        self._beside = Session(dsn, "target", application_name=f"cdcsync look-up {slot}")
        """Looks up for the next batch while this one is written."""
        self._look_ups: tuple[Connection | None, dict[str, LookUps]] = None, {}
        """The look-ups over that connection, by index."""
        self._failed: dict[str, FailedDocuments] = {}

    @property
    def connection(self) -> Connection:
        """The session's connection, for reading what only the lock's holder may rely on."""
        if self._connection is None:
            raise TargetUnavailable("the apply connection is closed", where="target", hint="it is opened again")
        return self._connection

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

    async def try_open(self, once_locked: Callable[[], Awaitable[None]] | None = None) -> bool:
        """Connect and take the pipeline's lock and a new fence; False when another worker holds the lock.

        :param once_locked: called between the two: what only the lock's holder may do, and the fence needs.
        :raises TargetUnavailable: the target does not answer now.
        """
        connection = await self._connect()
        with speaking_of("target"):
            try:
                locked = await self._pipelines.try_lock(connection)
                if not locked and await self._end_silent(connection):
                    locked = await self._pipelines.try_lock(connection)
                if locked:
                    if once_locked is not None:
                        await once_locked()
                    self._lease = await self._pipelines.take_over(connection, worker_name())
                    crash_point("fence raised")
                    self._connection, self._pid = connection, connection.info.backend_pid
            finally:
                if self._connection is None:
                    await _close(connection)
        return self._connection is not None

    async def reopen(self, specs: Sequence[IndexSpec]) -> None:
        """Connect again under the same fence, after the connection broke.

        :raises TargetUnavailable: the target does not answer now, or still holds the old session's lock.
        :raises LeaseLost: another worker took over meanwhile.
        :raises TargetRewound: the target is not as this worker last committed it.
        """
        await self.aclose()
        if self._ending:
            raise TargetUnavailable("the worker is ending", where=f"slot {self._slot}")
        connection = await self._connect()
        with speaking_of("target"):
            try:
                locked = await self._pipelines.lock_within(connection, OLD_SESSION_S)
                holder = None if locked else await self._pipelines.holder(connection)
                state = await self._pipelines.read(connection)
                if not locked:
                    self._pipelines.refuse_successor(self._held, state)
                    if holder is not None and holder == self._pid:
                        # A server that was cut off from us keeps our own old session until TCP gives it up.
                        log.warning("old_session_ended", slot=self._slot, pid=holder)
                        await self._pipelines.end_session(connection, holder, self._application_name)
                        locked = await self._pipelines.try_lock(connection)
                        state = await self._pipelines.read(connection)
                    elif await self._end_silent(connection):
                        locked = await self._pipelines.try_lock(connection)
                        state = await self._pipelines.read(connection)
                if locked:
                    self._continue(state)
                else:
                    raise TargetUnavailable(
                        f"the pipeline's lock is still held by the session with pid {holder}",
                        where=f"slot {self._slot}",
                        hint="it ends by itself within a minute if its client is gone, and is ended if it is silent",
                    )
                self._connection, self._pid = connection, connection.info.backend_pid
            finally:
                if self._connection is None:
                    await _close(connection)
        await self.prepare(specs)

    async def _end_silent(self, connection: WatchedConnection) -> bool:
        """End the session that holds the lock if its worker is gone without a word; returns whether that was so."""
        pid = await self._pipelines.end_silent(connection, self._application_name, connection.patience_s)
        if pid is not None:
            log.warning("silent_session_ended", slot=self._slot, pid=pid, silent_s=connection.patience_s)
        return pid is not None

    async def awaited(self) -> bool:
        """Say whether somebody waits until the index holds a position.

        :raises TargetUnavailable: the target does not answer.
        """
        with speaking_of("target"):
            return await self._pipelines.awaited(self.connection)

    async def ensure(self, specs: Sequence[IndexSpec]) -> None:
        """Open the connection again if it is not usable; otherwise do nothing.

        :raises TargetUnavailable, LeaseLost: as `reopen`.
        """
        if not self._usable:
            await self.reopen(specs)

    @property
    def _usable(self) -> bool:
        return self._connection is not None and self._connection.free

    async def prepare(self, specs: Sequence[IndexSpec]) -> None:
        """Create the connection's stages for these indexes."""
        with speaking_of("target"):
            writers = {spec.name: IndexWriter(self.connection, self._schema, spec) for spec in specs}
            try:
                for index, writer in writers.items():
                    with speaking_of("target", where=f"index {index}", index=index):
                        await writer.open()
            except BaseException:
                await self.aclose()  # half of them open is worse than none
                raise
            self._writers = writers
            self._failed = {
                spec.name: FailedDocuments(self.connection, self._schema, spec.name, len(spec.shape.key))
                for spec in specs
            }

    async def state(self) -> PipelineState:
        """Return the stored state of the pipeline."""
        with speaking_of("target"):
            state = await self._pipelines.read(self.connection)
        if state is None:
            raise RunError("the pipeline's row is gone", where=f"slot {self._slot}", hint="start the worker again")
        self._continue(state)
        return state

    def _continue(self, state: PipelineState | None) -> None:
        """See that the row is as this worker last committed it.

        :raises LeaseLost: another worker took over.
        :raises TargetRewound: the target went back.
        """
        self._lease, self._proposed = self._pipelines.continued(self._held, state, self._proposed), None

    async def begin_at(
        self, checkpoint: Lsn, system_identifier: str, timeline: int, *, doubted: Sequence[str] = ()
    ) -> None:
        """Store where the pipeline starts and which cluster it follows.

        :param doubted: indexes to compare with the source in any case.
        """
        with speaking_of("target"):
            async with self._chain():
                self._proposed = await self._pipelines.begin_at(
                    self.connection, self._held, checkpoint, system_identifier, timeline
                )
                for index in doubted:
                    await self._requests.compare(self.connection, index)
                crash_point("beginning written")
            crash_point("beginning stored")

    async def forget_position(self, resync: Sequence[str]) -> None:
        """Forget the checkpoint, and in the same transaction ask for a resync of these indexes."""
        with speaking_of("target"):
            async with self._chain():
                self._proposed = await self._pipelines.forget(self.connection, self._held)
                for index in resync:
                    await self._requests.reload(self.connection, index, rewrite=False)
                crash_point("position forgotten")
            crash_point("forgotten position committed")

    @property
    def _held(self) -> Lease:
        assert self._lease is not None
        return self._lease

    @contextlib.asynccontextmanager
    async def _chain(self) -> AsyncIterator[None]:
        """Run a transaction that moves the pipeline's row: `_proposed` becomes the lease once it has committed."""
        connection = self.connection
        try:
            async with connection.transaction():
                yield
        except BaseException:
            if not connection.closed:
                self._proposed = None  # it was rolled back
            raise
        assert self._proposed is not None
        self._lease, self._proposed = self._proposed, None

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
        :raises SchemaChanged: the target refuses a value of one index; nothing was committed.
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
        except SchemaChanged as error:
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
                    await self._end_page(page)
                # After the pages: a request asks how far the one that is being served has come.
                for index, change_set in changes.items():
                    for rebuild in change_set.rebuilds:
                        await self._rebuilds.ask(self.connection, index, rebuild)
                self._proposed = await self._pipelines.commit(
                    self.connection, self._held, checkpoint, ahead=ahead, commit_time=commit_time, caught_up=caught_up
                )
                crash_point("batch written")
            crash_point("batch committed")
        return applied

    async def _end_page(self, page: PageEnd) -> None:
        if page.force_embed and page.index in self._writers:
            await discard_vectors(self.connection, self._schema, self._writers[page.index].spec, page.force_embed)
        request = await self._queue.end_page(self.connection, page)
        if request is not None and page.done and request.read_all:
            await close_list(self.connection, self._schema, request.index, request.started_at)

    async def interrupt(self) -> None:
        """Have what runs in this session fail and roll back, until cancelled: for a worker whose time is up.

        From now on the session is not opened again.
        """
        self._ending = True
        while True:
            if self._connection is not None:
                await interrupt(self._connection)
            await anyio.sleep(INTERRUPT_EVERY_S)

    @property
    def _application_name(self) -> str:
        return f"cdcsync apply {self._slot}"

    async def _connect(self) -> WatchedConnection:
        connection = await connect(self._dsn, "target", application_name=self._application_name)
        connection.beat()
        return connection

    async def aclose(self) -> None:
        """End the session, which frees the lock."""
        await self._beside.aclose()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await _close(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _close(connection: Connection) -> None:
    with anyio.CancelScope(shield=True), contextlib.suppress(psycopg.Error):
        await connection.close()
