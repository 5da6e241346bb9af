"""Rerankers: models that read a query and a text together, and say how well the one answers the other.

They are slower than a search and better judges, so they order the best of what it found. A cross-encoder runs in a
thread of this process; text-embeddings-inference answers `POST /rerank`.

Source: Nogueira and Cho, "Passage Re-ranking with BERT" (2019); text-embeddings-inference, `/rerank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, assert_never

import anyio
import msgspec
import numpy as np
import numpy.typing as npt

from cdcsync import config
from cdcsync.embedders.foreign import decoded, first_line
from cdcsync.embedders.provider import QUERY_TRIES, Provider
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, leading
from cdcsync.process.threads import Calls, Loading

Scores = npt.NDArray[np.float32]
"""`float32[n]`, one for each text: higher is better."""

INSTALL = "pip install 'cdcsync[local]'"

BYTES_PER_SCORE = 200
"""More than an entry of TEI's answer takes, without the text, which we do not ask for."""


class Reranker(Protocol):
    """Scores texts against a query."""

    @property
    def candidates(self) -> int:
        """How many hits of a search it is asked about."""

    async def open(self) -> None:
        """Load or connect to the model. Calling it again does nothing.

        :raises EmbedderUnavailable: it failed for a reason that passes.
        :raises EmbedderSetupError: it cannot be used as configured.
        """

    async def score(self, query: str, texts: Sequence[str]) -> Scores:
        """Return how well each text answers the query.

        :raises EmbedderUnavailable: the model is away.
        :raises EmbedError: it gave something else than a number for each text.
        """

    async def aclose(self) -> None:
        """Give back memory and connections."""


def make_reranker(name: str, settings: config.Reranker) -> Reranker:
    """Build the reranker that a section of the configuration describes; loads nothing."""
    match settings:
        case config.SentenceTransformersReranker():
            return CrossEncoderReranker(name, settings)
        case config.TeiReranker():
            return TeiReranker(name, settings)
        case unreachable:
            assert_never(unreachable)


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers."""

    def __init__(self, name: str, settings: config.SentenceTransformersReranker) -> None:
        self.candidates = settings.candidates
        self._settings = settings
        self._where = f"rerankers.{name}"
        self._calls = Calls(1)  # a forward pass uses all processors
        self._loading = Loading()
        self._model: Any = None

    async def open(self) -> None:
        """Load the model, in a thread."""
        if self._model is None:
            await self._loading.run(self._load)

    def _load(self) -> None:
        settings = self._settings
        try:
            from sentence_transformers import CrossEncoder

            self._model = CrossEncoder(
                settings.model,
                revision=settings.revision,
                device=None if settings.device == "auto" else settings.device,
                trust_remote_code=settings.trust_remote_code,
                # Other formats of weights can hold code.
                model_kwargs={"use_safetensors": True},
            )
        except ImportError as error:
            raise EmbedderSetupError(
                "sentence-transformers is not installed", where=self._where, hint=INSTALL
            ) from error
        except Exception as error:  # whatever the libraries raise for a model that they cannot load
            raise EmbedderSetupError(
                f"{settings.model} cannot be loaded: {type(error).__name__}: {first_line(error)}",
                where=f"{self._where}.model",
                hint="name a cross-encoder of the hub, or a directory that holds one, with safetensors weights",
            ) from error

    async def score(self, query: str, texts: Sequence[str]) -> Scores:
        """Return how well each text answers the query.

        :raises EmbedderUnavailable: the model is not open or failed, for example for want of memory.
        """
        if self._model is None:
            raise EmbedderUnavailable("the reranker is not open", where=self._where)
        made = await self._calls.run(lambda: self._predict(query, list(texts)))
        return _checked(made, len(texts), self._where)

    def _predict(self, query: str, texts: list[str]) -> Any:
        pairs = [(query, text) for text in texts]
        try:
            return self._model.predict(pairs, batch_size=self._settings.batch_size, show_progress_bar=False)
        except Exception as error:  # whatever torch or a module's code may raise
            raise EmbedderUnavailable(
                f"the model does not run: {first_line(error, [query, *texts])}",
                where=self._where,
                hint="if the device lacks memory, lower batch_size or free some",
            ) from error

    async def aclose(self) -> None:
        """Let go of the model."""
        self._calls.close()
        self._model = None


class _Ranked(msgspec.Struct):
    index: int
    score: float


_RANKED = msgspec.json.Decoder(list[_Ranked])


class TeiReranker:
    """A server of text-embeddings-inference."""

    def __init__(self, name: str, settings: config.TeiReranker) -> None:
        self.candidates = settings.candidates
        self._settings = settings
        self._where = f"rerankers.{name}"
        self._provider = Provider(self._where, settings)

    async def open(self) -> None:
        """Make the pool of connections."""
        self._provider.open()

    async def score(self, query: str, texts: Sequence[str]) -> Scores:
        """Return how well each text answers the query."""
        if not self._provider.is_open:
            raise EmbedderUnavailable("the reranker is not open", where=self._where)
        scores = np.full(len(texts), np.nan, np.float32)

        async def ask(start: int) -> None:
            part = texts[start : start + self._settings.batch_texts]
            body = msgspec.json.encode({"query": query, "texts": part, "truncate": True, "raw_scores": True})
            answer = await self._provider.ask(
                "/rerank", body, texts=[query, *part], at_most=1024 + BYTES_PER_SCORE * len(part), tries=QUERY_TRIES
            )
            for ranked in decoded(answer, _RANKED, "a list of index and score"):
                if not 0 <= ranked.index < len(part):
                    raise EmbedError("the reranker scored a text that it was not given", where=self._where)
                scores[start + ranked.index] = ranked.score

        try:
            async with anyio.create_task_group() as tasks:
                for start in range(0, len(texts), self._settings.batch_texts):
                    tasks.start_soon(ask, start)
        except BaseExceptionGroup as group:
            raise leading(group) from None
        return _checked(scores, len(texts), self._where)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._provider.aclose()


def _checked(made: Any, count: int, where: str) -> Scores:
    scores: Scores = np.asarray(made, np.float32)
    if scores.shape != (count,) or not np.isfinite(scores).all():
        raise EmbedError(
            "the reranker did not give one finite number for each text",
            where=where,
            hint="check that the model is a reranker: a cross-encoder with one label",
        )
    return scores
