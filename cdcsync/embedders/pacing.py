"""When a provider may be asked: budgets, and what it told us to wait.

Pure logic: the time is an argument, in seconds of any clock that does not go back. `Pace` is what callers use:

    wait = pace.wait_s(now, tokens)   0.0: ask now; else wait that long and ask `wait_s` again
    pace.take(now, tokens)            right before asking, without anything happening in between
    pace.heard(now, headers)          after each answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MINUTE_S = 60.0

BURST_SHARE = 1 / 6
"""The share of a minute's budget that may be used at once: light load never waits, and the rest comes evenly."""

MOST_ASKED_S = 3600.0
"""Longer waits are not believed: a wrong clock or header must not stop embedding for a day. Every wait that a provider
asks for is capped where it enters."""

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


class Waited:
    """How long a call has waited for its turn, in seconds; that time says nothing of how long its texts take."""

    def __init__(self) -> None:
        self.seconds = 0.0


WAITED: ContextVar[Waited | None] = ContextVar("WAITED", default=None)
"""Where the call that is being made notes its waits, if someone asks."""


class Budget:
    """At most `per_minute` units in any minute, a sixth of them at once.

    A request larger than that sixth goes when the budget is full, and leaves a debt.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._burst = per_minute * BURST_SHARE
        # Tokens that are used at once count in the same minute.
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


class Pace:
    """One provider's budgets, and the waits that it asks for."""

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
        """Block all requests for so long."""
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
    """Return how long an answer asks us to wait, in seconds and at most `MOST_ASKED_S`; `None` when it does not say.

    Source: RFC 9110, section 10.2.3; `retry-after-ms` is an addition of some providers.
    """
    if (milliseconds := number(headers.get("retry-after-ms"))) is not None:
        return min(milliseconds / 1000, MOST_ASKED_S)
    text = headers.get("retry-after")
    if text is None:
        return None
    if (seconds := number(text)) is not None:
        return min(seconds, MOST_ASKED_S)
    try:
        date = parsedate_to_datetime(text)
        wait = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - today).total_seconds()
    except (ValueError, OverflowError, TypeError):  # no date, or one that no calendar has
        return None
    return min(max(0.0, wait), MOST_ASKED_S)


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
