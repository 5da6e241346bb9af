"""The lag: how long the oldest commit that was received has been waiting to be in the target."""

from __future__ import annotations

import math
from collections.abc import Callable

from cdcsync.lsn import Lsn

FAR_BEHIND_S = 2.0
"""Embedding waits for a stream that is later than this: more than a batch takes, and more than the clocks of two
servers that keep time should differ. With clocks that differ more, vectors always follow from the backlog."""

CLOSE_S = 0.25
"""A stream that was far behind has caught up when it is no later than this: under steady load it is never empty."""


SILENCE_S = 60.0
"""How long a source may be silent, where its `wal_sender_timeout` does not say."""


class Lag:
    """How late the stream is. Receiver and open batch tell it; metrics, status and the embedders ask it.

    Silence is not health: while the source is not heard, nobody knows what it has that the index lacks.

    :param now: the time in seconds since 1970.
    :param clock: a clock that is never set, in seconds.
    """

    def __init__(self, now: Callable[[], float], clock: Callable[[], float]) -> None:
        self._now = now
        self._clock = clock
        self._silence_s = SILENCE_S
        self._heard = Lsn(0)
        self._heard_at = -math.inf
        self._oldest_s: float | None = None
        self._caught_up = False
        # A worker begins late: nobody knows yet what came while it was away.
        self._far_behind = True

    def begin(self, checkpoint: Lsn, silence_s: float) -> None:
        """Note that a connection begins to stream.

        :param silence_s: a source that is silent for longer is away.
        """
        self._silence_s = silence_s
        self.hear(checkpoint)
        self.note(None, caught_up=False)

    def hear(self, position: Lsn) -> None:
        """Note that the source has told of a position."""
        self._heard = max(self._heard, position)
        self.listen()

    def listen(self) -> None:
        """Note that the receiver listens again: while it did not, silence said nothing."""
        self._heard_at = self._clock()

    def end(self) -> None:
        """Note that the connection has ended: nothing is heard until another one begins."""
        self._heard_at = -math.inf

    @property
    def heard(self) -> Lsn:
        """The furthest position that the source has told of."""
        return self._heard

    @property
    def silent_s(self) -> float:
        """How long nothing has come from the source."""
        return self._clock() - self._heard_at

    @property
    def silent(self) -> bool:
        """Whether the source has been silent for so long that it is away."""
        return self.silent_s > self._silence_s

    @property
    def heard_lately(self) -> bool:
        """Whether the source has shown lately that it is there."""
        return self.silent_s < self._silence_s / 2

    def note(self, oldest_s: float | None, *, caught_up: bool) -> None:
        """Note what waits.

        :param oldest_s: when the oldest transaction was committed that is received and not in the target; None if
            there is none.
        :param caught_up: whether the source has sent everything, and all of it is in the target.
        """
        self._oldest_s = oldest_s
        self._caught_up = caught_up

    @property
    def seconds(self) -> float:
        """The age of the oldest received commit that is not in the target; 0.0 when there is none, NaN when unknown.

        It is unknown while the source is not heard.
        """
        if self._oldest_s is not None:
            return max(0.0, self._now() - self._oldest_s)
        return 0.0 if self.heard_lately else math.nan

    @property
    def caught_up(self) -> bool:
        """Whether the source has sent everything, and all of it is in the target."""
        return self._caught_up

    @property
    def far_behind(self) -> bool:
        """Whether what is applied now has probably changed again already; stays so until the stream has caught up."""
        if self._caught_up:
            self._far_behind = False
        elif self._oldest_s is not None:
            self._far_behind = self.seconds > (CLOSE_S if self._far_behind else FAR_BEHIND_S)
        return self._far_behind
