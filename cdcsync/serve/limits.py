"""How much a tenant may ask for: a token bucket, calls at the same time, and text a day.

Two bounds hold for everybody together: how many calls work at the same time, and how many wait for that. Beyond them
callers are told to come back at once, so that a storm costs the others nothing and no queue grows.

Counts are kept by each replica; with n of them a tenant has up to n times its share.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from cdcsync.config.serving import Serve
from cdcsync.serve.problems import Problem

DAY_S = 86_400.0

REFUSED_AFTER_S = 1.0
"""A refusal is told after a part of this time, by chance: a loop that calls again at once becomes slow, and a thousand
loops that wait equally long do not come back together."""

FORGET_AFTER = 10_000
"""Accounts that are kept; those that have been quiet go first."""


class _Account:
    def __init__(self, burst: float, now: float) -> None:
        self.tokens = burst
        self.filled_at = now
        self.running = 0
        self.spent = 0
        self.day_began = now


class Limits:
    """The limits of all callers of one process.

    :param now: the time in seconds, which never goes back.
    """

    def __init__(self, serve: Serve, now: Callable[[], float] = anyio.current_time) -> None:
        self._serve = serve
        self._now = now
        self._accounts: dict[str, _Account] = {}
        self._room = anyio.CapacityLimiter(serve.connections)
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self._waiting

    @asynccontextmanager
    async def admitted(self, account: str) -> AsyncIterator[None]:
        """Let a call in for the time of the block.

        :raises Problem: 429, this tenant has used up its share; 503, too many calls wait.
        """
        mine = self._account(account)
        refused = self._refusal(mine)
        if refused is not None:
            await anyio.sleep(REFUSED_AFTER_S * random.random())  # noqa: S311 # nosec B311
            raise refused
        mine.tokens -= 1
        if self._waiting >= self._serve.waiting and self._room.available_tokens < 1:
            raise Problem(503, "The server is busy", "too many calls wait", retry_after_s=1)
        mine.running += 1
        try:
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

    def spend(self, account: str, tokens: int) -> None:
        """Count text that was answered."""
        self._account(account).spent += tokens

    def _account(self, name: str) -> _Account:
        now = self._now()
        account = self._accounts.pop(name, None) or _Account(self._serve.burst, now)
        self._accounts[name] = account  # the newest is last
        if len(self._accounts) > FORGET_AFTER:
            quiet = next((one for one, kept in self._accounts.items() if not kept.running), None)
            if quiet is not None:
                del self._accounts[quiet]
        if now - account.day_began >= DAY_S:
            account.day_began, account.spent = now, 0
        rate = self._serve.requests_per_s
        account.tokens = min(self._serve.burst, account.tokens + (now - account.filled_at) * rate)
        account.filled_at = now
        return account

    def _refusal(self, account: _Account) -> Problem | None:
        """Return why an account may not make a call now; None if it may."""
        if account.tokens < 1:
            return Problem(
                429,
                "Too many calls",
                f"more than {self._serve.requests_per_s:g} calls a second",
                "slow down",
                retry_after_s=(1 - account.tokens) / self._serve.requests_per_s,
            )
        budget = self._serve.tokens_per_day
        if budget and account.spent >= budget:
            wait_s = account.day_began + DAY_S - self._now()
            return Problem(
                429, "The day's budget is used up", f"{budget} tokens of text a day", "wait", retry_after_s=wait_s
            )
        if account.running >= self._serve.concurrency:
            return Problem(
                429,
                "Too many calls",
                f"{account.running} calls of yours are being answered",
                "wait for them before you send more",
                retry_after_s=1,
            )
        return None
