"""Whether an embedder works as a whole, and until when it is left alone.

Fresh evidence decides whose fault a failed call is: a harmless word is embedded after the failure. If that works, the
call is at fault: its size, or a text in it. If it does not, the embedder is, whatever it said. So a success of an hour
ago excuses nobody, and a provider that refuses everything costs no text its attempts.

    working ──a call fails──► word ──works──► working (the caller makes the call smaller)
                                └──fails──► broken: nobody calls; the word is tried again, each time after a longer
                                            pause, or when the provider said; once it works ──► working

Every wait has an end, and the end is known: it is in `problem`, which readiness, status, metrics and alerts read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import anyio
import msgspec
import structlog

from cdcsync.backoff import backoff_s
from cdcsync.embedders.foreign import repeatable
from cdcsync.embedders.protocol import Embedder, harmless, validate
from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.model.embedding import Problem

log = structlog.get_logger()

WORD_S = 60.0
"""How long the word may take: longer than a model that is loaded on demand needs, and the end of any silence."""

SILENCE = f"no answer within {WORD_S:g} s"

MOST_PAUSE_S = 60.0
"""An embedder that works again is noticed within a minute, unless it told us to wait for longer."""

MOST_ASKED_S = 3_600.0
"""The longest wait that an embedder can ask for."""

PATIENCE_S = 90.0
"""Being told to wait for less is pacing and nobody's problem; for longer, the embedder is not working."""

SLOW_S = 300.0
"""What the embedder has been doing for this long is a problem in itself: nothing in it is supposed to take minutes. A
thread that hangs in a library cannot be ended by a time limit, so it has to be told."""


class _Running(msgspec.Struct, frozen=True):
    """Something that the embedder is doing: what, since when by the clock, and how long it may take."""

    what: str
    begun: float
    most_s: float


class Health:
    """One embedder's health: `usable` before a call, `running` around it, `confirm` after it failed, `recover` beside.

    :param clock: the time in seconds.
    :param free: limits how many calls run at a time; the word is one of them.
    """

    def __init__(self, embedder: Embedder, clock: Callable[[], float], free: anyio.CapacityLimiter) -> None:
        self._embedder = embedder
        self._free = free
        self._clock = clock
        self._turn = anyio.Lock()
        self._error: CdcsyncError | None = None
        self._since = datetime.now(UTC)
        self._until = 0.0
        """When the embedder may be asked again, by the clock."""
        self._tried_again = self._since
        """The same as a time of day."""
        self._pauses = 0
        self._word_asked = float("-inf")
        """When the word was asked for that worked last."""
        self._broken = anyio.Event()
        self._works = anyio.Event()
        self._works.set()
        self._running: set[_Running] = set()
        self.changed: Callable[[], None] = lambda: None
        """Called whenever `problem` may have changed."""

    @property
    def problem(self) -> Problem | None:
        """Why there are no vectors now; None while the embedder works."""
        if self._error is not None:
            return Problem(self._error.message, self._error.hint, self._since, self._tried_again)
        now = self._clock()
        late = [one for one in self._running if now - one.begun > one.most_s]
        if late:
            longest = min(late, key=lambda one: one.begun)
            waited = now - longest.begun
            since = datetime.now(UTC) - timedelta(seconds=waited)
            return Problem(f"{longest.what} for {waited:.0f} s", "see what the embedder is doing", since, None)
        return None

    async def works(self) -> None:
        """Wait until the embedder may be asked."""
        while self._error is not None:
            await self._works.wait()

    def usable(self) -> None:
        """Check that calls may be made.

        :raises EmbedderUnavailable: the embedder is broken, and it is known until when it is left alone.
        """
        if self._error is not None:
            raise self._unavailable(self._error)

    @contextmanager
    def running(self, what: str = "a call has been running", most_s: float = SLOW_S) -> Iterator[None]:
        """Note that the embedder does something inside, which is a problem if it takes too long.

        Everything that waits for the embedder goes through here.
        """
        one = _Running(what, self._clock(), most_s)
        self._running.add(one)
        try:
            yield
        finally:
            self._running.discard(one)

    async def confirm(self, error: CdcsyncError, failed: float) -> None:
        """Find out whose fault a failed call is; returns if it is not the embedder's.

        If the embedder told us to wait, that wait comes first.

        :param failed: when the call ended, by the clock.
        :raises EmbedderUnavailable: the embedder fails at a harmless word too.
        """
        async with self._turn:
            self.usable()
            if self._word_asked >= failed:
                return  # another caller has asked since
            told: CdcsyncError | None = error
            waited = 0.0
            while told is not None and (wait := asked_s(told)):
                waited += wait
                if waited > PATIENCE_S:
                    self._break(told, wait)
                    self.usable()
                await anyio.sleep(wait)
                told = await self._word()
            if told is error:
                told = await self._word()
            if told is None:
                return
            # Silence says less than what the embedder said before.
            silent = told.message == SILENCE and isinstance(error, EmbedderUnavailable)
            self._break(error if silent else told, asked_s(told))
            self.usable()

    def fails(self, error: CdcsyncError) -> None:
        """Note that the embedder cannot be opened."""
        self._break(error, asked_s(error))

    async def recover(self) -> None:
        """Try a broken embedder again and again, until cancelled."""
        while True:
            await self._broken.wait()
            await self.pause()
            async with self._turn:
                failure = await self._word()
                if failure is None:
                    self.recovered()
                    log.info("embedder_recovered", embedder=self._embedder.name)
                else:
                    self._break(failure, asked_s(failure))

    async def pause(self) -> None:
        """Wait until the embedder may be tried."""
        await anyio.sleep(max(0.0, self._until - self._clock()))

    def recovered(self) -> None:
        """Note that the embedder works."""
        self._error = None
        self._pauses = 0
        self._broken = anyio.Event()
        self._works.set()
        self.changed()

    def _break(self, error: CdcsyncError, asked: float) -> None:
        """Note that the embedder fails as a whole, and until when it is left alone."""
        if self._error is None:
            self._since = datetime.now(UTC)
            self._works = anyio.Event()
        pause = asked or backoff_s(self._pauses, most=MOST_PAUSE_S)
        self._pauses += 1
        self._until = self._clock() + pause
        self._tried_again = datetime.now(UTC) + timedelta(seconds=pause)
        self._error = error
        self._broken.set()
        name, reason, delay = self._embedder.name, str(error), round(pause, 1)
        if isinstance(error, EmbedderSetupError | TextRejected):  # one that refuses the word is set up wrongly
            log.error("embedder_unusable", embedder=name, error=reason, fix=error.hint, delay_s=delay)
        else:
            log.warning("embedder_unavailable", embedder=name, error=reason, fix=error.hint, delay_s=delay)
        self.changed()

    async def _word(self) -> CdcsyncError | None:
        """Embed the harmless word; returns why that failed."""
        try:
            async with self._free:
                asked = self._clock()
                # All who failed wait for the word.
                with self.running("the embedder has been trying a single word", WORD_S), anyio.fail_after(WORD_S):
                    validate(await self._embedder.embed([harmless(self._embedder)]), 1, self._embedder.dimensions)
        except TimeoutError:
            return EmbedderUnavailable(SILENCE, where=f"embedders.{self._embedder.name}")
        except Exception as error:
            return known(error, [], self._embedder.name)
        self._word_asked = asked
        return None

    def _unavailable(self, error: CdcsyncError) -> EmbedderUnavailable:
        left = max(0.0, self._until - self._clock())
        return EmbedderUnavailable(error.message, where=error.where, hint=error.hint, retry_after_s=left)


def asked_s(error: CdcsyncError) -> float:
    """Return how long an embedder asks us to wait, in seconds; 0.0 if it does not."""
    asked = error.retry_after_s if isinstance(error, EmbedderUnavailable) else None
    return min(max(0.0, asked or 0.0), MOST_ASKED_S)


def known(error: Exception, texts: list[str], name: str) -> CdcsyncError:
    """Return an embedder's error as one of ours, with a message that may be logged and stored.

    An embedder runs foreign code, or speaks for it: it may raise anything, and quote what it was given.
    """
    if not isinstance(error, CdcsyncError):
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return EmbedError(f"the embedder fails: {repeatable(words, texts)}", where=f"embedders.{name}")
    error.message = repeatable(error.message)
    return error
