"""Whether the source still has what was applied last, asked of its slot after the source was started again.

    the slot fell behind the checkpoint ─► what it sends again ends with the transaction that was applied last?
                                                  no, or nobody can tell: source and indexes are compared

A crash of the source sets its slot back to where it was last saved, and a backup that is restored sets it back to the
backup. Before PostgreSQL 17 an orderly restart does so, too. Once the source has written beyond the checkpoint again,
no position tells the one from the other. What the slot sends again does: after a crash it is what was applied. That is
nothing, if nothing was applied since the position that the slot has: the server was there when it was saved.

Source: PostgreSQL, "Streaming Replication Protocol" (START_REPLICATION SLOT … LOGICAL).
"""

from __future__ import annotations

import anyio
import structlog

from cdcsync.config import Config
from cdcsync.errors import DecodingFailed, SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.lag import SILENCE_S
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive
from cdcsync.pgoutput.messages import Begin
from cdcsync.pgoutput.wire import from_datetime
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection, same_server
from cdcsync.postgres.refusals import TOO_MANY_CONNECTIONS
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import Slot, released_slot
from cdcsync.source.slot import SlotConnection, silence
from cdcsync.target.pipelines import PipelineState

log = structlog.get_logger()

ASK_S = 1.0
"""How often a source that sends nothing is asked how far it is."""

_BEGIN = ord("B")
_ROWS = b"IUDT"
"""The tags of changes of rows: Insert, Update, Delete, Truncate."""


def fell_back(slot: Slot, state: PipelineState) -> bool:
    """Say whether the slot is behind the checkpoint, from which the stream would begin."""
    if slot.confirmed_flush is None or state.checkpoint is None:
        return False
    return slot.confirmed_flush < state.checkpoint


async def has_last_applied(source: Connection, config: Config, slot: Slot, state: PipelineState) -> bool:
    """Say whether the slot sends the transaction that was applied last, and no change of a row after it.

    Only what lies before the checkpoint counts. Nothing is acknowledged. The slot is free again afterwards, unless the
    server takes long to see that. If the server has no WAL sender left for this, or cannot decode again what it has
    sent before, nobody can tell.

    :raises SlotInUse: somebody else reads the slot.
    :raises SourceUnavailable: the connection or the server ended, or fell silent.
    """
    assert slot.confirmed_flush is not None
    assert state.checkpoint is not None
    if state.commit_time is None:
        return False

    async def right(again: SlotConnection) -> None:
        if not (isinstance(source, WatchedConnection) and same_server(source.backend, await again.backend())):
            raise SourceUnavailable("the address led to another server meanwhile", where=f"slot {slot.name}")

    try:
        again = await SlotConnection.connect(config.source.dsn, right)
    except SourceUnavailable as error:
        if error.sqlstate != TOO_MANY_CONNECTIONS:
            raise
        return False
    async with again:
        confirmed, checkpoint = str(slot.confirmed_flush), str(state.checkpoint)
        log.info("slot_read_again", slot=slot.name, confirmed=confirmed, checkpoint=checkpoint)
        await again.start(slot.name, [config.source.publication], slot.confirmed_flush, streaming=False)
        last_us = from_datetime(state.commit_time)
        there = state.commit_lsn is not None and state.commit_lsn <= slot.confirmed_flush
        try:
            found = await _ends_with(again, last_us, slot.confirmed_flush, state.checkpoint, found=there)
        except DecodingFailed:
            found = False
    with speaking_of("source", where=f"slot {slot.name}"):
        await released_slot(source, slot.name)
    return found


async def _ends_with(again: SlotConnection, last_us: int, confirmed: Lsn, checkpoint: Lsn, *, found: bool) -> bool:
    """Say whether a transaction is sent before a checkpoint, and no change of a row after it.

    :param found: whether it is before all that is sent.
    """
    now_us, heard_at = 0, anyio.current_time()
    while True:
        frame = await again.receive(ASK_S)
        if frame is not None:
            heard_at = anyio.current_time()
        elif anyio.current_time() - heard_at > SILENCE_S:
            raise silence(SILENCE_S)
        if frame is None or isinstance(frame, Keepalive):
            if frame is not None and frame.wal_end >= checkpoint:
                return found
            await again.send_status(confirmed, confirmed, ask=frame is None)
        elif frame.payload[0] == _BEGIN:
            begin = decode(frame.payload)
            assert isinstance(begin, Begin)
            if begin.final_lsn >= checkpoint:
                return found
            now_us = begin.commit_time_us
            found = found or now_us == last_us
        elif frame.payload[0] in _ROWS and now_us != last_us:
            found = False
