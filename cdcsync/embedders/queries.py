"""Embedding what users search for: one text at a time, beside others, and soon or not at all.

A search can do without a vector, and nobody wants to wait for one. So a model that does not answer in time, or failed a
moment ago, is *away*: searches go by words until it is back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import anyio

from cdcsync.embedders.protocol import Embedder, Vectors, validate
from cdcsync.errors import EmbedderUnavailable

REMEMBERED = 256
"""Queries whose vectors are kept: those of the next page, or of a second index, cost no call."""

AWAY_S = 5.0
"""How long a model that failed is left alone: long enough to spare a provider in trouble, short for a person."""


class QueryEmbedder:
    """An embedder for queries, opened when the first one comes and kept open.

    :param timeout_s: how long a call may take. Loading the model at first is not counted.
    """

    def __init__(self, embedder: Embedder, *, timeout_s: float) -> None:
        self.embedder = embedder
        self._timeout_s = timeout_s
        self._room = anyio.CapacityLimiter(embedder.concurrency)
        self._opening = anyio.Lock()
        self._opened = False
        self._away_until = -1.0
        self._why: EmbedderUnavailable | None = None
        self._remembered: dict[str, Vectors] = {}

    async def open(self) -> None:
        """Load or connect to the model. Calling it again does nothing.

        :raises EmbedderUnavailable: it failed for a reason that passes.
        :raises EmbedderSetupError: the model or provider cannot be used as configured.
        """
        async with self._opening:
            if not self._opened:
                with self._noticing_absence():
                    await self.embedder.open()
                self._opened = True

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the queries' vectors, `float32[n, dimensions]`.

        :raises EmbedderUnavailable: the model is away.
        :raises TextRejected: one of these texts cannot be embedded.
        :raises EmbedderSetupError: the model or provider cannot be used as configured.
        """
        await self.open()
        with self._noticing_absence():
            with anyio.move_on_after(self._timeout_s):
                async with self._room:
                    vectors = await self.embedder.embed(texts, kind="query")
                    validate(vectors, len(texts), self.embedder.dimensions)
                    return vectors
            raise EmbedderUnavailable(
                f"the model did not answer within {self._timeout_s:g} s", where=f"embedders.{self.embedder.name}"
            )

    async def embed_one(self, text: str) -> Vectors:
        """Return a query's vector, `float32[dimensions]`; see `embed`. The last ones are remembered."""
        vector = self._remembered.pop(text, None)
        if vector is None:
            vector = (await self.embed([text]))[0]
        self._remembered[text] = vector  # the newest is last
        if len(self._remembered) > REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return vector

    async def aclose(self) -> None:
        """Let go of the model."""
        self._opened = False
        await self.embedder.aclose()

    @contextmanager
    def _noticing_absence(self) -> Iterator[None]:
        """Refuse calls for a while after one has found the model away."""
        if (why := self._why) is not None and anyio.current_time() < self._away_until:
            raise EmbedderUnavailable(why.message, where=why.where, hint=why.hint)
        try:
            yield
        except EmbedderUnavailable as error:
            self._why, self._away_until = error, anyio.current_time() + AWAY_S
            raise
        self._why = None
