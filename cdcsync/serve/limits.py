"""How much a tenant may ask for: a token bucket, calls at the same time, and text a day.

Two bounds hold for everybody together: how many calls work at the same time, and how many wait for that. Beyond them
callers are told at once to come back later, so that a storm costs the others little and no queue grows.

Refusals stand in line: each account is told `REFUSALS_PER_S` of them. A caller that is refused once is told at once,
and a thousand loops that call again without a pause are held back until they cost little. Each refusal says when its
caller may come back, which is later than what the one before it in the line was told: callers that wait as long as they
are told do not come back together.

Counts are kept by each replica; with n of them a tenant has up to n times its share.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from cdcsync.config.serving import Serve
from cdcsync.serve.problems import Problem

DAY_S = 86_400.0

REFUSALS_PER_S = 20.0
"""Refusals that one account is told a second, once some are held back: as often as it may call by default."""

HELD_S = 5.0
"""A refusal is told after this time at the latest: clients wait for longer than that before they give up."""

COMING_BACK_S = 60.0
"""The longest time that callers in the line are told to stay away for because of those before them."""

CROWD = 20
"""Once so many refusals of an account are held back, its further calls are refused by their headers alone. Until then
an agent that makes a few calls too many at the same time is told so by its tools."""

MESSAGES = 5
"""Messages of MCP that an account may send for each call: a client that connects anew sends three before it calls."""

STRANGERS = ""
"""The account of unknown callers."""

FORGET_AFTER = 10_000
"""Accounts that are kept; those that have been quiet go first."""


class Refused(Problem):
    """A call beyond its caller's share, or beyond what all callers may ask for.

    :ivar held_s: how long the answer is held back.
    """

    held_s = 0.0


class _Bucket:
    """A token bucket."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = self._tokens = burst
        self._filled_at = now

    def wait_s(self, now: float) -> float:
        """Return how long it takes until there is a token; 0 if there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return max(0.0, (1 - self._tokens) / self._rate)

    def take(self, tokens: int = 1) -> None:
        """Take tokens, of which one is there; the others are owed, and come in before there is one again."""
        self._tokens -= tokens


class _Account:
    def __init__(self, serve: Serve, now: float) -> None:
        self.calls = _Bucket(serve.requests_per_s, serve.burst, now)
        self.messages = _Bucket(MESSAGES * serve.requests_per_s, MESSAGES * serve.burst, now)
        self.running = 0
        self.spent = 0
        self.day_began = now
        self.told_until = self.back_until = float("-inf")


class Limits:
    """The limits of all callers of one process.

    :param now: the time in seconds, which never goes back.
    """

    def __init__(self, serve: Serve, now: Callable[[], float] = anyio.current_time) -> None:
        self._serve = serve
        self._now = now
        self._accounts: dict[str, _Account] = {}
        self._room = anyio.CapacityLimiter(serve.connections)
        self._waiting = self._before = 0
        self._told_until = float("-inf")

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self._waiting

    @asynccontextmanager
    async def admitted(self, account: str, first: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
        """Admit a call for the duration of the block.

        :param first: what it waits for before its turn.
        :raises Refused: 429, this tenant has used up its share; 503, too many calls wait.
        """
        refused = self.refusal(account)
        if refused is not None:
            raise refused
        mine = self._account(account)
        mine.calls.take()
        mine.running += 1
        try:
            if first is not None:
                await self._early(account, first)
            self._waiting += 1
            try:
                await self._room.acquire_on_behalf_of(turn := object())
            finally:
                self._waiting -= 1
            try:
                yield
            finally:
                self._room.release_on_behalf_of(turn)
        finally:
            mine.running -= 1

    async def _early(self, account: str, first: Callable[[], Awaitable[None]]) -> None:
        """Wait for what a call waits for before its turn; not too many may, as each asks the target now and then."""
        if self._before >= max(self._serve.waiting, self._serve.connections):
            raise self._in_line(account, self._busy())
        self._before += 1
        try:
            await first()
        finally:
            self._before -= 1

    def count(self, account: str, calls: int) -> None:
        """Count what an admitted call costs as so many further calls: the next one waits until they are made up for."""
        self._account(account).calls.take(calls)

    def spend(self, account: str, tokens: int) -> None:
        """Count text that was answered."""
        self._account(account).spent += tokens

    def _account(self, name: str) -> _Account:
        now = self._now()
        account = self._accounts.pop(name, None) or _Account(self._serve, now)
        self._accounts[name] = account  # the newest is last
        if len(self._accounts) > FORGET_AFTER:
            quiet = next((one for one, kept in self._accounts.items() if not kept.running), None)
            if quiet is not None:
                del self._accounts[quiet]
        if now - account.day_began >= DAY_S:
            account.day_began, account.spent = now, 0
        return account

    def crowded(self, account: str | None = None) -> bool:
        """Say whether refusals of an account are held back, or of any account."""
        told_until = self._told_until if account is None else self._account(account).told_until
        return told_until - self._now() > CROWD / REFUSALS_PER_S

    def message(self, account: str) -> Refused | None:
        """Count a message of MCP of any kind; returns why it may not be read, None if it may."""
        mine = self._account(account)
        if wait_s := mine.messages.wait_s(self._now()):
            return self._in_line(account, self._too_many(MESSAGES * self._serve.requests_per_s, "messages", wait_s))
        mine.messages.take()
        return None

    def refusal(self, account: str) -> Refused | None:
        """Return why an account may not make a call now, and put that into its line; None if it may."""
        refused = self._reason(self._account(account))
        return None if refused is None else self._in_line(account, refused)

    def _in_line(self, account: str, refused: Refused) -> Refused:
        refused.held_s = self.held_s(account)
        if refused.status == 429:
            self._spread(self._account(account), refused)
        return refused

    def held_s(self, account: str) -> float:
        """Put a refusal into the line of an account; returns how long it is held back."""
        now, mine = self._now(), self._account(account)
        told_at = max(now, mine.told_until + 1 / REFUSALS_PER_S)
        if told_at > now + HELD_S:  # the line is full: at any time, so that not all of them are told together
            return HELD_S * (1 + random.random()) / 2  # noqa: S311 # nosec B311
        mine.told_until = told_at
        self._told_until = max(self._told_until, told_at)
        return told_at - now

    def _spread(self, account: _Account, refused: Refused) -> None:
        """Return when a caller may come back: after the callers that were told before it."""
        told_at = self._now() + refused.held_s
        soonest = told_at + max(0.0, (refused.retry_after_s or 0.0) - refused.held_s)
        behind = min(account.back_until + 1 / self._serve.requests_per_s, told_at + COMING_BACK_S)
        account.back_until = max(soonest, behind)
        refused.retry_after_s = account.back_until - told_at

    def _too_many(self, rate: float, what: str, wait_s: float) -> Refused:
        return Refused(429, "Too many calls", f"more than {rate:g} {what} a second", "slow down", retry_after_s=wait_s)

    def _reason(self, account: _Account) -> Refused | None:
        """Return why an account may not make a call now; None if it may."""
        if wait_s := account.calls.wait_s(self._now()):
            return self._too_many(self._serve.requests_per_s, "calls", wait_s)
        budget = self._serve.tokens_per_day
        if budget and account.spent >= budget:
            wait_s = account.day_began + DAY_S - self._now()
            return Refused(
                429, "The day's budget is used up", f"{budget} tokens of text a day", "wait", retry_after_s=wait_s
            )
        if account.running >= self._serve.concurrency:
            return Refused(
                429,
                "Too many calls",
                f"{account.running} calls of yours are being answered",
                "wait for them before you send more",
                retry_after_s=1,
            )
        if self._waiting >= self._serve.waiting and self._room.available_tokens < 1:
            return self._busy()
        return None

    def _busy(self) -> Refused:
        return Refused(503, "The server is busy", "too many calls wait", "call again later", retry_after_s=1)
