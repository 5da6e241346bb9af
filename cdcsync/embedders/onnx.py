"""A local model, run by ONNX Runtime on processors, without torch.

The transformer is in the ONNX file. What comes before and after it (prompt, tokens, pooling, length one) is done here,
as the model's files say, so that the vectors are those of sentence-transformers up to rounding.

Source: ONNX Runtime, Python API, "InferenceSession"; sentence-transformers, module reference.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import anyio
import numpy as np
import numpy.typing as npt

from cdcsync import config
from cdcsync.embedders.description import Described, describe
from cdcsync.embedders.foreign import first_line
from cdcsync.embedders.model_files import ModelFiles, fetch_weights, locate, onnx_files, quiet
from cdcsync.embedders.passes import MOST_CALLS, PASS_TOKENS, passes
from cdcsync.embedders.pooling import pool, pooling_modes
from cdcsync.embedders.processors import processors
from cdcsync.embedders.protocol import WORD, Kind, Vectors
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from cdcsync.process.threads import Calls, Loading

INSTALL = "pip install 'cdcsync[onnx]'"

_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
"""The inputs that a model may take."""


class OnnxEmbedder(Described):
    """Embeds with an ONNX file; `float32[n, dimensions]`, L2-normalised if the model normalises.

    Calls run in threads, about as many at a time as there are processors. A cancelled call returns at
    once, and its thread keeps its place until its texts are done.

    :param name: the section's name in the configuration.
    :raises EmbedderSetupError: the model is not to be found or not supported, or a package is missing.
    """

    def __init__(self, name: str, settings: config.OnnxEmbedder) -> None:
        self.name = name
        self._where = f"embedders.{name}"
        self._settings = settings
        if missing := [package for package in ("onnxruntime", "tokenizers") if not importlib.util.find_spec(package)]:
            raise EmbedderSetupError(f"{' and '.join(missing)} not installed", where=self._where, hint=INSTALL)
        files = locate(settings.model, settings.revision, where=self._where, whole=self._is_whole)
        described = describe(files, settings, where=self._where)
        super().__init__(files, described)
        modules = dict(described.facts["modules"])
        self._modes = pooling_modes(modules.get("Pooling", {}))
        self._of_length_one = "Normalize" in modules
        if not modules.get("Pooling", {}).get("include_prompt", True) and any(described.prompts.values()):
            raise EmbedderSetupError(
                "the model leaves its prompt out when it pools, which does not run from an ONNX file",
                where=f"{self._where}.model",
                hint='run the model with type = "sentence-transformers"',
            )
        self.concurrency = min(processors(), MOST_CALLS)
        self._calls = Calls(self.concurrency)
        self._opening = anyio.Lock()
        self._loading = Loading()
        self._session: Any = None
        self._tokenizer: Any = None
        folder = self._files.modules()[0].folder
        prefix = f"{folder}/" if folder else ""
        self._pad_id = int(self._files.json(f"{prefix}config.json").get("pad_token_id") or 0)
        self._truncation_side = self._files.json(f"{prefix}tokenizer_config.json").get("truncation_side", "right")

    def _is_whole(self, files: ModelFiles) -> bool:
        return files.described() and bool(onnx_files(files, self._settings.file))

    @cached_property
    def identity(self) -> str:
        """A name for everything that determines the vectors. The first call blocks, if the file has to be hashed."""
        return self.description.identity(self._files)

    async def open(self) -> None:
        """Load the model, downloading its file if need be. Calling it again does nothing.

        :raises EmbedderUnavailable: the file cannot be downloaded now.
        :raises EmbedderSetupError: ONNX Runtime cannot load it, or it is not a transformer's.
        """
        async with self._opening:
            await self._loading.run(self._load)

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order. What the model does not read of a text is left out.

        :raises EmbedderUnavailable: the model is not open or failed, for example for want of memory.
        """
        return await self._calls.run(lambda: self._embed(list(texts), kind))

    async def aclose(self) -> None:
        """Give the model's memory back."""
        self._calls.close()
        self._session = self._tokenizer = None

    def _load(self) -> None:
        if self._session is not None:
            return
        names = self.description.weights
        fetch_weights(self._files, names, where=self._where)
        quiet()
        try:
            runtime = importlib.import_module("onnxruntime")
            tokenizers = importlib.import_module("tokenizers")
        except ImportError as error:
            raise EmbedderSetupError(
                f"ONNX Runtime cannot be imported: {error}", where=self._where, hint=INSTALL
            ) from error
        options = runtime.SessionOptions()
        options.intra_op_num_threads = max(1, processors() // self.concurrency)
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # its errors are ours to report; warnings about a graph are its maker's concern
        path = self._files.directory / names[0]
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class in common but this
            raise EmbedderSetupError(
                f"ONNX Runtime cannot load {path}: {error}",
                where=self._where,
                hint=f"check that the file is whole ({self._files.origin})",
            ) from error
        tokenizer = tokenizers.Tokenizer.from_str(self.description.tokenizer_json)
        if (reads := self.description.reads) is not None:
            tokenizer.enable_truncation(max_length=reads, direction=self._truncation_side)
        self._check(session)
        self._session, self._tokenizer = session, tokenizer
        try:
            made = self._embed([WORD], "document")
        except EmbedderUnavailable as error:
            self._session = self._tokenizer = None
            raise EmbedderSetupError(error.message, where=error.where, hint=error.hint) from error
        if made.shape != (1, self.dimensions):
            self._session = self._tokenizer = None
            raise EmbedderSetupError(
                f"the loaded model has {made.shape[1]} dimensions; its files say {self.dimensions}",
                where=self._where,
                hint="check that the model's configuration files and its ONNX file belong together",
            )

    def _check(self, session: Any) -> None:
        """Refuse a file that is not a transformer's, which takes tokens and gives a vector for each."""
        inputs = [one.name for one in session.get_inputs()]
        output = session.get_outputs()[0]
        if unknown := [name for name in inputs if name not in _INPUTS]:
            problem = f"wants the input {unknown[0]}, which is unknown here"
        elif len(output.shape) != 3:
            problem = f"gives {output.name} of {len(output.shape)} dimensions, and not a vector for each token"
        else:
            return
        raise EmbedderSetupError(
            f"the model's ONNX file {problem}",
            where=f"{self._where}.model",
            hint="export the transformer for the task feature-extraction: docs/embedders.md",
        )

    def _embed(self, texts: list[str], kind: Kind) -> Vectors:
        session, tokenizer = self._session, self._tokenizer
        if session is None:
            raise EmbedderUnavailable("the model is not loaded yet", where=self._where)
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        if not texts:
            return vectors
        prompt = self.description.prompts[kind]
        wanted = [one.name for one in session.get_inputs()]
        try:
            encoded = tokenizer.encode_batch([prompt + text for text in texts])
            lengths = [len(one.ids) for one in encoded]
            for places in passes(lengths, self._settings.batch_size, PASS_TOKENS):
                given = self._given([encoded[place] for place in places])
                (tokens,) = session.run([session.get_outputs()[0].name], {name: given[name] for name in wanted})
                vectors[places] = self._finished(pool(tokens, given["attention_mask"], self._modes))
        except Exception as error:  # onnxruntime's errors have no class in common but this
            raise EmbedderUnavailable(
                f"the model does not run: {first_line(error, texts)}",
                where=self._where,
                hint="if the machine lacks memory, lower batch_size or free some",
            ) from error
        return vectors

    def _given(self, encoded: Sequence[Any]) -> dict[str, npt.NDArray[np.int64]]:
        """Return the texts' tokens as the model takes them, `int64[texts, tokens]`, padded at the end."""
        shape = len(encoded), max(1, *(len(one.ids) for one in encoded))
        given = {name: np.zeros(shape, np.int64) for name in _INPUTS}
        given["input_ids"][:] = self._pad_id
        for row, one in enumerate(encoded):
            length = len(one.ids)
            given["input_ids"][row, :length] = one.ids
            given["attention_mask"][row, :length] = 1
            given["token_type_ids"][row, :length] = one.type_ids
        return given

    def _finished(self, pooled: npt.NDArray[np.float32]) -> Vectors:
        """Return vectors after the model's own steps and the configuration's."""
        if self._of_length_one:
            pooled = _of_length_one(pooled)
        pooled = pooled[:, : self.dimensions]
        return _of_length_one(pooled) if self.description.normalize else pooled


def _of_length_one(vectors: npt.NDArray[np.float32]) -> Vectors:
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return cast("Vectors", vectors / norms)
