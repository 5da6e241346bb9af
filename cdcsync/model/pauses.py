"""Why an index does not follow its table, and whether it may be resumed.

A pause is stored beside the index's row (`target/registry.py`). `Pauses` is what one worker remembers of those that it
saw: an index is resumed once its cause is gone, and where nothing tells that, it is tried again more and more rarely.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from cdcsync.errors import IndexFault

REPEATED_WITHIN_S = 600.0
"""A pause counts as a repeated one for so long after the one before it was ended."""

PASSING_PAUSES = 50
"""So often within that time an index is resumed at once if the stream moved past the cause: a stream that is far behind
may meet an old type in batch after batch, but not for ever."""

FIRST_DELAY_S = 60.0
MOST_DELAY_S = 3_600.0
"""How long a cause that stays, such as a value that the target refuses, is left alone before the index is tried again:
each attempt reads the table from its beginning, so the pauses double up to an hour."""


LOAD_CANCELLED = "its load was cancelled"
"""Why an index is paused whose load someone cancelled: it is not loaded again without being asked."""


class Pause(msgspec.Struct, frozen=True):
    """Why an index does not follow its table.

    :ivar reason: what is wrong; it may name the key of a row, so it is for the index's row and not for a log.
    :ivar remedy: what to do about it.
    :ivar since: when the index was paused; None before that is stored.
    """

    reason: str
    remedy: str | None = None
    since: datetime | None = None

    @classmethod
    def of(cls, error: IndexFault) -> Pause:
        """Return the pause that an error calls for."""
        return cls(f"{error.message}, of the row {error.row}" if error.row else error.message, error.hint)

    @property
    def needs_a_start(self) -> bool:
        """Whether the worker has to be started again to resume the index; it ends any other pause by itself."""
        return self.reason.startswith(LOAD_CANCELLED)

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


class Pauses:
    """The pauses that a worker has seen since it started, and when each index may be resumed."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._last: dict[str, Pause] = {}
        self._due: dict[str, float] = {}
        self.unsafe = set[str]()
        """The indexes whose tables in the target could lose or hide rows when they were last looked at."""
        self.seen: dict[str, object] = {}
        """What each paused index would be made of, as its tables were when they were last looked at."""
        self.warned: dict[str, set[tuple[str, str | None]]] = {}
        """What was last warned of about each index that need not be paused: by which place and fix each is known."""

    def note(self, error: IndexFault, now: float, seen: object = None, *, refused: bool = False) -> None:
        """Note that an index was paused at `now`, a clock's reading in seconds.

        :param refused: whether its set-up failed, which would fail again if nothing else is done before.
        :param seen: what the index would have been made of when the attempt that failed examined its tables, if known:
            a change that comes before the next look is one.
        """
        self._last[error.index] = Pause.of(error)
        if seen is not None:
            self.seen[error.index] = seen
        self._put_off(error.index, now, free=PASSING_PAUSES if error.passing else 0 if refused else 1)

    def note_standing(self, index: str, now: float) -> None:
        """Note that the cause of an index's pause was found to be there still."""
        self._put_off(index, now, free=0)

    def _put_off(self, index: str, now: float, *, free: int) -> None:
        """Count a pause, and put the next attempt off, unless it is among the first `free` ones."""
        recent = now - self._due.get(index, float("-inf")) < REPEATED_WITHIN_S
        times = self._times[index] = self._times.get(index, 0) + 1 if recent else 1
        late = times - free
        delay = 0.0 if late <= 0 else min(MOST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(late - 1, 30))
        self._due[index] = now + delay

    def heal(self, index: str) -> None:
        """Note that the cause of an index's pause was seen to go: it may be resumed at once."""
        self._due.pop(index, None)
        self._times.pop(index, None)

    def due(self, index: str, now: float) -> bool:
        """Say whether a paused index may be tried again."""
        return now >= self._due.get(index, now)

    def standing(self, broken: Mapping[str, Pause], now: float) -> dict[str, Pause]:
        """Return which indexes cannot be followed now, and why.

        :param broken: those of which an examination has just found it, and so knows better than what was found first.
        """
        waiting = {name: self._last[name] for name in self._last if not self.due(name, now)}
        return waiting | dict(broken)
