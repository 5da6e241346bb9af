"""The source's address: whether it still leads to the server that the stream is on.

The stream, and the sessions that are used all the time, stay with their server for as long as that runs, whatever the
address leads to by then. So a session is opened now and then. Like each session of a worker it is compared with the
stream's server before its use (`postgres/followed`), and that is all that it is for.
"""

from __future__ import annotations

import anyio
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.logs import Told
from cdcsync.postgres.sessions import connect

log = structlog.get_logger()

LOOK_S = 30.0
"""How often it is looked: a login costs the server some 10 ms."""


async def watch_address(dsn: str) -> None:
    """Look where the source's address leads, until cancelled."""
    told = Told()

    def failed(failure: Failure) -> None:
        if told.anew(failure.error):
            log.warning("source_sessions_wait", error=str(failure.error), fix=failure.error.hint)

    backoff = Backoff(failed, waits="new sessions on the source wait")
    while True:
        async with backoff:
            await (await connect(dsn, "source", application_name="cdcsync address")).close()
            backoff.succeeded()
            told.over()
            await anyio.sleep(LOOK_S)
