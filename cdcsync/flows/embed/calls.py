"""Calls of one embedder, and whose fault it is when one fails.

    a call fails ─► the harmless word fails too    ─► the embedder's: nobody calls until the word works (`Health`)
                 └► the word works, several texts  ─► the call is halved, and the size that failed is remembered
                                    one text       ─► once more, alone, between two words: the text's if it fails again

The unit is the call, whatever happened within it. What the embedder says of itself (a status, an exception) is shown to
operators; it decides nothing but the time of the next attempt, and whether a text is worth another one later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import anyio
import msgspec

from cdcsync.embedders.pacing import WAITED, Waited
from cdcsync.embedders.protocol import UNUSABLE_HINT, Embedder, check_shape
from cdcsync.embedders.sizes import CallSizes
from cdcsync.errors import CdcsyncError, EmbedError, TextRejected
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

    async def make(self, texts: Texts, made: Made) -> bool:
        """Embed texts in as few calls as is known to work, and in smaller ones if those fail.

        Returns whether a text is at fault.

        :raises EmbedderUnavailable: the embedder fails as a whole; what was made before that is in `made`.
        """
        at_fault = False
        while texts:
            count = self.fitting(texts.values())
            at_fault |= await self._make(dict(islice(texts.items(), count)), made)
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

        :raises EmbedError: the call fails.
        :raises TimeoutError: it takes too long.
        """
        async with self._free:
            self.health.usable()
            with anyio.fail_after(CALL_S):
                try:
                    vectors = await self._embedder.embed([text])
                except Exception as error:
                    raise known(error, [text], self._embedder.name) from None
        check_shape(vectors, 1, self._embedder.dimensions)
        vector: FloatVector = vectors[0]
        return vector

    async def _make(self, texts: Texts, made: Made) -> bool:
        before = self.sizes.learnt
        outcome = await self._call(texts, made)
        if outcome is None:
            return False
        failure, rest, failed_at = outcome
        await self.health.confirm(failure, failed_at)
        at_fault = False
        if len(rest) < len(texts):
            # The others have their vectors: no size is in the way.
            for one, text in rest.items():
                at_fault |= await self._judge(one, text, made)
        elif len(rest) == 1:
            ((one, text),) = rest.items()
            at_fault = await self._judge(one, text, made)
        else:
            items = list(rest.items())
            middle = len(items) // 2
            for part in (items[:middle], items[middle:]):
                at_fault |= await self.make(dict(part), made)
        if at_fault:
            self.sizes.restore(before)
            self._adjust()
        return at_fault

    async def _judge(self, one: bytes, text: str, made: Made) -> bool:
        """Call for a text that failed once more, alone; returns whether it is at fault.

        Alone, because an embedder that is too busy fails at texts that it would take otherwise.

        :raises EmbedderUnavailable: the embedder fails as a whole.
        """
        async with self._alone:
            self._adjust()
            try:
                outcome = await self._call({one: text}, made)
                if outcome is None:
                    return False
                failure, _, failed_at = outcome
                await self.health.confirm(failure, failed_at)
                made.failed[one] = failure
                return True
            finally:
                self._adjust(alone=False)

    async def _call(self, texts: Texts, made: Made) -> tuple[EmbedError, Texts, float] | None:
        """Call the embedder once there is a place; adds the vectors that can be used to `made`.

        Returns None if there is one for each text, else the error, the texts without one, and when that was.

        :raises EmbedderUnavailable: the embedder is left alone for now.
        """
        name = self._embedder.name
        async with self._free:
            self.health.usable()
            started = self._clock()
            beside, failures = self._free.borrowed_tokens, self._failures
            call = self.health.begins()
            waited = Waited()
            WAITED.set(waited)
            try:
                with self.tracing.call(name, texts.keys()), anyio.fail_after(CALL_S):
                    vectors = await self._embedder.embed(list(texts.values()))
                check_shape(vectors, len(texts), self._embedder.dimensions)
            except Exception as error:
                self._failures += 1
                # The call that was too much for the provider may have begun before this one or after it.
                self.sizes.fails(len(texts), _bytes(texts), max(beside, self._free.borrowed_tokens))
                self._adjust()
                if isinstance(error, TimeoutError):
                    error = EmbedError(f"no answer within {CALL_S:g} s", where=f"embedders.{name}")
                return self._note_failure(known(error, list(texts.values()), name), texts, started)
            finally:
                self.health.ends(call)
                beside = max(beside, self._free.borrowed_tokens)
        faults = unusable_rows(vectors)
        usable = {one: vector for at, (one, vector) in enumerate(zip(texts, vectors, strict=True)) if at not in faults}
        made.vectors.update(usable)
        if usable:
            # A call that succeeds because others failed does not show that so many can run at a time.
            self.sizes.works(len(texts), _bytes(texts), beside if failures == self._failures else 1)
            self._adjust()
            self._succeeded({one: texts[one] for one in usable}, usable, self._clock() - started - waited.seconds)
        if not faults:
            return None
        fault = TextRejected(
            f"the text's vector {next(iter(faults.values()))}", where=f"embedders.{name}", hint=UNUSABLE_HINT
        )
        return self._note_failure(fault, {one: text for one, text in texts.items() if one not in usable}, started)

    def _note_failure(self, error: Exception, texts: Texts, started: float) -> tuple[EmbedError, Texts, float]:
        now = self._clock()
        self._metrics.embed_errors.labels(self._embedder.name, type(error).__name__).inc()
        self._failed(len(texts), now - started)
        if not isinstance(error, EmbedError):
            # The key, the address or the model: the word tells whether that is so for every text.
            assert isinstance(error, CdcsyncError)
            error = EmbedError(error.message, where=error.where, hint=error.hint)
        return error, texts, now

    def _adjust(self, *, alone: bool | None = None) -> None:
        """Let as many calls run at a time as there should be."""
        alone = self._alone.locked() if alone is None else alone
        self._free.total_tokens = 1 if alone else self.sizes.calls


def _bytes(texts: Mapping[bytes, str]) -> int:
    return sum(len(text.encode()) for text in texts.values())
