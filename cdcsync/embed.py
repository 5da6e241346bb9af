"""The embed flow: from texts that wait in the backlog to vectors, at the model's pace and nobody else's.

    backlog ─► window (live lane first) ─► sorted by length, cut into batches ─► model ─► vectors

A *desk* is one embedder with its queue of one: the embed loops of all indexes that use it take turns, and apply may
use it inline when it is idle. What an inline call does not finish within its budget is not lost: the desk keeps the
result, and the loop stores it when it finds the text in the backlog.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import cast

import anyio
import anyio.abc
import numpy as np
import numpy.typing as npt
import structlog

from cdcsync.embedders.protocol import Embedder, validate
from cdcsync.errors import (
    CdcsyncError,
    EmbedderSetupError,
    EmbedderUnavailable,
    EmbedError,
    Retry,
    TargetUnavailable,
    TextRejected,
)
from cdcsync.index.backlog import Backlog, Waiting
from cdcsync.index.schema import IndexSpec
from cdcsync.metrics import Metrics
from cdcsync.postgres import connect, speaking_of

log = structlog.get_logger()

FloatVector = npt.NDArray[np.float32]

WINDOW_TEXTS = 512
"""Texts read at once, to be sorted by length: large enough that batches have little padding, small enough to keep
in memory."""

MIN_BATCH_TEXTS = 32
"""Texts of one call at least: fewer leave a processor's vector units idle."""

BATCH_S = 0.25
"""A call is made as large as takes about this long: a live change waits behind one call, not behind the window."""

REMEMBERED_VECTORS = 4_096
"""Vectors kept for texts that come back at once: rows skipped while apply held them, late inline results. 6 MB at
384 dimensions."""

POLL_S = 5.0
"""How often the backlog is looked at without a word from apply: postponed texts become due by themselves."""

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 300.0


def backoff_s(attempt: int, *, first: float = FIRST_DELAY_S, most: float = MAX_DELAY_S) -> float:
    """Return how long to wait after failure number `attempt` (from 0), in seconds.

    The bound doubles up to `most`; the wait is a random part of its upper half, so that callers spread out.
    """
    bound = min(most, first * 2.0 ** min(attempt, 30))
    return bound * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, guards nothing


class Desk:
    """One embedder, used by one caller at a time."""

    def __init__(self, embedder: Embedder, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.embedder = embedder
        self._metrics = metrics
        self._clock = clock
        self._turn = anyio.Lock()
        self._made: OrderedDict[bytes, FloatVector] = OrderedDict()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._seconds_per_text = 0.0
        self.ready = anyio.Event()
        self.problem: CdcsyncError | None = None

    async def run(self) -> None:
        """Load the model, trying again while that may help, then hold the inline calls until cancelled."""
        attempt = 0
        while True:
            try:
                await self.embedder.open()
                break
            except CdcsyncError as error:
                self.problem = error
                if error.retry is not Retry.AUTOMATIC:
                    # Text, metadata and deletes go on; vectors wait until someone has mended this and restarts.
                    log.error("embedder_unusable", embedder=self.embedder.name, error=str(error), fix=error.hint)
                    return
                log.warning("embedder_unavailable", embedder=self.embedder.name, error=str(error))
                await anyio.sleep(backoff_s(attempt))
                attempt += 1
        self.problem = None
        log.info("embedder_ready", embedder=self.embedder.name, model=self.embedder.identity)
        async with anyio.create_task_group() as self._tasks:
            self.ready.set()
            await anyio.sleep_forever()

    @property
    def idle(self) -> bool:
        """Whether a call could begin now."""
        return self.ready.is_set() and self._tasks is not None and not self._turn.locked()

    @property
    def batch_texts(self) -> int:
        """How many texts a call should have."""
        if not self._seconds_per_text:
            return MIN_BATCH_TEXTS
        return max(MIN_BATCH_TEXTS, min(WINDOW_TEXTS, int(BATCH_S / self._seconds_per_text)))

    def remembered(self, hashes: Sequence[bytes]) -> dict[bytes, FloatVector]:
        """Return the vectors that were made recently for these texts."""
        return {one: self._made[one] for one in hashes if one in self._made}

    async def embed(self, texts: Mapping[bytes, str]) -> dict[bytes, FloatVector]:
        """Return the vector of each text by its hash, calling the model for those not made recently.

        :raises EmbedderUnavailable: the model or provider fails as a whole.
        :raises TextRejected: one of the texts cannot be embedded.
        """
        async with self._turn:
            made = self.remembered(list(texts))
            missing = {one: text for one, text in texts.items() if one not in made}
            if missing:
                made.update(await self._call(missing))
        return made

    async def embed_within(self, texts: Mapping[bytes, str], budget_s: float) -> dict[bytes, FloatVector]:
        """Return what can be embedded within the budget; nothing when the desk is busy or would take longer.

        A call that overruns goes on by itself and its result is remembered.
        """
        made = self.remembered(list(texts))
        missing = {one: text for one, text in texts.items() if one not in made}
        if not missing or not self.idle or self._seconds_per_text * len(missing) > budget_s:
            return made
        done = anyio.Event()

        async def call() -> None:
            try:
                made.update(await self.embed(missing))
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

    async def _call(self, texts: Mapping[bytes, str]) -> dict[bytes, FloatVector]:
        await self.ready.wait()
        name = self.embedder.name
        started = self._clock()
        try:
            vectors = await self.embedder.embed(list(texts.values()))
            validate(vectors, len(texts), self.embedder.dimensions)
        except EmbedError as error:
            self._metrics.embed_errors.labels(name, type(error).__name__).inc()
            raise
        elapsed = self._clock() - started
        self._metrics.embed_texts.labels(name).inc(len(texts))
        self._metrics.embed_seconds.labels(name).observe(elapsed)
        each = elapsed / len(texts)
        self._seconds_per_text = each if not self._seconds_per_text else 0.8 * self._seconds_per_text + 0.2 * each
        made = dict(zip(texts, vectors, strict=True))
        self._made.update(made)
        while len(self._made) > REMEMBERED_VECTORS:
            self._made.popitem(last=False)
        return made


class EmbedLoop:
    """Empties one index's backlog for ever, on a connection of its own."""

    def __init__(self, dsn: str, schema: str, spec: IndexSpec, desk: Desk, metrics: Metrics) -> None:
        self._dsn = dsn
        self._schema = schema
        self._spec = spec
        self._desk = desk
        self._metrics = metrics
        self._wake = anyio.Event()
        self._live = False
        self._outage = 0
        self.drained: Callable[[], None] = lambda: None
        """Called each time nothing is left that is due."""
        self.problem: str | None = None
        """Why nothing is being embedded just now, for the status page."""

    def notify(self, *, live: bool) -> None:
        """Say that the backlog has grown; `live` that some of it should not wait behind a window."""
        self._live = self._live or live
        self._wake.set()

    async def run(self) -> None:
        """Embed until cancelled, connecting again whenever the target was away."""
        await self._desk.ready.wait()
        attempt = 0
        while True:
            try:
                async with AsyncExitStack() as stack:
                    connection = await connect(self._dsn, "target", application_name=f"cdcsync embed {self._spec.name}")
                    stack.push_async_callback(connection.close)
                    connection.prepare_threshold = None
                    backlog = Backlog(connection, self._schema, self._spec)
                    with speaking_of("target", where=f"index {self._spec.name}"):
                        await backlog.open()
                        attempt = 0
                        await self._drain_for_ever(backlog)
            except TargetUnavailable as error:
                log.warning("target_unavailable", index=self._spec.name, loop="embed", error=str(error))
                self._metrics.reconnects.labels("target").inc()
                await anyio.sleep(backoff_s(attempt, first=0.2, most=15))
                attempt += 1

    async def _drain_for_ever(self, backlog: Backlog) -> None:
        while True:
            self._wake = anyio.Event()
            self._live = False
            if await self._window(backlog, lane=None) == 0:
                self.drained()
                with anyio.move_on_after(POLL_S):
                    await self._wake.wait()

    async def _window(self, backlog: Backlog, *, lane: int | None) -> int:
        """Embed one window of due texts and return how many there were."""
        window = await backlog.window(WINDOW_TEXTS, lane=lane)
        # Texts of about the same length together: a batch is padded to its longest.
        window.sort(key=lambda waiting: (waiting.lane, len(waiting.text)))
        found = len(window)
        while window:
            if self._live and lane is None and window[0].lane > 0:
                self._live = False
                while await self._window(backlog, lane=0):
                    pass
            batch, window = window[: self._desk.batch_texts], window[self._desk.batch_texts :]
            # Texts that changed again while they waited in the window are not worth a call.
            waiting = await backlog.still_waiting([one.hash for one in batch])
            if batch := [one for one in batch if one.hash in waiting]:
                await self._batch(backlog, batch)
        return found

    async def _batch(self, backlog: Backlog, batch: Sequence[Waiting]) -> None:
        try:
            made = await self._desk.embed({waiting.hash: waiting.text for waiting in batch})
        except (EmbedderUnavailable, EmbedderSetupError) as error:
            # The provider is down or refuses us, not the text: nobody's attempt.
            self.problem = str(error)
            asked = error.retry_after_s if isinstance(error, EmbedderUnavailable) else None
            delay = asked or backoff_s(self._outage, most=60)
            log.warning(
                "embedder_unavailable", embedder=self._desk.embedder.name, error=str(error), delay_s=round(delay, 1)
            )
            self._outage += 1
            await anyio.sleep(delay)
            return
        except EmbedError as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._batch(backlog, batch[:middle])
                await self._batch(backlog, batch[middle:])
                return
            (poison,) = batch
            log.warning("text_not_embedded", index=self._spec.name, attempts=poison.attempts + 1, error=str(error))
            await backlog.postpone(
                [poison.hash], str(error), delay_s=backoff_s(poison.attempts), final=isinstance(error, TextRejected)
            )
            return
        self._outage = 0
        self.problem = None
        stored = await backlog.store(made)
        self._metrics.vectors.labels(self._spec.name, "backlog").inc(stored)


def vector_text(vector: FloatVector) -> str:
    """Return a vector in pgvector's text form, exact to the last bit of a float32."""
    return "[" + ",".join([str(value) for value in cast(list[float], vector.tolist())]) + "]"
