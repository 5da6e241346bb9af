"""Recording calls: in batches and beside the calls, which never wait for it."""

from __future__ import annotations

import hashlib

import anyio
import structlog
from prometheus_client import Counter

from cdcsync.errors import CdcsyncError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Session
from cdcsync.target.calls import Call, forget_calls, record_calls

log = structlog.get_logger()

MOST = 10_000
"""Calls that wait to be stored; while the database is away more are dropped, and counted."""

BATCH = 500
FORGET_S = 3_600.0


def query_hash(text: str) -> str:
    """Return what stands for a query in the record: the same for the same text, and no text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Recorder:
    """Stores calls in the target, over a session of its own.

    :param days: how long they are kept; 0 records nothing.
    """

    def __init__(self, dsn: str, schema: str, days: int, dropped: Counter) -> None:
        self._session = Session(dsn, "target", application_name="cdcsync serve audit")
        self._schema = schema
        self._days = days
        self._dropped = dropped
        self._waiting: list[Call] = []
        self._some = anyio.Event()

    def record(self, call: Call) -> None:
        """Take a call to be stored."""
        if not self._days:
            return
        if len(self._waiting) >= MOST:
            self._dropped.inc()
            return
        self._waiting.append(call)
        self._some.set()

    async def run(self) -> None:
        """Store calls until cancelled; those that wait are stored at the end."""
        forget_at = anyio.current_time()
        try:
            while True:
                await self._some.wait()
                self._some = anyio.Event()
                await self._store()
                if anyio.current_time() >= forget_at:
                    forget_at = anyio.current_time() + FORGET_S
                    await self._forget()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                await self._store()
                await self._session.aclose()

    async def _store(self) -> None:
        while batch := self._waiting[:BATCH]:
            try:
                with speaking_of("target", where=f"{self._schema}.calls"):
                    await record_calls(await self._session.connection(), self._schema, batch)
            except CdcsyncError as error:
                log.warning("calls_not_recorded", error=str(error), waiting=len(self._waiting))
                await anyio.sleep(1)
                self._some.set()
                return
            del self._waiting[: len(batch)]

    async def _forget(self) -> None:
        try:
            with speaking_of("target", where=f"{self._schema}.calls"):
                await forget_calls(await self._session.connection(), self._schema, self._days)
        except CdcsyncError as error:
            log.warning("calls_not_forgotten", error=str(error))
