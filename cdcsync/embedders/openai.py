"""Providers with OpenAI's interface, `POST /v1/embeddings`.

Source: OpenAI, API reference, "Create embeddings".
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np

from cdcsync import config
from cdcsync.embedders.foreign import decoded
from cdcsync.embedders.protocol import Vectors
from cdcsync.embedders.provider import Provider
from cdcsync.embedders.remote import RemoteEmbedder
from cdcsync.errors import EmbedError
from cdcsync.malformed import MALFORMED

LEARNING = 0.2
"""How fast the estimate of tokens follows what the provider counts."""

OTHER_TOKENS = 64
"""The most tokens that a provider may count for a text besides one for each byte: special ones, and an instruction."""


class _Item(msgspec.Struct):
    embedding: list[float] | str
    index: int | None = None


class _Answer(msgspec.Struct):
    data: list[_Item]
    usage: Any = None


_DECODER = msgspec.json.Decoder(_Answer)


class OpenAIEmbedder(RemoteEmbedder):
    """Embeds by a provider with OpenAI's interface.

    The address is not part of the identity: the same model may be served elsewhere tomorrow.

    :param name: the section's name in the configuration.
    """

    path = "/embeddings"

    def __init__(self, name: str, settings: config.OpenAIEmbedder) -> None:
        self._settings = settings
        provider = Provider(
            f"embedders.{name}",
            settings,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
        )
        super().__init__(name, settings, provider, kind="openai")

    def _options(self) -> list[str]:
        return ["cut"] if self._settings.request_dimensions else []

    def _body(self, texts: list[str]) -> dict[str, Any]:
        request: dict[str, object] = {"model": self._settings.model, "input": texts}
        if self._settings.request_dimensions:
            request["dimensions"] = self.dimensions
        if self._settings.encoding != "float":  # which is the default, and some servers know no such key
            request["encoding_format"] = self._settings.encoding
        return request

    def _read(self, answer: bytes, tokens: float, size: int) -> list[Vectors]:
        expected = "what /v1/embeddings gives"
        read = decoded(answer, _DECODER, expected)
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, which `unusable` finds
                rows = [_vector(item.embedding) for item in read.data]
        except MALFORMED:
            raise EmbedError(f"the provider's answer is not {expected}") from None
        if counted := _counted(read.usage, size + OTHER_TOKENS * len(rows)):
            self._provider.correct(counted - tokens)
            self._tokens_per_byte += LEARNING * (counted / max(1, size) - self._tokens_per_byte)
        places = [item.index if item.index is not None else at for at, item in enumerate(read.data)]
        if sorted(places) != list(range(len(rows))):
            raise EmbedError("the provider's answer numbers its vectors in another way than the texts")
        return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


def _counted(usage: Any, most: int) -> float | None:
    """Return how many tokens the provider says a request had; None if it says nothing that can be believed."""
    match usage:
        case {"total_tokens": int() | float() as total} if 0 < total <= most:
            return float(total)
        case _:
            return None


def _vector(embedding: list[float] | str) -> Vectors:
    """Return a vector from either encoding, whichever was asked for: servers differ in what they heed."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float32, copy=False)
    return np.array(embedding, np.float32)
