"""Keeps the table `embedders` current: what dispatchers have learnt, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import structlog

from cdcsync.errors import CdcsyncError, SetupError, Unavailable
from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.flows.embed.pool import BacklogPool
from cdcsync.logs import Told
from cdcsync.model.embedding import EmbedderState
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.embedders import note_embedders, read_embedders

log = structlog.get_logger()

NOTE_S = 10.0
"""How often sizes and tokens are noted where they changed. Trouble is noted at once. A killed worker forgets the tokens
of so many seconds."""

LAST_NOTE_S = 2.0
"""How long a stopping worker may take to note what it used: less than it has for finishing its batch."""


async def recall(connection: Connection, schema: str, slot: str, dispatchers: Mapping[str, Dispatcher]) -> None:
    """Let dispatchers resume from the state noted before a restart; without it they measure anew.

    :raises TargetUnavailable: the target does not answer.
    """
    try:
        with speaking_of("target"):
            noted = await read_embedders(connection, schema, slot)
    except SetupError as error:
        log.warning("embedders_not_recalled", error=str(error), fix=error.hint)
        return
    for name, state in noted.items():
        if name in dispatchers:
            dispatchers[name].recall(state)


async def note_for_ever(pool: BacklogPool, schema: str, slot: str, dispatchers: Mapping[str, Dispatcher]) -> None:
    """Note what changes, until cancelled, and once more then: a restart does not forget tokens that were used."""
    noted: dict[str, EmbedderState] = {}
    told = Told()

    async def note() -> None:
        states = {name: dispatcher.state for name, dispatcher in dispatchers.items()}
        news = {name: state for name, state in states.items() if noted.get(name) != state}
        if news:
            try:
                with speaking_of("target"):
                    async with pool.connection() as connection:
                        await note_embedders(connection, schema, slot, news)
                noted.update(news)
                told.over()
            except CdcsyncError as error:
                say = log.debug if isinstance(error, Unavailable) else log.warning
                if told.anew(error):
                    say("embedders_not_noted", error=str(error), fix=error.hint)

    try:
        while True:
            changed = anyio.Event()
            for dispatcher in dispatchers.values():
                dispatcher.health.changed = changed.set
            await note()
            with anyio.move_on_after(NOTE_S):
                await changed.wait()
    finally:
        with anyio.move_on_after(LAST_NOTE_S, shield=True):
            await note()
