"""Models as searches use them: for one text at a time, beside others, and soon or not at all.

A search can do without a vector and without a reranker, and nobody wants to wait for one. So a model that does not
answer in time, or failed a moment ago, is *away*: searches do without it until it is back. So is a model that is still
being loaded, and a provider that refuses us, because a key has expired or a firewall does not like the request: it
accepted us when it was set up.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import anyio
import numpy as np

from cdcsync.config import Config
from cdcsync.embedders import embedder_of, make_embedder
from cdcsync.embedders.protocol import Embedder, Vectors, validate
from cdcsync.embedders.remote import RemoteEmbedder
from cdcsync.embedders.reranking import Reranker, Scores, make_reranker
from cdcsync.errors import EmbedderLoading, EmbedderSetupError, EmbedderUnavailable, leading
from cdcsync.model.spec import IndexSpec

T = TypeVar("T")

REMEMBERED = 256
REMEMBERED_S = 60.0
"""So many queries, for so long, keep their vectors: those of the next page, or of a second index, cost no call."""

AWAY_S = 5.0
"""How long a model that failed is left alone: long enough to spare a provider in trouble, short for a person."""


class _Model(Protocol):
    async def open(self) -> None: ...

    async def aclose(self) -> None: ...


class OnCall:
    """A model that is opened when it is first needed and kept open.

    :param where: the section that describes it, for messages.
    :param timeout_s: how long a call may take for each query, and for a model that has to be loaded first. The load
        continues after that.
    :param concurrency: how many calls may run at the same time.
    :param remote: whether a provider answers, also when the model is opened.
    """

    def __init__(self, model: _Model, where: str, *, timeout_s: float, concurrency: int, remote: bool = False) -> None:
        self._model = model
        self._where = where
        self._timeout_s = timeout_s
        self._remote = remote
        self._room = anyio.CapacityLimiter(concurrency)
        self._opening = anyio.Lock()
        self._opened = False
        self._away_until = -1.0
        self._why: EmbedderUnavailable | EmbedderSetupError | None = None

    async def open(self) -> None:
        """Load or connect to the model, however long that takes. Calling it again does nothing.

        :raises EmbedderUnavailable: it failed for a reason that passes, or its provider refuses us.
        :raises EmbedderSetupError: the model cannot be loaded on this machine.
        """
        async with self._opening:
            if not self._opened:
                with self._noticing_absence(), _refusing_is_absence() if self._remote else nullcontext():
                    await self._model.open()
                self._opened = True

    async def aclose(self) -> None:
        """Let go of the model."""
        self._opened = False
        await self._model.aclose()

    async def _in_time(self, call: Callable[[], Awaitable[T]], *, queries: int = 1) -> T:
        """Make a call of the model, once it is open.

        :param queries: how many it is for. Each has its time: a model that works on many is not away.
        :raises EmbedderUnavailable: the model is away, refuses us, or is not loaded or does not answer in time.
        :raises EmbedderSetupError: the model cannot be loaded on this machine.
        """
        with self._noticing_absence():
            with anyio.move_on_after(timeout_s := self._timeout_s * queries):
                await self.open()
                with _refusing_is_absence():
                    async with self._room:
                        return await call()
            if not self._opened:
                raise EmbedderLoading(f"the model was not loaded within {timeout_s:g} s", where=self._where)
            raise EmbedderUnavailable(f"the model did not answer within {timeout_s:g} s", where=self._where)

    @contextmanager
    def _noticing_absence(self) -> Iterator[None]:
        """Refuse calls for a while after one has found that the model is away or cannot be loaded."""
        if (why := self._why) is not None and anyio.current_time() < self._away_until:
            raise type(why)(why.message, where=why.where, hint=why.hint)
        try:
            yield
        except (EmbedderUnavailable, EmbedderSetupError) as error:
            self._why, self._away_until = error, anyio.current_time() + AWAY_S
            raise
        self._why = None


@contextmanager
def _refusing_is_absence() -> Iterator[None]:
    """Take a provider that refuses the key, the address or the model for one that is away, with the same words."""
    try:
        yield
    except EmbedderSetupError as error:
        raise EmbedderUnavailable(error.message, where=error.where, hint=error.hint) from error


class QueryEmbedder(OnCall):
    """An embedder for queries."""

    def __init__(self, embedder: Embedder, *, timeout_s: float) -> None:
        where = f"embedders.{embedder.name}"
        super().__init__(
            *(embedder, where),
            timeout_s=timeout_s,
            concurrency=embedder.concurrency,
            remote=isinstance(embedder, RemoteEmbedder),
        )
        self.embedder = embedder
        self._share = anyio.CapacityLimiter(max(1, embedder.concurrency // 2))
        self._remembered: dict[str, tuple[float, Vectors]] = {}
        self._asking: dict[str, tuple[anyio.Lock, int]] = {}

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the queries' vectors, `float32[n, dimensions]`.

        :raises EmbedderUnavailable: the model is away, or the provider refuses us.
        :raises TextRejected: one of these texts cannot be embedded.
        :raises EmbedderSetupError: the model cannot be loaded on this machine.
        """
        vectors = await self._in_time(lambda: self.embedder.embed(texts, kind="query"), queries=max(1, len(texts)))
        validate(vectors, len(texts), self.embedder.dimensions)
        return vectors

    async def embed_each(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of queries as `embed` does, each by a call of its own as `embed_one` makes it.

        All that are embedded so take half of the model's calls at the same time: queries of searches come between them.
        """
        vectors: dict[int, Vectors] = {}

        async def embed(at: int) -> None:
            async with self._share:
                vectors[at] = await self.embed_one(texts[at])

        try:
            async with anyio.create_task_group() as tasks:
                for at in range(len(texts)):
                    tasks.start_soon(embed, at)
        except BaseExceptionGroup as group:
            raise leading(group) from None
        return np.stack([vectors[at] for at in range(len(texts))])

    async def embed_one(self, text: str) -> Vectors:
        """Return a query's vector, `float32[dimensions]`; see `embed`.

        The last ones are remembered, and callers that ask for the same text at the same time share one call.
        """
        async with self._turn(text):
            now = anyio.current_time()
            until, vector = self._remembered.pop(text, (now, None))
            if vector is None or until <= now:
                vector = (await self.embed([text]))[0]
                until = anyio.current_time() + REMEMBERED_S
            self._remembered[text] = until, vector  # the newest is last
            if len(self._remembered) > REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            return vector

    @asynccontextmanager
    async def _turn(self, text: str) -> AsyncIterator[None]:
        """Admit one caller at a time for a text: the next one finds it remembered, unless the first was cancelled."""
        lock, callers = self._asking.get(text, (anyio.Lock(), 0))
        self._asking[text] = lock, callers + 1
        try:
            async with lock:
                yield
        finally:
            lock, callers = self._asking[text]
            if callers > 1:
                self._asking[text] = lock, callers - 1
            else:
                del self._asking[text]


class QueryReranker(OnCall):
    """A reranker for what searches found."""

    def __init__(self, reranker: Reranker, name: str, *, timeout_s: float) -> None:
        super().__init__(reranker, f"rerankers.{name}", timeout_s=timeout_s, concurrency=4)
        self.candidates = reranker.candidates
        self._reranker = reranker

    async def score(self, query: str, texts: Sequence[str]) -> Scores:
        """Return how well each text answers the query.

        :raises EmbedderUnavailable: the model is away, or the provider refuses us.
        :raises EmbedderSetupError: it cannot be loaded on this machine.
        :raises EmbedError: it gave something else than a number for each text.
        """
        return await self._in_time(lambda: self._reranker.score(query, texts))


class QueryModels:
    """The models and rerankers of a configuration, each made when it is first asked for and kept open.

    :param timeout_s: how long a call of one of them may take.
    """

    def __init__(self, config: Config, timeout_s: float) -> None:
        self._config = config
        self._timeout_s = timeout_s
        self._embedders: dict[str, QueryEmbedder] = {}
        self._unusable: dict[str, tuple[EmbedderSetupError, float]] = {}
        """Why the configuration has no embedder of a model, and until when it is not looked through again."""
        self._rerankers: dict[str, QueryReranker] = {}

    def embedder(self, spec: IndexSpec) -> QueryEmbedder:
        """Return the model that made the vectors of an index.

        :raises EmbedderSetupError: it cannot be used as configured, or the configuration does not have it.
        """
        if spec.model not in self._embedders:
            why, until = self._unusable.get(spec.model, (None, -1.0))
            if why is not None and anyio.current_time() < until:
                raise type(why)(why.message, where=why.where, hint=why.hint)
            try:
                embedder = embedder_of(self._config.embedders, spec.model, spec.config.embedder)
            except EmbedderSetupError as error:
                self._unusable[spec.model] = error, anyio.current_time() + AWAY_S
                raise
            self._embedders[spec.model] = QueryEmbedder(embedder, timeout_s=self._timeout_s)
        return self._embedders[spec.model]

    async def open_embedder(self, spec: IndexSpec) -> None:
        """Load the model that made the vectors of an index, if the configuration has it: searches say if it has not.

        :raises EmbedderSetupError: it cannot be used as configured.
        :raises EmbedderUnavailable: it failed for a reason that passes, or its provider refuses us.
        """
        try:
            embedder = self.embedder(spec)
        except EmbedderSetupError:
            if (section := self._config.embedders.get(spec.config.embedder)) is not None:
                make_embedder(spec.config.embedder, section)
            return
        await embedder.open()

    def reranker(self, name: str) -> QueryReranker:
        """Return the reranker of a [rerankers] section."""
        if name not in self._rerankers:
            reranker = make_reranker(name, self._config.rerankers[name])
            self._rerankers[name] = QueryReranker(reranker, name, timeout_s=self._timeout_s)
        return self._rerankers[name]

    async def open_reranker(self, name: str | None) -> None:
        """Load the reranker that an index names, if it names one.

        :raises EmbedderUnavailable: it failed for a reason that passes.
        :raises EmbedderSetupError: it cannot be used as configured.
        """
        if name is not None:
            await self.reranker(name).open()

    async def aclose(self) -> None:
        """Close all of them."""
        async with AsyncExitStack() as stack:
            for model in [*self._embedders.values(), *self._rerankers.values()]:
                stack.push_async_callback(model.aclose)
