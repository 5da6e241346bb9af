"""How far the pipeline is: received, checkpoint, acknowledged.

The invariant, held by every method: `acknowledged ≤ checkpoint ≤ received`. The checkpoint here is the one that is
committed in the target; only what is committed there is ever acknowledged to the source, because the source is then
free to throw the WAL away.
"""

from __future__ import annotations

from cdcsync.lsn import Lsn


class Progress:
    """The three positions of one connection to a slot. Positions never move backwards."""

    def __init__(self, checkpoint: Lsn) -> None:
        self.received = checkpoint
        self.checkpoint = checkpoint
        self.acknowledged = checkpoint

    def receive(self, lsn: Lsn) -> None:
        """Note that the stream has been received up to `lsn`."""
        if lsn > self.received:
            self.received = lsn

    def commit(self, lsn: Lsn) -> None:
        """Note that the target holds, durably, everything up to `lsn`."""
        if lsn > self.checkpoint:
            self.checkpoint = lsn
        if lsn > self.received:
            self.received = lsn

    def acknowledge(self) -> Lsn:
        """Return the position to acknowledge to the source now: the checkpoint."""
        self.acknowledged = self.checkpoint
        return self.acknowledged
