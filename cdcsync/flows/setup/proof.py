"""Whether the source still has what was applied last, asked of its slot after the source was started again.

    the slot fell behind the checkpoint ─► what it sends again ends with the transaction that was applied last?
                                                  no, or nobody can tell: source and indexes are compared

A crash of the source sets its slot back to where it was last saved, and a backup that is restored sets it back to the
backup. Before PostgreSQL 17 an orderly restart does so, too. Once the source has written beyond the checkpoint again,
no position tells the one from the other. What the slot sends again does: after a crash it is what was applied. That is
nothing, if nothing was applied since the position that the slot has: the server was there when it was saved.

A slot that somebody made on the restored server, between what was applied last and the checkpoint, looks the same: a
slot has no time of creation, and no mark of ours. docs/operations.md warns of that.

Source: PostgreSQL, "Streaming Replication Protocol" (START_REPLICATION SLOT … LOGICAL).
"""

from __future__ import annotations

import anyio
import structlog

from cdcsync.config import Config
from cdcsync.errors import DecodingFailed
from cdcsync.flows.blocked import REPORT_S, Note
from cdcsync.lsn import Lsn
from cdcsync.model.lag import SILENCE_S
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive
from cdcsync.pgoutput.messages import Begin
from cdcsync.pgoutput.wire import from_datetime
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import Slot, released_slot
from cdcsync.source.slot import SlotConnection, silence
from cdcsync.target.pipelines import PipelineState

log = structlog.get_logger()

ASK_S = 1.0
"""How often a source that sends nothing is asked how far it is."""

_SLOW = "a large transaction takes a while, and one that a standby in synchronized_standby_slots lacks is not sent"
"""Why that may take long."""

_BEGIN = ord("B")
_ROWS = b"IUDT"
"""The tags of changes of rows: Insert, Update, Delete, Truncate."""


def fell_back(slot: Slot, state: PipelineState) -> bool:
    """Say whether the slot is behind the checkpoint, from which the stream would begin."""
    if slot.confirmed_flush is None or state.checkpoint is None:
        return False
    return slot.confirmed_flush < state.checkpoint


async def has_last_applied(
    slot_connection: SlotConnection, source: Connection, config: Config, slot: Slot, state: PipelineState, note: Note
) -> bool:
    """Say whether the slot sends the transaction that was applied last, and no change of a row after it.

    Only what lies before the checkpoint counts. Nothing is acknowledged. If the server cannot decode again what it has
    sent before, nobody can tell. The slot is free again afterwards, unless the server takes long to see that.

    :param slot_connection: closed afterwards, because a session streams from a slot only once.
    :param source: a session with the same server.
    :param note: told how far the slot is, if that takes long.
    :raises SlotInUse: somebody else reads the slot.
    :raises SourceUnavailable: the connection or the server ended, or fell silent.
    """
    assert slot.confirmed_flush is not None
    assert state.checkpoint is not None
    confirmed, checkpoint = str(slot.confirmed_flush), str(state.checkpoint)
    async with slot_connection:
        if state.commit_time is None:
            return False
        log.info("slot_read_again", slot=slot.name, confirmed=confirmed, checkpoint=checkpoint)
        await slot_connection.start(slot.name, [config.source.publication], slot.confirmed_flush, streaming=False)
        there = state.commit_lsn is not None and state.commit_lsn <= slot.confirmed_flush
        last_us = from_datetime(state.commit_time)
        try:
            found = await _ends_with(slot_connection, last_us, slot, state.checkpoint, note, found=there)
        except DecodingFailed:
            found = False
        finally:
            note(None)
    with speaking_of("source", where=f"slot {slot.name}"):
        await released_slot(source, slot.name)
    return found


async def _ends_with(
    slot_connection: SlotConnection, last_us: int, slot: Slot, checkpoint: Lsn, note: Note, *, found: bool
) -> bool:
    """Say whether a transaction is sent before a checkpoint, and no change of a row after it.

    :param found: whether it is before all that is sent.
    """
    assert slot.confirmed_flush is not None
    confirmed = sent = slot.confirmed_flush
    now_us, heard_at = 0, anyio.current_time()
    told_at = heard_at
    while True:
        if anyio.current_time() - told_at >= REPORT_S:
            told_at = anyio.current_time()
            note(
                f"slot {slot.name} sends again what precedes the checkpoint {checkpoint}, so that the worker sees"
                f" whether the source still has it; it is at {sent}: {_SLOW}"
            )
        frame = await slot_connection.receive(ASK_S)
        if frame is not None:
            heard_at = anyio.current_time()
        elif anyio.current_time() - heard_at > SILENCE_S:
            raise silence(SILENCE_S)
        if frame is None or isinstance(frame, Keepalive):
            if frame is not None:
                sent = max(sent, frame.wal_end)
                if frame.wal_end >= checkpoint:
                    return found
            await slot_connection.send_status(confirmed, confirmed, ask=frame is None)
        elif frame.payload[0] == _BEGIN:
            begin = decode(frame.payload)
            assert isinstance(begin, Begin)
            if begin.final_lsn >= checkpoint:
                return found
            now_us, sent = begin.commit_time_us, begin.final_lsn
            found = found or now_us == last_us
        elif frame.payload[0] in _ROWS and now_us != last_us:
            found = False
