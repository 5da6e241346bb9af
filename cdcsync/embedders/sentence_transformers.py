"""A local model, run by sentence-transformers.

Until `open`, a model is known by its files alone (`description`): torch takes some 10 s to import, and most commands
need to know about a model without using it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, assert_never

import anyio
import anyio.to_thread
import msgspec
import numpy as np

from cdcsync import config
from cdcsync.documents.chunks import Lengths
from cdcsync.embedders.description import Described, describe
from cdcsync.embedders.foreign import first_line
from cdcsync.embedders.model_files import INSTALL, ModelFiles, fetch_weights, locate, quiet
from cdcsync.embedders.passes import MOST_CALLS, PASS_TOKENS, passes
from cdcsync.embedders.processors import processors
from cdcsync.embedders.protocol import Kind, Vectors
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from cdcsync.process.threads import Calls, Loading

ON_ACCELERATOR = 2
"""Calls that run at a time on an accelerator: it computes one while the texts of the other are tokenised."""

SINGLE_THREAD_TEXTS = 8
"""Calls of up to so many texts always run on one thread: handing out such small work takes several threads longer than
the work (measured: 14 ms against 110 ms and more)."""

NVIDIA = Path("/dev/nvidiactl")
"""Is there where NVIDIA's driver is."""

_BACKEND_PACKAGES = {
    "torch": (),
    "onnx": ("onnxruntime", "optimum.onnxruntime"),
    "openvino": ("openvino", "optimum.intel"),
}
"""The packages that each backend needs besides sentence-transformers; the extra `local` does not install them."""

_EXPORTS = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
"""The file that each backend loads where the model's directory, or the backend's folder in it, has one. Elsewhere it
makes one of the weights, in memory, whenever the model is loaded."""

_PRECISION = "f32"
"""The precision that OpenVINO computes in. By default it computes in less if the processor has instructions for that,
so that one model gives other vectors on other machines: by up to 0.001 a component, measured with MiniLM."""


class SentenceTransformersEmbedder(Described):
    """Embeds with a local model; `float32[n, dimensions]`, L2-normalised if the model normalises.

    Calls run in threads: on processors about as many at a time as there are, on an accelerator two, so that texts of
    one are tokenised while the device computes the other. A cancelled `embed` returns at once, and its thread keeps its
    place until its texts are done.

    :param name: the section's name in the configuration.
    :raises EmbedderSetupError: the model is not to be found or not supported.
    """

    def __init__(self, name: str, settings: config.SentenceTransformersEmbedder) -> None:
        self.name = name
        self._where = f"embedders.{name}"
        self._settings = settings
        self._need_backend()
        files = locate(settings.model, settings.revision, where=self._where, code=settings.trust_remote_code)
        super().__init__(files, describe(files, settings, where=self._where))
        self.concurrency = _calls(settings)
        self._lengths = Lengths(self.description.tokenizer_json)
        self._calls = Calls(self.concurrency)
        self._pass_tokens: int | None = None
        """How many tokens one forward pass may have; None on an accelerator."""
        self._opening = anyio.Lock()
        self._loading = Loading()
        self._model: Any = None
        self._threads: int | None = None
        """How many threads torch uses for a call on processors; None on an accelerator."""

    @cached_property
    def identity(self) -> str:
        """A name for everything that determines the vectors. The first call blocks, if weights have to be hashed."""
        described = self.description
        loaded = described.weights + exported(self._files, self._settings.backend)
        return msgspec.structs.replace(described, weights=loaded).identity(self._files)

    @property
    def missing_package(self) -> str | None:
        """The library, if it is not installed: the model is known by its files all the same."""
        return None if _installed("sentence_transformers") else "sentence-transformers"

    async def open(self) -> None:
        """Load the model, downloading its weights if need be; takes some 10 s. Calling it again does nothing.

        A cancelled call returns at once, and the next one waits for the load that it began.

        :raises EmbedderUnavailable: the weights cannot be downloaded now, or the device lacks memory now.
        :raises EmbedderSetupError: sentence-transformers is not installed, or cannot load the model on the device.
        """
        async with self._opening:
            await self._loading.run(self._load)
            if self._threads is None:  # devices other than processors and NVIDIA's are known only now
                self._calls.at_a_time = min(ON_ACCELERATOR, self._calls.at_a_time)

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order. What the model does not read of a text is left out.

        :raises EmbedderUnavailable: the model is not open or failed, for example for want of memory.
        """
        return await self._calls.run(lambda: self._encode(list(texts), kind))

    async def aclose(self) -> None:
        """Give the model's memory back."""
        self._calls.close()
        await anyio.to_thread.run_sync(self._unload)

    def _load(self) -> None:
        if self._model is not None:
            return
        fetch_weights(self._files, self.description.weights, where=self._where)
        quiet()
        if self._settings.backend == "openvino":
            _keep_usage_private()
        try:
            library = importlib.import_module("sentence_transformers")
            importlib.import_module("transformers").utils.logging.disable_progress_bar()
        except ImportError as error:
            raise EmbedderSetupError(
                f"sentence-transformers cannot be imported: {_causes(error)}", where=self._where, hint=INSTALL
            ) from error
        settings = self._settings
        device = None if settings.device == "auto" else settings.device
        try:
            model = library.SentenceTransformer(
                str(self._files.directory),
                device=device,
                backend=settings.backend,
                trust_remote_code=settings.trust_remote_code,
                local_files_only=True,
                model_kwargs=self._model_options(),
            )
            if settings.dtype != "auto":
                model.to(getattr(importlib.import_module("torch"), settings.dtype))
            # Its first call settles how the tokenizer pads and cuts, which later ones, at the same time, only read.
            model.encode(["word"], show_progress_bar=False)
        except MemoryError as error:
            raise self._failed("load", error) from error
        except Exception as error:  # whatever torch, transformers or a module's code may raise
            if _out_of_memory(error):
                raise self._failed("load", error) from error
            raise self._refused(error) from error
        self._check(model)
        on_cpu = model.device.type == "cpu"
        self._threads = max(1, processors() // self.concurrency) if on_cpu else None
        self._pass_tokens = PASS_TOKENS if on_cpu else None
        self._model = model

    def _model_options(self) -> dict[str, Any]:
        """Return what a backend is told besides. By themselves they count processors that a container may not use."""
        match self._settings.backend:
            case "torch":
                return {} if self._settings.pickled_weights else {"use_safetensors": True}
            case "onnx":
                options = importlib.import_module("onnxruntime").SessionOptions()
                options.intra_op_num_threads = processors()
                return {"session_options": options}
            case "openvino":
                threads = str(processors())
                return {"ov_config": {"INFERENCE_PRECISION_HINT": _PRECISION, "INFERENCE_NUM_THREADS": threads}}
            case unknown:
                assert_never(unknown)

    def _need_backend(self) -> None:
        """Refuse a backend whose packages are not installed, before anything is downloaded for it.

        :raises EmbedderSetupError: they are not.
        """
        backend = self._settings.backend
        missing = [name for name in _BACKEND_PACKAGES[backend] if not _installed(name)]
        if missing:
            raise EmbedderSetupError(
                f"the backend {backend} needs {' and '.join(missing)}, which cannot be imported",
                where=f"{self._where}.backend",
                hint=f"pip install 'sentence-transformers[{backend}]', or leave backend out to use torch",
            )

    def _refused(self, error: Exception) -> EmbedderSetupError:
        """Return what it means that the libraries cannot load the model."""
        settings = self._settings
        if "trust_remote_code" in str(error):
            return EmbedderSetupError(
                f"{settings.model} comes with Python code of its own, which is not run unless you say so",
                where=f"{self._where}.trust_remote_code",
                hint=f"read the code ({self._files.origin}); if you trust it, pin the revision and set it to true",
            )
        return EmbedderSetupError(
            f"sentence-transformers cannot load {settings.model}: {error}",
            where=self._where,
            hint=f"check that its files are whole ({self._files.origin}) and that the device {settings.device!r} is"
            " there",
        )

    def _check(self, model: Any) -> None:
        """Compare the loaded model with its description, by which chunks and tables were made."""
        device = self._settings.device
        if device != "auto" and model.device.type != device.partition(":")[0]:
            # Other backends than torch stay where they can run, without a word.
            raise EmbedderSetupError(
                f"the backend {self._settings.backend} runs the model on {model.device.type}, not on {device}",
                where=f"{self._where}.device",
                hint=f"leave it out, or leave backend out to have torch use {device}",
            )
        dimensions = model.get_embedding_dimension()
        if self._settings.dimensions is not None:
            dimensions = min(dimensions, self._settings.dimensions)
        reads = model.max_seq_length
        described = self.description
        if dimensions != described.dimensions or (described.reads is not None and reads < described.reads):
            raise EmbedderSetupError(
                f"the loaded model has {dimensions} dimensions and reads {reads} tokens;"
                f" its files say {described.dimensions} and {described.reads}",
                where=self._where,
                hint="check that the model's configuration files belong together",
            )

    def _encode(self, texts: list[str], kind: Kind) -> Vectors:
        if self._model is None:
            raise EmbedderUnavailable("the model is not loaded yet", where=self._where)
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        if self._threads is not None:
            # Counted per thread, and calls come from any of a pool: set it each time.
            importlib.import_module("torch").set_num_threads(1 if len(texts) <= SINGLE_THREAD_TEXTS else self._threads)
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        try:
            # An accelerator does not wait until tokens are counted: characters give about the same order.
            lengths = list(map(len, texts)) if self._pass_tokens is None else self._lengths.of(texts)
            for places in passes(lengths, self._settings.batch_size, self._pass_tokens):
                vectors[places] = self._model.encode(
                    [texts[place] for place in places],
                    prompt=self.description.prompts[kind],
                    batch_size=len(places),
                    truncate_dim=self._settings.dimensions,
                    normalize_embeddings=self.description.normalize,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                )
        except Exception as error:  # onnxruntime's errors have no class in common but this
            raise self._failed("run", error, texts) from error
        return vectors

    def _unload(self) -> None:
        if self._model is None:
            return
        on_cpu = self._model.device.type == "cpu"
        self._model = None
        gc.collect()
        if not on_cpu:
            importlib.import_module("torch").accelerator.empty_cache()

    def _failed(self, what: str, error: BaseException, texts: Sequence[str] = ()) -> EmbedderUnavailable:
        return EmbedderUnavailable(
            f"the model does not {what}: {first_line(error, texts)}",
            where=self._where,
            hint="if the device lacks memory, lower batch_size or free some",
        )


def exported(files: ModelFiles, backend: str) -> tuple[str, ...]:
    """Return the names of the files that a backend loads in place of a model's weights, none where it exports these.

    Someone saved them in the model's directory. They may be of other weights, quantised for example.
    """
    if backend == "torch":
        return ()
    name, folder = _EXPORTS[backend], files.directory / files.modules()[0].folder
    for place in (folder, folder / backend):
        if (place / name).exists():
            # A large model's weights lie beside it.
            found = {*place.glob(f"{name}*"), *place.glob(f"{name.partition('.')[0]}.bin")}
            return tuple(sorted(path.relative_to(files.directory).as_posix() for path in found))
    return ()


def _installed(package: str) -> bool:
    """Say whether a package is there, without importing more than what it lies in."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the package that it lies in is missing
        return False


def _keep_usage_private() -> None:
    """Keep OpenVINO from reporting to its makers that it was used, which it does unless a file at home forbids it.

    Its tools do without the package that reports where it cannot be imported.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)


def _causes(error: BaseException) -> str:
    """Return an error with the first of its causes: transformers says of a broken package that it is not to be had."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return str(error) if first is error else f"{error} ({type(first).__name__}: {first})"


def _calls(settings: config.SentenceTransformersEmbedder) -> int:
    """Return how many calls run at a time."""
    if settings.backend != "torch":
        # They bring threads of their own, which share a call; OpenVINO refuses a call while another runs.
        return 1
    return ON_ACCELERATOR if _accelerated(settings.device) else min(processors(), MOST_CALLS)


def _accelerated(device: str) -> bool:
    """Say whether a device will be an accelerator, as far as that can be told without torch."""
    if device == "auto":
        return NVIDIA.exists()
    return not device.startswith("cpu")


def _out_of_memory(error: Exception) -> bool:
    """Say whether a device had no memory left, which another process may give back."""
    return type(error).__name__ == "OutOfMemoryError"
