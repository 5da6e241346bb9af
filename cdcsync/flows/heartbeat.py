"""The heartbeat: a message now and then in the source's WAL, which shows on an idle source that the pipeline moves.

Source: PostgreSQL, "System Administration Functions" (pg_logical_emit_message).
"""

from __future__ import annotations

import anyio
import structlog

from cdcsync.config import Config
from cdcsync.errors import CdcsyncError, Unavailable
from cdcsync.logs import Told
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Session
from cdcsync.process.crashpoints import crash_point

log = structlog.get_logger()

HEARTBEAT_PREFIX = "cdcsync heartbeat"
"""The prefix of the messages: not that of the marks, which are looked for."""


async def send_heartbeats(config: Config) -> None:
    """Write a message to the source's WAL every `source.heartbeat_every_s`, until cancelled; without it do nothing."""
    if not config.source.heartbeat_every_s:
        return
    told = Told()
    async with Session(config.source.dsn, "source", application_name="cdcsync heartbeat") as session:
        while True:
            try:
                with speaking_of("source"):
                    # In no transaction: it takes no transaction id, and waits for no commit.
                    await (await session.connection()).execute(
                        "SELECT pg_logical_emit_message(false, %s, '')", [HEARTBEAT_PREFIX]
                    )
                    crash_point("heartbeat written")
                told.over()
            except CdcsyncError as error:
                say = log.debug if isinstance(error, Unavailable) else log.warning
                if told.anew(error):
                    say("heartbeat_waits", error=str(error), fix=error.hint)
            await anyio.sleep(config.source.heartbeat_every_s)
