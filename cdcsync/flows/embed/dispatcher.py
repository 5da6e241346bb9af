"""The dispatcher: one embedder, its queue, what it made recently and what is under way."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from cdcsync.documents.chunks import Lengths, estimate
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import CdcsyncError
from cdcsync.flows.embed.calls import Calls, Made, Texts
from cdcsync.flows.embed.health import Health, known
from cdcsync.flows.embed.pace import LIVE_WAIT_S, MOST_WINDOWS, SMALL_CALL_TEXTS, WINDOW_TEXTS, Pace
from cdcsync.flows.embed.suspects import Suspects
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import DailyTokens, EmbedderState, Problem
from cdcsync.model.lag import Lag
from cdcsync.model.vectors import FloatVector
from cdcsync.tracing import Tracing

log = structlog.get_logger()

REMEMBERED_BYTES = 24 * 1024 * 1024
"""Memory for vectors of texts that come back: rows skipped while apply held them, late inline results, rows that were
read newer than the stream and come again in their turn. It holds some 13,000 vectors of 384 dimensions."""

REMEMBERED_VECTORS = 4_096
"""So many are remembered in any case, of however many dimensions: what is under way in a window, and some more."""

ENTRY_BYTES = 300
"""What the memory takes for each of them besides the vector."""


class Dispatcher:
    """One embedder, used by as many callers at a time as it can serve.

    :param live_wait_s: how long a live change may wait behind texts of a load.
    :param tokens_per_day: see the configuration; None means no limit.
    """

    def __init__(
        self,
        embedder: Embedder,
        metrics: Metrics,
        clock: Callable[[], float],
        live_wait_s: float = LIVE_WAIT_S,
        tokens_per_day: int | None = None,
        *,
        tracing: Tracing | None = None,
    ) -> None:
        self.embedder = embedder
        self.places = embedder.concurrency
        """How many calls may run at the same time."""
        self._metrics = metrics
        self._day = DailyTokens(tokens_per_day)
        self._under_way: dict[bytes, anyio.Event] = {}
        self._made: OrderedDict[bytes, FloatVector] = OrderedDict()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._lengths = Lengths(embedder.tokenizer_json)
        self._tokens: OrderedDict[bytes, int] = OrderedDict()
        """Of texts that were measured; others are estimated."""
        self.pace = Pace(self.places, live_wait_s)
        self._calls = Calls(embedder, metrics, clock, self._note_success, self.pace.failed, tracing)
        self.ready = anyio.Event()
        self.lag: Lag | None = None
        """How late the stream is."""
        self._recalled = False

    async def run(self) -> None:
        """Load the model, trying again while that may help, then hold the inline calls until cancelled."""
        while True:
            try:
                with self.health.running("the model has been loading"):
                    await self.embedder.open()
                break
            except Exception as error:
                # Text, metadata and deletes continue. What someone has to fix may be on the provider's side, so that
                # nobody restarts this worker for it.
                self.health.fails(known(error, [], self.embedder.name))
                await self.health.pause()
        self.health.recovered()
        log.info("embedder_ready", embedder=self.embedder.name, model=self.embedder.identity)
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self.health.recover)
            self.ready.set()
            await anyio.sleep_forever()

    async def probe(self, text: str) -> FloatVector:
        """Return what the embedder itself makes of a text now, whatever is remembered.

        :raises EmbedError, EmbedderSetupError: it fails at this text, or as a whole; `problem` tells the latter.
        """
        return await self._calls.one(text)

    @property
    def health(self) -> Health:
        """Whether the embedder works."""
        return self._calls.health

    @property
    def tracing(self) -> Tracing:
        """Where calls are traced."""
        return self._calls.tracing

    @property
    def far_behind(self) -> bool:
        """Whether the stream is so late that texts applied now are likely to change again at once."""
        return self.lag is not None and self.lag.far_behind

    @property
    def problem(self) -> Problem | None:
        """Why the embedder makes no vectors now."""
        if (trouble := self.health.problem) is not None:
            return trouble
        if (until := self.waits_until(load=False)) is not None:
            hint = "raise tokens_per_day, or wait"
            return Problem(
                f"all {self._day.per_day} tokens of the day are used", hint, until - timedelta(days=1), until
            )
        return None

    @property
    def state(self) -> EmbedderState:
        """The embedder's state, to be noted in the target."""
        return EmbedderState(
            self._calls.sizes.learnt,
            self._day.day,
            self._day.used,
            self.problem,
            self.waits_until(load=True),
            self.pace.texts_per_s,
        )

    def recall(self, state: EmbedderState) -> None:
        """Resume from what was known before a restart; once, as what is known later is newer."""
        if not self._recalled:
            self._recalled = True
            self._calls.recall(state.learnt)
            self._day.recall(state.day, state.tokens)
            self.pace.recall(state.texts_per_s)

    def waits_until(self, *, load: bool) -> datetime | None:
        """Return until when texts of loads, or of live changes, wait for `tokens_per_day`; None while they do not."""
        return self._day.waits_until(datetime.now(UTC), load=load)

    @property
    def idle(self) -> bool:
        """Whether a call could begin now."""
        return self.ready.is_set() and self._tasks is not None and self.problem is None and self._calls.free

    def free_within(self, seconds: float) -> bool:
        """Whether a call could begin now, or after what is under way has likely ended in this time."""
        loaded = self.ready.is_set() and self._tasks is not None and self.problem is None
        return self.idle or (loaded and self.pace.seconds_per_text * len(self._under_way) <= seconds)

    async def measure(self, texts: Mapping[bytes, str]) -> dict[bytes, int]:
        """Return each text's number of tokens by its hash; what is in a window is measured once."""
        counted = await anyio.to_thread.run_sync(self._lengths.of, list(texts.values()))
        tokens = dict(zip(texts, counted, strict=True))
        self._tokens.update(tokens)
        while len(self._tokens) > 2 * WINDOW_TEXTS * MOST_WINDOWS:
            self._tokens.popitem(last=False)
        return tokens

    def batch(self, texts: Mapping[bytes, str], of: int = 0) -> int:
        """Return how many of these texts, from the first on, the next call should have; at least one.

        :param of: how many there are altogether, those that the caller has under way included, if there are more.
        """
        wanted: list[str] = []
        tokens = 0
        # Where several calls run at a time, each gets its share of what there is.
        share = max(SMALL_CALL_TEXTS, -(-max(of, len(texts)) // self.places))
        for one, text in islice(texts.items(), min(share, WINDOW_TEXTS)):
            tokens += self._size(one, text)
            if wanted and tokens > self.pace.call_tokens:
                break
            wanted.append(text)
        return self._calls.fitting(wanted)

    def _size(self, one: bytes, text: str) -> int:
        return self._tokens.get(one) or estimate(text)

    def remembered(self, hashes: Iterable[bytes]) -> dict[bytes, FloatVector]:
        """Return the vectors that were made recently for these texts."""
        return {one: self._made[one] for one in hashes if one in self._made}

    @property
    def suspects(self) -> Suspects:
        """Texts whose call failed, to be asked for apart."""
        return self._calls.suspects

    async def embed(self, texts: Mapping[bytes, str]) -> Made:
        """Return what becomes of each text by its hash, calling the model for those not made recently or under way.

        Suspects are left out: they stay in the backlog, and the embed loop asks for them apart.

        :raises EmbedderUnavailable: the model or provider fails as a whole; what was made before that is remembered.
        """
        made = Made({}, {})
        async with contextlib.aclosing(self.parts(texts)) as parts:
            async for part in parts:
                made.vectors.update(part.vectors)
                made.failed.update(part.failed)
        return made

    async def parts(self, texts: Mapping[bytes, str], *, apart: bool = False) -> AsyncGenerator[Made]:
        """Yield what becomes of texts as soon as it is known, call by call. Suspects are left out.

        Calls go on while the caller deals with a part, so that it can store what has been paid for before the next one
        is lost or waits for an embedder that fails.

        :param apart: whether these are suspects, `together`: they have one call, and those that it does not clear are
            left out.
        :raises EmbedderUnavailable: the model or provider fails as a whole.
        """
        await self.ready.wait()
        missing = dict(texts)
        waited: set[bytes] = set()
        while missing:
            if recent := self.remembered(missing):
                self.avoided("remembered", len(recent.keys() - waited))
                self.avoided("under_way", len(recent.keys() & waited))
                missing = {one: text for one, text in missing.items() if one not in recent}
                yield Made(recent, {})
                continue  # what others were calling for may have been made while the caller dealt with these
            if not apart:
                missing = {one: text for one, text in missing.items() if one not in self.suspects}
            others = {one: self._under_way[one] for one in missing if one in self._under_way}
            waited.update(others)
            ours = {one: text for one, text in missing.items() if one not in others}
            if ours:
                async with contextlib.aclosing(self._claim(ours, apart=apart)) as parts:
                    async for part in parts:
                        for one in (*part.vectors, *part.failed):
                            del missing[one]
                        yield part
                if apart:
                    return
            elif others:
                # Whoever called for these has no call of ours to wait for: a caller's own calls come first.
                await next(iter(others.values())).wait()

    async def embed_within(self, texts: Mapping[bytes, str], budget_s: float) -> dict[bytes, FloatVector]:
        """Return what can be embedded within the budget; nothing when the dispatcher is busy or would take longer.

        A call that overruns continues by itself and its result is remembered.
        """
        made = self.remembered(texts)
        missing = {one: text for one, text in texts.items() if one not in made}
        if (
            not missing
            or not self.free_within(budget_s / 2)
            or not self.pace.fits(len(missing), budget_s)
            or self._calls.fitting(missing.values()) < len(missing)
            or self.far_behind
        ):
            self.avoided("remembered", len(made))
            return made
        done = anyio.Event()

        async def call() -> None:
            try:
                made.update((await self.embed(missing)).vectors)
            except CdcsyncError as error:
                # The texts stay in the backlog, where the loop meets the same error and deals with it.
                log.debug("inline_embedding_failed", embedder=self.embedder.name, error=str(error))
            finally:
                done.set()

        assert self._tasks is not None
        self._tasks.start_soon(call)
        with anyio.move_on_after(budget_s):
            await done.wait()
        return dict(made)

    def texts_within(self, seconds: float) -> int:
        """Return how many texts are likely to take no longer than this; 0 before the first call: nobody knows."""
        if not self.ready.is_set() or not self.pace.measured or self.waits_until(load=True) is not None:
            return 0
        return int(seconds / self.pace.seconds_per_text)

    def forget(self) -> None:
        """Forget the vectors made recently: someone wants them made anew."""
        self._made.clear()

    def avoided(self, reason: str, texts: int) -> None:
        """Count texts that need no call; docs/embedders.md tells the reasons."""
        if texts > 0:
            self._metrics.embed_avoided.labels(self.embedder.name, reason).inc(texts)

    async def _claim(self, texts: Texts, *, apart: bool) -> AsyncGenerator[Made]:
        """Embed texts that nobody else is calling for, and yield what each call makes.

        If the caller is cancelled, because a table has changed, the calls are finished all the same, and what they make
        is remembered for whoever asks next.
        """
        done = anyio.Event()
        self._under_way.update(dict.fromkeys(texts, done))
        failures: list[Exception] = []
        making, parts = anyio.create_memory_object_stream[Made](math.inf)

        def made(part: Made) -> None:
            with contextlib.suppress(anyio.BrokenResourceError):  # nobody waits any more
                making.send_nowait(part)

        async def call() -> None:
            try:
                await (self._calls.ask_apart if apart else self._calls.make)(texts, made)
            except Exception as error:
                failures.append(error)
            finally:
                for one in [one for one, event in self._under_way.items() if event is done]:
                    del self._under_way[one]
                done.set()
                making.close()

        assert self._tasks is not None
        self._tasks.start_soon(call)
        with parts:
            async for part in parts:
                yield part
        if failures:
            raise failures[0]

    def _note_success(self, texts: Texts, vectors: dict[bytes, FloatVector], elapsed: float) -> None:
        name = self.embedder.name
        self._metrics.embed_texts.labels(name).inc(len(texts))
        self._metrics.embed_seconds.labels(name).observe(elapsed)
        tokens = sum(self._size(one, text) for one, text in texts.items())
        self._metrics.embed_tokens.labels(name).inc(tokens)
        self._day.use(datetime.now(UTC), tokens)
        self.pace.succeeded(len(texts), tokens, elapsed)
        self._made.update(vectors)
        size = ENTRY_BYTES + max((vector.nbytes for vector in vectors.values()), default=0)
        most = max(REMEMBERED_VECTORS, REMEMBERED_BYTES // size)
        while len(self._made) > most:
            self._made.popitem(last=False)
