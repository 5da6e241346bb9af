"""How far the pipeline is: received, checkpoint, kept, acknowledged.

The rules, held by every method:

1. `acknowledged ≤ kept ≤ checkpoint ≤ received`. The checkpoint here is the one that is committed in the target; only
   what is committed there is ever acknowledged to the source, because the source is then free to throw the WAL away.
2. A checkpoint is *kept* once its commit is as safe as the position that it stands for. In a target elsewhere that is
   at once. But if the target is on the source's server, the commit comes after the position in one WAL, and a standby
   may have the one without the other. So the source is told of a checkpoint, and tells its standbys, only once it has
   sent what comes after the commit: a server with `synchronized_standby_slots` sends nothing that its standbys lack.
   A standby that is promoted then has each checkpoint that its slot has been told of. Where the role may not ask for
   the end of the WAL, that cannot be known, and a checkpoint counts as kept at once there, too.
3. Where a commit ended is not asked for, which would take an extra round trip. The commit after it says where the WAL
   ended as that one was written; it comes soon, because the checkpoint's own WAL moves the position.
"""

from __future__ import annotations

from collections import deque

from cdcsync.lsn import INVALID_LSN, Lsn


class Progress:
    """The positions of one connection to a slot. They never move backwards."""

    def __init__(self, checkpoint: Lsn, *, committed_before: Lsn | None = None) -> None:
        """Begin at a checkpoint.

        :param committed_before: a position of the source's WAL beyond the checkpoint's commit, if the target is in that
            WAL and commits can tell where it ends. Nothing is acknowledged until the source has sent it.
        """
        self.received = checkpoint
        self.checkpoint = checkpoint
        self.kept = checkpoint if committed_before is None else INVALID_LSN
        self.acknowledged = self.kept
        self._commits = deque([] if committed_before is None else [(committed_before, checkpoint)])
        """The checkpoints that are not known to be kept, each with a position beyond its commit."""

    def receive(self, lsn: Lsn) -> None:
        """Note that the stream has been received up to `lsn`."""
        if lsn > self.received:
            self.received = lsn

    def commit(self, lsn: Lsn | None, *, wal_end: Lsn | None = None) -> None:
        """Note a commit in the target: it holds, durably, everything up to `lsn`, or with None no more than before.

        :param wal_end: where the WAL of target and source ended as this was written, if they have one WAL and it may be
            asked for: beyond the commit before, and before this one.
        """
        if wal_end is not None and self.checkpoint > (self._commits[-1][1] if self._commits else self.kept):
            self._commits.append((wal_end, self.checkpoint))
        if lsn is not None and lsn > self.checkpoint:
            self.checkpoint = lsn
            self.receive(lsn)
        if wal_end is None:
            self._commits.clear()
            self.kept = self.checkpoint

    def sent(self, lsn: Lsn) -> None:
        """Note that the source has sent what it had up to `lsn`, even inside an unfinished transaction."""
        while self._commits and self._commits[0][0] <= lsn:
            self.kept = self._commits.popleft()[1]

    @property
    def unacknowledged(self) -> bool:
        """Whether there is something to acknowledge."""
        return self.kept > self.acknowledged

    def acknowledge(self) -> Lsn:
        """Return the position to acknowledge to the source now: the last checkpoint that is kept; 0/0 is none yet."""
        self.acknowledged = self.kept
        return self.acknowledged
