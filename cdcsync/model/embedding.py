"""Facts about an embedder that are kept in the target: sizes that work, tokens of the day, and its trouble."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta

import msgspec


class Learnt(msgspec.Struct, frozen=True):
    """Sizes of calls that work, learnt from those that failed; None means that only the configuration limits them."""

    texts: float | None = None
    bytes: float | None = None
    calls: float | None = None


class Problem(msgspec.Struct, frozen=True):
    """Why an embedder makes no vectors now.

    :ivar until: when it is tried again; None where a call is under way that has not ended.
    """

    message: str
    hint: str | None
    since: datetime
    until: datetime | None

    def __str__(self) -> str:
        again = "" if self.until is None else f"; tried again at {self.until:%Y-%m-%d %H:%M:%S} UTC"
        fix = "" if self.hint is None else f" ({self.hint})"
        return f"{self.message}{fix}{again}"


class EmbedderState(msgspec.Struct, frozen=True):
    """The state of one embedder, as the worker stores it.

    :ivar tokens: embedded on `day` (UTC).
    :ivar loads_wait_until: until when texts of loads wait, for `tokens_per_day`; None while they do not.
    :ivar texts_per_s: how many texts a second it makes vectors of, to two digits; None before the first call.
    """

    learnt: Learnt = Learnt()
    day: date | None = None
    tokens: int = 0
    problem: Problem | None = None
    loads_wait_until: datetime | None = None
    texts_per_s: float | None = None


TOLERANCE = 0.01
"""The cosine distance up to which two vectors of a text are of one model: what providers compute in lower precision, or
on other machines, differs by less than a tenth of it, other models by many times as much."""


class Probe(msgspec.Struct, frozen=True):
    """An embedder's vector of a fixed text, compared with the first one that it made.

    :ivar vector: the first one, of `made_at`.
    :ivar drift: the cosine distance between that and the one of `checked_at`.
    """

    identity: str
    vector: tuple[float, ...]
    made_at: datetime
    checked_at: datetime
    drift: float

    @property
    def changed(self) -> bool:
        """Whether the embedder is another model by now."""
        return self.drift > TOLERANCE


def cosine_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine distance of two vectors, 0 to 2; 2 if they have other dimensions, or one has no direction."""
    if len(one) != len(other):
        return 2.0
    lengths = math.hypot(*one) * math.hypot(*other)
    return 2.0 if not lengths else max(0.0, 1.0 - sum(map(operator.mul, one, other)) / lengths)


LOADS_SHARE = 0.8
"""The share of a day's tokens that loads may use up: the rest is kept for changes."""


class DailyTokens:
    """Counts the tokens of a day, in UTC, against `tokens_per_day`.

    :param per_day: None means no limit.
    """

    def __init__(self, per_day: int | None) -> None:
        self.per_day = per_day
        self.day: date | None = None
        self.used = 0

    def use(self, now: datetime, tokens: int) -> None:
        """Note that so many tokens were embedded."""
        self._turn(now)
        self.used += tokens

    def recall(self, day: date | None, used: int) -> None:
        """Go on from what was used before a restart."""
        self.day, self.used = day, used

    def waits_until(self, now: datetime, *, load: bool) -> datetime | None:
        """Return until when texts wait; None while they do not.

        :param load: whether these are texts of a load, or else of live changes.
        """
        self._turn(now)
        if self.per_day is None or self.used < self.per_day * (LOADS_SHARE if load else 1.0):
            return None
        return datetime.combine(now.date() + timedelta(days=1), time(), now.tzinfo)

    def _turn(self, now: datetime) -> None:
        if self.day != now.date():
            self.day, self.used = now.date(), 0
