"""Shared by the embedders over HTTP: requests that fit, and answers that are read with suspicion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cdcsync import config
from cdcsync.embedders.protocol import Distance, Kind, Vectors
from cdcsync.embedders.provider import QUERY_TRIES, Provider
from cdcsync.errors import EmbedderUnavailable, EmbedError

TOKENS_PER_BYTE = 0.3
"""English has about 0.25, most other languages in UTF-8 about as many. Providers that say what a request had correct
it."""

BYTES_PER_NUMBER = 40
"""A generous bound for one component of a vector in JSON."""

OTHER_BYTES = 1024 * 1024
"""The most bytes that an answer may hold besides its vectors."""


class RemoteEmbedder:
    """Embeds by asking a provider; one subclass for each way of asking."""

    tokenizer_json: str | None = None
    path = ""
    """Where texts are posted, after the base URL."""

    def __init__(
        self, name: str, settings: config.OpenAIEmbedder | config.TeiEmbedder, provider: Provider, *, kind: str
    ) -> None:
        self.name = name
        self.dimensions = settings.dimensions
        self.distance: Distance = settings.distance
        self.max_input_tokens = settings.max_input_tokens
        self.concurrency = settings.concurrency
        self.origin = settings.base_url
        self.identity = ":".join([kind, settings.model, str(settings.dimensions), *self._options()])
        prefixes = {"document": settings.document_prefix, "query": settings.query_prefix}
        if any(prefixes.values()):
            self.identity += f":prefixes {_digest(prefixes)}"
        self._bodies: Mapping[Kind, Mapping[str, Any]] = {
            "document": settings.document_body,
            "query": settings.query_body,
        }
        if any(self._bodies.values()):
            self.identity += f":body {_digest(self._bodies)}"
        self._prefixes: Mapping[Kind, str] = {
            "document": settings.document_prefix,
            "query": settings.query_prefix,
        }
        self._where = provider.where
        self._provider = provider
        self._batch_texts = settings.batch_texts
        self._batch_tokens = settings.batch_tokens
        self._tokens_per_byte = TOKENS_PER_BYTE

    def _options(self) -> list[str]:
        """Return what else decides the vectors, for the identity."""
        return []

    def fitting(self, texts: Sequence[str]) -> int:
        """Return how many of these texts, from the first on, go into one request: at least one."""
        tokens = 0.0
        for count, text in enumerate(texts[: self._batch_texts]):
            tokens += self._tokens([text])
            if count and tokens > self._batch_tokens:
                return count
        return min(len(texts), self._batch_texts)

    async def open(self) -> None:
        """Make the pool of connections. Calling it again does nothing.

        :raises EmbedderSetupError: the key's file cannot be read.
        """
        self._provider.open()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._provider.aclose()

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order; in one request where they fit in one.

        :raises EmbedderUnavailable: the provider is away or overloaded, or the embedder is not open.
        :raises TextRejected: the provider says no to these texts.
        :raises EmbedError: it fails at them.
        :raises EmbedderSetupError: it says that the key, the address or the model is not right.
        """
        if not self._provider.is_open:
            raise EmbedderUnavailable("the embedder is not open", where=self._where)
        sent = [self._prefixes[kind] + text for text in texts]
        parts = []
        while sent:
            count = self.fitting(sent)
            parts.append(await self._request(sent[:count], kind))
            sent = sent[count:]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), np.float32)

    async def _request(self, texts: list[str], kind: Kind) -> Vectors:
        """Send one request and read its answer."""
        tokens = self._tokens(texts)
        answer = await self._provider.ask(
            self.path,
            msgspec.json.encode({**self._body(texts), **self._bodies[kind]}),
            texts=texts,
            tokens=tokens,
            at_most=len(texts) * self.dimensions * BYTES_PER_NUMBER + OTHER_BYTES,
            tries=QUERY_TRIES if kind == "query" else 1,
        )
        rows = self._read(answer, tokens, sum(len(text.encode()) for text in texts))
        if len(rows) != len(texts):
            raise EmbedError(f"the provider gives {len(rows)} vectors for {len(texts)} texts", where=self._where)
        lengths = {len(row) for row in rows} - {self.dimensions}
        if lengths:
            raise EmbedError(
                f"the provider gives vectors of {min(lengths)} dimensions, {self.dimensions} are configured",
                where=f"{self._where}.dimensions",
                hint="check that the model is the right one, and set dimensions to the length of its vectors",
            )
        return np.stack(rows).astype(np.float32, copy=False)

    def _tokens(self, texts: Sequence[str]) -> float:
        return sum(len(text.encode()) for text in texts) * self._tokens_per_byte + len(texts)

    def _body(self, texts: list[str]) -> dict[str, Any]:
        """Return what the body of a request holds."""
        raise NotImplementedError

    def _read(self, answer: bytes, tokens: float, size: int) -> list[Vectors]:
        """Return the answer's vectors, in the texts' order.

        :param tokens: how many were estimated.
        :param size: bytes of the texts.
        :raises EmbedError: the answer has another shape.
        """
        raise NotImplementedError


def _digest(settings: Mapping[Any, Any]) -> str:
    plain = sorted(
        (key, sorted(value.items()) if isinstance(value, Mapping) else value) for key, value in settings.items()
    )
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:12]
