"""How long to wait after a failure: before a retry, or before an index that others need not wait for is tried again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self

import anyio
import msgspec

from cdcsync.errors import CdcsyncError, Unavailable

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 300.0

ATTEMPT_S = 30.0
"""How long an attempt counts as failing like those before it: in that time a connection gives up on three hosts that do
not answer. An attempt that lasts longer does its work, or waits for something else."""


def backoff_s(attempt: int, *, first: float = FIRST_DELAY_S, most: float = MAX_DELAY_S) -> float:
    """Return how long to wait after failure number `attempt` (from 0), in seconds.

    The bound doubles up to `most`; the wait is a random part of its upper half, so that callers spread out.
    """
    bound = min(most, first * 2.0 ** min(attempt, 30))
    return bound * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, guards nothing


class Failure(msgspec.Struct, frozen=True):
    """An attempt that failed, the `attempt`-th in a row, and how long the next one waits."""

    error: CdcsyncError
    attempt: int
    delay_s: float


class Outages:
    """What the loops of a worker cannot do for now.

    A `Backoff` that says what waits joins with its first failure and leaves once it has succeeded. A worker has a dozen
    of those loops beside the stream. While one of them cannot reach a server, the stream may flow, and nothing else
    would tell.
    """

    def __init__(self) -> None:
        self._failed: dict[Backoff, None] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Collect the failures of the loops that begin in this block, until it ends."""
        token = _OUTAGES.set(self)
        try:
            yield
        finally:
            _OUTAGES.reset(token)
            self._failed.clear()

    def add(self, backoff: Backoff) -> None:
        """Note that an attempt has failed."""
        self._failed[backoff] = None

    def remove(self, backoff: Backoff) -> None:
        """Note that an attempt has succeeded, if one had failed."""
        self._failed.pop(backoff, None)

    def lasting(self, seconds: float) -> dict[str, list[str]]:
        """Return what has failed for so long, by the cause with its fix.

        A loop whose attempt lasts longer than failing ones do is left out: its cause may be gone by now.
        """
        found: dict[str, dict[str, None]] = {}
        for one in self._failed:
            if one.attempting_s <= ATTEMPT_S and (error := one.failing_for(seconds)) is not None:
                found.setdefault(error.with_fix, {})[one.waits] = None
        return {cause: [*waits] for cause, waits in found.items()}


_OUTAGES: ContextVar[Outages | None] = ContextVar("outages", default=None)


class Backoff:
    """Waits after each failure, and longer after each in a row.

    As a context manager inside a loop, it swallows the errors for which a retry helps, and waits:

        while True:
            async with backoff:
                async with await connect(…) as connection:
                    backoff.succeeded()
                    await work(connection)

    A block that ends without an error has succeeded too.
    """

    def __init__(
        self,
        failed: Callable[[Failure], None] = lambda failure: None,
        *,
        first: float = 0.2,
        most: float = 15.0,
        errors: type[CdcsyncError] | tuple[type[CdcsyncError], ...] = Unavailable,
        waits: str = "",
        until: anyio.Event | None = None,
    ) -> None:
        """Wait between `first` and `most` seconds.

        :param failed: called before each wait, to say so.
        :param errors: those for which a retry helps; any other leaves the block.
        :param waits: what cannot be done meanwhile, in a few words, where a worker should tell of it: see `Outages`.
        :param until: a wait ends early once this is set.
        """
        self._failed = failed
        self._first = first
        self._most = most
        self._errors = errors
        self._until = until
        self.waits = waits
        self.failures = 0
        """Failures in a row."""
        self._began_s = 0.0
        """When the first of them came."""
        self._again_s = 0.0
        """When the attempt after the last of them begins."""
        self._error: CdcsyncError | None = None

    def succeeded(self) -> None:
        """Begin again with the shortest wait."""
        self.failures = 0
        if (outages := _OUTAGES.get()) is not None:
            outages.remove(self)

    @property
    def attempting_s(self) -> float:
        """How long the attempt after the last failure has taken; below 0 until it begins."""
        return anyio.current_time() - self._again_s

    def failing_for(self, seconds: float) -> CdcsyncError | None:
        """Return the last error if more than one in a row came, the first so long ago: less may pass in a moment."""
        return self._error if self.failures > 1 and anyio.current_time() - self._began_s >= seconds else None

    async def wait(self, error: CdcsyncError | None = None, *, asked_s: float | None = None) -> None:
        """Wait after a failure.

        :param asked_s: how long the other side asked us to wait, if it did.
        """
        delay_s = asked_s or backoff_s(self.failures, first=self._first, most=self._most)
        now = anyio.current_time()
        self._again_s = now + delay_s
        if self.failures == 0:
            self._began_s = now
        self._error = error
        self.failures += 1
        if self.waits and (outages := _OUTAGES.get()) is not None:
            outages.add(self)
        if error is not None:
            self._failed(Failure(error, self.failures, round(delay_s, 2)))
        with anyio.move_on_after(delay_s):
            await (self._until.wait() if self._until is not None else anyio.sleep_forever())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self.succeeded()
        if not isinstance(error, self._errors):
            return False
        await self.wait(error)
        return True


class Cooldown:
    """Says when something that failed may be tried again, later after each failure in a row. Other work continues.

    Use a `Backoff` where the caller itself waits.
    """

    def __init__(self, *, most: float = 60.0) -> None:
        """Last for `most` seconds at most."""
        self._most = most
        self._failures = 0
        self._until = -math.inf

    @property
    def over(self) -> bool:
        """Whether it may be tried again."""
        return anyio.current_time() >= self._until

    def failed(self, error: CdcsyncError) -> None:
        """Begin a cooldown; an error that does not pass by itself makes it longer."""
        self._failures += 1 if isinstance(error, Unavailable) else 5
        self._until = anyio.current_time() + backoff_s(self._failures, most=self._most)

    def succeeded(self) -> None:
        """Begin again with the shortest cooldown."""
        self._failures = 0
