"""Models of the hub whose revision can move are warned of."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcsync.config import parse
from cdcsync.embedders import Embedder
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.preflight import unpinned

COMMIT = "e9b6763023c676ca8431644204f50c2b100d9aab"

CONFIG = """
[embedders.local]
type = "sentence-transformers"
model = "acme/mini"
{embedder}
[rerankers.judge]
type = "sentence-transformers"
model = "{reranker}"
[embedders.fake]
type = "hash"
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "local"
"""


def located(commit: str | None) -> dict[str, Embedder]:
    """Return an embedder of the configuration whose files came from the hub, at this commit, or did not."""
    from cdcsync.config import HashEmbedder as Settings

    embedder = HashEmbedder("local", Settings())
    embedder.commit = commit  # type: ignore[attr-defined] # as a local model has it
    return {"local": embedder}


@pytest.mark.parametrize(
    ("line", "commit", "warned"),
    [
        ("", COMMIT, True),
        ('revision = "main"', COMMIT, True),
        (f'revision = "{COMMIT}"', COMMIT, False),
        ("", None, False),
    ],
)
def test_a_model_of_the_hub_without_a_commit_is_warned_of_with_the_commit_to_pin(
    tmp_path: Path, line: str, commit: str | None, warned: bool
) -> None:
    config = parse(CONFIG.format(embedder=line, reranker=tmp_path), {}, where="here")
    found = list(unpinned(config, located(commit)))
    assert [one.where for one in found] == ["embedders.local.revision"] * warned
    assert all(COMMIT in str(one.hint) and one.level == "warning" for one in found)


def test_a_reranker_of_the_hub_is_warned_of_too() -> None:
    config = parse(CONFIG.format(embedder="", reranker="acme/judge"), {}, where="here")
    assert [one.where for one in unpinned(config, located(None))] == ["rerankers.judge.revision"]
