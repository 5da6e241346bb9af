"""How large a call may be, and how many may run at a time: learnt from calls that failed for no text's fault.

Additive increase, multiplicative decrease, as TCP does: a size that fails is halved; each call that succeeds near the
limit raises it by a thirty-second of the size that failed, so that some sixteen calls succeed before the next one is
likely to fail. Past the size that failed, growth is faster: what was in the way is gone.

Providers limit texts, bytes or calls at a time, and do not say which. Whether it was the calls at a time is tried: the
call is made again while no other runs. What has worked lately is not suspected: a call of three texts that fails, after
one of five that did not, had too many bytes. If nothing is to be suspected, the failure is taken for an accident, and
the next one is not.

Pure: no clock.
"""

from __future__ import annotations

from cdcsync.model.embedding import Learnt

STEPS = 32
"""Successes that take a limit from nothing to the size that failed."""

FASTER = 1.25
"""The growth of each success past the size that failed."""


class Limit:
    """One limit that gives way and recovers.

    :param most: the configuration's limit, where it never is in the way.
    """

    def __init__(self, most: float, learnt: float | None = None) -> None:
        self.most = most
        self.now = most if learnt is None else max(1.0, min(most, learnt))
        self._failed = most if learnt is None else min(most, 2 * self.now)
        self._good = 0.0
        """The largest size that worked lately."""

    def suspected(self, size: float) -> bool:
        """Say whether so much may be too much, by what has worked."""
        return size > max(1.0, self._good)

    def doubt(self) -> None:
        """Trust what has worked less."""
        self._good /= 2

    def fails(self, size: float) -> None:
        """Note that so much was too much."""
        if size / 2 < self.now:
            self._failed = max(1.0, size)
            self.now = max(1.0, size / 2)

    def works(self, size: float) -> None:
        """Note that so much was fine; a size well below the limit says nothing of the limit."""
        self._good = max(self._good, size)
        if self.now < self.most and size >= self.now / 2:
            grown = self.now * FASTER if self.now >= self._failed else self.now + self._failed / STEPS
            self.now = min(self.most, grown)

    def restore(self, before: float | None) -> None:
        """Go back to an earlier limit, if it was higher."""
        self.now = max(self.now, self.most if before is None else before)

    @property
    def learnt(self) -> float | None:
        """The limit where it differs from the configuration's."""
        return None if self.now >= self.most else round(self.now, 3)


class CallSizes:
    """The limits of one embedder.

    :param calls: how many calls may run at a time by the configuration.
    """

    MOST_TEXTS = 10_000.0
    MOST_BYTES = 10.0**9

    def __init__(self, calls: int, learnt: Learnt | None = None) -> None:
        known = learnt or Learnt()
        self._texts = Limit(self.MOST_TEXTS, known.texts)
        self._bytes = Limit(self.MOST_BYTES, known.bytes)
        self._calls = Limit(float(calls), known.calls)

    @property
    def texts(self) -> int:
        """The most texts in one call."""
        return int(self._texts.now)

    @property
    def bytes(self) -> int:
        """The most bytes of text in one call of several texts."""
        return int(self._bytes.now)

    @property
    def calls(self) -> int:
        """The most calls at a time."""
        return int(self._calls.now)

    @property
    def learnt(self) -> Learnt:
        """The sizes to remember over a restart."""
        return Learnt(self._texts.learnt, self._bytes.learnt, self._calls.learnt)

    def restore(self, before: Learnt) -> None:
        """Go back to earlier limits: a text turned out to be at fault, not the size."""
        self._texts.restore(before.texts)
        self._bytes.restore(before.bytes)
        self._calls.restore(before.calls)

    def crowded(self, beside: int) -> None:
        """Note that a call failed while so many were running, itself included, and may work while no other is."""
        if beside > 1:
            self._blame([(self._calls, beside)])

    def fails(self, texts: int, size: int) -> None:
        """Note that a call of several texts failed, at no text's fault as far as is known."""
        self._blame([(self._texts, texts), (self._bytes, size)])

    @staticmethod
    def _blame(measured: list[tuple[Limit, int]]) -> None:
        suspects = [(limit, value) for limit, value in measured if limit.suspected(value)]
        for limit, value in suspects:
            limit.fails(value)
        if not suspects:
            for limit, _ in measured:
                limit.doubt()

    def works(self, texts: int, size: int, beside: int) -> None:
        """Note that a call succeeded."""
        self._texts.works(texts)
        if texts > 1:
            self._bytes.works(size)
        self._calls.works(beside)
