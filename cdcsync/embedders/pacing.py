"""When a provider may be asked: budgets, what it told us to wait, and a breaker for when it is down.

Pure logic: the time is an argument, in seconds of any clock that does not go back. `Pace` is what callers use:

    wait = pace.wait_s(now, tokens)   0.0: ask now; else wait that long and ask `wait_s` again
    pace.take(now, tokens)            right before asking, without anything happening in between
    pace.heard(now, headers)          after each answer

A `Breaker` is closed while the provider answers. Failures in a row open it: nobody asks for a while, then one caller
may try; its success closes the breaker, its failure opens it for longer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MINUTE_S = 60.0

BURST_SHARE = 1 / 6
"""The share of a minute's budget that may be used at once: light load never waits, and the rest comes evenly."""

BREAKER_FAILURES = 5
"""Failures in a row that open the breaker: more than one request's own attempts, so that one bad moment does not."""

BREAKER_FIRST_S = 1.0
BREAKER_MOST_S = 60.0
"""A provider that came back is noticed within a minute."""

MOST_ASKED_S = 3600.0
"""Longer waits are not believed: a wrong clock or header must not stop embedding for a day."""

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


class Budget:
    """At most `per_minute` units in any minute, a sixth of them at once.

    A request larger than that sixth goes when the budget is full, and leaves a debt.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._burst = per_minute * BURST_SHARE
        # What is used at once counts in the same minute.
        self._per_second = (per_minute - self._burst) / MINUTE_S
        self._left = self._burst
        self._at = now

    def wait_s(self, now: float, amount: float) -> float:
        """Return how long to wait until `amount` may be taken; 0.0 means now."""
        self._refill(now)
        return max(0.0, (min(amount, self._burst) - self._left) / self._per_second)

    def take(self, now: float, amount: float) -> None:
        """Take from the budget; a negative amount gives back what an estimate took too much."""
        self._refill(now)
        self._left = min(self._burst, self._left - amount)

    def _refill(self, now: float) -> None:
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now


class Breaker:
    """Keeps callers from a provider that is down."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened = 0
        self._until = -math.inf
        self._trying = False

    @property
    def closed(self) -> bool:
        """Whether anyone may ask."""
        return not self._opened

    def wait_s(self, now: float) -> float:
        """Return how long nobody may ask; 0.0 means that the caller may."""
        if self.closed:
            return 0.0
        if self._trying:
            return max(BREAKER_FIRST_S, self._until - now)
        return max(0.0, self._until - now)

    def admit(self) -> None:
        """Note that the caller asks now; `ended` must follow, after whatever else is to be noted."""
        self._trying = not self.closed

    def succeeded(self) -> None:
        """The provider answered."""
        self._failures = self._opened = 0

    def failed(self, now: float, chance: float) -> None:
        """The provider failed.

        :param chance: a random number from 0 to 1, by which waits differ between workers.
        """
        self._failures += 1
        if self._failures >= BREAKER_FAILURES and now >= self._until:
            bound = min(BREAKER_MOST_S, BREAKER_FIRST_S * 2.0 ** min(self._opened, 30))
            self._opened += 1
            self._until = now + bound * (0.5 + chance / 2)

    def ended(self) -> None:
        """The caller is done; if it neither succeeded nor failed, another one may try."""
        self._trying = False


class Pace:
    """One provider's budgets and its own wishes."""

    def __init__(self, now: float, *, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._requests = None if requests_per_minute is None else Budget(requests_per_minute, now)
        self._tokens = None if tokens_per_minute is None else Budget(tokens_per_minute, now)
        self._not_before = -math.inf
        self._tokens_left = math.inf
        self._tokens_reset = -math.inf

    def wait_s(self, now: float, tokens: float) -> float:
        """Return how long to wait before a request of so many tokens; 0.0 means ask now."""
        waits = [0.0, self._not_before - now]
        if tokens > self._tokens_left:
            waits.append(self._tokens_reset - now)
        if self._requests is not None:
            waits.append(self._requests.wait_s(now, 1))
        if self._tokens is not None:
            waits.append(self._tokens.wait_s(now, tokens))
        return max(waits)

    def take(self, now: float, tokens: float) -> None:
        """Note a request."""
        if self._requests is not None:
            self._requests.take(now, 1)
        self.correct(now, tokens)
        self._tokens_left = math.inf if now >= self._tokens_reset else self._tokens_left - tokens

    def correct(self, now: float, tokens: float) -> None:
        """Note that a request took so many tokens more than was said, or fewer when negative."""
        if self._tokens is not None:
            self._tokens.take(now, tokens)

    def hold(self, now: float, wait_s: float) -> None:
        """Let nobody ask for so long."""
        self._not_before = max(self._not_before, now + min(wait_s, MOST_ASKED_S))

    def heard(self, now: float, headers: Mapping[str, str]) -> None:
        """Note what an answer's headers say of the provider's limits.

        Source: OpenAI, "Rate limits", headers `x-ratelimit-*`; many compatible servers send them too.
        """
        if number(headers.get("x-ratelimit-remaining-requests")) == 0 and (
            reset := duration_s(headers.get("x-ratelimit-reset-requests"))
        ):
            self.hold(now, reset)
        left = number(headers.get("x-ratelimit-remaining-tokens"))
        reset = duration_s(headers.get("x-ratelimit-reset-tokens"))
        if left is not None and reset is not None:
            self._tokens_left, self._tokens_reset = left, now + min(reset, MOST_ASKED_S)


def retry_after_s(headers: Mapping[str, str], today: datetime) -> float | None:
    """Return how long an answer asks us to wait, in seconds; `None` when it does not say.

    Source: RFC 9110, section 10.2.3; `retry-after-ms` is an addition of some providers.
    """
    milliseconds = number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None or (seconds := number(text)) is not None:
        return None if text is None else seconds
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - today).total_seconds())


def duration_s(text: str | None) -> float | None:
    """Read `6m0s`, `1.5s`, `20ms` or plain seconds; `None` when it is none of them."""
    if not text:
        return None
    if (seconds := number(text)) is not None:
        return seconds
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def number(text: str | None) -> float | None:
    """Return a header's value that is a number, not negative and finite; else `None`."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
