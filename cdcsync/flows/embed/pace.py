"""How quick an embedder is, learnt from its calls, and how large calls and windows should be for that."""

from __future__ import annotations

WINDOW_TEXTS = 512
"""Texts read at once, to be sorted by length: large enough that batches have little padding, small enough to keep
in memory."""

LIVE_WAIT_S = 0.5
"""How long a live change may wait behind texts of the backfill that are under way, where nobody says otherwise."""

CALLS_AHEAD = 2
"""Calls under way when a live change comes, on a model that takes one call at a time: one call that runs and one that
is next. Together they take no longer than the change may wait."""

FIRST_TOKENS = 1_024
"""Tokens of a call before anything was measured: what a processor takes a fraction of a second for, and enough to keep
its vector units busy."""

MOST_CALL_TOKENS = 10**7
"""No call grows beyond this, however fast an embedder is."""

MOST_GROWTH = 2.0
"""Calls grow and shrink by this factor at most from one to the next: a single measurement may be an accident."""

WINDOW_S = 1.0
"""How long a window should last: long beside the time in which the next one is read."""

MOST_WINDOWS = 16
"""A window grows with the number of concurrent calls, and with their speed, up to this many times its size, so that all
have work: clusters have dozens. Some 10 MB of texts."""

LONGEST_CALLS = 4
"""A call may take so many times longer where several run at a time, at most."""

SMALL_CALL_TEXTS = 16
"""Calls up to this size are timed apart: what a text costs in a large call says little of what it costs alone."""

SKIPPED = 0.9
"""Each small call that is skipped as too slow lowers its estimate by this, so that a passing slowness is not held
for ever."""


class Pace:
    """One embedder's speed.

    :param places: how many calls may run at the same time.
    :param live_wait_s: how long a live change may wait behind texts of a load.
    """

    def __init__(self, places: int, live_wait_s: float) -> None:
        self._places = places
        # Where several calls run at a time, one of them ends soon, and each costs a journey to the provider.
        self._call_s = live_wait_s / CALLS_AHEAD * min(places, LONGEST_CALLS)
        self.call_tokens = float(FIRST_TOKENS)
        """How many tokens a call may have, so that it takes no longer than its share of what a live change may wait."""
        self.seconds_per_text = 0.0
        """0 before the first call."""
        self._small_seconds_per_text = 0.0
        self._noted_rate: float | None = None
        """The rate that a worker noted before a restart."""

    @property
    def texts_per_s(self) -> float | None:
        """How many texts a second it makes vectors of; to two digits, so that it changes seldom."""
        if not self.seconds_per_text:
            return self._noted_rate
        return float(f"{self._places / self.seconds_per_text:.2g}")

    @property
    def measured(self) -> bool:
        """Whether a call has told how quick the model is."""
        return self.seconds_per_text > 0

    @property
    def window_texts(self) -> int:
        """How many texts a window should have: enough for every call, and for a second of an embedder as fast as this.

        Between two windows nothing is embedded, which an accelerator would notice.
        """
        enough = max(WINDOW_TEXTS * self._places, int((self.texts_per_s or 0.0) * WINDOW_S))
        return min(enough, WINDOW_TEXTS * MOST_WINDOWS)

    def recall(self, texts_per_s: float | None) -> None:
        """Resume from the rate that was noted before a restart."""
        self._noted_rate = texts_per_s

    def fits(self, texts: int, budget_s: float) -> bool:
        """Say whether a small call is likely to fit; what did not fit is tried again after some that were skipped."""
        if self._small_seconds_per_text * texts <= budget_s:
            return True
        self._small_seconds_per_text *= SKIPPED
        return False

    def succeeded(self, texts: int, tokens: int, elapsed: float) -> None:
        """Learn from a call.

        A call that had fewer tokens than it might have says little of how large one may be, unless it took too long
        all the same.
        """
        each = elapsed / texts
        self.seconds_per_text = _smoothed(self.seconds_per_text, each)
        if texts <= SMALL_CALL_TEXTS:
            self._small_seconds_per_text = _smoothed(self._small_seconds_per_text, each)
        if elapsed > self._call_s or tokens >= self.call_tokens / 2:
            wanted = tokens * self._call_s / max(elapsed, 1e-6)
            least, most = self.call_tokens / MOST_GROWTH, self.call_tokens * MOST_GROWTH
            self.call_tokens = max(1.0, min(most, max(least, wanted), float(MOST_CALL_TOKENS)))

    def failed(self, texts: int, elapsed: float) -> None:
        """Learn from a call that failed: an embedder that hangs before it fails is slow, whatever it was before."""
        self.seconds_per_text = max(self.seconds_per_text, elapsed / texts)


def _smoothed(before: float, now: float) -> float:
    return now if not before else 0.8 * before + 0.2 * now
