"""A local model, run by sentence-transformers.

Until `open`, a model is known by its files alone (`description`): torch takes some 10 s to import, and most commands
need to know about a model without using it.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import anyio
import anyio.to_thread
import numpy as np

from cdcsync import config
from cdcsync.embedders.description import describe
from cdcsync.embedders.model_files import INSTALL, fetch_weights, locate, quiet
from cdcsync.embedders.protocol import Distance, Kind, Vectors
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable

SINGLE_THREAD_TEXTS = 8
"""Calls of up to so many texts run on one thread: handing out such small work, and waiting for each other in a busy
loop, takes several threads longer than the work, and starves whatever else runs (measured: 14 ms against 110 ms and
more)."""


class SentenceTransformersEmbedder:
    """Embeds with a local model; `float32[n, dimensions]`, L2-normalised if the model normalises.

    One call runs at a time, in a thread: the model uses the whole device anyway. A thread cannot be stopped, so a
    cancelled call holds on until its texts are done.

    :param name: the section's name in the configuration.
    :raises EmbedderSetupError: the model is not to be found or not supported.
    """

    concurrency = 1

    def __init__(self, name: str, settings: config.SentenceTransformersEmbedder) -> None:
        self.name = name
        self._where = f"embedders.{name}"
        self._settings = settings
        self._files = locate(settings.model, settings.revision, where=self._where)
        self._description = describe(self._files, where=self._where)
        self._turn = anyio.CapacityLimiter(1)
        self._model: Any = None
        self._threads: int | None = None
        """How many threads torch uses on a processor; None on an accelerator."""

    @cached_property
    def identity(self) -> str:
        """What decides the vectors. Blocks when first asked: weights outside the hub's cache are read to be hashed."""
        return self._description.identity(self._files)

    @property
    def origin(self) -> str:
        """Where the model comes from, for people."""
        return self._files.origin

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self._description.dimensions

    @property
    def distance(self) -> Distance:
        """The distance that the model was made for; cosine where it does not say."""
        return self._description.distance

    @property
    def tokenizer_json(self) -> str | None:
        """The model's tokenizer, without truncation and padding."""
        return self._description.tokenizer_json

    @property
    def max_input_tokens(self) -> int | None:
        """How many tokens of a document the model reads, special tokens and prompt not counted."""
        return self._description.max_input_tokens

    async def open(self) -> None:
        """Load the model, downloading its weights if need be; takes some 10 s. Calling it again does nothing.

        :raises EmbedderUnavailable: the weights cannot be downloaded now, or the device lacks memory now.
        :raises EmbedderSetupError: sentence-transformers is not installed, or cannot load the model on the device.
        """
        await anyio.to_thread.run_sync(self._load, limiter=self._turn)

    def fitting(self, texts: Sequence[str]) -> int:
        """Return the number of texts: the model cuts them into passes itself."""
        return len(texts)

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order. What the model does not read of a text is left out.

        :raises EmbedderUnavailable: the model is not open or failed, for example for want of memory.
        """
        return await anyio.to_thread.run_sync(self._encode, list(texts), kind, limiter=self._turn)

    async def aclose(self) -> None:
        """Give the model's memory back."""
        await anyio.to_thread.run_sync(self._unload, limiter=self._turn)

    def _load(self) -> None:
        if self._model is not None:
            return
        fetch_weights(self._files, self._description.weights, where=self._where)
        quiet()
        try:
            library = importlib.import_module("sentence_transformers")
            importlib.import_module("transformers").utils.logging.disable_progress_bar()
        except ImportError as error:
            raise EmbedderSetupError(
                f"sentence-transformers cannot be imported: {error}", where=self._where, hint=INSTALL
            ) from error
        device = None if self._settings.device == "auto" else self._settings.device
        try:
            model = library.SentenceTransformer(str(self._files.directory), device=device, local_files_only=True)
        except MemoryError as error:
            raise self._failed("load", error) from error
        except Exception as error:  # whatever torch, transformers or a module's code may raise
            if _out_of_memory(error):
                raise self._failed("load", error) from error
            raise EmbedderSetupError(
                f"sentence-transformers cannot load {self._settings.model}: {error}",
                where=self._where,
                hint=f"see that its files are whole ({self._files.origin}) and that the device"
                f" {self._settings.device!r} is there",
            ) from error
        self._check(model)
        on_cpu = model.device.type == "cpu"
        self._threads = importlib.import_module("torch").get_num_threads() if on_cpu else None
        self._model = model

    def _check(self, model: Any) -> None:
        """Compare the loaded model with its description, by which chunks and tables were made."""
        dimensions = model.get_embedding_dimension()
        reads = model.max_seq_length
        described = self._description
        if dimensions != described.dimensions or (described.reads is not None and reads < described.reads):
            raise EmbedderSetupError(
                f"the loaded model has {dimensions} dimensions and reads {reads} tokens;"
                f" its files say {described.dimensions} and {described.reads}",
                where=self._where,
                hint="see that the model's configuration files belong together",
            )

    def _encode(self, texts: list[str], kind: Kind) -> Vectors:
        if self._model is None:
            raise EmbedderUnavailable("the model is not loaded yet", where=self._where)
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        if self._threads is not None:
            # Counted per thread, and calls come from any of a pool: set it each time.
            importlib.import_module("torch").set_num_threads(1 if len(texts) <= SINGLE_THREAD_TEXTS else self._threads)
        try:
            vectors: Vectors = self._model.encode(
                texts,
                prompt=self._description.prompts[kind],
                batch_size=self._settings.batch_size,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        except (RuntimeError, MemoryError) as error:
            raise self._failed("run", error) from error
        return vectors.astype(np.float32, copy=False)

    def _unload(self) -> None:
        if self._model is None:
            return
        on_cpu = self._model.device.type == "cpu"
        self._model = None
        gc.collect()
        if not on_cpu:
            importlib.import_module("torch").accelerator.empty_cache()

    def _failed(self, what: str, error: BaseException) -> EmbedderUnavailable:
        return EmbedderUnavailable(
            f"the model does not {what}: {error}",
            where=self._where,
            hint="if the device lacks memory, lower batch_size or free some",
        )


def _out_of_memory(error: Exception) -> bool:
    """Say whether a device had no memory left, which another process may give back."""
    return type(error).__name__ == "OutOfMemoryError"
