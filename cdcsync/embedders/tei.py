"""Servers of Hugging Face's text-embeddings-inference.

The configuration says which model it is, so that a worker starts while the server is down; the server's `/info` has to
agree once it is there.

Source: text-embeddings-inference, docs/openapi.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from cdcsync import config
from cdcsync.embedders.foreign import decoded
from cdcsync.embedders.protocol import Kind, Vectors
from cdcsync.embedders.provider import Provider
from cdcsync.embedders.remote import OTHER_BYTES, RemoteEmbedder
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected

_VECTORS = msgspec.json.Decoder(list[list[float]])


class _Info(msgspec.Struct):
    model_id: str
    model_sha: str | None = None
    model_type: Any = None
    max_input_length: int | None = None
    max_client_batch_size: int | None = None


_INFO = msgspec.json.Decoder(_Info)


class TeiEmbedder(RemoteEmbedder):
    """Embeds by a server of text-embeddings-inference.

    :param name: the section's name in the configuration.
    """

    path = "/embed"

    def __init__(self, name: str, settings: config.TeiEmbedder) -> None:
        self._settings = settings
        super().__init__(name, settings, Provider(f"embedders.{name}", settings), kind="tei")
        self._known = False

    def _options(self) -> list[str]:
        settings = self._settings
        options = {"normalized": settings.normalize, "truncated": settings.truncate}
        return [settings.revision or "any revision", *(option for option, on in options.items() if on)]

    async def open(self) -> None:
        """Connect, and see from `/info` that the server has the configured model; takes over its limits.

        :raises EmbedderUnavailable: the server is away or not ready.
        :raises EmbedderSetupError: it serves something else.
        """
        await super().open()
        if self._known:
            return
        info = await self._ask_info()
        self._check(info)
        if info.max_client_batch_size is not None and info.max_client_batch_size > 0:
            self._batch_texts = min(self._batch_texts, info.max_client_batch_size)
        self._known = True

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order; raises what every remote embedder's `embed` does.

        A server that was away may come back with another model: it is asked again for its `/info`.
        """
        if self._provider.is_open:
            await self.open()
        try:
            return await super().embed(texts, kind=kind)
        except EmbedderUnavailable:
            self._known = False
            raise

    async def _ask_info(self) -> _Info:
        try:
            answer = await self._provider.ask("/info", at_most=OTHER_BYTES)
        except TextRejected:
            answer = b""
        except EmbedderUnavailable:
            raise
        except EmbedError as error:
            raise EmbedderUnavailable(error.message, where=self._where) from None
        try:
            return decoded(answer, _INFO, "that of /info")
        except EmbedError:
            raise EmbedderSetupError(
                "the server's /info is not that of text-embeddings-inference",
                where=self._where,
                hint="check that base_url is right; a server with /v1/embeddings is of type openai",
            ) from None

    def _check(self, info: _Info) -> None:
        settings = self._settings
        if info.model_id != settings.model:
            raise EmbedderSetupError(
                f"the server has the model {info.model_id}, {settings.model} is configured",
                where=f"{self._where}.model",
                hint="set model to what the server has, if that is the right one; vectors of two models do not mix",
            )
        if settings.revision is not None and info.model_sha != settings.revision:
            raise EmbedderSetupError(
                f"the server has revision {info.model_sha}, {settings.revision} is configured",
                where=f"{self._where}.revision",
                hint="start the server with that revision, or set revision to what it has",
            )
        if info.model_type is not None and not (isinstance(info.model_type, dict) and "embedding" in info.model_type):
            raise EmbedderSetupError(
                "the server's model makes no embeddings", where=f"{self._where}.model", hint="serve an embedding model"
            )
        reads, wanted = info.max_input_length, settings.max_input_tokens
        if reads is not None and wanted is not None and reads < wanted:
            raise EmbedderSetupError(
                f"the model reads {reads} tokens, max_input_tokens is {wanted}",
                where=f"{self._where}.max_input_tokens",
                hint="lower it: what the model does not read of a chunk is refused or left out",
            )

    def _body(self, texts: list[str]) -> dict[str, Any]:
        return {"inputs": texts, "normalize": self._settings.normalize, "truncate": self._settings.truncate}

    def _read(self, answer: bytes, tokens: float, size: int) -> list[Vectors]:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, which `unusable` finds
            return [np.array(row, np.float32) for row in decoded(answer, _VECTORS, "what /embed gives")]
