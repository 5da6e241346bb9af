"""The next batch, which is prepared while the server writes the one before it, if it is full already.

The index will then hold what it holds now, as another connection sees it, but for the documents of the batch that is
being written. If writing that batch fails, the next one is prepared again. If preparing takes longer than writing, it
is neither given up nor waited for by what is committed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import anyio
import anyio.lowlevel
import msgspec
import structlog

from cdcsync.errors import CdcsyncError, TargetUnavailable
from cdcsync.flows.follow.prepare import Preparer
from cdcsync.model.batch import Batch
from cdcsync.model.changeset import ChangeSet
from cdcsync.target.look_ups import LookUps
from cdcsync.target.session import ApplySession
from cdcsync.tracing import Tracing

log = structlog.get_logger()

CONNECT_S = 1.0
"""How long the next batch waits for the connection for its look-ups. Where a pooler has none to spare, it is prepared
over the connection that writes."""

CONNECT_AGAIN_S = 60.0
"""How soon that connection is tried for again: with such a wait for each batch, nothing would be gained by it."""


async def nothing_follows() -> Batch:
    """Wait for ever: there is no batch to be prepared."""
    await anyio.sleep_forever()
    raise AssertionError


class NextBatch:
    """The batch after the one that is being written."""

    def __init__(self, session: ApplySession, preparers: Mapping[str, Preparer], tracing: Tracing) -> None:
        self._session = session
        self._preparers = preparers
        self._tracing = tracing
        self._tried_again_at = -math.inf
        """When the connection for look-ups is tried for again."""
        self.await_from(nothing_follows)

    def await_from(self, following: Callable[[], Awaitable[Batch]]) -> None:
        """Forget the last batch, and take the next one from here."""
        self._following = following
        self.batch: Batch | None = None
        self.changes: Mapping[str, ChangeSet] | None = None
        """Its changes, once they are prepared."""
        self._rewriting: set[str] = set()

    def changes_of(self, batch: Batch) -> Mapping[str, ChangeSet] | None:
        """Return what was prepared of a batch; None if it was another one, or is to be written anew by now."""
        return self.changes if batch is self.batch and _rewriting(batch) == self._rewriting else None

    def possible_beside(self, indexes: Iterable[str]) -> bool:
        """Say whether it can be prepared while changes of these indexes are written."""
        connected = anyio.current_time() >= self._tried_again_at
        return connected and all(self._preparers[index].looks_ahead for index in indexes)

    async def prepare(self, before: Mapping[str, ChangeSet], waiting: anyio.CancelScope) -> None:
        """Take the batch once it is full, and prepare it.

        :param before: the changes that are being written.
        :param waiting: is cancelled once they are; a batch that was not full by then is not prepared.
        """
        with waiting:
            if self.batch is None:
                self.batch = await self._following()
                self._rewriting = _rewriting(self.batch)
        if self.batch is None:
            return
        try:
            prepared = {}
            for index, of_index in self.batch.indexes.items():
                look_ups = await self._look_ups(index)
                with self._tracing.prepare(index, self.batch.origins):
                    changes = await self._preparers[index].prepare(of_index, look_ups, before.get(index))
                prepared[index] = msgspec.structs.replace(changes, staged=await self._stage(index, changes))
            self.changes = prepared
        except CdcsyncError as error:
            # It is prepared again once the batch before it is written, and meets the same error if that stays. If the
            # target has no connection to spare for the look-ups, that is all there is to it.
            log.debug("not_prepared_ahead", error=str(error))

    async def _look_ups(self, index: str) -> LookUps:
        """Return look-ups beside the connection that writes.

        :raises TargetUnavailable, SetupError: there are none; nobody tries for some time.
        """
        try:
            with anyio.fail_after(CONNECT_S):
                return await self._session.look_ups(index)
        except (CdcsyncError, TimeoutError) as error:
            self._tried_again_at = anyio.current_time() + CONNECT_AGAIN_S
            if isinstance(error, CdcsyncError):
                raise
            raise TargetUnavailable("no connection for look-ups came in time", where="target") from None

    async def _stage(self, index: str, changes: ChangeSet) -> Sequence[bytes] | None:
        if changes.new:
            return None
        staged = []
        for block in self._session.writer(index).stage(changes):
            staged.append(block)
            await anyio.lowlevel.checkpoint()
        return staged


def _rewriting(batch: Batch) -> set[str]:
    return {index for index, changes in batch.indexes.items() if changes.rewrite}
