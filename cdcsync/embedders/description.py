"""Describes a local model from its files, without loading it.

Source: the configuration files of sentence-transformers (modules.json, sentence_bert_config.json,
config_sentence_transformers.json, those of its modules) and of transformers (config.json, tokenizer_config.json).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, assert_never

import msgspec

from cdcsync import config
from cdcsync.embedders.model_files import INSTALL, UNREADABLE, ModelFiles, Module, fetch_weights, onnx_files
from cdcsync.embedders.pooling import pooling_modes
from cdcsync.embedders.protocol import Distance
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable

NO_LIMIT = 10**6
"""Tokenizers without a limit say 10^30 or the like; no model reads a million tokens at once."""

_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Where the settings of a Transformer module may be; the first that exists counts."""

_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
"""The names that families of transformers give to the width of their output."""

_DISTANCES: dict[str, Distance] = {"cosine": "cosine", "dot": "inner_product", "euclidean": "l2", "manhattan": "l2"}
"""pgvector's distance for each of sentence-transformers' similarities; Manhattan's is nearest to the Euclidean."""

_IN_ONNX = {"Transformer", "Pooling", "Normalize", "Dropout"}
"""The modules of a model that runs from an ONNX file: the transformer is in the file, the others are computed here."""

LocalEmbedder = config.SentenceTransformersEmbedder | config.OnnxEmbedder
"""The embedders of models that are known by their files."""


class Description(msgspec.Struct, frozen=True):
    """The facts known about a model.

    `kind` is the type of the embedder that runs it. `reads` is the number of tokens of an input that the model sees,
    special tokens included; `max_input_tokens` is what of this is left for a document. `prompts` are put before
    documents and queries. Vectors are made of length one after all else if `normalize`. `weights` are the files that
    loading needs, `code` the Python files that it runs.
    `facts` are the settings that, with these files, decide what vectors come out.
    """

    kind: str
    dimensions: int
    distance: Distance
    tokenizer_json: str
    reads: int | None
    max_input_tokens: int | None
    prompts: dict[str, str]
    normalize: bool
    weights: tuple[str, ...]
    code: tuple[str, ...]
    facts: dict[str, Any]

    def identity(self, files: ModelFiles) -> str:
        """Return the model's identity: the same for the same model under any name and in any directory."""
        facts = self.facts | {"weights": {name: files.sha256(name) for name in self.weights}}
        if self.code:
            facts["code"] = {name: files.sha256(name) for name in self.code}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}:{self.dimensions}:{digest[:32]}"


class Described:
    """The common part of embedders of local models, which are identified by their files."""

    def __init__(self, files: ModelFiles, description: Description) -> None:
        self._files = files
        self.description = description

    @property
    def origin(self) -> str:
        """Where the model comes from, for people."""
        return self._files.origin

    @property
    def commit(self) -> str | None:
        """The hub's commit of the model; None for one that does not come from the hub."""
        return self._files.commit

    @property
    def dimensions(self) -> int:
        """Length of the vectors, once they are cut."""
        return self.description.dimensions

    @property
    def distance(self) -> Distance:
        """The distance that the model was made for; cosine where it does not say."""
        return self.description.distance

    @property
    def tokenizer_json(self) -> str | None:
        """The model's tokenizer, without truncation and padding."""
        return self.description.tokenizer_json

    @property
    def max_input_tokens(self) -> int | None:
        """How many tokens of a document the model reads, special tokens and prompt not counted."""
        return self.description.max_input_tokens

    def fitting(self, texts: Sequence[str]) -> int:
        """Return the number of texts: a call cuts them into passes itself."""
        return len(texts)


def describe(files: ModelFiles, settings: LocalEmbedder, *, where: str) -> Description:
    """Read what a model's files say, and what the configuration makes of it.

    :raises EmbedderSetupError: they cannot be read, or the model has modules that need to be loaded to be known.
    """
    try:
        return _describe(files, settings, where)
    except UNREADABLE as error:
        raise EmbedderSetupError(
            f"the model's files in {files.directory} cannot be read: {type(error).__name__}: {error}",
            where=f"{where}.model",
            hint="check that the directory holds a whole model, as it is on the hub",
        ) from error


def _describe(files: ModelFiles, settings: LocalEmbedder, where: str) -> Description:
    modules = files.modules()
    match settings:
        case config.SentenceTransformersEmbedder():
            kind, code = "sentence-transformers", files.code() if settings.trust_remote_code else ()
            weights = _weights(files, modules, settings, where)
        case config.OnnxEmbedder():
            kind, code = "onnx", ()
            weights = _exported(files, modules, settings, where)
        case unreachable:
            assert_never(unreachable)
    first = modules[0]
    if first.kind == "StaticEmbedding":
        try:
            fetch_weights(files, weights, where=where)  # a small file, and the only one that tells the width
        except EmbedderUnavailable as error:
            raise EmbedderSetupError(error.message, where=error.where, hint=error.hint) from error
    own = files.json("config_sentence_transformers.json")
    dimensions = 0
    configs = []
    for module in modules:
        module_config = _config(files, module)
        dimensions = _width(files, module, module_config, dimensions, where)
        configs.append([module.kind, module_config])
    shortened = settings.dimensions or own.get("truncate_dim")
    if (settings.dimensions or 0) > dimensions:
        raise EmbedderSetupError(
            f"the model's vectors have {dimensions} dimensions, and cannot be cut to {settings.dimensions}",
            where=f"{where}.dimensions",
            hint="lower it, or leave it out to keep all dimensions",
        )
    if shortened is not None:
        dimensions = min(dimensions, shortened)
    unit_length = any(module.kind == "Normalize" for module in modules)
    # A vector that the model normalised is no longer of length one once it is cut.
    normalize = (settings.normalize or unit_length) if settings.dimensions else settings.normalize and not unit_length
    transformer = _transformer_config(files, first.folder)
    tokenizer_json = _tokenizer_json(
        files, first.folder, lowercase=transformer.get("do_lower_case", False), where=where
    )
    saved = own.get("prompts") or {}
    saved_prompt = next((saved[name] for name in ("document", "passage", "corpus") if saved.get(name)), "")
    prompts = {
        "document": settings.document_prompt or saved_prompt,
        "query": settings.query_prompt or saved.get("query") or "",
    }
    reads = None if first.kind == "StaticEmbedding" else _reads(files, first.folder, transformer)
    return Description(
        kind=kind,
        dimensions=dimensions,
        distance=_DISTANCES[own.get("similarity_fn_name") or "cosine"],
        tokenizer_json=tokenizer_json,
        reads=reads,
        max_input_tokens=reads and _room(tokenizer_json, reads, prompts["document"], where),
        prompts=prompts,
        normalize=normalize,
        weights=tuple(weights),
        code=code,
        facts={
            "modules": configs,
            "truncate_dim": shortened,
            "reads": reads,
            "prompts": prompts,
            "tokenizer": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        }
        | _options(settings, normalize),
    )


def _weights(
    files: ModelFiles, modules: list[Module], settings: config.SentenceTransformersEmbedder, where: str
) -> list[str]:
    """Return the weight files of a model's modules."""
    weights: list[str] = []
    for module in modules:
        found = files.weights(module.folder) if module.has_weights else []
        if module.has_weights and not found:
            raise ValueError(f"there are no weights for {module.kind}")
        if (other := [one for one in found if not one.endswith(".safetensors")]) and not settings.pickled_weights:
            raise EmbedderSetupError(
                f"the model's weights {', '.join(other)} are not in the format safetensors, and other formats can run"
                " code",
                where=f"{where}.pickled_weights",
                hint=f"name a model or a revision with safetensors; if you trust the files ({files.origin}), set it to"
                " true",
            )
        weights += found
    return weights


def _exported(files: ModelFiles, modules: list[Module], settings: config.OnnxEmbedder, where: str) -> list[str]:
    """Return the ONNX file of a model whose other modules can do without weights, and what lies beside the file."""
    if other := [module.kind for module in modules if not module.official or module.kind not in _IN_ONNX]:
        raise EmbedderSetupError(
            f"the model has a module {other[0]}, which does not run from an ONNX file",
            where=f"{where}.model",
            hint='run the model with type = "sentence-transformers"',
        )
    if found := onnx_files(files, settings.file):
        return list(found)
    raise EmbedderSetupError(
        f"the model has no file {settings.file or 'onnx/model.onnx'} ({files.origin})",
        where=f"{where}.file",
        hint='name the model\'s ONNX file, or export the model: docs/embedders.md, "ONNX Runtime alone"',
    )


def _options(settings: LocalEmbedder, normalize: bool) -> dict[str, Any]:
    """Return the options that change vectors and are not as the model's files have them."""
    options: dict[str, Any] = {"normalize": normalize}
    if isinstance(settings, config.SentenceTransformersEmbedder):
        options |= {"dtype": settings.dtype, "backend": settings.backend}
    usual = {"dtype": "auto", "backend": "torch", "normalize": False}
    return {name: value for name, value in options.items() if value != usual[name]}


def _config(files: ModelFiles, module: Module) -> dict[str, Any]:
    """Return a module's own configuration, without what does not change vectors."""
    if not module.has_config:
        return {}
    if module.kind == "Pooling" and not module.folder:
        return {"pooling_mode": "mean"}  # the model was not made for sentence-transformers
    found = files.json(f"{module.folder}/config.json" if module.folder else "config.json")
    for key in ("_name_or_path", "transformers_version", "architectures"):
        found.pop(key, None)
    return found


def _width(files: ModelFiles, module: Module, settings: dict[str, Any], before: int, where: str) -> int:
    """Return the length of the vectors that leave a module into which vectors of length `before` go."""
    if module.official:
        match module.kind:
            case "Transformer":
                if (width := next((settings[key] for key in _WIDTHS if key in settings), None)) is None:
                    raise ValueError(f"config.json has none of {', '.join(_WIDTHS)}")
                return int(width)
            case "StaticEmbedding":
                return _rows_width(files, module)
            case "Pooling":
                return before * len(pooling_modes(settings))
            case "Dense":
                return int(settings["out_features"])
            case "Normalize" | "LayerNorm" | "Dropout":
                return before
    raise EmbedderSetupError(
        f"the model has a module {module.kind}, which is not supported",
        where=f"{where}.model",
        hint="use a model of the modules Transformer, Pooling, Dense, LayerNorm, Normalize or StaticEmbedding",
    )


def _rows_width(files: ModelFiles, module: Module) -> int:
    """Return the width of a StaticEmbedding's table, from the header of its safetensors file."""
    (name,) = files.weights(module.folder)
    with (files.directory / name).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int((header.get("embedding.weight") or header["embeddings"])["shape"][1])


def _transformer_config(files: ModelFiles, folder: str) -> dict[str, Any]:
    prefix = f"{folder}/" if folder else ""
    return next((found for name in _TRANSFORMER_CONFIGS if (found := files.json(prefix + name))), {})


def _reads(files: ModelFiles, folder: str, transformer: dict[str, Any]) -> int | None:
    """Return how many tokens the model sees; `None` where nothing limits it."""
    prefix = f"{folder}/" if folder else ""
    limit = transformer.get("max_seq_length")
    for key in ("processor_kwargs", "tokenizer_args"):
        limit = (transformer.get(key) or {}).get("model_max_length", limit)
    if limit is None:
        limits = (
            files.json(f"{prefix}tokenizer_config.json").get("model_max_length"),
            files.json(f"{prefix}config.json").get("max_position_embeddings"),
        )
        limit = min((value for value in limits if value is not None and value > 0), default=None)
    return limit if limit is not None and limit < NO_LIMIT else None


def _tokenizer_json(files: ModelFiles, folder: str, *, lowercase: bool, where: str) -> str:
    """Return the tokenizer, without truncation and padding, which are not the model's but those of its training."""
    tokenizer = files.json(f"{folder}/tokenizer.json" if folder else "tokenizer.json")
    if not tokenizer:
        raise EmbedderSetupError(
            "the model has no tokenizer.json, which is needed to cut texts into chunks that it reads whole",
            where=f"{where}.model",
            hint="load its tokenizer with transformers and save it into a copy of the model: that writes the file",
        )
    tokenizer |= {"truncation": None, "padding": None}
    if lowercase and not (tokenizer["normalizer"] or {}).get("lowercase"):
        steps = [step for step in ({"type": "Lowercase"}, tokenizer["normalizer"]) if step]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return json.dumps(tokenizer, sort_keys=True)


def _room(tokenizer_json: str, reads: int, prompt: str, where: str) -> int:
    """Return the tokens that special tokens and the prompt leave to a document."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EmbedderSetupError("tokenizers is not installed", where=where, hint=INSTALL) from error
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the binding raises bare Exception for what it cannot parse
        raise ValueError(f"tokenizer.json: {error}") from error
    special = tokenizer.num_special_tokens_to_add(False)
    return reads - special - len(tokenizer.encode(prompt, add_special_tokens=False).ids)
