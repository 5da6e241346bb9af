"""Why an index does not follow its table, and whether it may be resumed.

A pause is stored beside the index's row (`target/registry.py`). `Pauses` is what one worker remembers of those that it
saw: an index is resumed by looking at its table again, but an index that is paused again soon stays paused.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from cdcsync.errors import SchemaChanged

RESUME_AGAIN_S = 600.0
"""An index that is paused again within this time of being resumed stays paused until the worker starts anew."""

PASSING_PAUSES = 50
"""So often within that time where the stream moved past the cause: a stream that is far behind may meet an old type in
batch after batch, but not for ever."""


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
    def of(cls, error: SchemaChanged) -> Pause:
        """Return the pause that an error calls for."""
        return cls(f"{error.message}, of the row {error.row}" if error.row else error.message, error.hint)

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


class Pauses:
    """The pauses that a worker has seen since it started."""

    def __init__(self) -> None:
        self._at: dict[str, list[float]] = {}
        self._last: dict[str, Pause] = {}
        self._kept: set[str] = set()

    def note(self, error: SchemaChanged, now: float) -> None:
        """Note that an index was paused at `now`, a clock's reading in seconds."""
        index = error.index
        recent = [at for at in self._at.get(index, ()) if now - at < RESUME_AGAIN_S]
        if len(recent) >= (PASSING_PAUSES if error.passing else 1):
            self._kept.add(index)
        self._last[index] = Pause.of(error)
        self._at[index] = [*recent, now]

    def standing(self, broken: Mapping[str, Pause]) -> dict[str, Pause]:
        """Return which indexes cannot be followed now, and why.

        :param broken: those of which an examination has just found it, and so knows better than what was found first.
        """
        return {name: self._last[name] for name in self._kept} | dict(broken)
