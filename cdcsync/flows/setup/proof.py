"""Whether the source still has what was applied last, asked of its slot after the source was started again.

    the slot fell behind the checkpoint ─► what it sends again ends with the transaction that was applied last?
                                                  no, or nobody can tell: source and indexes are compared

A crash of the source sets its slot back to where it was last saved, and a backup that is restored sets it back to the
backup. Once the source has written beyond the checkpoint again, no position tells the one from the other. What the slot
sends again does: after a crash it is what was applied.

Source: PostgreSQL, "Streaming Replication Protocol" (START_REPLICATION SLOT … LOGICAL).
"""

from __future__ import annotations

import anyio

from cdcsync.config import Config
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive
from cdcsync.pgoutput.messages import Begin
from cdcsync.pgoutput.wire import from_datetime
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import Slot, read_slot
from cdcsync.source.slot import SlotConnection
from cdcsync.target.pipelines import PipelineState

ASK_S = 1.0
"""How often a source that sends nothing is asked how far it is."""

FREE_S = 5.0
"""How long to wait until the slot is free again, which the server sees within a moment."""

FREE_POLL_S = 0.02

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
    server takes long to see that.

    :raises SlotInUse: somebody else reads the slot.
    :raises SourceUnavailable: the connection or the server ended.
    """
    assert slot.confirmed_flush is not None
    assert state.checkpoint is not None
    if state.commit_time is None:
        return False
    async with await SlotConnection.connect(config.source.dsn) as again:
        await again.start(slot.name, [config.source.publication], slot.confirmed_flush, streaming=False)
        last_us = from_datetime(state.commit_time)
        found = await _ends_with(again, last_us, slot.confirmed_flush, state.checkpoint)
    deadline = anyio.current_time() + FREE_S
    while anyio.current_time() < deadline:
        with speaking_of("source", where=f"slot {slot.name}"):
            now = await read_slot(source, slot.name)
        if now is None or now.active_pid is None:
            break
        await anyio.sleep(FREE_POLL_S)
    return found


async def _ends_with(again: SlotConnection, last_us: int, confirmed: Lsn, checkpoint: Lsn) -> bool:
    """Say whether a transaction is sent before a checkpoint, and no change of a row after it."""
    found, now_us = False, 0
    while True:
        frame = await again.receive(ASK_S)
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
