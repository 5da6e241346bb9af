"""Calls of one embedder, and whose fault it is when one fails.

    a call fails ─► the harmless word fails too ─► the embedder's: nobody calls until the word works (`Health`)
                 └► the word works ─► its texts are suspects (`Suspects`), and asked for apart
                       it failed quickly ─► once more while no other call runs; if that works: too many at a time
                       several texts     ─► in parts, and the size that failed is remembered
                       one text          ─► the text's

The unit is the call, whatever happened within it. What the embedder says of itself (a status, an exception) is shown to
operators; it decides nothing but the time of the next attempt, and whether a text is worth another one later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import islice

import anyio
import msgspec

from cdcsync.embedders.pacing import WAITED, Waited
from cdcsync.embedders.protocol import UNUSABLE_HINT, Embedder, Vectors, check_shape
from cdcsync.embedders.sizes import CallSizes
from cdcsync.errors import CdcsyncError, EmbedderUnavailable, EmbedError, TextRejected, leading
from cdcsync.flows.embed.health import Health, known
from cdcsync.flows.embed.suspects import PARTS, Suspects, Suspicion
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import Learnt
from cdcsync.model.vectors import FloatVector, unusable_rows
from cdcsync.tracing import Tracing

QUICK_S = 2.0
"""A call that fails within this time may have been turned away because others were running, and is made again while no
other begins. Others are held back for no longer: calls are kept shorter than this (`pace`), so one that takes longer to
fail was not turned away, and every text would have to wait for its time limit."""

CALL_S = 900.0
"""The end of a call that nothing else ends. Providers have a time limit of their own, far below it."""

Texts = dict[bytes, str]
"""Texts by their hash."""


class Made(msgspec.Struct, frozen=True):
    """Results by hash of the text: a vector, or the reason why this text alone cannot have one now."""

    vectors: dict[bytes, FloatVector]
    failed: dict[bytes, EmbedError]


class Failed(msgspec.Struct, frozen=True):
    """A call that failed.

    :ivar texts: those without a vector: all of them, unless only some vectors cannot be used.
    :ivar at: when it ended, by the clock.
    :ivar quick: whether it failed so soon that it may have been turned away because others were running.
    :ivar beside: how many calls were running, this one included.
    """

    error: EmbedError
    texts: Texts
    at: float
    quick: bool
    beside: int


class Calls:
    """Makes the calls of one embedder, as many at a time as it takes.

    :param succeeded: told of each call that succeeded: its texts, their vectors and how many seconds it took.
    :param failed: told of each call that failed: how many texts it had and how many seconds it took.
    """

    def __init__(
        self,
        embedder: Embedder,
        metrics: Metrics,
        clock: Callable[[], float],
        succeeded: Callable[[Texts, dict[bytes, FloatVector], float], None],
        failed: Callable[[int, float], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._free = anyio.CapacityLimiter(embedder.concurrency)
        self.health = Health(embedder, clock, self._free)
        self.sizes = CallSizes(embedder.concurrency)
        self.tracing = tracing or Tracing()
        self._embedder = embedder
        self._metrics = metrics
        self._clock = clock
        self._succeeded = succeeded
        self._failed = failed
        self.suspects = Suspects()
        self._apart = anyio.Lock()
        """Held by the call that runs for suspects."""
        self._held = False
        """Whether other calls are held back for one that has to be alone."""
        self._failures = 0
        """How many calls have failed."""

    @property
    def free(self) -> bool:
        """Whether a call could begin now."""
        return self._free.available_tokens > 0

    def recall(self, learnt: Learnt) -> None:
        """Begin with the sizes that worked before a restart."""
        self.sizes = CallSizes(self._embedder.concurrency, learnt)
        self._adjust()

    async def make(self, texts: Texts, made: Callable[[Made], None]) -> None:
        """Embed texts in as few calls as is known to work. Those of a call that fails become suspects.

        :param made: is given the results of each call as soon as it ends.
        :raises EmbedderUnavailable: the embedder fails as a whole; `made` has what was made before that.
        """
        while texts:
            call = dict(islice(texts.items(), self.fitting(texts.values())))
            before = self.sizes.learnt
            if (failed := await self._confirmed(call, made)) is not None:
                crowd = failed.quick and (failed.beside > 1 or len(call) == 1)
                self._suspect(failed, call, before, alone=crowd)
            texts = dict(islice(texts.items(), len(call), None))

    def fitting(self, texts: Iterable[str]) -> int:
        """Return how many of these texts, from the first on, one call can have, as far as is known; at least one."""
        size = 0
        wanted: list[str] = []
        for text in islice(texts, self.sizes.texts):
            size += len(text.encode())
            if wanted and size > self.sizes.bytes:
                break
            wanted.append(text)
        return self._embedder.fitting(wanted)

    async def one(self, text: str) -> FloatVector:
        """Return the vector of a text, in a call of its own that nothing is learnt from.

        :raises EmbedderUnavailable: the embedder fails as a whole.
        :raises EmbedError, EmbedderSetupError: the call fails.
        """
        try:
            async with self._free:
                self.health.usable()
                vectors = await self._embed([text])
        except CdcsyncError as error:
            await self.health.confirm(error, self._clock())
            raise
        vector: FloatVector = vectors[0]
        return vector

    async def _embed(self, texts: list[str]) -> Vectors:
        """Call the embedder; there is a place.

        :raises CdcsyncError: it fails, and the message may be logged and stored.
        """
        name = self._embedder.name
        try:
            with self.health.running(), anyio.fail_after(CALL_S):
                vectors = await self._embedder.embed(texts)
            check_shape(vectors, len(texts), self._embedder.dimensions)
        except TimeoutError:
            raise EmbedError(f"no answer within {CALL_S:g} s", where=f"embedders.{name}") from None
        except Exception as error:
            raise known(error, texts, name) from None
        return vectors

    async def ask_apart(self, texts: Texts, made: Callable[[Made], None]) -> None:
        """Make the next call for suspects, while no other runs for any.

        Those that it does not clear are suspected more closely, until one that fails alone is at fault.

        :param texts: of one suspicion, as many as it says.
        :raises EmbedderUnavailable: the embedder fails as a whole.
        """
        suspicion = self.suspects.of(next(iter(texts)))
        async with self._apart:
            texts = dict(islice(texts.items(), self.fitting(texts.values())))
            same = len(texts) == suspicion.texts
            if suspicion.alone and (same or len(texts) == 1):  # one may be all that is left of a call
                async with self._alone():
                    failed = await self._confirmed(texts, made)
                if failed is None and same:
                    self.sizes.crowded(suspicion.beside)
                    self._adjust()
            else:
                failed = await self._confirmed(texts, made)
        if failed is None:
            return
        crowd = failed.quick and not suspicion.alone
        if len(texts) > 1 or crowd:
            self._suspect(failed, texts, suspicion.before, alone=crowd and len(texts) == 1)
            return
        self.suspects.acquit(texts)
        if suspicion.before is not None:  # no size was in the way
            self.sizes.restore(suspicion.before)
            self._adjust()
        made(Made({}, dict.fromkeys(texts, failed.error)))

    def _suspect(self, failed: Failed, texts: Texts, before: Learnt | None, *, alone: bool) -> None:
        """Suspect the texts that have no vector after a call.

        :param texts: those of the call.
        :param before: the sizes that were known before the first call with them failed.
        :param alone: whether too many calls at a time may have been the cause, so that the same is tried again alone.
        """
        count = len(failed.texts)
        if count < len(texts):
            count, alone = 1, True  # the others have their vectors: no size is in the way
        elif not alone and count > 1:
            self.sizes.fails(count, _bytes(texts))
            self._adjust()
            count = max(1, count // PARTS)
        self.suspects.note(failed.texts, Suspicion(count, alone, failed.beside, before))

    async def _confirmed(self, texts: Texts, made: Callable[[Made], None]) -> Failed | None:
        """Call the embedder; returns how that failed, if not by the embedder's fault.

        :raises EmbedderUnavailable: the embedder fails as a whole.
        """
        failed = await self._call(texts, made)
        if failed is not None:
            try:
                await self.health.confirm(failed.error, failed.at)
            except EmbedderUnavailable:
                # The word may have failed because others were running, too.
                self.sizes.crowded(failed.beside)
                self._adjust()
                raise
        return failed

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Let no other call begin at first.

        An embedder that is too busy fails at what it takes otherwise, and says so in no way that others could not mean.
        """
        try:
            async with anyio.create_task_group() as tasks:
                self._held = True
                self._adjust()
                tasks.start_soon(self._release)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
                    self._held = False
                    self._adjust()
        except BaseExceptionGroup as group:
            raise leading(group) from None

    async def _release(self) -> None:
        await anyio.sleep(QUICK_S)
        self._held = False
        self._adjust()

    async def _call(self, texts: Texts, made: Callable[[Made], None]) -> Failed | None:
        """Call the embedder once there is a place; gives the vectors that can be used to `made`.

        Returns None if there is one for each text.

        :raises EmbedderUnavailable: the embedder is left alone for now.
        """
        name = self._embedder.name
        async with self._free:
            self.health.usable()
            started = self._clock()
            beside, failures = self._free.borrowed_tokens, self._failures
            waited = Waited()
            WAITED.set(waited)
            try:
                with self.tracing.call(name, texts.keys()):
                    vectors = await self._embed(list(texts.values()))
            except CdcsyncError as error:
                self._failures += 1
                # The call that was too much for the provider may have begun before this one or after it.
                beside = max(beside, self._free.borrowed_tokens)
                return self._note_failure(error, texts, started, beside)
            finally:
                beside = max(beside, self._free.borrowed_tokens)
        faults = unusable_rows(vectors)
        usable = {one: vector for at, (one, vector) in enumerate(zip(texts, vectors, strict=True)) if at not in faults}
        if usable:
            # A call that succeeds because others failed does not show that so many can run at a time.
            self.sizes.works(len(texts), _bytes(texts), beside if failures == self._failures else 1)
            self._adjust()
            self.suspects.acquit(usable)
            self._succeeded({one: texts[one] for one in usable}, usable, self._clock() - started - waited.seconds)
            made(Made(usable, {}))
        if not faults:
            return None
        fault = TextRejected(
            f"the text's vector {next(iter(faults.values()))}", where=f"embedders.{name}", hint=UNUSABLE_HINT
        )
        return self._note_failure(
            fault, {one: text for one, text in texts.items() if one not in usable}, started, beside
        )

    def _note_failure(self, error: Exception, texts: Texts, started: float, beside: int) -> Failed:
        now = self._clock()
        self._metrics.embed_errors.labels(self._embedder.name, type(error).__name__).inc()
        self._failed(len(texts), now - started)
        if not isinstance(error, EmbedError):
            # The key, the address or the model: the word tells whether that is so for every text.
            assert isinstance(error, CdcsyncError)
            error = EmbedError(error.message, where=error.where, hint=error.hint)
        return Failed(error, texts, now, now - started <= QUICK_S, beside)

    def _adjust(self) -> None:
        """Set how many calls may run at a time: one while a call has to be alone, else as many as have worked."""
        self._free.total_tokens = 1 if self._held else self.sizes.calls


def _bytes(texts: Mapping[bytes, str]) -> int:
    return sum(len(text.encode()) for text in texts.values())
