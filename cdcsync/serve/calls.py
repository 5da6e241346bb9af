"""Recording calls: in batches and beside the calls, which never wait for it.

A caller has a say in some of a record's texts: names of filters, the query, the subject of a token. So no text of a
call may keep those of other callers out of the record. If the target refuses a batch, smaller ones are tried, down to
the call that it refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import anyio
import structlog
from prometheus_client import Counter

from cdcsync.errors import CdcsyncError, TargetUnavailable
from cdcsync.postgres.errors import REFUSALS, speaking_of
from cdcsync.postgres.sessions import IDLE_S, Session
from cdcsync.target.calls import Call, ascii_call, forget_calls, record_calls, storable_call

log = structlog.get_logger()

MOST = 10_000
"""Calls that wait to be stored; while the database is away more are dropped, and counted."""

BATCH = 500
FORGET_S = 3_600.0

STORE_S = 5.0
"""How long storing a batch may take, and how long the end of the server may wait for it."""

NOT_OURS = ("25006", "3F000", "42501", "42P01")
"""The errors of a target in which this server may delete nothing: a standby, a role that only reads, or no record."""


def query_hash(text: str) -> str:
    """Return what stands for a query in the record: the same for the same text, and no text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Recorder:
    """Stores calls in the target, over a session of its own.

    :param days: how long they are kept; 0 records nothing, and forgets what was recorded before.
    """

    def __init__(self, dsn: str, schema: str, days: int, dropped: Counter) -> None:
        self._session = Session(dsn, "target", application_name="cdcsync serve audit", idle_s=IDLE_S)
        self._schema = schema
        self._days = days
        self._dropped = dropped
        self._waiting: list[Call] = []
        self._some = anyio.Event()
        self._stored = False
        self._trouble: str | None = None
        self._refusals: set[str] = set()

    def record(self, call: Call) -> None:
        """Take a call to be stored."""
        if not self._days:
            return
        if len(self._waiting) >= MOST:
            self._dropped.inc()
            return
        self._waiting.append(storable_call(call))
        self._some.set()

    async def run(self) -> None:
        """Store calls until cancelled, and forget old ones now and then; calls that wait are stored at the end."""
        forget_at = anyio.current_time()
        try:
            while True:
                if anyio.current_time() >= forget_at:
                    await self._forget()
                    forget_at = anyio.current_time() + FORGET_S
                with anyio.move_on_after(forget_at - anyio.current_time()):
                    await self._some.wait()
                    self._some = anyio.Event()
                await self._store()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                await self._store()
                await self._session.aclose()

    async def _store(self) -> None:
        at_once = BATCH
        while batch := self._waiting[:at_once]:
            try:
                await self._store_batch(batch)
            except Exception as error:
                if isinstance(error, CdcsyncError) and not isinstance(error.__cause__, REFUSALS):
                    await self._wait(error)
                    return
                if len(batch) > 1:
                    at_once = len(batch) // 2
                    continue
                if (plainer := ascii_call(batch[0])) != batch[0]:
                    self._waiting[0] = plainer
                    continue
                self._drop(error)
            else:
                self._stored, self._trouble = True, None
            del self._waiting[: len(batch)]
            at_once = min(2 * at_once, BATCH)

    async def _store_batch(self, batch: Sequence[Call]) -> None:
        """Store some calls; also if the server is stopped meanwhile: they would be stored a second time at its end."""
        with speaking_of("target", where=f"{self._schema}.calls"):
            try:
                with anyio.fail_after(STORE_S, shield=True):
                    await record_calls(await self._session.connection(), self._schema, batch)
            except TimeoutError as error:
                raise TargetUnavailable(
                    f"the calls were not stored within {STORE_S:.0f} s", where=f"{self._schema}.calls"
                ) from error

    async def _wait(self, error: CdcsyncError) -> None:
        """Have the calls stored a little later, and tell why if that is not known yet."""
        if self._trouble != str(error):
            self._trouble = str(error)
            log.warning("calls_not_recorded", error=str(error), waiting=len(self._waiting))
        await anyio.sleep(1)
        self._some.set()

    def _drop(self, error: Exception) -> None:
        """Count a call that the target refuses, and tell once of each reason; the error's text may hold a value."""
        self._dropped.inc()
        reason = type(error.__cause__ or error).__name__
        if reason not in self._refusals:
            self._refusals.add(reason)
            log.warning("call_not_storable", error=reason)

    async def _forget(self) -> None:
        try:
            with speaking_of("target", where=f"{self._schema}.calls"):
                await forget_calls(await self._session.connection(), self._schema, self._days)
        except CdcsyncError as error:
            # Where this server stores nothing, it is not the one that has to delete.
            if self._stored or error.sqlstate not in NOT_OURS:
                log.warning("calls_not_forgotten", error=str(error))
