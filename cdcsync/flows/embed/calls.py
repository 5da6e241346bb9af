"""Calls of one embedder, and whose fault it is when one fails.

    a call fails ─► the harmless word fails too   ─► the embedder's: nobody calls until the word works (`Health`)
                 └► the word works ─► once more, while no other call runs
                                         it works      ─► too many calls at a time: fewer run from now on
                                         several texts ─► the call is halved, and the size that failed is remembered
                                         one text      ─► the text's

The unit is the call, whatever happened within it. What the embedder says of itself (a status, an exception) is shown to
operators; it decides nothing but the time of the next attempt, and whether a text is worth another one later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import anyio
import msgspec

from cdcsync.embedders.pacing import WAITED, Waited
from cdcsync.embedders.protocol import UNUSABLE_HINT, Embedder, Vectors, check_shape
from cdcsync.embedders.sizes import CallSizes
from cdcsync.errors import CdcsyncError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.flows.embed.health import Health, known
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import Learnt
from cdcsync.model.vectors import FloatVector, unusable_rows
from cdcsync.tracing import Tracing

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
    :ivar beside: how many calls were running, this one included.
    """

    error: EmbedError
    texts: Texts
    at: float
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
        self._alone = anyio.Lock()
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

    async def make(self, texts: Texts, made: Callable[[Made], None], *, halved: bool = False) -> bool:
        """Embed texts in as few calls as is known to work, and in smaller ones if those fail.

        Returns whether a text is at fault.

        :param made: is given the results of each call as soon as it ends.
        :param halved: whether the texts are a part of a call that failed while no other ran.
        :raises EmbedderUnavailable: the embedder fails as a whole; `made` has what was made before that.
        """
        at_fault = False
        while texts:
            count = self.fitting(texts.values())
            at_fault |= await self._make(dict(islice(texts.items(), count)), made, halved=halved)
            texts = dict(islice(texts.items(), count, None))
        return at_fault

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

    async def _make(self, texts: Texts, made: Callable[[Made], None], *, halved: bool) -> bool:
        before = self.sizes.learnt
        failed = await self._call(texts, made)
        if failed is None:
            return False
        try:
            await self.health.confirm(failed.error, failed.at)
        except EmbedderUnavailable:
            # The word may have failed because others were running, too.
            self.sizes.crowded(failed.beside)
            self._adjust()
            raise
        if len(failed.texts) < len(texts):
            # The others have their vectors: no size is in the way.
            at_fault = await self._judge_each(failed.texts, made)
        elif len(texts) == 1 or (failed.beside > 1 and not halved):
            at_fault = await self._judge(texts, made, beside=failed.beside)
        else:
            at_fault = await self._halve(texts, made)
        if at_fault:
            self.sizes.restore(before)
            self._adjust()
        return at_fault

    async def _judge(self, texts: Texts, made: Callable[[Made], None], *, beside: int) -> bool:
        """Call once more for texts that failed, while no other call runs; returns whether one of them is at fault.

        An embedder that is too busy fails at what it takes otherwise, and says so in no way that others could not mean.

        :param beside: how many calls ran when it failed, this one included.
        :raises EmbedderUnavailable: the embedder fails as a whole.
        """
        async with self._alone:
            if self.fitting(texts.values()) < len(texts):
                rest = texts  # another call has shown meanwhile that so many are too many
            else:
                self._adjust()
                try:
                    failed = await self._call(texts, made)
                    if failed is None:
                        self.sizes.crowded(beside)
                        return False
                    await self.health.confirm(failed.error, failed.at)
                finally:
                    self._adjust(alone=False)
                if len(texts) == 1:
                    made(Made({}, dict.fromkeys(texts, failed.error)))
                    return True
                rest = failed.texts
        return await self._halve(rest, made) if len(rest) == len(texts) else await self._judge_each(rest, made)

    async def _judge_each(self, texts: Texts, made: Callable[[Made], None]) -> bool:
        """Call once more for each of some texts that have no vector while others of their call do."""
        at_fault = False
        for one, text in texts.items():
            at_fault |= await self._judge({one: text}, made, beside=1)
        return at_fault

    async def _halve(self, texts: Texts, made: Callable[[Made], None]) -> bool:
        """Embed texts in two calls that failed in one; returns whether a text is at fault."""
        self.sizes.fails(len(texts), _bytes(texts))
        items = list(texts.items())
        middle = len(items) // 2
        at_fault = False
        for part in (items[:middle], items[middle:]):
            at_fault |= await self.make(dict(part), made, halved=True)
        return at_fault

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
        return Failed(error, texts, now, beside)

    def _adjust(self, *, alone: bool | None = None) -> None:
        """Set how many calls may run at a time: one while a call has to be alone, else as many as have worked."""
        alone = self._alone.locked() if alone is None else alone
        self._free.total_tokens = 1 if alone else self.sizes.calls


def _bytes(texts: Mapping[bytes, str]) -> int:
    return sum(len(text.encode()) for text in texts.values())
