"""Makes a directory with an ONNX file of a local model, for embedders of type "onnx".

    python -m cdcsync.embedders.export sentence-transformers/all-MiniLM-L6-v2 models/minilm

Needs sentence-transformers and the package onnx, on the machine where it runs and nowhere else.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from cdcsync import config
from cdcsync.embedders.model_files import INSTALL, fetch_weights, locate
from cdcsync.embedders.onnx import OnnxEmbedder
from cdcsync.embedders.sentence_transformers import SentenceTransformersEmbedder
from cdcsync.errors import CdcsyncError, EmbedderSetupError, UsageError

OPSET = 17
"""The version of ONNX' operators: old enough for every ONNX Runtime that cdcsync takes."""

CLOSE = 1e-5
"""The largest difference of a component that both may have."""

_SAMPLES = ("a text", "another one, which is longer than the first", "", "ein dritter, in einer anderen Sprache: Größe")

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def export(model: str, directory: Path, *, revision: str | None = None) -> float:
    """Write a model and its ONNX file into a new directory; return the largest difference of a component.

    :param model: a directory, or a name on the hub.
    :raises UsageError: the directory exists.
    :raises EmbedderSetupError: the model cannot be found or exported, or the ONNX file makes other vectors.
    """
    if directory.exists():
        raise UsageError("it exists already", where=str(directory), hint="name a new directory")
    with_torch = SentenceTransformersEmbedder(
        "model", config.SentenceTransformersEmbedder(model=model, revision=revision, device="cpu")
    )
    files = locate(model, revision, where="model")
    fetch_weights(files, with_torch.description.weights, where="model")
    try:
        for path in sorted(files.directory.rglob("*")):
            if path.suffix in (".json", ".txt", ".model"):
                copy = directory / path.relative_to(files.directory)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        (directory / "onnx").mkdir(parents=True, exist_ok=True)
        _write(files.directory, directory / "onnx" / "model.onnx")
        return anyio.run(_difference, with_torch, directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _write(model: Path, path: Path) -> None:
    """Write the ONNX file of a model's transformer."""
    try:
        torch: Any = importlib.import_module("torch")
        library: Any = importlib.import_module("sentence_transformers")
        importlib.import_module("onnx")
    except ImportError as error:
        raise EmbedderSetupError(f"{error.name} is not installed", where="model", hint=f"{INSTALL} onnx") from error
    loaded = library.SentenceTransformer(
        str(model), device="cpu", local_files_only=True, model_kwargs={"attn_implementation": "eager"}
    )
    transformer = loaded[0].auto_model.eval()
    tokens = loaded[0].tokenizer(["a text", "a longer text"], padding=True, return_tensors="pt")
    names = [name for name in _INPUTS if name in tokens]

    class Tokens(torch.nn.Module):  # type: ignore[misc]
        """The transformer, with its inputs by place and the vectors of tokens alone."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, *inputs: Any) -> Any:
            return self.transformer(**dict(zip(names, inputs, strict=True))).last_hidden_state

    axes = {0: "texts", 1: "tokens"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is what the vectors are compared for
        torch.onnx.export(
            Tokens().eval(),
            tuple(tokens[name] for name in names),
            str(path),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys((*names, "last_hidden_state"), axes),
            opset_version=OPSET,
            dynamo=False,
        )


async def _difference(with_torch: SentenceTransformersEmbedder, directory: Path) -> float:
    """Return the largest difference of a component between the vectors of both."""
    exported = OnnxEmbedder("model", config.OnnxEmbedder(model=str(directory)))
    for embedder in (with_torch, exported):
        await embedder.open()
    texts = [*_SAMPLES, "word " * 600]
    difference = float(np.abs(await with_torch.embed(texts) - await exported.embed(texts)).max())
    if difference > CLOSE:
        raise EmbedderSetupError(
            f"the ONNX file makes other vectors: a component differs by {difference:.2g}",
            where="model",
            hint='run the model with type = "sentence-transformers"',
        )
    return difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cdcsync.embedders.export", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a directory, or a name on the hub")
    parser.add_argument("directory", type=Path, help="where to write the model; it must not exist")
    parser.add_argument("--revision", help="the hub's commit, branch or tag")
    given = parser.parse_args(arguments)
    try:
        difference = export(given.model, given.directory, revision=given.revision)
    except CdcsyncError as error:
        print(f"error: {error.message}\nwhere: {error.where}\nfix:   {error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"{given.directory}: vectors differ from those of torch by {difference:.1g} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
