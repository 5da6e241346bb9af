"""The chain of a pipeline's commits: what a worker last saw committed of the row, and what its next commit continues.

The rules:

1. Who has raised `fence` last may write; a worker that finds a higher one than its own has been overtaken.
2. A commit moves the row from `held` to `proposed`, or not at all: the target compares before it sets.
3. A commit whose answer was lost may or may not have happened. Until the row is read again, both continue the chain.
4. Any other values mean that the target went back to an earlier state, or that somebody edited the row. `commits` tells
   that even of commits that left the checkpoint where it was.
"""

from __future__ import annotations

import msgspec

from cdcsync.errors import LeaseLost, TargetRewound
from cdcsync.lsn import Lsn


class Lease(msgspec.Struct, frozen=True):
    """A worker's right to write, and the last values of the row that it saw committed."""

    fence: int
    checkpoint: Lsn | None
    commits: int


class Chain:
    """A worker's end of the chain.

    :ivar held: the row as it was last seen committed.
    :ivar proposed: the row as a commit will have made it whose answer has not come yet.
    """

    def __init__(self, slot: str, held: Lease) -> None:
        self._slot = slot
        self.held = held
        self.proposed: Lease | None = None

    def committed(self) -> None:
        """Note that what was proposed is committed."""
        assert self.proposed is not None
        self.held, self.proposed = self.proposed, None

    def failed(self, *, answered: bool) -> None:
        """Note that a commit failed.

        :param answered: whether the server said so, or undid it over a connection that still works; else nobody knows.
        """
        if answered:
            self.proposed = None

    def continue_with(self, found: Lease) -> None:
        """Continue with the row as it was read again, once nobody else can be writing it.

        :raises LeaseLost, TargetRewound: as `continued`.
        """
        self.held, self.proposed = continued(self._slot, self.held, found, self.proposed), None


def overtaken(slot: str) -> LeaseLost:
    """Return what to raise in a worker whose fence is no longer the last one."""
    return LeaseLost(
        "another worker, or a command, has taken over this pipeline",
        where=f"slot {slot}",
        hint="a worker that was overtaken stands by, and continues once the pipeline is free",
    )


def refuse_successor(slot: str, held: Lease, fence: int) -> None:
    """Refuse to continue once another worker, or a command that works like one, has raised the fence.

    :raises LeaseLost: it has.
    """
    if fence > held.fence:
        raise overtaken(slot)


def continued(slot: str, held: Lease, found: Lease, proposed: Lease | None = None) -> Lease:
    """Return what a worker that holds `held` has when the row is `found`.

    :raises LeaseLost: another worker took over.
    :raises TargetRewound: these are not the values that were last committed.
    """
    refuse_successor(slot, held, found.fence)
    if found not in (held, proposed):
        raise TargetRewound(
            f"the target is at checkpoint {found.checkpoint} (commit {found.commits}), and this worker has"
            f" committed {held.checkpoint} (commit {held.commits}): a standby was promoted before it had"
            " everything, a backup was restored, or the row was edited",
            where=f"slot {slot}",
            hint="the worker starts again from the target's position, unless what follows it is lost",
        )
    return found
