"""The addresses: whether they still lead to the servers that the stream and the apply session are on.

Both, and all sessions that are used all the time, stay with their server for as long as that runs, whatever the address
leads to by then. So a session is opened now and then. Like each session of a worker it is compared with the server of
its side's main session before its use (`postgres/followed`), and that is all that it is for.
"""

from __future__ import annotations

import anyio
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.logs import Told
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import Side

log = structlog.get_logger()

LOOK_S = 30.0
"""How often it is looked: a login costs the server some 10 ms."""


async def watch_address(dsn: str, side: Side) -> None:
    """Look where an address leads, until cancelled."""
    told = Told()

    def failed(failure: Failure) -> None:
        if told.anew(failure.error):
            if side == "source":
                log.warning("source_sessions_wait", error=str(failure.error), fix=failure.error.hint)
            else:
                log.warning("target_sessions_wait", error=str(failure.error), fix=failure.error.hint)

    backoff = Backoff(failed, waits=f"new sessions on the {side} wait")
    while True:
        async with backoff:
            await (await connect(dsn, side, application_name="cdcsync address")).close()
            backoff.succeeded()
            told.over()
            await anyio.sleep(LOOK_S)
